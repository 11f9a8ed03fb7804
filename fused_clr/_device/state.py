"""The schedule step, the groups' values and the counters of a device, kept in its memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..kernels import layout
from ..kernels import schedule as columns
from ..kernels.evaluate import reevaluate_kernel
from ..telemetry import History, Live, Status
from .capture import is_capturing, refuse_capture
from .engine import EngineState, Snapshot
from .group_table import encode_groups
from .launch import Launch, interpreted, make_launch, run
from .memory import DeviceMemory
from .parameters import Parameters
from .rules import UpdateRule
from .settings import GroupSettings, Options
from .step_plan import LaunchConfig, evaluators
from .tensors import real_dtype, real_numel, upload


class DeviceState(EngineState):
    """Reads and writes a device's memory from the host; see `EngineState`. Methods that read wait for the device.

    Attributes:
        memory: The memory.
        host_step: The schedule step as far as the host knows it: it does not see replays, and counts skipped steps.
        is_replayed: A step was captured or recorded, so that there may be replays.
        generation: A captured launch of another generation does nothing.
        scale_functions: Scale functions that are compiled into kernels.
        last_step: The last schedule step for which every tabulated ``scale_fn`` has a value.
        tensor_lrs: Index and tensor of the learning rates that are tensors.
        idle_rows: int64[num_tensors, TENSOR_COLUMNS]: the tensor table without addresses.
        has_float64: Whether some parameter is float64, and its updates need scalars of that dtype.

    Args:
        parameters: The parameters.
        rule: The update rule.
        groups: Settings of all groups.
        options: Options for all groups.
        config: How kernels are compiled.
        schedule_step: The schedule step to start from.
        update_steps: Number of updates of each parameter so far.
    """

    def __init__(
        self,
        parameters: Parameters,
        rule: UpdateRule,
        groups: Sequence[GroupSettings],
        options: Options,
        config: LaunchConfig,
        schedule_step: int,
        update_steps: Sequence[int],
    ) -> None:
        self.device = device = parameters.device
        if device.type != "cuda" and not interpreted():
            raise RuntimeError(
                f"the triton backend takes parameters on {device} only in Triton's interpreter: set TRITON_INTERPRET=1 "
                "before triton is imported"
            )
        if len(rule.states) > layout.MAX_STATES.value:
            raise ValueError(f"an update rule must have at most {layout.MAX_STATES.value} states, got {rule.states}")
        self._rule, self._config, self._averaging = rule, config, options.averaging
        self.update, self.scalars = rule.kernels()
        multiprocessors = 2
        if device.type == "cuda":
            multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        max_updaters = multiprocessors * config.programs_per_multiprocessor
        self.step_mirror = torch.tensor(list(update_steps), dtype=torch.float32, device=device)
        self.memory = memory = DeviceMemory(self.step_mirror, len(groups), max_updaters, options)
        # From the integers: float32 cannot represent every step beyond 2**24.
        upload(np.array(update_steps, np.int64), device, out=memory.update_steps)
        memory.control[layout.SCHEDULE_STEP.value].fill_(schedule_step)
        self.host_step, self.is_replayed = schedule_step, False
        self.live = Live(
            lr=memory.live[layout.NEXT_LR.value],
            momentum=memory.live[layout.NEXT_MOMENTUM.value],
            grad_norm=memory.norm[layout.GRAD_NORM.value],
            applied_steps=memory.control[layout.APPLIED_STEPS.value],
            skipped_steps=memory.control[layout.SKIPPED_STEPS.value],
            schedule_step=memory.control[layout.SCHEDULE_STEP.value],
        )
        if options.max_grad_norm is not None:
            self.set_max_grad_norm(options.max_grad_norm)
        # One row even without tensors, since a table needs an address.
        self.idle_rows = np.zeros((max(len(parameters), 1), layout.TENSOR_COLUMNS.value), np.int64)
        for row, record, param in zip(self.idle_rows, parameters.records, parameters.tensors, strict=False):
            row[layout.GROUP.value] = record.group_index
            row[layout.NUMEL.value] = real_numel(param)
        self._idle_table = upload(self.idle_rows, device)
        self._num_tensors = len(parameters)
        self.has_float64 = any(real_dtype(param.dtype) == torch.float64 for param in parameters.tensors)
        self._mirror_version = self.step_mirror._version
        self._reevaluation: Launch | None = None
        self.generation = 0
        self.scale_functions: tuple[Any, ...] = ()
        self.new_generation()
        self.set_groups(groups)
        self._copy_next_to_applied()

    # -- device -------------------------------------------------------------------------------------------------------
    @property
    def capturing(self) -> bool:
        """See `EngineState.capturing`."""
        return is_capturing(self.device)

    def refuse_capture(self, what: str) -> None:
        """Raises an error during capture; ``what`` says what happened."""
        refuse_capture(self.device, what)

    # -- hyperparameters and schedules --------------------------------------------------------------------------------
    def set_groups(self, groups: Sequence[GroupSettings]) -> bool:
        """Applies new hyperparameters and schedules, in place.

        Returns:
            Whether scale functions changed, so that kernels must be compiled again.
        """
        self.refuse_capture("hyperparameters or the schedule changed")
        table = encode_groups(groups, self._rule)
        schedules = table.schedules
        recompile = schedules.scale_functions != self.scale_functions
        self.groups = list(groups)
        self.scale_functions = schedules.scale_functions
        self.last_step = schedules.last_step
        parts, segments = schedules.parts.ravel(), schedules.segments.ravel()
        # Kept: the settings hold addresses in it.
        self._schedule_tables = upload(np.concatenate([parts, segments, schedules.scale_table]), self.device)
        address = self._schedule_tables.data_ptr()
        settings = np.zeros(columns.SETTINGS_WORDS.value, np.int64)
        for word, value in (
            (columns.IN_USE, schedules.in_use),
            (columns.PART_STRIDE, schedules.part_stride),
            (columns.SEGMENT_STRIDE, schedules.segment_stride),
            (columns.MAX_UNIT_SHIFT, schedules.max_unit_shift),
            (columns.PART_TABLE, address),
            (columns.SEGMENT_TABLE, address + parts.nbytes),
            (columns.SCALE_TABLE, address + parts.nbytes + segments.nbytes),
        ):
            settings[word.value] = value
        if self._averaging is not None:
            every, decay = self._averaging.every, self._averaging.decay
            settings[columns.AVERAGE_EVERY.value] = 0 if every == "cycle" else every
            settings[columns.AVERAGE_START.value] = self._averaging.start
            settings.view(np.float64)[columns.AVERAGE_WEIGHT.value] = 0.0 if decay is None else 1.0 - decay
        upload(np.concatenate([settings, table.rows.view(np.int64).ravel()]), self.device, out=self.memory.tables)
        self.tensor_lrs = [(i, group.tensor_lr) for i, group in enumerate(groups) if group.tensor_lr is not None]
        if recompile:
            self._reevaluation = None
            self.new_generation()
        self.reevaluate()
        return recompile

    def new_generation(self) -> None:
        """Makes captured launches do nothing."""
        self.generation += 1
        self.memory.control[layout.GENERATION.value].fill_(self.generation)

    def retire(self) -> None:
        """Makes all launches do nothing."""
        self.generation = -1
        self.memory.control[layout.GENERATION.value].fill_(-1)

    def reevaluate(self, recorded: bool = False) -> None:
        """Evaluates the current step into the current slot, after something other than a step changed its inputs."""
        for index, lr in self.tensor_lrs:
            self.memory.group_table[index, columns.LR.value].copy_(lr.detach().reshape(()), non_blocking=True)
        if self._reevaluation is None:
            self._reevaluation = make_launch(
                reevaluate_kernel,
                evaluators(self._num_tensors, len(self.groups), self._config),
                self._config.options,
                self.device,
                **self.memory.evaluator_arguments(),
                tensor_table_ptr=self._idle_table,
                num_groups=len(self.groups),
                num_tensors=self._num_tensors,
                SCALARS=self.scalars,
                HAS_DECAY_SCHEDULE=self._rule.has_decay_schedule,
                HAS_AVERAGING=self._averaging is not None,
                HAS_FLOAT64=self.has_float64,
                SCALE_FNS=self.scale_functions,
                LANES=self._config.lanes,
            )
        run(self._reevaluation, recorded)

    def before_step(self) -> bool:
        """Applies what was written in place since the last step.

        Returns:
            Whether the current stream is captured.

        Raises:
            RuntimeError: A tabulated ``scale_fn`` has no value for this step.
        """
        if (self.host_step > self.last_step or self.is_replayed) and self.last_step < math.inf:
            self._check_last_step()
        capturing = self.capturing
        if self.step_mirror._version != self._mirror_version:
            self.refresh()
        elif self.tensor_lrs:
            if capturing:
                self._refuse_host_lrs()
            # Part of the step, and of a captured step: a replay reads the tensors' values at that time.
            self.reevaluate(recorded=True)
        return capturing

    def _refuse_host_lrs(self) -> None:
        for index, lr in self.tensor_lrs:
            if lr.device.type != self.device.type:
                raise RuntimeError(
                    f"the lr of param_groups[{index}] is a tensor on {lr.device}, which a CUDA graph cannot read at "
                    f"its replays; make it a tensor on {self.device}, or a float"
                )

    def _check_last_step(self) -> None:
        """Raises an error past the end of a tabulated ``scale_fn``. Reads the step, which skips and replays change."""
        if self.capturing:
            return
        self.host_step = int(self.memory.control[layout.SCHEDULE_STEP.value])
        if self.host_step > self.last_step:
            raise RuntimeError(
                f"schedule step {self.host_step} is past the end of the table of a scale_fn, {self.last_step:.0f}; "
                "give the schedule a larger total_steps"
            )

    def refresh(self) -> None:
        """See `EngineState.refresh`."""
        if self.step_mirror._version != self._mirror_version:
            self.refuse_capture("state['step'] was written")
            # A user wrote state[p]["step"] in place.
            self.memory.update_steps.copy_(self.step_mirror)
            self._mirror_version = self.step_mirror._version
            self.reevaluate()

    # -- reading and writing ------------------------------------------------------------------------------------------
    def read_lr_and_momentum(self, applied: bool) -> list[tuple[float, float]]:
        """See `EngineState.read_lr_and_momentum`."""
        if self.capturing:
            raise RuntimeError(
                "a scheduled value of a param group was read during CUDA graph capture, where the device cannot be "
                "read; optimizer.live.lr and optimizer.live.momentum can be captured"
            )
        first = (layout.APPLIED_LR if applied else layout.NEXT_LR).value
        lrs, momenta = self.memory.live[first : first + 2].tolist()
        return list(zip(lrs, momenta, strict=True))

    def set_schedule_step(self, step: int, is_ahead: bool = False) -> None:
        """See `EngineState.set_schedule_step`."""
        self.refuse_capture("the schedule step was set")
        if is_ahead:
            self.set_schedule_step(max(step - 1, 0))
            self._copy_next_to_applied()
        self.memory.control[layout.SCHEDULE_STEP.value].fill_(step)
        self.host_step = step
        self.reevaluate()

    def _copy_next_to_applied(self) -> None:
        live = self.memory.live
        live[: layout.NEXT_LR.value].copy_(live[layout.NEXT_LR.value :])

    def get_update_steps(self) -> list[int]:
        """See `EngineState.get_update_steps`."""
        if self.step_mirror._version != self._mirror_version:
            return [int(step) for step in self.step_mirror.tolist()]
        return [int(step) for step in self.memory.update_steps.tolist()]

    def set_update_steps(self, steps: Sequence[int]) -> None:
        """See `EngineState.set_update_steps`."""
        self.refuse_capture("update steps were set")
        upload(np.array(steps, np.int64), self.device, out=self.memory.update_steps)
        self.step_mirror.copy_(self.memory.update_steps)
        self._mirror_version = self.step_mirror._version
        self.reevaluate()

    def get_average_counts(self) -> list[int]:
        """See `EngineState.get_average_counts`."""
        self.refuse_capture("n_averaged was read")
        return self._by_group(self.memory.average_counts.cpu().numpy())

    def _by_group(self, counts: NDArray[np.int64]) -> list[int]:
        by_group = [0] * len(self.groups)
        for group_index, count in zip(self.idle_rows[:, layout.GROUP.value].tolist(), counts.tolist(), strict=False):
            by_group[group_index] = count
        return by_group

    def set_average_counts(self, counts: Sequence[int]) -> None:
        """See `EngineState.set_average_counts`."""
        self.refuse_capture("averages were loaded")
        groups = self.idle_rows[: self._num_tensors, layout.GROUP.value]
        upload(np.array(counts, np.int64)[groups], self.device, out=self.memory.average_counts)
        self.reevaluate()

    def set_counts(self, applied_steps: int, skipped_steps: int) -> None:
        """See `EngineState.set_counts`."""
        self.memory.control[layout.APPLIED_STEPS.value].fill_(applied_steps)
        self.memory.control[layout.SKIPPED_STEPS.value].fill_(skipped_steps)

    def set_max_grad_norm(self, max_grad_norm: float) -> None:
        """See `EngineState.set_max_grad_norm`."""
        self.refuse_capture("max_grad_norm was set")
        self.memory.norm[layout.MAX_NORM.value].fill_(max_grad_norm)

    def copy_words(self) -> Tensor:
        """See `EngineState.copy_words`."""
        self.refuse_capture("the optimizer's status was read")
        if self.device.type != "cuda":
            return self.memory.words.clone()
        words = torch.empty(self.memory.words.shape, dtype=torch.int64, device="cpu", pin_memory=True)
        return words.copy_(self.memory.words, non_blocking=True)

    def parse(self, words: Tensor) -> Snapshot:
        """See `EngineState.parse`."""
        control, norm, live, update_steps, counts = (part.numpy() for part in words.split(self.memory.sizes))
        norm = norm.view(np.float64)
        live = live.view(np.float64).reshape(layout.LIVE_ROWS.value, -1)
        status = Status(
            schedule_step=int(control[layout.SCHEDULE_STEP.value]),
            lr=live[layout.NEXT_LR.value],
            momentum=live[layout.NEXT_MOMENTUM.value],
            grad_norm=float(norm[layout.GRAD_NORM.value]),
            applied_steps=int(control[layout.APPLIED_STEPS.value]),
            skipped_steps=int(control[layout.SKIPPED_STEPS.value]),
            schedule_exhausted=bool(control[layout.OVERRUN.value]),
            stale_replay=bool(control[layout.STALE.value]),
        )
        applied_lr, applied_momentum = live[layout.APPLIED_LR.value], live[layout.APPLIED_MOMENTUM.value]
        return Snapshot(status, applied_lr, applied_momentum, update_steps, self._by_group(counts))

    def read_history(self, count: int) -> History:
        """See `EngineState.read_history`."""
        self.refuse_capture("the history was read")
        ring = self.memory.history.cpu().numpy()
        entries = ring[:, 0, layout.ENTRY.value]
        order = np.argsort(entries)
        order = order[entries[order] > 0]
        rows = ring[order[max(len(order) - count, 0) :]]
        return History(
            schedule_step=rows[:, 0, layout.ENTRY_STEP.value].astype(np.int64),
            lr=rows[:, :, layout.ENTRY_LR.value].copy(),
            momentum=rows[:, :, layout.ENTRY_MOMENTUM.value].copy(),
            grad_norm=rows[:, 0, layout.ENTRY_GRAD_NORM.value].copy(),
            clip_coefficient=rows[:, 0, layout.ENTRY_CLIP_COEFFICIENT.value].copy(),
            grad_scale=rows[:, 0, layout.ENTRY_GRAD_SCALE.value].copy(),
            skipped=rows[:, 0, layout.ENTRY_SKIPPED.value] != 0,
        )

    def save_telemetry(self) -> Any:
        """See `EngineState.save_telemetry`."""
        return self.memory.norm.clone(), self.memory.history.clone()

    def load_telemetry(self, saved: Any) -> None:
        """See `EngineState.load_telemetry`."""
        norm, history = saved
        self.memory.norm.copy_(norm)
        self.memory.history.copy_(history)
