"""The host half: param groups, state and checkpoints, as in `torch.optim`."""
