"""What tests share. No tests are here."""
