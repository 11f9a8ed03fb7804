"""The device half: takes steps over given tensors and settings. Does not know the optimizer classes."""
