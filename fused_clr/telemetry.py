"""Values that an optimizer reports: `optimizer.live`, `optimizer.status()` and `optimizer.history()`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class Live(NamedTuple):
    """Tensors on the device of the first parameter, which steps and graph replays update.

    Reading them on the device needs no synchronization.

    Attributes:
        lr: float64[num_groups], the learning rates that the next step applies.
        momentum: float64[num_groups], the momentum (Adam's beta1) that it applies.
        grad_norm: float64[], the norm of the last step's unscaled gradients, over all groups, dtypes and devices; NaN
            without ``max_grad_norm``.
        applied_steps: int64[], how many steps were applied.
        skipped_steps: int64[], how many were skipped, because of an overflow or a norm that is not finite.
        schedule_step: int64[], how many times the schedule has advanced: torch's ``last_epoch``.
    """

    lr: Tensor
    momentum: Tensor
    grad_norm: Tensor
    applied_steps: Tensor
    skipped_steps: Tensor
    schedule_step: Tensor


class History(NamedTuple):
    """The latest steps, oldest first; skipped steps are among them.

    Attributes:
        schedule_step: int64[n], the schedule step of each.
        lr: float64[n, num_groups], the learning rates that it applied, or would have applied if not skipped.
        momentum: float64[n, num_groups], the momentum (Adam's beta1) that it applied.
        grad_norm: float64[n], the norm of the unscaled gradients; NaN without ``max_grad_norm``.
        clip_coefficient: float64[n], the factor that clipped them; 1 if they were not clipped.
        grad_scale: float64[n], the loss scale; 1 without one.
        skipped: bool[n], whether it was skipped.
    """

    schedule_step: NDArray[np.int64]
    lr: NDArray[np.float64]
    momentum: NDArray[np.float64]
    grad_norm: NDArray[np.float64]
    clip_coefficient: NDArray[np.float64]
    grad_scale: NDArray[np.float64]
    skipped: NDArray[np.bool_]

    def rows(self) -> Iterator[dict[str, float]]:
        """A flat dict per step, for `csv.DictWriter` and loggers; a group's values are ``lr/0``, ``momentum/0``, ..."""
        for index, step in enumerate(self.schedule_step):
            yield {
                "schedule_step": int(step),
                **_by_group("lr", self.lr[index]),
                **_by_group("momentum", self.momentum[index]),
                "grad_norm": float(self.grad_norm[index]),
                "clip_coefficient": float(self.clip_coefficient[index]),
                "grad_scale": float(self.grad_scale[index]),
                "skipped": bool(self.skipped[index]),
            }


def _by_group(name: str, values: NDArray[np.float64]) -> dict[str, float]:
    return {f"{name}/{group}": float(value) for group, value in enumerate(values)}


class Status(NamedTuple):
    """The values of an optimizer at one moment, as plain numbers.

    Attributes:
        schedule_step: How many times the schedule has advanced: torch's ``last_epoch``.
        lr: float64[num_groups], the learning rates that the next step applies.
        momentum: float64[num_groups], the momentum (Adam's beta1) that it applies.
        grad_norm: Norm of the last step's unscaled gradients; NaN without ``max_grad_norm``.
        applied_steps: Steps applied so far.
        skipped_steps: Steps skipped so far.
        schedule_exhausted: The schedule went past the last value of a tabulated ``scale_fn``; replays keep that value.
        stale_replay: A graph that no longer fits the optimizer was replayed; that replay did nothing.
    """

    schedule_step: int
    lr: NDArray[np.float64]
    momentum: NDArray[np.float64]
    grad_norm: float
    applied_steps: int
    skipped_steps: int
    schedule_exhausted: bool
    stale_replay: bool

    def scalars(self) -> dict[str, float]:
        """A flat dict for loggers, without step and flags; a group's values are ``lr/0``, ``momentum/0``, ..."""
        return {
            **_by_group("lr", self.lr),
            **_by_group("momentum", self.momentum),
            "grad_norm": self.grad_norm,
            "applied_steps": self.applied_steps,
            "skipped_steps": self.skipped_steps,
        }
