"""Measurements and audits. Not part of the package: run from a checkout."""
