"""Compiled kernels, executed."""
