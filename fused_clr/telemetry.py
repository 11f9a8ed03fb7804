"""What an optimizer tells of its steps: a history kept by the step itself, and a monitor that never waits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from .base import FusedOptimizer

# Columns of a history's rows, as `fused_clr.kernels.layout` has them.
ENTRY, STEP, LR, MOMENTUM, GRAD_NORM, CLIP_COEFFICIENT, GRAD_SCALE, SKIPPED = range(8)
HISTORY_COLUMNS = 8


class History(NamedTuple):
    """The latest steps, oldest first; skipped steps are among them.

    Attributes:
        schedule_step: int64[n], the schedule step that each was at.
        lr: float64[n, num_groups], the learning rates that it applied, or would have.
        momentum: float64[n, num_groups], its beta1.
        grad_norm: float64[n], the norm of the unscaled gradients; NaN without ``max_grad_norm``.
        clip_coefficient: float64[n], what they were multiplied by.
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


def ordered_history(ring: NDArray[np.float64], count: int) -> History:
    """The newest rows of a ring, in order.

    Args:
        ring: float64[rows, num_groups, HISTORY_COLUMNS].
        count: How many; fewer if fewer were written.

    Returns:
        The `History`; arrays of its own.
    """
    entries = ring[:, 0, ENTRY]
    order = np.argsort(entries)
    order = order[entries[order] > 0]
    rows = ring[order[max(len(order) - count, 0) :]]
    return History(
        rows[:, 0, STEP].astype(np.int64),
        rows[:, :, LR].copy(),
        rows[:, :, MOMENTUM].copy(),
        rows[:, 0, GRAD_NORM].copy(),
        rows[:, 0, CLIP_COEFFICIENT].copy(),
        rows[:, 0, GRAD_SCALE].copy(),
        rows[:, 0, SKIPPED] != 0,
    )


class Status(NamedTuple):
    """What an optimizer's device said at one moment.

    Attributes:
        schedule_step: Ticks of the schedule.
        lr: float64[num_groups], the learning rates that the next step applies.
        momentum: float64[num_groups], its beta1.
        grad_norm: Norm of the last step's unscaled gradients; NaN without ``max_grad_norm``.
        applied_steps: Steps applied so far.
        skipped_steps: Steps skipped so far.
        stale_replay: A graph was replayed that no longer fits the optimizer; that replay did nothing.
    """

    schedule_step: int
    lr: NDArray[np.float64]
    momentum: NDArray[np.float64]
    grad_norm: float
    applied_steps: int
    skipped_steps: int
    stale_replay: bool

    def scalars(self) -> dict[str, float]:
        """A flat dict for loggers, of all but the step; a group's values are ``lr/0``, ``momentum/0``, ..."""
        return {
            **_by_group("lr", self.lr),
            **_by_group("momentum", self.momentum),
            "grad_norm": self.grad_norm,
            "applied_steps": self.applied_steps,
            "skipped_steps": self.skipped_steps,
        }


class Monitor:
    """The newest `Status` that has arrived from the device, without ever waiting for it: for progress bars and loggers.

    Each `poll` gives the newest status that has arrived and, if none is on its way, sends for another: one small copy
    into pinned memory, in the order of the current stream. Two polls a step apart give a status about a step old.

    Args:
        optimizer: A `FusedAdam`.

    Raises:
        TypeError: ``optimizer`` is none.

    Example:
        >>> import fused_clr
        >>> optimizer = fused_clr.FusedAdam([torch.nn.Parameter(torch.ones(2))], lr=0.1)
        >>> monitor = Monitor(optimizer)
        >>> optimizer.step()
        >>> float(monitor.poll().lr[0])
        0.1
    """

    def __init__(self, optimizer: FusedOptimizer) -> None:
        if not hasattr(optimizer, "live_lr"):
            raise TypeError(f"optimizer must be a FusedAdam, got {type(optimizer).__name__}")
        self._optimizer = optimizer
        self._latest: Status | None = None
        self._pending: _Copy | None = None

    def poll(self) -> Status | None:
        """The newest status that has arrived; None before the first. Never waits.

        Raises:
            RuntimeError: Called while a CUDA graph is captured, which would copy at every replay.
        """
        engine = self._optimizer._engines.ready()[0]
        if self._pending is not None and self._pending.engine is not engine:
            # Groups were added since: what is on its way has another shape.
            self._pending = None
        if self._pending is None:
            self._pending = _Copy(engine)
        if self._pending.arrived():
            self._latest = engine.parse_status(self._pending.words)
            self._pending = None
            if engine.device.type == "cuda":
                self._pending = _Copy(engine)
        return self._latest


class _Copy:
    """A copy of an engine's status on its way to the host."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.words: Tensor = engine.copy_status()
        self._event: torch.cuda.Event | None = None
        if engine.device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(engine.device))

    def arrived(self) -> bool:
        """Whether the host may read it."""
        return self._event is None or self._event.query()
