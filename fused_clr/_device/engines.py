"""An optimizer's engines, one per device."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..schedules import Schedule
from ..telemetry import Status
from .capture import CapturedStep, refuse_capture
from .engine import Engine, EngineSetup, Snapshot
from .moments import AVERAGE
from .rules import UpdateRule
from .settings import GroupSettings, Options, TensorRecord
from .status import StatusCopy

VARIABLE = "FUSED_CLR_BACKEND"


def engine_class(device: torch.device) -> Any:
    """The engine for parameters on ``device``; the environment variable FUSED_CLR_BACKEND overrides.

    Raises:
        RuntimeError: No backend supports them.
        ValueError: FUSED_CLR_BACKEND names no backend.
    """
    name = os.environ.get(VARIABLE) or {"cuda": "triton", "cpu": "cpu"}.get(device.type)
    if name not in ("triton", "cpu", None):
        raise ValueError(f"{VARIABLE} must be 'triton' or 'cpu', got {name!r}")
    if name is None or (name == "cpu" and device.type != "cpu"):
        raise RuntimeError(
            f"parameters on {device} are not supported, got the backend {name!r}: 'cpu' takes parameters on a CPU, and "
            "'triton' on a CUDA or ROCm device"
        )
    if name == "cpu":
        from .cpu import CpuEngine

        return CpuEngine
    try:
        from .triton import TritonEngine
    except ImportError as error:
        raise RuntimeError(f"parameters on {device} need triton, which cannot be imported: {error}") from error
    return TritonEngine


class Engines:
    """Engines that step together. Their schedule steps are equal, so values of groups are read from the first.

    Attributes:
        options: Options for all groups. Replaced, never changed in place.
        captures: Captured or recorded steps that may still be replayed.

    Args:
        rule: The update rule.
        options: Options for all groups.
        schedule_step: The schedule step to start from.
        update_steps: Number of updates so far, by parameter; for other parameters, ``state[p]["step"]``.
        counts: Steps applied and skipped so far.
        average_counts: How often each parameter was averaged so far.
    """

    def __init__(
        self,
        rule: UpdateRule,
        options: Options,
        schedule_step: int = 0,
        update_steps: Mapping[Tensor, int] | None = None,
        counts: tuple[int, int] = (0, 0),
        average_counts: Mapping[Tensor, int] | None = None,
    ) -> None:
        self._rule = rule
        self.options = options
        self._schedule_step = schedule_step
        self._update_steps = dict(update_steps or {})
        self._counts = counts
        self._average_counts = dict(average_counts or {})
        self._engines: list[Engine] = []
        self.captures: list[CapturedStep] = []
        # Whether the user may hold state tensors; see `Moments.hand_out`.
        self._state_handed_out = False
        self._pending: StatusCopy | None = None
        self._latest: Status | None = None

    def __iter__(self) -> Any:
        return iter(self._engines)

    @property
    def first(self) -> Engine:
        """The engine that values of groups are read from."""
        return self._engines[0]

    def check_schedule(self, schedule: Schedule, devices: Iterable[torch.device]) -> None:
        """Checks that engines for ``devices`` could evaluate a schedule.

        Raises:
            ValueError: They could not.
        """
        step = self.first.state.host_step if self._engines else self._schedule_step
        # Other devices are refused by the first step: a model on meta gets its device later.
        for engine in {engine_class(device) for device in devices if device.type in ("cpu", "cuda")}:
            engine.check_schedule(schedule, step)

    # -- changes by the host ------------------------------------------------------------------------------------------
    def retire(self) -> None:
        """Makes graphs captured so far do nothing: the parameters or groups have changed."""
        self.refuse_capture("parameters or groups were changed")
        for engine in self._engines:
            engine.retire()

    def rebuild(
        self,
        records: Mapping[torch.device, Sequence[TensorRecord]],
        groups: Sequence[GroupSettings],
        state: MutableMapping[Tensor, Any],
        adopt: bool,
        is_ahead: bool,
    ) -> None:
        """Gives each device an engine that continues from the old one.

        Args:
            records: The parameters, by device.
            groups: Settings of all groups.
            state: Parameter -> dict of its state tensors.
            adopt: A user has written to ``state`` since the last call.
            is_ahead: See `set_schedule_step`.
        """
        for device in records:
            refuse_capture(
                device, "the optimizer was used for the first time since it was created or its groups changed,"
            )
        counts_before: list[int] = []
        if self._engines:
            counts_before = [] if self.options.averaging is None else self.average_counts()
            if adopt:
                self.adopt_state(state)
            else:
                self._drop_lost_averages(state)
            snapshot = self.snapshots()[0]
            self._schedule_step = snapshot.status.schedule_step
            self._counts = snapshot.status.applied_steps, snapshot.status.skipped_steps
            self._update_steps.update(self.update_steps())
            self._average_counts.update(self.average_counts_by_parameter())

        def update_step(param: Tensor) -> int:
            written = self._rule.saved_step(state.get(param))
            if not self._rule.has_step:
                # A buffer may have been created and not been updated yet.
                return self._update_steps.get(param, written) if written else 0
            # A user may have written it. Float32 cannot represent all steps beyond 2**24, so it is not the count.
            counted = self._update_steps.get(param, written)
            return counted if np.float32(counted) == written else written

        engines = [
            engine_class(device)(
                EngineSetup(
                    device,
                    own,
                    state,
                    self._rule,
                    groups,
                    self.options,
                    self._schedule_step,
                    [update_step(record.param) for record in own],
                )
            )
            for device, own in records.items()
        ]
        average_counts = [0] * len(groups)
        for own in records.values():
            for record in own:
                # A parameter that joins a group is averaged with the others from now on.
                count = self._average_counts.get(record.param)
                if count is None:
                    # A parameter in the place of another, with its state.
                    continues = AVERAGE in (state.get(record.param) or {}) and record.group_index < len(counts_before)
                    count = counts_before[record.group_index] if continues else 0
                average_counts[record.group_index] = max(average_counts[record.group_index], count)
        for engine in engines:
            engine.state.set_counts(*self._counts)
            if any(average_counts):
                engine.state.set_average_counts(average_counts)
            if self._state_handed_out:
                engine.moments.hand_out()
            if is_ahead:
                engine.state.set_schedule_step(self._schedule_step, is_ahead)
        # From now on the engines count; what is kept here would keep removed parameters alive.
        self._update_steps, self._average_counts = {}, {}
        # Captured steps keep the memory of their old engines alive.
        self.retire()
        self._engines = engines
        # A copy that has not arrived has the old shape.
        self._pending = None

    def adopt_state(self, state: Mapping[Tensor, Any]) -> None:
        """Applies what a user wrote into ``optimizer.state``: steps at once, state tensors at their next use."""
        self.refuse_capture("the optimizer's state was written")
        self._drop_lost_averages(state)
        for engine in self._engines:
            engine.state.set_update_steps(engine.moments.adopt_steps(engine.state.get_update_steps()))
            engine.forget_plans()

    def _drop_lost_averages(self, state: Mapping[Tensor, Any]) -> None:
        """Starts the count of a group anew if a user has removed the averages of all its parameters."""
        if self.options.averaging is None:
            return
        kept, lost = set(), set()
        for engine in self._engines:
            for record, step in zip(engine.parameters.records, engine.state.get_update_steps(), strict=True):
                if AVERAGE in (state.get(record.param) or {}):
                    kept.add(record.group_index)
                elif step:
                    lost.add(record.group_index)
        if lost - kept:
            counts = [0 if index in lost - kept else count for index, count in enumerate(self.average_counts())]
            self.set_average_counts(counts)

    def hand_out_state(self) -> None:
        """Lets the user have state tensors; see `Moments.hand_out`."""
        if not self._state_handed_out:
            self._state_handed_out = True
            for engine in self._engines:
                engine.moments.hand_out()

    def steps_moved(self) -> bool:
        """Whether ``.data`` of a ``state[p]["step"]`` was replaced; see `Moments.steps_moved`."""
        return self._state_handed_out and any(engine.moments.steps_moved() for engine in self._engines)

    def set_groups(self, groups: Sequence[GroupSettings]) -> None:
        """Applies new hyperparameters and schedules, in place."""
        for engine in self._engines:
            engine.set_groups(groups)

    def set_schedule_step(self, step: int, is_ahead: bool = False) -> None:
        """Sets the schedule step, in place.

        Args:
            step: The step.
            is_ahead: The step before it counts as the one last applied.
        """
        for engine in self._engines:
            engine.state.set_schedule_step(step, is_ahead)

    def set_max_grad_norm(self, max_grad_norm: float) -> None:
        """Sets the limit of the gradient norm, in place."""
        for engine in self._engines:
            engine.state.set_max_grad_norm(max_grad_norm)
        self.options = self.options._replace(max_grad_norm=max_grad_norm)

    # -- the step -----------------------------------------------------------------------------------------------------
    def step(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Takes a step on every device. Every error that a user can cause is raised before anything has changed.

        Raises:
            ParametersMovedError: Nothing has changed; call `rebuild` first.
        """
        engines, options = self._engines, self.options
        device = engines[0].device
        if len(engines) > 1 or (device.type == "cuda" and device.index != torch.cuda.current_device()):
            self._check_all_capture()
        captures = [engine.prepare() for engine in engines]
        if options.max_grad_norm is not None:
            # There is a loss scale but no overflow flag: use the norm as the check.
            skip_if_nonfinite = options.skip_if_nonfinite or (grad_scale is not None and found_inf is None)
            for engine in engines:
                engine.compute_norm(grad_scale, skip_if_nonfinite)
            if len(engines) > 1 or engines[0].parameters.is_sharded:
                self._share_norm(grad_scale, skip_if_nonfinite)
        for engine in engines:
            engine.launch(grad_scale, found_inf)
        if captures[0] is not None:
            self.captures.append(CapturedStep([capture for capture in captures if capture is not None]))

    def _check_all_capture(self) -> None:
        """Raises an error if a part of the step would be captured, and a part of it run."""
        devices = [engine.device for engine in self._engines]
        capturing = [engine.state.capturing for engine in self._engines]
        if any(capturing) and not all(capturing):
            captured = [str(device) for device, one in zip(devices, capturing, strict=True) if one]
            others = [str(device) for device, one in zip(devices, capturing, strict=True) if not one]
            raise RuntimeError(
                f"the current stream of {', '.join(captured)} is being captured, and that of {', '.join(others)} is "
                "not: a replay would not step all parameters; let their streams join the capture, or use one optimizer "
                "per device"
            )
        if not any(capturing) and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"a stream of cuda:{torch.cuda.current_device()} is being captured, but the parameters are on "
                f"{', '.join(map(str, devices))}: the step would run now, and not be in the graph; capture within "
                "torch.cuda.device(...) of their device"
            )

    def before_capture(self) -> None:
        """Prepares every engine for a capture; see `Engine.before_capture`."""
        for engine in self._engines:
            engine.before_capture()

    def refuse_capture(self, what: str) -> None:
        """Raises an error if a device's current stream is being captured; ``what`` says what happened."""
        for engine in self._engines:
            refuse_capture(engine.device, what)

    @property
    def capturing(self) -> bool:
        """Whether the current stream of any of the devices is being captured."""
        return any(engine.state.capturing for engine in self._engines)

    def _share_norm(self, grad_scale: Tensor | None, skip_if_nonfinite: bool) -> None:
        """Gives every device and process the norm over all of them: they clip and skip together."""
        device = self.first.device
        sums = [engine.sum_of_squares(grad_scale).to(device, non_blocking=True) for engine in self._engines]
        total = torch.stack(sums).sum()
        for engine in self._engines:
            engine.set_sum_of_squares(total, skip_if_nonfinite)

    def tick(self) -> None:
        """Advances the schedule without an update."""
        for engine in self._engines:
            engine.state.refresh()
            engine.tick()

    # -- values from the devices --------------------------------------------------------------------------------------
    def read_lr_and_momentum(self, applied: bool) -> list[tuple[float, float]]:
        """Every group's learning rate and momentum: what the last step applied, or what the next one will."""
        return self.first.state.read_lr_and_momentum(applied)

    def snapshots(self) -> list[Snapshot]:
        """Reads all devices, with one copy from each, and waits for them. One entry per engine."""
        return StatusCopy(self._engines).read()

    def update_steps(self) -> dict[Tensor, int]:
        """The number of updates of each parameter. Waits for the devices."""
        return {
            record.param: step
            for engine in self._engines
            for record, step in zip(engine.parameters.records, engine.state.get_update_steps(), strict=True)
        }

    def average_counts(self) -> list[int]:
        """How often the parameters of each group were averaged. Waits for the devices."""
        each = [engine.state.get_average_counts() for engine in self._engines]
        return [max(counts) for counts in zip(*each, strict=True)]

    def set_average_counts(self, counts: Sequence[int]) -> None:
        """Sets how often the parameters of each group were averaged, in place."""
        for engine in self._engines:
            engine.state.set_average_counts(counts)

    def average_counts_by_parameter(self) -> dict[Tensor, int]:
        """How often each parameter was averaged. Waits for the devices."""
        if self.options.averaging is None:
            return {}
        counts = self.average_counts()
        return {
            record.param: counts[record.group_index] for engine in self._engines for record in engine.parameters.records
        }

    def status(self, wait: bool) -> Status | None:
        """The status. Without ``wait``: the newest one that has arrived; then starts another copy."""
        if wait:
            return self._merge(StatusCopy(self._telling()).read())
        if self._pending is None:
            self._pending = StatusCopy(self._telling())
        if self._pending.arrived():
            self._latest = self._merge(self._pending.read())
            self._pending = StatusCopy(self._telling()) if self.first.device.type == "cuda" else None
        return self._latest

    def _telling(self) -> list[Engine]:
        """The engines whose flags count: the current ones, and retired ones that have captured steps."""
        # A capture knows its engine by less than an Engine is.
        retired: dict[int, Any] = {id(part.engine): part.engine for capture in self.captures for part in capture.parts}
        for engine in self._engines:
            retired.pop(id(engine), None)
        return [*self._engines, *retired.values()]

    @staticmethod
    def _merge(snapshots: Sequence[Snapshot]) -> Status:
        """The first engine's status, with the flags of all."""
        statuses = [snapshot.status for snapshot in snapshots]
        return statuses[0]._replace(
            schedule_exhausted=any(status.schedule_exhausted for status in statuses),
            stale_replay=any(status.stale_replay for status in statuses),
        )
