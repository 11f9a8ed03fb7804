"""The cpu backend: torch's own fused CPU kernel, called with cached lists and the schedule's host closed form."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..schedules import Schedule
from .cpu_state import CpuState
from .engine import Engine, EngineSetup
from .launch import recorders
from .moments import Moments
from .parameters import Parameters, ParametersMovedError
from .plan_cache import PlanCache
from .rules.base import CpuUpdate
from .settings import GroupSettings
from .tensors import is_low_precision, is_resolved, same_layout, total_norm

# What torch's kernels take.
TensorList = tuple[Tensor, ...] | list[Tensor]


@dataclass
class Batch:
    """Tensors of alike groups, one parameter dtype and gradient layout: the lists of one call of torch's kernel."""

    group_index: int
    indices: list[int]
    params: list[Tensor]
    # One list of tensors per state key of the rule.
    states: list[list[Tensor]]
    steps: list[Tensor]
    # The gradients must be copied into the parameters' dtype and layout first.
    converts: bool
    is_complex: bool
    # Torch's kernel unscales: float16 gradients, once unscaled, may be too small for float16.
    kernel_unscales: bool
    # All of the engine's tensors are in it.
    is_whole: bool

    def __post_init__(self) -> None:
        first, *rest = self.indices
        # Takes a sequence of entries. With one index, itemgetter would return the entry itself: use a slice.
        self.take: Any = itemgetter(first, *rest) if rest else itemgetter(slice(first, first + 1))

    def gradients(
        self, grads: Sequence[Tensor | None], factor: float, write_back: bool
    ) -> tuple[TensorList, Tensor | None]:
        """This batch's gradients, multiplied and converted as torch's kernel wants them.

        Args:
            grads: One entry per parameter of the engine.
            factor: The factor to multiply them by.
            write_back: Multiply them in place, instead of copies.

        Returns:
            The gradients; what the kernel divides them by, or None. It writes the quotients into them.
        """
        # None of a batch's gradients is None.
        own: TensorList = cast("TensorList", grads) if self.is_whole else self.take(grads)
        if factor == 1.0:
            return self._converted(own), None
        wide = torch.promote_types(torch.promote_types(own[0].dtype, self.params[0].dtype), torch.float32)
        if self.kernel_unscales:
            scale = torch.tensor(1.0 / factor if factor else math.inf, dtype=torch.float32, device="cpu")
            if not self.converts:
                return own if write_back else [grad.clone() for grad in own], scale
            copies = self._converted(own)
            if write_back:
                torch._foreach_copy_(own, [grad.to(wide) * factor for grad in own])
            return copies, scale
        if not self.converts:
            if not write_back:
                return torch._foreach_mul(own, factor), None
            torch._foreach_mul_(own, factor)
            return own, None
        scaled = [grad.to(wide) * factor for grad in own]
        if write_back:
            torch._foreach_copy_(own, scaled)
        return self._converted(scaled), None

    def _converted(self, grads: TensorList) -> list[Tensor]:
        """Copies in the parameters' dtype and layout."""
        return [torch.empty_like(param).copy_(grad) for param, grad in zip(self.params, grads, strict=True)]


@dataclass
class CpuPlan:
    """The batches of a step, and the indices of all its tensors."""

    batches: list[Batch]
    # None if all of the engine's tensors are updated.
    active: NDArray[np.intp] | None
    # Parameters and their averages, by group.
    averages: dict[int, tuple[list[Tensor], list[Tensor]]]


