"""Tests of fused-clr, in rooms; `cases.py` registers what they go through."""
