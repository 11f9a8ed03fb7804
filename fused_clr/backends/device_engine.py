"""An engine's side of the device's memory: hyperparameters, the clock, counters, what it tells."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..hyperparameters import Hyperparameters, StepOptions
from ..kernels import layout
from ..kernels.evaluate import prime_kernel
from ..kernels.schedule import BASE_LR
from ..plan import real_numel
from ..telemetry import History, Status, ordered_history
from . import launch as launcher
from .device_memory import DeviceMemory
from .device_plan import DevicePlan, upload
from .engine import Engine
from .hyper_table import encode
from .launch import INTERPRETED, Launch
from .step_launches import StepConstants, config_for_device


class DeviceEngine(Engine[DevicePlan]):
    """What a device knows between steps. Arguments as for `Engine`."""

    # A test may set another one.
    config = config_for_device()

    def __init__(
        self,
        device: torch.device,
        records: Sequence[Any],
        state: Any,
        hyperparameters: Sequence[Hyperparameters],
        options: StepOptions,
        schedule_step: int,
        update_steps: Sequence[int],
    ) -> None:
        if device.type != "cuda" and not INTERPRETED:
            raise RuntimeError(
                f"the triton backend takes parameters on {device} only in Triton's interpreter: set TRITON_INTERPRET=1 "
                "before triton is imported"
            )
        super().__init__(device, records, state, hyperparameters, options, schedule_step, update_steps)
        num_tensors, num_groups = len(self.records), len(self.hyperparameters)
        multiprocessors = 2
        if device.type == "cuda":
            multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        max_updaters = multiprocessors * self.config.programs_per_multiprocessor
        self.memory = memory = DeviceMemory(self.step_mirror, num_groups, max_updaters, options.history_size)
        # From the integers: float32 cannot tell steps apart beyond 2**24.
        upload(np.array(update_steps, np.int64), device, out=memory.update_steps)
        memory.clock[layout.SCHEDULE_STEP.value] = schedule_step
        self.live_lr, self.live_beta1 = memory.live[layout.NEXT_LR.value], memory.live[layout.NEXT_BETA1.value]
        self.grad_norm = memory.norm[layout.GRAD_NORM.value]
        self.applied_steps = memory.clock[layout.APPLIED_STEPS.value]
        self.skipped_steps = memory.clock[layout.SKIPPED_STEPS.value]
        if options.max_grad_norm is not None:
            self.set_max_grad_norm(options.max_grad_norm)
        # Rows of the tensor table without addresses, for evaluators of any plan.
        self._idle_rows = np.zeros((max(num_tensors, 1), layout.TENSOR_COLUMNS.value), np.int64)
        for index, record in enumerate(self.records):
            self._idle_rows[index, layout.GROUP.value] = record.group_index
            self._idle_rows[index, layout.NUMEL.value] = real_numel(self.params[index])
        self._idle_table = upload(self._idle_rows, self.device)
        self._mirror_version = self.step_mirror._version
        # Scale functions are compiled into kernels; a captured launch of another generation does nothing.
        self.generation = 0
        self._scale_functions: tuple[Any, ...] = ()
        self._scale_table: Tensor | None = None
        self._constants = StepConstants(
            num_tensors,
            num_groups,
            -(-(num_tensors + num_groups) // self.config.lanes),
            max_updaters,
            self.generation,
            options.history_size,
            options.advance_on_skip,
            options.skip_nonfinite,
            options.store_grads,
            (),
        )
        self._new_generation()
        self.set_hyperparameters(hyperparameters)
        memory.live[: layout.NEXT_LR.value].copy_(memory.live[layout.NEXT_LR.value :])

    # -- device -------------------------------------------------------------------------------------------------------
    def _on_device(self) -> AbstractContextManager[Any]:
        if self.device.type != "cuda" or torch.cuda.current_device() == self.device.index:
            return nullcontext()
        return torch.cuda.device(self.device)

    @property
    def _capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _refuse_capture(self, what: str) -> None:
        if self._capturing:
            raise RuntimeError(f"{what} during CUDA graph capture; do it before, and take one eager step")

    # -- hyperparameters and schedule ---------------------------------------------------------------------------------
    def set_hyperparameters(self, hyperparameters: Sequence[Hyperparameters]) -> None:
        """See `Engine.set_hyperparameters`."""
        self._refuse_capture("hyperparameters or the schedule changed")
        table = encode(hyperparameters)
        if [h.amsgrad for h in hyperparameters] != [h.amsgrad for h in self.hyperparameters]:
            self.drop_plans()
            self._new_generation()
        if table.scale_functions != self._scale_functions:
            self._scale_functions = table.scale_functions
            self._new_generation()
        self.hyperparameters = list(hyperparameters)
        self._last_step = table.last_step
        upload(table.rows, self.device, out=self.memory.hyper_table)
        self._scale_table = upload(table.scale_table, self.device)
        settings = np.array([table.kinds, table.max_unit_shift, self._scale_table.data_ptr()], np.int64)
        upload(settings, self.device, out=self.memory.settings)
        # A scheduled group's lr is without effect.
        self._tensor_lrs = [
            (i, h.lr) for i, h in enumerate(hyperparameters) if h.schedule is None and isinstance(h.lr, Tensor)
        ]
        self._prime()

    def _new_generation(self) -> None:
        """Makes captured launches do nothing, and compiles the others anew."""
        self.generation += 1
        self.memory.clock[layout.GENERATION.value] = self.generation
        self._constants = self._constants._replace(generation=self.generation, scale_functions=self._scale_functions)
        for plan, _ in self._plans.values():
            plan.launches = None

    def set_max_grad_norm(self, max_grad_norm: float) -> None:
        """See `Engine.set_max_grad_norm`."""
        self._refuse_capture("max_grad_norm was set")
        self.memory.norm[layout.MAX_NORM.value] = max_grad_norm

    def _prime(self, recorded: bool = False) -> None:
        """Evaluates the current step into the current slot, after anything but a step has changed what it needs."""
        memory = self.memory
        for index, lr in self._tensor_lrs:
            memory.hyper_table[index, BASE_LR.value].copy_(lr.detach().reshape(()), non_blocking=True)
        arguments = (
            memory.clock,
            memory.settings,
            memory.hyper_table,
            self._idle_table,
            memory.scalars,
            memory.scalars_float64,
            memory.update_steps,
            memory.step_mirror,
            memory.live,
            len(self.hyperparameters),
            len(self.records),
            self._scale_functions,
            self.config.lanes,
        )
        launch = Launch(prime_kernel, self._constants.num_evaluators, arguments, self.config.options)
        with self._on_device():
            launcher.run(launch, launcher.compile_launch(launch), recorded)

    # -- reading and writing the device's state -----------------------------------------------------------------------
    def read_lr_and_beta1(self, group_index: int, applied: bool) -> tuple[float, float]:
        """See `Engine.read_lr_and_beta1`. Waits for the device."""
        if self._capturing:
            raise RuntimeError(
                f"param_groups[{group_index}] was asked for a scheduled value during CUDA graph capture, where the "
                "device cannot be read; optimizer.live_lr and optimizer.live_beta1 can be captured"
            )
        row = layout.APPLIED_LR if applied else layout.NEXT_LR
        lr, beta1 = self.memory.live[row.value : row.value + 2, group_index].tolist()
        return lr, beta1

    def get_schedule_step(self) -> int:
        """See `Engine.get_schedule_step`. Waits for the device."""
        return int(self.memory.clock[layout.SCHEDULE_STEP.value].item())

    def set_schedule_step(self, step: int) -> None:
        """See `Engine.set_schedule_step`."""
        self._refuse_capture("the schedule step was set")
        self.memory.clock[layout.SCHEDULE_STEP.value] = step
        self.host_step = step
        self._prime()

    def get_update_steps(self) -> list[int]:
        """See `Engine.get_update_steps`. Waits for the device."""
        if self.step_mirror._version != self._mirror_version:
            return [int(step) for step in self.step_mirror.tolist()]
        return [int(step) for step in self.memory.update_steps.tolist()]

    def set_update_steps(self, steps: Sequence[int]) -> None:
        """See `Engine.set_update_steps`."""
        self._refuse_capture("update steps were set")
        upload(np.array(steps, np.int64), self.device, out=self.memory.update_steps)
        self.step_mirror.copy_(self.memory.update_steps)
        self._mirror_version = self.step_mirror._version
        self._prime()

    def get_schedule_exhausted(self) -> bool:
        """See `Engine.get_schedule_exhausted`. Waits for the device."""
        return bool(self.memory.clock[layout.OVERRUN.value].item())

    def get_stale_replay(self) -> bool:
        """See `Engine.get_stale_replay`. Waits for the device."""
        return bool(self.memory.clock[layout.STALE.value].item())

    def get_counts(self) -> tuple[int, int]:
        """See `Engine.get_counts`. Waits for the device."""
        first = layout.APPLIED_STEPS.value
        applied, skipped = self.memory.clock[first : first + 2].tolist()
        return applied, skipped

    def set_counts(self, applied_steps: int, skipped_steps: int) -> None:
        """See `Engine.set_counts`."""
        self.memory.clock[layout.APPLIED_STEPS.value] = applied_steps
        self.memory.clock[layout.SKIPPED_STEPS.value] = skipped_steps

    def read_history(self, count: int) -> History:
        """See `Engine.read_history`. Waits for the device."""
        self._refuse_capture("the history was read")
        return ordered_history(self.memory.history.cpu().numpy(), count)

    def copy_status(self) -> Tensor:
        """See `Engine.copy_status`."""
        self._refuse_capture("a Monitor was polled")
        if self.device.type != "cuda":
            return self.memory.words.clone()
        words = torch.empty(self.memory.words.shape, dtype=torch.int64, pin_memory=True)
        return words.copy_(self.memory.words, non_blocking=True)

    def parse_status(self, words: Tensor) -> Status:
        """See `Engine.parse_status`."""
        clock, rest = words[: layout.CLOCK_WORDS.value], words[layout.CLOCK_WORDS.value :].view(torch.float64)
        live = rest[layout.NORM_WORDS.value :].view(layout.LIVE_ROWS.value, -1).numpy()
        return Status(
            int(clock[layout.SCHEDULE_STEP.value]),
            live[layout.NEXT_LR.value].copy(),
            live[layout.NEXT_BETA1.value].copy(),
            float(rest[layout.GRAD_NORM.value]),
            int(clock[layout.APPLIED_STEPS.value]),
            int(clock[layout.SKIPPED_STEPS.value]),
            bool(clock[layout.STALE.value]),
        )

    def refresh(self) -> None:
        """See `Engine.refresh`."""
        if self.step_mirror._version != self._mirror_version:
            # A user wrote state[p]["step"] in place.
            self.memory.update_steps.copy_(self.step_mirror)
            self._mirror_version = self.step_mirror._version
            self._prime()

    def get_measured_sum(self) -> Tensor:
        """See `Engine.get_measured_sum`."""
        words: Tensor = self.memory.norm
        return words[layout.SUM_OF_SQUARES.value]

    def set_sum_of_squares(self, total: Tensor, skip_nonfinite: bool) -> None:
        """See `Engine.set_sum_of_squares`: what ``write_norm`` of the kernels does, over several devices."""
        words = self.memory.norm
        norm = total.to(self.device, non_blocking=True).sqrt()
        words[layout.GRAD_NORM.value] = norm
        words[layout.CLIP_COEFFICIENT.value] = (words[layout.MAX_NORM.value] / (norm + 1e-6)).clamp(max=1.0)
        words[layout.OVERFLOW.value] = ~norm.isfinite() * skip_nonfinite

    def retire(self) -> None:
        """See `Engine.retire`."""
        self.generation = -1
        self.memory.clock[layout.GENERATION.value] = -1
