"""Whether tensors are laid out as they were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

try:
    # What torch.compile checks its inputs with, in C++: half the time of asking each tensor from Python.
    from torch._C._dynamo import guards as dynamo_guards
except ImportError:
    # A module by its type.
    dynamo_guards = None  # type: ignore[assignment]


class Fingerprint:
    """Which gradients there are, and the dtype, device, shape, strides, conj and neg bits of tensors.

    Addresses are not part of it: a plan compares them itself, and writes new ones into its tables.

    Args:
        grads: One entry per parameter; None where it has none. Not kept.
        others: The parameters and the other tensors that the plan was made for. Kept, and compared too.
    """

    def __init__(self, grads: Sequence[Tensor | None], others: Sequence[Tensor]) -> None:
        self._missing = [index for index, grad in enumerate(grads) if grad is None]
        self._active = [index for index, grad in enumerate(grads) if grad is not None]
        self._others = list(others)
        tensors = self._tensors(list(grads))
        self._layouts = list(map(_layout, tensors))
        self._check = _fast_check(tensors)

    def _tensors(self, grads: list[Tensor | None]) -> list[Tensor | None]:
        own = [grads[index] for index in self._active] if self._missing else grads
        return own + self._others

    def matches(self, grads: list[Tensor | None]) -> bool:
        """Whether these gradients and the other tensors are as they were, in one call; False may mean 'unknown'."""
        for index in self._missing:
            if grads[index] is not None:
                return False
        return self._check is not None and self._check(*self._tensors(grads))

    def matches_slowly(self, grads: list[Tensor | None]) -> bool:
        """The same for certain, tensor by tensor; `matches` then knows it too."""
        if any(grads[index] is not None for index in self._missing):
            return False
        tensors = self._tensors(grads)
        if list(map(_layout, tensors)) != self._layouts:
            return False
        # The fast check was made in another state of torch's dispatcher: an autocast region, say.
        self._check = _fast_check(tensors)
        return True


def _fast_check(tensors: Sequence[Any]) -> Callable[..., bool] | None:
    """A function of as many tensors: whether they are laid out as these."""
    if not tensors or dynamo_guards is None:
        return None
    guards: Any = dynamo_guards.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    check: Callable[..., bool] = guards.check
    return check


def _layout(tensor: Any) -> Any:
    if tensor is None or tensor.layout != torch.strided:
        return None
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg()
