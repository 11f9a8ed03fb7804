"""The triton backend: one launch per step and dtype combination. Captured launches have their own tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import layout
from ..kernels.norm import shared_norm_kernel
from ..schedules import Schedule
from . import launch as launcher
from .capture import Capture, Place
from .chunks import cut_into_chunks
from .engine import CLIP_EPS, Engine, EngineSetup
from .launch import Launch
from .moments import Moments
from .parameters import Parameters, ParametersMovedError
from .plan_cache import PlanCache
from .schedule_tables import encode_schedules
from .settings import GroupSettings
from .sharding import local_tensor
from .state import DeviceState
from .step_plan import DTYPE_CODES, StepLaunches, StepPlan, config_for_device, make_step_launches
from .tensors import is_resolved, real_dtype, real_numel, same_layout, upload


class TritonEngine(Engine):
    """Steps parameters on a CUDA or ROCm device, or on the CPU in Triton's interpreter. See `Engine`."""

    # Tests may replace it.
    config = config_for_device()

    def __init__(self, setup: EngineSetup) -> None:
        device, records, state, rule, groups, options, schedule_step, update_steps = setup
        self.device = device
        if device.type == "cuda":
            self.config = self.config.for_warp_size(torch.cuda.get_device_properties(device).warp_size)
        self.parameters = Parameters(device, records)
        self.state: DeviceState = DeviceState(
            self.parameters, rule, groups, options, self.config, schedule_step, update_steps
        )
        has_averages = options.averaging is not None
        self.moments = Moments(self.parameters, state, rule, groups, self.state.step_mirror, has_averages)
        self._options, self._rule = options, rule
        self._plans: PlanCache[StepPlan] = PlanCache()
        # The result of `prepare`, for `compute_norm` and `launch`. Keeps temporary gradients (reduced sums) alive.
        self._ready: tuple[StepPlan, StepLaunches, list[Tensor | None]] | None = None
        self._shared_norm: Launch | None = None

    @property
    def generation(self) -> int:
        """The current generation: launches of another one do nothing."""
        return self.state.generation

    @staticmethod
    def check_schedule(schedule: Schedule, step: int) -> None:
        """See `Engine.check_schedule`. Tables hold all steps; a ``@triton.jit`` scale_fn need not run on the host."""
        del step
        encode_schedules([schedule])

    def set_groups(self, groups: Sequence[GroupSettings]) -> None:
        """See `Engine.set_groups`."""
        recompile = self.state.set_groups(groups)
        keys_before = self.moments.keys_by_group
        self.moments.set_groups(groups)
        if self.moments.keys_by_group != keys_before:
            self._plans.clear()
            self.state.new_generation()
        elif recompile:
            # Now, since the next step may be captured.
            for plan in self._plans.plans():
                plan.launches = self._make_launches(plan, plan.tensor_table)

    def forget_plans(self) -> None:
        """See `Engine.forget_plans`."""
        self._plans.clear()

    # -- the step -----------------------------------------------------------------------------------------------------
    def prepare(self) -> Capture | None:
        """See `Engine.prepare`."""
        capturing = self.state.before_step()
        if (self.parameters.is_sharded and self.parameters.shards_replaced()) or self.moments.layouts_changed():
            self._plans.clear()
        grads = self.parameters.grads()
        if capturing or launcher.recorders:
            self.state.is_replayed = True
            return self._prepare_capture(grads)
        self._prepare_eager(grads)
        return None

    def _prepare_eager(self, grads: list[Tensor | None]) -> None:
        plan = self._plans.get(grads, self._build_plan)
        addresses = plan.find_addresses(grads, self.moments.handed_out)
        if addresses != plan.addresses:
            plan.set_addresses(addresses)
            upload(plan.rows, self.device, out=plan.tensor_table)
            plan.addresses = addresses
        if not plan.is_complete:
            self._complete(plan)
        assert plan.launches is not None
        self._ready = plan, plan.launches, grads

    def _complete(self, plan: StepPlan) -> None:
        """Gives a plan its launches, and what later captures need."""
        if plan.launches is None:
            plan.launches = self._make_launches(plan, plan.tensor_table)
        plan.stock_spare_tables()
        plan.is_complete = True

    def _build_plan(self, grads: list[Tensor | None]) -> tuple[StepPlan, list[Tensor]]:
        """Checks parameters, gradients and state, creates missing state, and allocates tables."""
        self.parameters.check(grads, self._options.write_back_grads)
        active = [index for index, grad in enumerate(grads) if grad is not None]
        idle = self.moments.check_all(active)
        if not self.state.has_float64:
            dtypes = [real_dtype(self.parameters.tensors[index].dtype) for index in active + idle]
            if torch.float64 in dtypes:
                # Launches so far, captured ones too, write no scalars for it.
                raise ParametersMovedError
        missing = self.moments.missing(active)
        if missing:
            self.state.refuse_capture(f"the state of {self.parameters.names(missing)} would be created")
        self.state.refuse_capture("the set of gradients, or their layouts, changed")
        self.state.restart_steps(self.moments.uncounted(missing))
        if self.moments.create_all(active + idle):
            # Other plans hold the state tensors that were replaced.
            self._plans.clear()
        params = self.parameters.tensors
        rows, buffers = self.state.idle_rows.copy(), {}
        for index in active:
            param, grad = params[index], grads[index]
            assert grad is not None
            if not same_layout(grad, param) or not is_resolved(grad):
                buffers[index] = torch.empty_like(param, dtype=grad.dtype, requires_grad=False)
            rows[index, layout.ACTIVE.value] = 1
            rows[index, layout.GRAD_DTYPE.value] = DTYPE_CODES[real_dtype(grad.dtype)]
            rows[index, layout.NUMEL.value] = real_numel(param)
        for index in active + idle:
            self._set_state_addresses(rows, index)
        num_states = [len(self.moments.keys(index)) for index in range(len(params))]
        measured = None if self._options.max_grad_norm is None else self.parameters.measured
        chunks = cut_into_chunks(
            params, grads, num_states, self._rule.required_states, self.config.block_size, measured, idle
        )
        states = [self.moments.of(index) for index in active]
        active_params, idle_params = [params[index] for index in active], [params[index] for index in idle]
        averages = [self.moments.average(index) for index in active + idle]
        plan = StepPlan(
            active,
            active_params,
            states,
            rows,
            buffers,
            chunks,
            self.device,
            idle,
            idle_params,
            [average for average in averages if average is not None],
        )
        return plan, active_params + idle_params

    def _set_state_addresses(self, rows: Any, index: int) -> None:
        addresses = [tensor.data_ptr() for tensor in self.moments.of(index)]
        rows[index, layout.STATES.value : layout.STATES.value + len(addresses)] = addresses
        average = self.moments.average(index)
        if average is not None:
            rows[index, layout.AVERAGE.value] = average.data_ptr()

    def _make_launches(self, plan: StepPlan, tensor_table: Tensor) -> StepLaunches:
        state, options = self.state, self._options
        return make_step_launches(
            plan,
            tensor_table,
            state.memory,
            self.config,
            num_groups=len(state.groups),
            num_tensors=len(self.parameters),
            history_rows=options.history_size,
            generation=state.generation,
            advance_schedule_on_skip=int(options.advance_schedule_on_skip),
            skip_if_nonfinite=options.skip_if_nonfinite,
            UPDATE=state.update,
            SCALARS=state.scalars,
            HAS_DECAY_SCHEDULE=self._rule.has_decay_schedule,
            HAS_AVERAGING=options.averaging is not None,
            HAS_FLOAT64=state.has_float64,
            WRITE_BACK_GRADS=options.write_back_grads,
            SCALE_FNS=state.scale_functions,
        )

    def compute_norm(self, grad_scale: Tensor | None, skip_if_nonfinite: bool) -> None:
        """See `Engine.compute_norm`."""
        assert self._ready is not None
        launch = self._ready[1].norm
        assert launch is not None
        replaced: dict[str, Any] = {}
        if grad_scale is not None:
            replaced["grad_scale_ptr"] = grad_scale.to(self.device, torch.float32, non_blocking=True)
            replaced["skip_if_nonfinite"] = int(skip_if_nonfinite)
        launcher.run(launch, **replaced)

    def sum_of_squares(self, grad_scale: Tensor | None) -> Tensor:
        """See `Engine.sum_of_squares`."""
        return self.parameters.add_other_shares(self.state.memory.norm[layout.SUM_OF_SQUARES.value], grad_scale)

    def set_sum_of_squares(self, total: Tensor, skip_if_nonfinite: bool) -> None:
        """See `Engine.set_sum_of_squares`."""
        total = total.to(self.device, non_blocking=True)
        if self._shared_norm is None:
            self._shared_norm = launcher.make_launch(
                shared_norm_kernel,
                1,
                self.config.options,
                self.device,
                norm_ptr=self.state.memory.norm,
                sum_of_squares_ptr=self.state.memory.norm[layout.SUM_OF_SQUARES.value],
                skip_if_nonfinite=0,
                CLIP_EPS=CLIP_EPS,
            )
        launcher.run(self._shared_norm, sum_of_squares_ptr=total, skip_if_nonfinite=int(skip_if_nonfinite))

    def launch(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """See `Engine.launch`."""
        assert self._ready is not None
        # The gradients are kept alive until all is launched.
        (plan, launches, _grads), self._ready = self._ready, None
        replaced: dict[str, Any] = {}
        if grad_scale is not None:
            replaced["grad_scale_ptr"] = grad_scale.to(self.device, torch.float32, non_blocking=True)
        if found_inf is not None:
            replaced["found_inf_ptr"] = found_inf.to(self.device, torch.float32, non_blocking=True)
        for launch in launches.updates:
            launcher.run(launch, **replaced)
        if self._options.write_back_grads:
            for index, buffer in plan.buffers.items():
                gradient = self.parameters.records[index].param.grad
                assert gradient is not None
                local_tensor(gradient).copy_(buffer)
        self.state.host_step += 1

    def tick(self) -> None:
        """See `Engine.tick`: the same launch, with no active tensor, and not counted."""
        self._prepare_eager([None] * len(self.parameters))
        assert self._ready is not None
        (_, launches, _), self._ready = self._ready, None
        for launch in launches.updates:
            launcher.run(launch, counts=0)
        self.state.host_step += 1

    def retire(self) -> None:
        """See `Engine.retire`."""
        self.state.retire()

    # -- capture ------------------------------------------------------------------------------------------------------
    def before_capture(self) -> None:
        """See `Engine.before_capture`."""
        self.state.refresh()
        if (self.parameters.is_sharded and self.parameters.shards_replaced()) or self.moments.layouts_changed():
            self._plans.clear()
        # The captured gradients will be laid out as the present ones.
        grads = self.parameters.grads()
        for index, (record, param) in enumerate(zip(self.parameters.records, self.parameters.tensors, strict=True)):
            if not record.param.requires_grad:
                grads[index] = None
            elif grads[index] is None:
                grads[index] = torch.empty_like(param, requires_grad=False)
        self._plans.get(grads, self._build_plan)
        for plan in self._plans.plans():
            if not plan.is_complete:
                self._complete(plan)

    def _prepare_capture(self, grads: list[Tensor | None]) -> Capture:
        """Prepares a launch with its own tables: no later step rewrites them, or frees the memory they point to."""
        missing = [
            index
            for index, (record, grad) in enumerate(zip(self.parameters.records, grads, strict=True))
            if grad is None and record.param.requires_grad
        ]
        if missing:
            raise RuntimeError(
                "captured steps need a gradient of every parameter that requires one; "
                f"{self.parameters.names(missing)} has none. "
                "Run backward before optimizer.step(), or use requires_grad_(False) for parameters that are not trained"
            )
        plan = self._plans.get(grads, self._build_plan)
        if plan.buffers and launcher.recorders:
            raise RuntimeError(
                "record_launches() records only kernels, and a gradient with another layout than its parameter needs a "
                f"copy; give these parameters gradients of their layout: {self.parameters.names(list(plan.buffers))}"
            )
        capturing = self.state.capturing
        if capturing and not (plan.launches and plan.spare_tables):
            raise RuntimeError("another capture needs its own tables: take one eager step before it")
        plan.set_addresses(plan.find_addresses(grads, self.moments.handed_out))
        # Not from the graph's private pool, which reuses its blocks.
        table = plan.take_spare_table() if capturing else upload(plan.rows, self.device)
        launches = plan.launches.with_table(table) if plan.launches else self._make_launches(plan, table)
        self._ready = plan, launches, grads
        addressed = plan.active + plan.idle
        state = [self.moments.entry(index) for index in addressed]
        tensors = [*grads, *plan.params, *plan.idle_params, *plan.averages, *plan.buffers.values(), *state]
        return Capture(self, addressed, (plan, table, launches), tensors)

    def refresh_capture(self, capture: Capture) -> None:
        """Writes current addresses into a captured launch's table. See `CapturableEngine`."""
        plan, table, launches = capture.tables
        if plan.buffers:
            raise RuntimeError(
                "the captured step copies gradients that have another layout than their parameters, from their old "
                f"addresses: those of {self.parameters.names(list(plan.buffers))}; capture it again"
            )
        rows, grads, states = plan.rows.copy(), self.parameters.grads(), []
        for index in capture.active:
            grad = grads[index]
            rows[index, layout.PARAM.value] = self.parameters.tensors[index].data_ptr()
            # An idle one has none.
            rows[index, layout.GRAD.value] = 0 if grad is None else grad.data_ptr()
            self._set_state_addresses(rows, index)
            states.append(self.moments.entry(index))
        upload(rows, self.device, out=table)
        capture.tables = plan, table, launches
        capture.tensors = [*grads, *self.parameters.tensors, *states]

    def active_parameters(self, active: Sequence[int]) -> list[Tensor]:
        """See `CapturableEngine`."""
        tensors = self.parameters.tensors
        return tensors if len(active) == len(tensors) else [tensors[index] for index in active]

    def present_places(self, active: Sequence[int]) -> tuple[list[Place], list[Place | None], list[Place]]:
        """Places that a captured launch depends on. See `CapturableEngine`."""
        records = self.parameters.records
        if self._options.averaging is not None:
            addressed = set(active)
            late = [i for i in range(len(records)) if i not in addressed and self.moments.average(i) is not None]
            if late:
                raise RuntimeError(
                    f"{self.parameters.names(late)} got an average after the capture, and a replay would not average "
                    "it; capture the step again"
                )
        params = [Place.of(records[index].name, self.parameters.tensors[index]) for index in active]
        grads = [
            None if grad is None else Place.of(f"the gradient of {record.name}", grad)
            for record, grad in zip(records, self.parameters.grads(), strict=True)
        ]
        state = [Place.of(name, tensor) for index in active for name, tensor in self.moments.named(index)]
        return params, grads, state
