"""The triton backend: tables on the device, one launch per step and dtype combination."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..hyperparameters import Hyperparameters, same_layout
from ..kernels import adam as kernels
from ..kernels.schedule import BASE_LR, HYPER_COLUMNS
from ..plan import plan_launches, real_numel
from . import launch as launcher
from .device_plan import DEFAULT_CONFIG, TRITON_DTYPES, DevicePlan, DeviceTables, upload
from .engine import DevicesChangedError, Engine
from .hyper_table import encode
from .launch import INTERPRETED, Launch


class TritonEngine(Engine[DevicePlan]):
    """Steps parameters on a CUDA or ROCm device, or on the CPU in Triton's interpreter. Arguments as for `Engine`."""

    # A test may set another one.
    config = DEFAULT_CONFIG

    def __init__(
        self,
        device: torch.device,
        records: Sequence[Any],
        state: Any,
        hyperparameters: Sequence[Hyperparameters],
        schedule_step: int,
        update_steps: Sequence[int],
    ) -> None:
        if device.type != "cuda" and not INTERPRETED:
            raise RuntimeError(
                f"the triton backend takes parameters on {device} only in Triton's interpreter: set TRITON_INTERPRET=1 "
                "before triton is imported"
            )
        super().__init__(device, records, state, hyperparameters, schedule_step, update_steps)
        num_tensors, num_groups = len(self.records), len(self.hyperparameters)
        self.clock = self._zeros(torch.int64, kernels.CLOCK_WORDS.value)
        self.clock[kernels.SCHEDULE_STEP.value] = schedule_step
        self.update_steps = torch.tensor(list(update_steps), dtype=torch.int64, device=device)
        self.scalars = self._zeros(torch.float32, 2, max(num_tensors, 1), kernels.SCALAR_COLUMNS.value)
        self.scalars_float64 = self.scalars.double()
        self.live = self._zeros(torch.float64, kernels.LIVE_ROWS.value, num_groups)
        self.live_lr, self.live_beta1 = self.live[kernels.NEXT_LR.value], self.live[kernels.NEXT_BETA1.value]
        self.hyper_table = self._zeros(torch.float64, num_groups, HYPER_COLUMNS.value)
        # What a step without GradScaler reads, so that the kernel is the same with and without.
        self.no_grad_scale, self.no_found_inf = self._zeros(torch.float32, 1) + 1, self._zeros(torch.float32, 1)
        self.num_evaluators = -(-(num_tensors + num_groups) // self.config.lanes)
        self.max_updaters = 2 * self.config.programs_per_multiprocessor
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            self.max_updaters = properties.multi_processor_count * self.config.programs_per_multiprocessor
        # Rows of the tensor table without addresses, for evaluators of any plan.
        self._idle_rows = np.zeros((max(num_tensors, 1), kernels.TENSOR_COLUMNS.value), np.int64)
        for index, record in enumerate(self.records):
            self._idle_rows[index, kernels.GROUP.value] = record.group_index
            self._idle_rows[index, kernels.NUMEL.value] = real_numel(record.param)
        self._idle_table = upload(self._idle_rows, self.device)
        self._mirror_version = self.step_mirror._version
        # What captured or recorded launches read and write, kept for as long as one may be replayed.
        self._captured_tables: list[Any] = []
        self._ready: list[tuple[Launch, Any]] = []
        # What the schedule kernels are compiled for; a captured launch of another generation does nothing.
        self._schedule_constants: tuple[Any, ...] = ()
        self._generation = 0
        self.scale_table = self._zeros(torch.float64, 1)
        self.set_hyperparameters(hyperparameters)
        self.live[: kernels.NEXT_LR.value].copy_(self.live[kernels.NEXT_LR.value :])

    # -- device memory ------------------------------------------------------------------------------------------------
    def _zeros(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

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
        self.hyperparameters = list(hyperparameters)
        self._last_step = table.last_step
        upload(table.rows, self.device, out=self.hyper_table)
        if len(table.scale_table) == len(self.scale_table):
            upload(table.scale_table, self.device, out=self.scale_table)
        else:
            self._captured_tables.append(self.scale_table)
            self.scale_table = upload(table.scale_table, self.device)
        constants = (table.kinds, table.max_unit_shift, table.scale_functions, len(self.scale_table))
        if constants != self._schedule_constants:
            self._schedule_constants = constants
            self._generation += 1
            self.clock[kernels.GENERATION.value] = self._generation
        self._tensor_lrs = [(i, h.lr) for i, h in enumerate(hyperparameters) if isinstance(h.lr, Tensor)]
        for plan in self._plans.values():
            plan.launches = []
        self._prime()

    def _prime(self, recorded: bool = False) -> None:
        """Evaluates the current step into the current slot, after anything but a step has changed what it needs."""
        for index, lr in self._tensor_lrs:
            self.hyper_table[index, BASE_LR.value].copy_(lr.detach().reshape(()), non_blocking=True)
        arguments = (
            self.clock,
            self.hyper_table,
            self.scale_table,
            self._idle_table,
            self.scalars,
            self.scalars_float64,
            self.update_steps,
            self.step_mirror,
            self.live,
            len(self.hyperparameters),
            len(self.records),
            *self._schedule_constants[:3],
            self.config.lanes,
        )
        launch = Launch(kernels.prime_kernel, self.num_evaluators, arguments, self.config.options)
        with self._on_device():
            launcher.run(launch, launcher.compile_launch(launch), recorded)

    # -- the step -----------------------------------------------------------------------------------------------------
    def build_plan(self, grads: Sequence[Tensor | None]) -> DevicePlan:
        """Plans launches and allocates their tables. See `Engine.build_plan`."""
        self._refuse_capture("the set of gradients or their layouts changed")
        amsgrad = [self.hyperparameters[record.group_index].amsgrad for record in self.records]
        plan = plan_launches(self.params, grads, amsgrad, self.config.block_size)
        rows, buffers = self._idle_rows.copy(), {}
        for index in plan.active:
            param, grad = self.params[index], grads[index]
            assert grad is not None
            if not same_layout(grad, param) or grad.is_conj() or grad.is_neg():
                buffers[index] = torch.empty_like(param, dtype=grad.dtype, requires_grad=False)
            state = self.state[param]
            rows[index, kernels.ACTIVE.value] = 1
            rows[index, kernels.EXP_AVG.value] = state["exp_avg"].data_ptr()
            rows[index, kernels.EXP_AVG_SQ.value] = state["exp_avg_sq"].data_ptr()
            if amsgrad[index]:
                rows[index, kernels.MAX_EXP_AVG_SQ.value] = state["max_exp_avg_sq"].data_ptr()
        return DevicePlan(plan, [self.params[index] for index in plan.active], rows, buffers, self.device)

    def prepare(self) -> None:
        """See `Engine.prepare`."""
        if self.host_step > self._last_step:
            raise RuntimeError(
                f"schedule step {self.host_step} is beyond the last one a scale_fn was tabulated for, "
                f"{self._last_step:.0f}; give the schedule a larger horizon"
            )
        if self.step_mirror._version != self._mirror_version:
            # A user wrote state[p]["step"] in place.
            self._refuse_capture("state['step'] was written")
            self.update_steps.copy_(self.step_mirror)
            self._mirror_version = self.step_mirror._version
            self._prime()
        elif self._tensor_lrs:
            # Part of the step, of a captured one too: it reads the tensors as they are then.
            self._prime(recorded=True)
        grads = [param.grad for param in self.params]
        plan = self.plan_for(grads)
        keeps_tables = self._capturing or bool(launcher.recorders)
        self._load_addresses(plan, grads, keeps_tables)

    def _load_addresses(self, plan: DevicePlan, grads: list[Tensor | None], keeps_tables: bool) -> None:
        if plan.buffers and launcher.recorders:
            names = ", ".join(self.records[index].name for index in plan.buffers)
            raise RuntimeError(
                "record_launches() records kernels, not the copy of a gradient whose layout is not its parameter's; "
                f"give these parameters gradients of their own layout: {names}"
            )
        active_grads: list[Any] = [grads[index] for index in plan.plan.active]
        for index, buffer in plan.buffers.items():
            active_grads[plan.plan.active.index(index)] = buffer.copy_(grads[index])  # type: ignore[arg-type]
        addresses = [param.data_ptr() for param in plan.params]
        addresses += [grad.data_ptr() for grad in active_grads]
        if addresses != plan.addresses or keeps_tables:
            if any(param.device != self.device for param in plan.params):
                raise DevicesChangedError
            plan.set_addresses(addresses)
            if keeps_tables:
                tables = self._tables_to_keep(plan, [*grads, *active_grads])
                self._ready = self._compiled_launches(plan, tables)
                return
            upload(plan.rows, self.device, out=plan.tables.tensor_table)
            plan.addresses = addresses
        if not plan.launches:
            plan.launches = self._compiled_launches(plan, plan.tables)
            if plan.spare_tables is None and self.device.type == "cuda":
                plan.spare_tables = plan.new_tables()
        self._ready = plan.launches

    def _tables_to_keep(self, plan: DevicePlan, grads: list[Tensor | None]) -> DeviceTables:
        """Tables of a captured or recorded launch's own: no later step rewrites them, or frees what they point to."""
        if not self._capturing:
            tables = plan.new_tables()
            upload(plan.rows, self.device, out=tables.tensor_table)
        elif plan.spare_tables is None:
            raise RuntimeError("a second capture needs tables of its own: take one eager step before it")
        else:
            # Not from the graph's private pool, which reuses its blocks, and not by a copy node, which would read the
            # host's memory again at every replay.
            tables, plan.spare_tables = plan.spare_tables, None
            # The next eager step makes new ones.
            plan.launches = []
            stream = torch.cuda.Stream(self.device)
            with torch.cuda.stream(stream):
                tables.tensor_table.copy_(torch.from_numpy(plan.rows.copy()))
            stream.synchronize()
        self._captured_tables.append((tables, grads, [dict(self.state[param]) for param in plan.params]))
        self.captured = True
        return tables

    def _compiled_launches(self, plan: DevicePlan, tables: DeviceTables) -> list[tuple[Launch, Any]]:
        """The launches of a plan over these tables. All are compiled before any runs."""
        launches = []
        for chunk_range in plan.plan.launches:
            is_last = chunk_range is plan.plan.launches[-1]
            num_evaluators = self.num_evaluators if is_last else 0
            combination = chunk_range.combination
            arguments = (
                self.clock,
                self.hyper_table,
                self.scale_table,
                tables.tensor_table,
                tables.chunk_table[chunk_range.first :],
                self.scalars,
                self.scalars_float64,
                self.update_steps,
                self.step_mirror,
                self.live,
                self.no_grad_scale,
                self.no_found_inf,
                len(self.hyperparameters),
                len(self.records),
                num_evaluators,
                chunk_range.num_chunks,
                self._generation,
                TRITON_DTYPES[combination.param_dtype],
                TRITON_DTYPES[combination.grad_dtype],
                combination.amsgrad,
                is_last,
                *self._schedule_constants[:3],
                chunk_range.block_size,
                self.config.lanes,
            )
            grid = num_evaluators + min(chunk_range.num_chunks, self.max_updaters)
            launches.append(Launch(kernels.adam_kernel, grid, arguments, self.config.options))
        with self._on_device():
            return [(launch, launcher.compile_launch(launch)) for launch in launches]

    def launch(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """See `Engine.launch`."""
        ready, self._ready = self._ready, []
        with self._on_device():
            for launch, compiled in ready:
                if grad_scale is not None or found_inf is not None:
                    launch = self._with_scaler(launch, grad_scale, found_inf)
                launcher.run(launch, compiled)
        # Whether a step with a scaler was skipped is not known here.
        self.host_step += found_inf is None

    def _with_scaler(self, launch: Launch, grad_scale: Tensor | None, found_inf: Tensor | None) -> Launch:
        arguments = list(launch.arguments)
        names = launch.kernel.arg_names
        if grad_scale is not None:
            arguments[names.index("grad_scale_ptr")] = grad_scale.to(self.device, torch.float32, non_blocking=True)
        if found_inf is not None:
            arguments[names.index("found_inf_ptr")] = found_inf.to(self.device, torch.float32, non_blocking=True)
        return launch._replace(arguments=tuple(arguments))

    def tick(self) -> None:
        """See `Engine.tick`: the same launch, with no active tensor."""
        no_grads: list[Tensor | None] = [None] * len(self.params)
        plan = self.plan_for(no_grads)
        self._load_addresses(plan, no_grads, keeps_tables=False)
        self.launch(None, None)

    def retire(self) -> None:
        """See `Engine.retire`."""
        self.clock[kernels.GENERATION.value] = -1

    # -- reading and writing the device's state -----------------------------------------------------------------------
    def read_lr_and_beta1(self, group_index: int, applied: bool) -> tuple[float, float]:
        """See `Engine.read_lr_and_beta1`. Waits for the device."""
        if self._capturing:
            raise RuntimeError(
                f"param_groups[{group_index}] was asked for a scheduled value during CUDA graph capture, where the "
                "device cannot be read; optimizer.live_lr and optimizer.live_beta1 can be captured"
            )
        row = kernels.APPLIED_LR if applied else kernels.NEXT_LR
        lr, beta1 = self.live[row.value : row.value + 2, group_index].tolist()
        return lr, beta1

    def get_schedule_step(self) -> int:
        """See `Engine.get_schedule_step`. Waits for the device."""
        return int(self.clock[kernels.SCHEDULE_STEP.value].item())

    def set_schedule_step(self, step: int) -> None:
        """See `Engine.set_schedule_step`."""
        self._refuse_capture("the schedule step was set")
        self.clock[kernels.SCHEDULE_STEP.value] = step
        self.host_step = step
        self._prime()

    def get_update_steps(self) -> list[int]:
        """See `Engine.get_update_steps`. Waits for the device."""
        if self.step_mirror._version != self._mirror_version:
            return [int(step) for step in self.step_mirror.tolist()]
        return [int(step) for step in self.update_steps.tolist()]

    def set_update_steps(self, steps: Sequence[int]) -> None:
        """See `Engine.set_update_steps`."""
        self._refuse_capture("update steps were set")
        upload(np.array(steps, np.int64), self.device, out=self.update_steps)
        self.step_mirror.copy_(self.update_steps)
        self._mirror_version = self.step_mirror._version
        self._prime()

    def get_schedule_exhausted(self) -> bool:
        """See `Engine.get_schedule_exhausted`. Waits for the device."""
        return bool(self.clock[kernels.OVERRUN.value].item())
