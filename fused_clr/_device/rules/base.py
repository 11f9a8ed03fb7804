"""`UpdateRule`: what a fused optimizer needs to know of its algorithm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

# (params, grads, states, steps, lr, momentum, weight_decay, grad_scale): updates in place. ``states`` has one list for
# each key. The gradients are divided by ``grad_scale``, float32[], if there is one, in float32; the quotients may be
# written into them.
CpuUpdate = Callable[
    [Sequence[Tensor], Sequence[Tensor], Sequence[list[Tensor]], list[Tensor], float, float, float, Tensor | None], None
]


class UpdateRule(NamedTuple):
    """An update rule, on both backends.

    Attributes:
        states: Keys of the state tensors, which have the parameter's shape, dtype and layout.
        num_states: How many of them a group with these values uses, counted from the first.
        required_states: How many of them every checkpoint has.
        saved_keys: What every version of torch's optimizer saves of a group, besides ``params`` and ``lr``.
        momentum_key: Key of the param group that holds the momentum, which schedules can cycle; empty: a rule without.
        momentum_index: Its index if that value is a tuple; None if the value is the momentum.
        default_momentum: The default momentum.
        columns: A group's values as columns of the group table, in the order of the kernel's constants.
        kernels: Imports the ``@triton.jit`` functions: UPDATE and SCALARS of `kernels.step.step_kernel`.
        cpu_update: From a group's values and ``maximize``, the same update on the CPU.
    """

    states: tuple[str, ...]
    num_states: Callable[[Mapping[str, Any]], int]
    columns: Callable[[Mapping[str, Any]], tuple[float, ...]]
    kernels: Callable[[], tuple[Any, Any]]
    cpu_update: Callable[[Mapping[str, Any], bool], CpuUpdate]
    required_states: int = 0
    saved_keys: frozenset[str] = frozenset()
    momentum_key: str = ""
    momentum_index: int | None = None
    default_momentum: float = 0.0

    def momentum_in(self, value: Any) -> Any:
        """The momentum in a value of ``momentum_key``."""
        return value if self.momentum_index is None else value[self.momentum_index]

    def momentum_of(self, values: Mapping[str, Any]) -> float:
        """The momentum in a group's values."""
        if not self.momentum_key:
            return self.default_momentum
        return float(self.momentum_in(values[self.momentum_key]))

    def with_momentum(self, value: Any, momentum: Any) -> Any:
        """A value of ``momentum_key`` with another momentum."""
        if self.momentum_index is None:
            return momentum
        return (*value[: self.momentum_index], momentum, *value[self.momentum_index + 1 :])
