"""Inputs of a step: parameters, settings of their groups, and options of the whole optimizer."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ..averaging import Averaging
from ..schedules import Schedule


class TensorRecord(NamedTuple):
    """One parameter, its name in messages, and its group."""

    name: str
    param: Tensor
    group_index: int


class GroupSettings(NamedTuple):
    """One param group, as a step needs it.

    Attributes:
        lr: Learning rate without a schedule. A 1-element tensor is read at every step.
        momentum: Momentum (Adam's beta1) if no schedule drives it.
        schedule: The schedule, or None.
        maximize: Ascend.
        values: The group's other hyperparameters, which the update rule reads.
    """

    lr: float | Tensor
    momentum: float
    schedule: Schedule | None
    maximize: bool
    values: Mapping[str, Any]

    @property
    def tensor_lr(self) -> Tensor | None:
        """``lr`` if it is a tensor and no schedule drives the group; else None."""
        return self.lr if isinstance(self.lr, Tensor) and self.schedule is None else None

    @property
    def weight_decay(self) -> float:
        """Weight decay where no schedule drives it."""
        return float(self.values.get("weight_decay", 0.0))

    @property
    def weight_decay_schedule(self) -> Schedule | None:
        """The schedule of the weight decay: its learning rate is the weight decay."""
        schedule: Schedule | None = self.values.get("weight_decay_schedule")
        return schedule

    @property
    def values_key(self) -> Hashable:
        """Groups of equal keys have the same learning rate, momentum and weight decay at every step."""
        lr: Hashable = id(self.lr) if isinstance(self.lr, Tensor) else self.lr
        keys = [
            schedule and (schedule.timeline.key, schedule.timeline.bounds)
            for schedule in (self.schedule, self.weight_decay_schedule)
        ]
        return (None if self.schedule else lr, self.momentum, self.weight_decay, *keys)

    def tensors(self) -> list[Tensor]:
        """The other hyperparameters that are tensors: they are read when the settings are applied."""
        values = [value for key, value in self.values.items() if key not in ("lr", "params")]
        values += [entry for value in values if isinstance(value, tuple) for entry in value]
        # Inference tensors have no version, and cannot be written in place outside of inference mode.
        return [value for value in values if isinstance(value, Tensor) and not value.is_inference()]


class Options(NamedTuple):
    """Options for all groups; see `fused_clr.optim.StepOptions`."""

    max_grad_norm: float | None = None
    skip_if_nonfinite: bool = False
    write_back_grads: bool = False
    advance_schedule_on_skip: bool = False
    history_size: int = 256
    averaging: Averaging | None = None