class CpuEngine(Engine):
    """Steps parameters on the CPU. See `Engine`."""

    def __init__(self, setup: EngineSetup) -> None:
        self.device, records, state, rule, groups, options, schedule_step, update_steps = setup
        self.parameters = Parameters(self.device, records)
        self.state: CpuState = CpuState(groups, options, schedule_step, update_steps)
        self.moments = Moments(
            self.parameters, state, rule, groups, self.state.step_mirror, options.averaging is not None
        )
        self._options, self._rule = options, rule
        self._plans: PlanCache[CpuPlan] = PlanCache()
        self._set_calls(self._calls_of(groups))
        # The result of `prepare`.
        self._ready: tuple[CpuPlan, list[Tensor | None]] | None = None

    def before_capture(self) -> None:
        """See `Engine.before_capture`: there are no captures on the CPU."""

    @staticmethod
    def check_schedule(schedule: Schedule, step: int) -> None:
        """See `Engine.check_schedule`."""
        for number in {0, step}:
            schedule.lr_and_momentum(number)

    def set_groups(self, groups: Sequence[GroupSettings]) -> None:
        """See `Engine.set_groups`."""
        # First: it may raise an error.
        calls = self._calls_of(groups)
        self.state.set_groups(groups)
        keys_before, alike_before = self.moments.keys_by_group, self._alike
        self.moments.set_groups(groups)
        self._set_calls(calls)
        if self.moments.keys_by_group != keys_before or self._alike != alike_before:
            self._plans.clear()

    def _calls_of(self, groups: Sequence[GroupSettings]) -> list[tuple[CpuUpdate, Hashable]]:
        """For each group, the call of torch's kernel, and what decides which one it is."""
        rule = self._rule
        return [
            (
                rule.cpu_update(group.values, group.maximize),
                (rule.columns(group.values), rule.num_states(group.values), group.maximize),
            )
            for group in groups
        ]

    def _set_calls(self, calls: Sequence[tuple[CpuUpdate, Hashable]]) -> None:
        """Takes `_calls_of` the groups that the state has, and finds the groups that one call can update together."""
        self._updates = [update for update, _ in calls]
        first: dict[Hashable, int] = {}
        keys = zip(self.state.alike, (key for _, key in calls), strict=True)
        self._alike = [first.setdefault(key, index) for index, key in enumerate(keys)]

    def forget_plans(self) -> None:
        """See `Engine.forget_plans`."""
        self._plans.clear()

    def _build_plan(self, grads: list[Tensor | None]) -> tuple[CpuPlan, list[Tensor]]:
        """Checks parameters, gradients and state, creates missing state, and sorts the tensors into batches."""
        self.parameters.check(grads, self._options.write_back_grads)
        active = [index for index, grad in enumerate(grads) if grad is not None]
        idle = self.moments.check_all(active)
        self.state.restart_steps(self.moments.uncounted(active))
        if self.moments.create_all(active + idle):
            # Other plans hold the state tensors that were replaced.
            self._plans.clear()
        batches: dict[Any, list[int]] = {}
        for index in active:
            param, grad = self.parameters.tensors[index], grads[index]
            assert grad is not None
            if grad.numel():
                converts = grad.dtype != param.dtype or not same_layout(grad, param) or not is_resolved(grad)
                group_index = self._alike[self.parameters.records[index].group_index]
                batches.setdefault((group_index, param.dtype, grad.dtype, converts), []).append(index)
        averages: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        for index in active + idle:
            average = self.moments.average(index)
            if average is not None:
                params, own = averages.setdefault(self.parameters.records[index].group_index, ([], []))
                params.append(self.parameters.tensors[index])
                own.append(average)
        plan = CpuPlan(
            [self._batch(indices, *key) for key, indices in batches.items()],
            None if len(active) == len(self.parameters) else np.array(active, np.intp),
            averages,
        )
        return plan, [self.parameters.tensors[index] for index in active + idle]

    def _batch(
        self, indices: list[int], group_index: int, dtype: torch.dtype, grad_dtype: torch.dtype, converts: bool
    ) -> Batch:
        params = [self.parameters.tensors[index] for index in indices]
        states = [self.moments.of(index) for index in indices]
        is_complex = params[0].is_complex()
        if is_complex:
            states = [[torch.view_as_real(tensor) for tensor in own] for own in states]
        return Batch(
            group_index,
            indices,
            params,
            [list(column) for column in zip(*states, strict=True)],
            [self.state.steps[index] for index in indices],
            converts,
            is_complex,
            kernel_unscales=grad_dtype == dtype and is_low_precision(dtype),
            is_whole=len(indices) == len(self.parameters),
        )

    def prepare(self) -> None:
        """See `Engine.prepare`."""
        records = self.parameters.records
        if records and records[0].param.device != self.device:
            raise ParametersMovedError
        if recorders:
            raise RuntimeError("record_launches() records kernels, and the cpu backend launches none")
        if self.state.must_evaluate:
            self.state.evaluate()
        if (self.parameters.is_sharded and self.parameters.shards_replaced()) or self.moments.layouts_changed():
            self._plans.clear()
        grads = self.parameters.grads()
        self._ready = self._plans.get(grads, self._build_plan), grads

    def compute_norm(self, grad_scale: Tensor | None, skip_if_nonfinite: bool) -> None:
        """See `Engine.compute_norm`."""
        assert self._ready is not None
        _, grads = self._ready
        if len(self.parameters.measured) != len(grads):
            grads = [grads[index] for index in self.parameters.measured]
        norm = float(total_norm([grad for grad in grads if grad is not None]))
        if grad_scale is not None:
            norm /= float(grad_scale)
        self.state.set_norm(norm, skip_if_nonfinite)

    def sum_of_squares(self, grad_scale: Tensor | None) -> Tensor:
        """See `Engine.sum_of_squares`."""
        return self.parameters.add_other_shares(self.state.live.grad_norm.square(), grad_scale)

    def set_sum_of_squares(self, total: Tensor, skip_if_nonfinite: bool) -> None:
        """See `Engine.set_sum_of_squares`."""
        self.state.set_norm(math.sqrt(float(total)), skip_if_nonfinite)

    def launch(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """See `Engine.launch`."""
        assert self._ready is not None
        (plan, grads), self._ready = self._ready, None
        state = self.state
        scale = 1.0 if grad_scale is None else float(grad_scale)
        skipped = state.overflow or (found_inf is not None and float(found_inf) != 0)
        if not skipped:
            state.count_updates(plan.active)
            factor = state.clip_coefficient / scale
            write_back = self._options.write_back_grads
            values, updates = state.next, self._updates
            for batch in plan.batches:
                params: Sequence[Tensor] = batch.params
                if factor == 1.0 and not batch.converts:
                    own_grads: Any = grads if batch.is_whole else batch.take(grads)
                    kernel_scale = None
                else:
                    own_grads, kernel_scale = batch.gradients(grads, factor, write_back)
                if batch.is_complex:
                    params = [torch.view_as_real(param) for param in params]
                    own_grads = [torch.view_as_real(grad) for grad in own_grads]
                index = batch.group_index
                updates[index](
                    params,
                    own_grads,
                    batch.states,
                    batch.steps,
                    *values[index],
                    state.weight_decay[index],
                    kernel_scale,
                )
            if self._options.averaging is not None:
                self._average(plan.averages)
        state.finish_step(scale, skipped, ticks=not skipped or self._options.advance_schedule_on_skip)

    def _average(self, averages: dict[int, tuple[list[Tensor], list[Tensor]]]) -> None:
        for index, weight in enumerate(self.state.count_averages()):
            if weight and index in averages:
                params, own = averages[index]
                if weight == 1.0:
                    # A lerp would keep a NaN.
                    torch._foreach_copy_(own, params)
                    continue
                torch._foreach_lerp_(own, [param.to(a.dtype) for param, a in zip(params, own, strict=True)], weight)

    def tick(self) -> None:
        """See `Engine.tick`."""
        self.state.tick()

    def retire(self) -> None:
        """See `Engine.retire`: the cpu backend has no captured launches."""
