"""The triton backend: one launch per step and dtype combination, captured ones over tables of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..hyperparameters import same_layout
from ..kernels import layout
from ..plan import plan_launches, real_dtype
from ..sharding import local_tensor
from . import launch as launcher
from .capture import EngineCapture, Place
from .device_engine import DeviceEngine
from .device_plan import DevicePlan, layouts, upload
from .engine import DevicesChangedError, moment_names
from .step_launches import DTYPE_CODES, StepLaunches, compile_step

MOMENT_COLUMNS = {
    "exp_avg": layout.EXP_AVG.value,
    "exp_avg_sq": layout.EXP_AVG_SQ.value,
    "max_exp_avg_sq": layout.MAX_EXP_AVG_SQ.value,
}


class TritonEngine(DeviceEngine):
    """Steps parameters on a CUDA or ROCm device, or on the CPU in Triton's interpreter. Arguments as for `Engine`."""

    # What `prepare` found, for `measure` and `launch`. Gradients may be temporary: those of partial sums are.
    _ready: tuple[DevicePlan, StepLaunches, list[Tensor | None]] | None = None

    # -- the step -----------------------------------------------------------------------------------------------------
    def refuse_new_plan(self, names: Sequence[str]) -> None:
        """See `Engine.refuse_new_plan`."""
        if names:
            self._refuse_capture(f"the state of {', '.join(names)} would be created")
        self._refuse_capture("the set of gradients or their layouts is a new one")

    def build_plan(self, grads: Sequence[Tensor | None]) -> DevicePlan:
        """Plans launches and allocates their tables. See `Engine.build_plan`."""
        amsgrad = [self.hyperparameters[record.group_index].amsgrad for record in self.records]
        measured = None if self.options.max_grad_norm is None else self.measured
        plan = plan_launches(self.params, grads, amsgrad, self.config.block_size, measured)
        rows, buffers = self._idle_rows.copy(), {}
        for index in plan.active:
            param, grad = self.params[index], grads[index]
            assert grad is not None
            if not same_layout(grad, param) or grad.is_conj() or grad.is_neg():
                buffers[index] = torch.empty_like(param, dtype=grad.dtype, requires_grad=False)
            rows[index, layout.ACTIVE.value] = 1
            rows[index, layout.GRAD_DTYPE.value] = DTYPE_CODES[real_dtype(grad.dtype)]
            for name, column in MOMENT_COLUMNS.items():
                if name in moment_names(amsgrad[index]):
                    rows[index, column] = self.moment(index, name).data_ptr()
        return DevicePlan(plan, [self.params[index] for index in plan.active], rows, buffers, self.device)

    def prepare(self) -> EngineCapture | None:
        """See `Engine.prepare`."""
        if self.host_step > self._last_step:
            raise RuntimeError(
                f"schedule step {self.host_step} is beyond the last one a scale_fn was tabulated for, "
                f"{self._last_step:.0f}; give the schedule a larger horizon"
            )
        if self.step_mirror._version != self._mirror_version:
            self._refuse_capture("state['step'] was written")
            self.refresh()
        elif self._tensor_lrs:
            # Part of the step, of a captured one too: it reads the tensors as they are then.
            self._prime(recorded=True)
        grads = self.read_grads()
        if self._capturing or launcher.recorders:
            return self._prepare_capture(grads)
        self._prepare_eager(grads)
        return None

    def _prepare_eager(self, grads: list[Tensor | None]) -> None:
        plan = self.plan_for(grads)
        addresses = self._addresses(plan, grads)
        if addresses != plan.addresses:
            if any(record.param.device != self.device for record in self.records):
                raise DevicesChangedError
            if layouts(plan.params) != plan.param_layouts:
                # The same gradients, and parameters of another dtype or layout.
                self.drop_plans()
                plan = self.plan_for(grads)
                addresses = self._addresses(plan, grads)
            plan.set_addresses(addresses)
            upload(plan.rows, self.device, out=plan.tensor_table)
            plan.addresses = addresses
        if plan.launches is None:
            plan.launches = self._compile(plan, plan.tensor_table)
            if self.device.type == "cuda":
                plan.stock_spare_tables()
        self._ready = plan, plan.launches, grads

    @staticmethod
    def _addresses(plan: DevicePlan, grads: list[Tensor | None]) -> list[int]:
        """Addresses of parameters, then of gradients in their parameter's layout."""
        active_grads: list[Any] = grads
        if len(plan.plan.active) != len(grads):
            active_grads = [grads[index] for index in plan.plan.active]
        for index, buffer in plan.buffers.items():
            active_grads = list(active_grads)
            active_grads[plan.plan.active.index(index)] = buffer.copy_(grads[index])  # type: ignore[arg-type]
        return [*map(Tensor.data_ptr, plan.params), *map(Tensor.data_ptr, active_grads)]

    def _compile(self, plan: DevicePlan, tensor_table: Tensor) -> StepLaunches:
        with self._on_device():
            return compile_step(plan.plan, tensor_table, plan.chunk_table, self.memory, self.config, self._constants)

    def measure(self, grad_scale: Tensor | None, skip_nonfinite: bool) -> None:
        """See `Engine.measure`."""
        assert self._ready is not None
        launch = self._ready[1].norm
        assert launch is not None
        replaced: dict[str, Any] = {}
        if grad_scale is not None:
            replaced["grad_scale_ptr"] = grad_scale.to(self.device, torch.float32, non_blocking=True)
            replaced["skip_nonfinite"] = int(skip_nonfinite)
        with self._on_device():
            launch.run(**replaced)

    def launch(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """See `Engine.launch`."""
        assert self._ready is not None
        # Let go of at the end, when all is launched.
        (plan, launches, _grads), self._ready = self._ready, None
        replaced: dict[str, Any] = {}
        if grad_scale is not None:
            replaced["grad_scale_ptr"] = grad_scale.to(self.device, torch.float32, non_blocking=True)
        if found_inf is not None:
            replaced["found_inf_ptr"] = found_inf.to(self.device, torch.float32, non_blocking=True)
        with self._on_device():
            for launch in launches.updates:
                launch.run(**replaced)
        if self.options.store_grads:
            for index, buffer in plan.buffers.items():
                local_tensor(self.records[index].param.grad).copy_(buffer)  # type: ignore[arg-type]
        # Whether a step that may be skipped was is not known here.
        self.host_step += found_inf is None and self.options.max_grad_norm is None

    def tick(self) -> None:
        """See `Engine.tick`: the same launch, with no active tensor, and not counted."""
        no_grads: list[Tensor | None] = [None] * len(self.params)
        self._prepare_eager(no_grads)
        assert self._ready is not None
        (_, launches, _), self._ready = self._ready, None
        with self._on_device():
            for launch in launches.updates:
                launch.run(counts=0)
        self.host_step += 1

    # -- capture ------------------------------------------------------------------------------------------------------
    def _prepare_capture(self, grads: list[Tensor | None]) -> EngineCapture:
        """Readies a launch over tables of its own: no later step rewrites them, or frees what they point to."""
        missing = [
            r.name for r, grad in zip(self.records, grads, strict=True) if grad is None and r.param.requires_grad
        ]
        if missing:
            raise RuntimeError(
                f"captured steps need a gradient of every parameter that requires one; {', '.join(missing)} has none. "
                "Run backward before optimizer.step(), or use requires_grad_(False) where nothing is to be updated"
            )
        plan = self.plan_for(grads)
        if plan.buffers and launcher.recorders:
            names = ", ".join(self.records[index].name for index in plan.buffers)
            raise RuntimeError(
                "record_launches() records kernels, not the copy of a gradient whose layout is not its parameter's; "
                f"give these parameters gradients of their own layout: {names}"
            )
        if self._capturing and not plan.spare_tables:
            raise RuntimeError("another capture needs tables of its own: take one eager step before it")
        plan.set_addresses(self._addresses(plan, grads))
        # Not from the graph's private pool, which reuses its blocks.
        if self._capturing:
            table = plan.spare_tables.pop()
            plan.fill_captured_table(table)
        else:
            table = upload(plan.rows, self.device)
        launches = self._compile(plan, table)
        self._ready = plan, launches, grads
        if self._capturing:
            # The next eager step stocks up on spare tables.
            plan.launches = None
        state = [dict(self.state[self.records[index].param]) for index in plan.plan.active]
        tensors = [*grads, *plan.params, *plan.buffers.values(), *state]
        return EngineCapture(self, plan.plan.active, (plan, table, launches), tensors)

    def refresh_capture(self, capture: EngineCapture) -> None:
        """Writes present addresses into a captured launch's table. See `CapturableEngine`."""
        plan, table, launches = capture.tables
        if plan.buffers:
            names = ", ".join(self.records[index].name for index in plan.buffers)
            raise RuntimeError(
                f"the captured step copies gradients whose layout is not their parameter's, of {names}, from where "
                "they were; capture it again"
            )
        rows, grads, states = plan.rows.copy(), self.read_grads(), []
        for index in capture.active:
            grad, state = grads[index], self.state[self.records[index].param]
            assert grad is not None
            rows[index, layout.PARAM.value] = self.params[index].data_ptr()
            rows[index, layout.GRAD.value] = grad.data_ptr()
            for name in moment_names("max_exp_avg_sq" in state):
                rows[index, MOMENT_COLUMNS[name]] = self.moment(index, name).data_ptr()
            states.append(dict(state))
        upload(rows, self.device, out=table)
        capture.tables = plan, table, launches
        capture.tensors = [*grads, *self.params, *states]

    def present_places(self, active: Sequence[int]) -> tuple[list[Place], list[Place | None], list[Place]]:
        """Places that a captured launch depends on. See `CapturableEngine`."""
        present_grads = self.read_grads()
        params = [Place.of(self.records[index].name, self.params[index]) for index in active]
        grads = [
            None if grad is None else Place.of(f"the gradient of {record.name}", grad)
            for record, grad in zip(self.records, present_grads, strict=True)
        ]
        state = []
        for index in active:
            record = self.records[index]
            entry = self.state.get(record.param) or {}
            for name in moment_names(self.hyperparameters[record.group_index].amsgrad):
                if name not in entry:
                    raise RuntimeError(f"state[{name!r}] of {record.name} was taken away since the capture")
                state.append(Place.of(f"state[{name!r}] of {record.name}", local_tensor(entry[name])))
        return params, grads, state
