"""An optimizer's engines, one per device, and what has been written since they last looked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..hyperparameters import read_hyperparameters
from . import Engine, TensorRecord, engine_class
from .engine import DevicesChangedError

if TYPE_CHECKING:
    from ..optim import FusedAdam


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
    """

    def __init__(self, optimizer: FusedAdam, schedule_step: int = 0, update_steps: dict[Tensor, int] | None = None):
        self.optimizer = optimizer
        self.structure_changed = True
        self.state_changed = False
        self.hyperparameters_changed = False
        self._schedule_step = schedule_step
        self._update_steps = dict(update_steps or {})
        self._engines: list[Engine[Any]] = []
        # A graph captured from an engine that was replaced may still be replayed, and must find its memory.
        self._retired: list[Engine[Any]] = []
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

    def prepared(self) -> Sequence[Engine[Any]]:
        """The engines, ready to launch. Every error that a user can cause in a step is raised here."""
        engines = self.ready()
        try:
            for engine in engines:
                engine.prepare()
        except DevicesChangedError:
            self.structure_changed = True
            engines = self.ready()
            for engine in engines:
                engine.prepare()
        return engines

    def update_steps(self) -> dict[Tensor, int]:
        """How many updates each parameter got. Waits for the device."""
        return {
            param: step
            for engine in self.ready()
            for param, step in zip(engine.params, engine.get_update_steps(), strict=True)
        }

    def _rebuild(self) -> None:
        """Sorts the parameters by device, and gives each device an engine that goes on where the old one was."""
        if self._engines:
            self._schedule_step = self._engines[0].get_schedule_step()
            for engine in self._engines:
                if self.state_changed:
                    engine.adopt_state()
                self._update_steps.update(zip(engine.params, engine.get_update_steps(), strict=True))
        groups = self.optimizer.param_groups
        records = records_by_device(self.optimizer)
        hyperparameters = read_hyperparameters(groups)
        engines = [
            engine_class(device)(
                device,
                device_records,
                self.optimizer.state,
                hyperparameters,
                self._schedule_step,
                [self._update_step(record.param) for record in device_records],
            )
            for device, device_records in records.items()
        ]
        for engine in self._engines:
            engine.retire()
        self._retired += [engine for engine in self._engines if engine.captured]
        self._engines = engines
        self._param_lists = [group.stored("params") for group in groups]
        self._param_counts = [len(params) for params in self._param_lists]
        self.structure_changed = self.state_changed = self.hyperparameters_changed = False

    def _update_step(self, param: Tensor) -> int:
        state = self.optimizer.state.get(param)
        if not state:
            return 0
        return self._update_steps.get(param, int(state.get("step", 0)))


def records_by_device(optimizer: FusedAdam) -> dict[torch.device, list[TensorRecord]]:
    """The parameters of all groups, by device; an optimizer of empty groups counts as one on the CPU."""
    records: dict[torch.device, list[TensorRecord]] = {}
    for index, group in enumerate(optimizer.param_groups):
        names = group.stored("param_names")
        for position, param in enumerate(group.stored("params")):
            name = f"param_groups[{index}]['params'][{position}]"
            record = TensorRecord(f"{name} ({names[position]})" if names else name, param, index)
            records.setdefault(param.device, []).append(record)
    return records or {torch.device("cpu"): []}
