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
        has_step: A parameter's state has its number of updates, ``step``. Without it, updates are counted from the
            creation of the first state tensor, and checkpoints tell only whether there was one.
        saved_keys: What every version of torch's optimizer saves of a group, besides ``params`` and ``lr``.
        has_decay_schedule: Whether a group's weight decay may have a schedule of its own.
        momentum_key: Key of the param group that holds the momentum, which schedules can cycle; empty: a rule without.
        momentum_index: Its index if that value is a tuple; None if the value is the momentum.
        usual_momenta: What a schedule that cycles the momentum overrides without a warning.
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
    has_step: bool = True
    saved_keys: frozenset[str] = frozenset()
    has_decay_schedule: bool = False
    momentum_key: str = ""
    momentum_index: int | None = None
    usual_momenta: tuple[float, ...] = ()

    def saved_step(self, entry: Mapping[str, Any] | None) -> int:
        """Number of updates that a parameter's state, saved or written by a user, tells of."""
        if not entry:
            return 0
        return int(entry.get("step") or 0) if self.has_step else int(entry.get(self.states[0]) is not None)

    def momentum_in(self, value: Any) -> Any:
        """The momentum in a value of ``momentum_key``."""
        return value if self.momentum_index is None else value[self.momentum_index]

    def momentum_of(self, values: Mapping[str, Any]) -> float:
        """The momentum in a group's values."""
        if not self.momentum_key:
            return 0.0
        return float(self.momentum_in(values[self.momentum_key]))

    def with_momentum(self, value: Any, momentum: Any) -> Any:
        """A value of ``momentum_key`` with another momentum."""
        if self.momentum_index is None:
            return momentum
        return (*value[: self.momentum_index], momentum, *value[self.momentum_index + 1 :])
