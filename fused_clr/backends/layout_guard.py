"""Whether gradients still have the dtypes, shapes and strides they had, asked in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

try:
    # What torch.compile checks its inputs with, in C++: half the time of asking each tensor from Python.
    from torch._C._dynamo import guards as dynamo_guards
except ImportError:
    dynamo_guards = None  # type: ignore[assignment]


class LayoutGuard:
    """Remembers the layouts of a set of gradients; holds no reference to them.

    Args:
        grads: One entry per parameter; None where it has none.
    """

    def __init__(self, grads: Sequence[Tensor | None]) -> None:
        self._missing = [index for index, grad in enumerate(grads) if grad is None]
        self.active = [index for index, grad in enumerate(grads) if grad is not None]
        self._check: Callable[..., bool] | None = None
        if dynamo_guards and self.active:
            guards: Any = dynamo_guards.TensorGuards(
                *(grads[index] for index in self.active), dynamic_dims_sizes=None, dynamic_dims_strides=None
            )
            self._check = guards.check

    def matches(self, grads: list[Tensor | None]) -> bool:
        """Whether these are laid out as the remembered ones. False may also mean that nobody knows."""
        if self._check is None:
            return False
        if not self._missing:
            return self._check(*grads)
        for index in self._missing:
            if grads[index] is not None:
                return False
        return self._check(*[grads[index] for index in self.active])
