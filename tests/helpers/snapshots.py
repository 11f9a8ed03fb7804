"""Everything that a training changes, as one value that can be compared bit for bit."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fused_clr import FusedAdam


def bits(value: Any) -> Any:
    """A value whose == compares tensors and arrays by their bytes."""
    if isinstance(value, Tensor):
        dense = value.detach().contiguous()
        return str(value.dtype), tuple(value.shape), bytes(dense.flatten().view(torch.uint8).tolist())
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return {key: bits(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(entry) for entry in value]
    return repr(value)


def everything(model: torch.nn.Module, optimizer: FusedAdam, *others: Any) -> dict[str, Any]:
    """The values, and the addresses of what has one."""
    tensors = [*model.parameters(), *model.buffers()]
    grads = [param.grad for param in model.parameters()]
    return bits(
        {
            "tensors": tensors,
            "grads": grads,
            "addresses": [t.data_ptr() for t in [*tensors, *grads] if t is not None],
            "training": [module.training for module in model.modules()],
            "state": optimizer.state_dict(),
            "keys": [list(entry) for entry in optimizer.state.values()],
            "groups": [dict(group) for group in optimizer.param_groups],
            "stored": [dict(dict.items(group)) for group in optimizer.param_groups],
            "status": optimizer.status(),
            "live": optimizer.live,
            "history": optimizer.history(),
            "others": [other.state_dict() for other in others],
            "random": [torch.get_rng_state(), random.getstate(), np.random.get_state()],
        }
    )
