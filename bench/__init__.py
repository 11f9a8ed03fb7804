"""Benchmarks: a training step of fused-clr, and of other optimizers, beside torch's pair. Run with ``pytest bench``."""
