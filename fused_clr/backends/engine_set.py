"""An optimizer's engines, one per device, and what has been written since they last looked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..captured import CapturedStep
from ..hyperparameters import read_hyperparameters
from . import Engine, TensorRecord, engine_class
from .engine import DevicesChangedError

if TYPE_CHECKING:
    from ..base import FusedOptimizer


class EngineSet:
    """The engines of an optimizer, made when first needed and kept up to date with what users write.

    Attributes:
        structure_changed: Parameters, groups or devices are others than the engines know.
        state_changed: Somebody wrote to ``optimizer.state``.
        hyperparameters_changed: Somebody wrote to ``optimizer.param_groups``.

    Args:
        optimizer: The optimizer.
        schedule_step: Where the clock starts.
        update_steps: Updates that parameters got so far; for others ``state[p]["step"]`` counts.
        counts: Steps applied and skipped so far.
    """

    def __init__(
        self,
        optimizer: FusedOptimizer,
        schedule_step: int = 0,
        update_steps: dict[Tensor, int] | None = None,
        counts: tuple[int, int] = (0, 0),
    ) -> None:
        self.optimizer = optimizer
        self.structure_changed = True
        self.state_changed = False
        self.hyperparameters_changed = False
        self._schedule_step = schedule_step
        self._update_steps = dict(update_steps or {})
        self._engines: list[Engine[Any]] = []
        # Captured or recorded steps that may still be replayed.
        self.captured_steps: list[CapturedStep] = []
        self._applied_steps, self._skipped_steps = counts
        # Torch lets users append to group["params"].
        self._param_lists: list[list[Tensor]] = []
        self._param_counts: list[int] = []

    def restructure(self) -> None:
        """Parameters or groups are others from now on: graphs captured before do nothing, and engines are made anew."""
        self.structure_changed = True
        for engine in self._engines:
            engine.retire()

    def ready(self) -> Sequence[Engine[Any]]:
        """The engines, with everything written since the last step taken over."""
        if [len(params) for params in self._param_lists] != self._param_counts:
            self.structure_changed = True
        if self.structure_changed:
            self._rebuild()
        if self.state_changed:
            for engine in self._engines:
                engine.adopt_state()
            self.state_changed = False
        if self.hyperparameters_changed:
            hyperparameters = read_hyperparameters(self.optimizer.param_groups)
            for engine in self._engines:
                engine.set_hyperparameters(hyperparameters)
            self.hyperparameters_changed = False
        return self._engines

    def refresh_captured(self) -> None:
        """Takes over at once what was written, where captured steps run with no host code that could do it later."""
        if self.captured_steps and not self.structure_changed:
            self.ready()

    def has_stale_replay(self) -> bool:
        """Whether a captured step that no longer fits was replayed. Waits for the device."""
        engines = {id(part.engine): part.engine for step in self.captured_steps for part in step.parts}
        return any(engine.get_stale_replay() for engine in engines.values())

    def counts(self) -> tuple[int, int]:
        """Steps applied and skipped so far. Waits for the device."""
        return self.ready()[0].get_counts()

    def step(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Takes a step on every device. Every error that a user can cause is raised before anything has changed."""
        engines = self.ready()
        try:
            captures = [engine.prepare() for engine in engines]
        except DevicesChangedError:
            self.structure_changed = True
            engines = self.ready()
            captures = [engine.prepare() for engine in engines]
        if captures[0] is not None:
            self.captured_steps.append(CapturedStep([capture for capture in captures if capture is not None]))
        options = self.optimizer._options
        if options.max_grad_norm is not None:
            # A loss scale without a check for overflow: the norm is the check.
            skip_nonfinite = options.skip_nonfinite or (grad_scale is not None and found_inf is None)
            for engine in engines:
                engine.measure(grad_scale, skip_nonfinite)
            if len(engines) > 1 or engines[0].is_sharded:
                self._share_norm(grad_scale, skip_nonfinite)
        for engine in engines:
            engine.launch(grad_scale, found_inf)

    def _share_norm(self, grad_scale: Tensor | None, skip_nonfinite: bool) -> None:
        """Gives every device and process the norm over all of them: they clip, and skip, together."""
        device = self._engines[0].device
        sums = [engine.sum_of_squares(grad_scale).to(device, non_blocking=True) for engine in self._engines]
        total = torch.stack(sums).sum()
        for engine in self._engines:
            engine.set_sum_of_squares(total, skip_nonfinite)

    def update_steps(self) -> dict[Tensor, int]:
        """How many updates each parameter got. Waits for the device."""
        return {
            record.param: step
            for engine in self.ready()
            for record, step in zip(engine.records, engine.get_update_steps(), strict=True)
        }

    def _rebuild(self) -> None:
        """Sorts the parameters by device, and gives each device an engine that goes on where the old one was."""
        if self._engines:
            self._schedule_step = self._engines[0].get_schedule_step()
            self._applied_steps, self._skipped_steps = self._engines[0].get_counts()
            for engine in self._engines:
                if self.state_changed:
                    engine.adopt_state()
                params = [record.param for record in engine.records]
                self._update_steps.update(zip(params, engine.get_update_steps(), strict=True))
        groups = self.optimizer.param_groups
        records = records_by_device(self.optimizer)
        hyperparameters = read_hyperparameters(groups)
        engines = [
            engine_class(device)(
                device,
                device_records,
                self.optimizer.state,
                hyperparameters,
                self.optimizer._options,
                self._schedule_step,
                [self._update_step(record.param) for record in device_records],
            )
            for device, device_records in records.items()
        ]
        for engine in engines:
            engine.set_counts(self._applied_steps, self._skipped_steps)
        # Captured steps hold the memory of their engines, which outlives these.
        for engine in self._engines:
            engine.retire()
        self._engines = engines
        self._param_lists = [group.stored("params") for group in groups]
        self._param_counts = [len(params) for params in self._param_lists]
        self.structure_changed = self.state_changed = self.hyperparameters_changed = False

    def _update_step(self, param: Tensor) -> int:
        state = self.optimizer.state.get(param)
        if not state:
            return 0
        return self._update_steps.get(param, int(state.get("step", 0)))


def records_by_device(optimizer: FusedOptimizer) -> dict[torch.device, list[TensorRecord]]:
    """The parameters of all groups, by device; an optimizer of empty groups counts as one on the CPU."""
    records: dict[torch.device, list[TensorRecord]] = {}
    for index, group in enumerate(optimizer.param_groups):
        names = group.stored("param_names")
        for position, param in enumerate(group.stored("params")):
            name = f"param_groups[{index}]['params'][{position}]"
            record = TensorRecord(f"{name} ({names[position]})" if names else name, param, index)
            records.setdefault(param.device, []).append(record)
    return records or {torch.device("cpu"): []}
