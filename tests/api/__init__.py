"""What users call and see: signatures, errors, checkpoints, the command line, the pages. Public names go here."""
