"""The cpu backend: torch's own fused CPU kernel, called with cached lists and the schedule's host closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..hyperparameters import Hyperparameters, same_layout
from ..schedules import Cyclic
from ..telemetry import HISTORY_COLUMNS, LR, MOMENTUM, History, Status, ordered_history
from .capture import EngineCapture
from .engine import DevicesChangedError, Engine
from .launch import recorders

# As `torch.nn.utils.clip_grad_norm_`.
CLIP_EPS = 1e-6


class Bounds(NamedTuple):
    """What a group's schedule makes of its wave; ``momentum_span`` is None where beta1 stays what it is."""

    group_index: int
    base_lr: float
    lr_span: float
    max_momentum: float
    momentum_span: float | None


@dataclass
class Batch:
    """Tensors of one group, parameter dtype and gradient layout: the lists of one call of torch's kernel."""

    group_index: int
    indices: list[int]
    params: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    # The gradients must be copied into the parameters' dtype and layout first.
    converts: bool
    is_complex: bool

    def __post_init__(self) -> None:
        first, *rest = self.indices
        # Gives a tuple, and for one index alone what stands there.
        self.take: Any = itemgetter(first, *rest) if rest else itemgetter(slice(first, first + 1))

    def gradients(
        self, grads: Sequence[Tensor | None], factor: float, store: bool
    ) -> tuple[Tensor, ...] | list[Tensor]:
        """This batch's gradients, as torch's kernel wants them.

        Args:
            grads: One entry per parameter of the engine.
            factor: What they are multiplied by.
            store: Multiply the given ones, and not copies.
        """
        own: tuple[Tensor, ...] | list[Tensor] = self.take(grads)
        if factor == 1.0 and not self.converts:
            return own
        if factor != 1.0:
            if store:
                torch._foreach_mul_(own, factor)
            else:
                own = torch._foreach_mul(own, factor)
        if self.converts:
            own = [torch.empty_like(param).copy_(grad) for param, grad in zip(self.params, own, strict=True)]
        return own


@dataclass
class CpuPlan:
    """The batches of a step, and the steps of all their tensors."""

    batches: list[Batch]
    # None: all of the engine's tensors are updated, and the mirror counts in one call.
    steps: list[Tensor] | None


class CpuEngine(Engine[CpuPlan]):
    """Steps parameters on the CPU. Arguments as for `Engine`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        num_groups = len(self.hyperparameters)
        self.live_lr = torch.zeros(num_groups, dtype=torch.float64)
        self.live_beta1 = torch.zeros(num_groups, dtype=torch.float64)
        # Writes through numpy cost a tenth of a torch call.
        self._live_lr, self._live_beta1 = self.live_lr.numpy(), self.live_beta1.numpy()
        self.grad_norm = torch.tensor(math.nan, dtype=torch.float64)
        self.applied_steps, self.skipped_steps = counts = torch.zeros(2, dtype=torch.int64)
        self._counts = counts.numpy()
        self._history = np.zeros((self.options.history_size, num_groups, HISTORY_COLUMNS))
        self._max_grad_norm = self.options.max_grad_norm
        self._clip_coefficient, self._overflow = 1.0, False
        self._grads: list[Tensor | None] = []
        self._sort_schedules()
        self._evaluate()
        self._applied = self._next

    def _sort_schedules(self) -> None:
        """Finds the groups whose schedules differ in their bounds alone: their triangle is evaluated once."""
        self._has_tensor_lr = any(h.schedule is None and isinstance(h.lr, Tensor) for h in self.hyperparameters)
        waves: dict[Any, tuple[Cyclic, list[Bounds]]] = {}
        self._constants = []
        for index, h in enumerate(self.hyperparameters):
            if h.schedule is None:
                self._constants.append((index, h.lr, h.beta1))
                continue
            s = h.schedule
            momenta = (s.max_momentum, s.max_momentum - s.base_momentum) if s.cycle_momentum else (h.beta1, None)
            waves.setdefault(s.wave, (s, []))[1].append(Bounds(index, s.base_lr, s.max_lr - s.base_lr, *momenta))
        self._waves = list(waves.values())

    def _evaluate(self) -> None:
        """Evaluates every group's schedule at the present step, for the next update."""
        lrs, beta1s = [0.0] * len(self.hyperparameters), [0.0] * len(self.hyperparameters)
        for index, lr, beta1 in self._constants:
            lrs[index], beta1s[index] = float(lr), beta1
        for schedule, members in self._waves:
            height, scale = schedule.height_and_scale(self.host_step)
            for index, base_lr, lr_span, max_momentum, momentum_span in members:
                # The operations of `Cyclic.lr_and_momentum`, in its order.
                lrs[index] = base_lr + lr_span * height * scale
                beta1s[index] = max_momentum if momentum_span is None else max_momentum - momentum_span * height * scale
        self._next = list(zip(lrs, beta1s, strict=True))
        self._live_lr[:] = lrs
        self._live_beta1[:] = beta1s

    def build_plan(self, grads: Sequence[Tensor | None]) -> CpuPlan:
        """Sorts the tensors into batches. See `Engine.build_plan`."""
        batches: dict[Any, list[int]] = {}
        active = [index for index, grad in enumerate(grads) if grad is not None]
        for index in active:
            record, grad = self.records[index], grads[index]
            assert grad is not None
            if grad.numel():
                param = self.params[index]
                converts = grad.dtype != param.dtype or not same_layout(grad, param) or grad.is_conj() or grad.is_neg()
                batches.setdefault((record.group_index, param.dtype, converts), []).append(index)
        return CpuPlan(
            [self._batch(group_index, indices, converts) for (group_index, _, converts), indices in batches.items()],
            None if len(active) == len(self.records) else [self.step_mirror[index] for index in active],
        )

    def _batch(self, group_index: int, indices: list[int], converts: bool) -> Batch:
        params = [self.params[index] for index in indices]
        is_complex = params[0].is_complex()
        as_real = torch.view_as_real if is_complex else _same

        def moments(key: str) -> list[Tensor]:
            return [as_real(self.moment(index, key)) for index in indices]

        return Batch(
            group_index,
            indices,
            params,
            moments("exp_avg"),
            moments("exp_avg_sq"),
            moments("max_exp_avg_sq") if self.hyperparameters[group_index].amsgrad else [],
            [self.step_mirror[index] for index in indices],
            converts,
            is_complex,
        )

    def prepare(self) -> EngineCapture | None:
        """See `Engine.prepare`."""
        if self.records and self.records[0].param.device != self.device:
            raise DevicesChangedError
        if recorders:
            raise RuntimeError("record_launches() records kernels, and the cpu backend launches none")
        if self._has_tensor_lr:
            self._evaluate()
        self._grads = self.read_grads()
        self.plan_for(self._grads)
        return None

    def measure(self, grad_scale: Tensor | None, skip_nonfinite: bool) -> None:
        """See `Engine.measure`."""
        grads = self._grads if len(self.measured) == len(self._grads) else [self._grads[i] for i in self.measured]
        norm = float(torch.nn.utils.get_total_norm([grad for grad in grads if grad is not None]))
        if grad_scale is not None:
            norm /= float(grad_scale)
        self._set_norm(norm, skip_nonfinite)

    def _set_norm(self, norm: float, skip_nonfinite: bool) -> None:
        assert self._max_grad_norm is not None
        self.grad_norm.fill_(norm)
        ratio = self._max_grad_norm / (norm + CLIP_EPS)
        # A comparison and not a minimum, which would drop a NaN.
        self._clip_coefficient = 1.0 if ratio > 1.0 else ratio
        self._overflow = skip_nonfinite and not math.isfinite(norm)

    def launch(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """See `Engine.launch`."""
        grads, self._grads = self._grads, []
        scale = 1.0 if grad_scale is None else float(grad_scale)
        skipped = self._overflow or (found_inf is not None and float(found_inf) != 0)
        if len(self._history):
            self._record(scale, skipped)
        self._counts[int(skipped)] += 1
        if not skipped:
            plan = self._plan
            assert plan is not None
            if plan.steps is None:
                self.step_mirror.add_(1)
            elif plan.steps:
                torch._foreach_add_(plan.steps, 1)
            factor = self._clip_coefficient / scale
            store_grads = self.options.store_grads
            for batch in plan.batches:
                self._update(batch, batch.gradients(grads, factor, store_grads))
        if not skipped or self.options.advance_on_skip:
            self.tick()

    def _record(self, grad_scale: float, skipped: bool) -> None:
        """Writes a row of the history, of what this step applies."""
        entry = int(self._counts[0] + self._counts[1])
        row = self._history[entry % len(self._history)]
        row[:, :LR] = entry + 1, self.host_step
        row[:, LR] = self._live_lr
        row[:, MOMENTUM] = self._live_beta1
        row[:, MOMENTUM + 1 :] = float(self.grad_norm), self._clip_coefficient, grad_scale, skipped

    def _update(self, batch: Batch, grads: Sequence[Tensor]) -> None:
        _, _, beta2, eps, weight_decay, amsgrad, maximize, decoupled, _ = self.hyperparameters[batch.group_index]
        lr, beta1 = self._next[batch.group_index]
        params: Sequence[Tensor] = batch.params
        if batch.is_complex:
            params, grads = [torch.view_as_real(p) for p in params], [torch.view_as_real(g) for g in grads]
        function: Any = torch._fused_adamw_ if decoupled else torch._fused_adam_
        function(
            params,
            grads,
            batch.exp_avgs,
            batch.exp_avg_sqs,
            batch.max_exp_avg_sqs,
            batch.steps,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=amsgrad,
            maximize=maximize,
        )

    def tick(self) -> None:
        """See `Engine.tick`."""
        self.host_step += 1
        self._applied = self._next
        self._evaluate()

    def set_hyperparameters(self, hyperparameters: Sequence[Hyperparameters]) -> None:
        """See `Engine.set_hyperparameters`."""
        if [h.amsgrad for h in hyperparameters] != [h.amsgrad for h in self.hyperparameters]:
            self.drop_plans()
        self.hyperparameters = list(hyperparameters)
        self._sort_schedules()
        self._evaluate()

    def read_lr_and_beta1(self, group_index: int, applied: bool) -> tuple[float, float]:
        """See `Engine.read_lr_and_beta1`."""
        return (self._applied if applied else self._next)[group_index]

    def get_schedule_step(self) -> int:
        """See `Engine.get_schedule_step`."""
        return self.host_step

    def set_schedule_step(self, step: int) -> None:
        """See `Engine.set_schedule_step`."""
        self.host_step = step
        self._evaluate()

    def get_update_steps(self) -> list[int]:
        """See `Engine.get_update_steps`."""
        return [int(step) for step in self.step_mirror.tolist()]

    def set_update_steps(self, steps: Sequence[int]) -> None:
        """See `Engine.set_update_steps`."""
        self.step_mirror.copy_(torch.tensor(list(steps), dtype=torch.float32))

    def get_measured_sum(self) -> Tensor:
        """See `Engine.get_measured_sum`."""
        return self.grad_norm.square()

    def set_sum_of_squares(self, total: Tensor, skip_nonfinite: bool) -> None:
        """See `Engine.set_sum_of_squares`."""
        self._set_norm(math.sqrt(float(total)), skip_nonfinite)

    def set_max_grad_norm(self, max_grad_norm: float) -> None:
        """See `Engine.set_max_grad_norm`."""
        self._max_grad_norm = max_grad_norm

    def copy_status(self) -> Tensor:
        """See `Engine.copy_status`: there is nothing to wait for."""
        return torch.empty(0, dtype=torch.int64)

    def parse_status(self, words: Tensor) -> Status:
        """See `Engine.parse_status`."""
        del words
        return Status(
            self.host_step,
            self._live_lr.copy(),
            self._live_beta1.copy(),
            float(self.grad_norm),
            int(self._counts[0]),
            int(self._counts[1]),
            False,
        )

    def read_history(self, count: int) -> History:
        """See `Engine.read_history`."""
        return ordered_history(self._history, count)

    def get_counts(self) -> tuple[int, int]:
        """See `Engine.get_counts`."""
        return int(self._counts[0]), int(self._counts[1])

    def set_counts(self, applied_steps: int, skipped_steps: int) -> None:
        """See `Engine.set_counts`."""
        self._counts[:] = applied_steps, skipped_steps


def _same(tensor: Tensor) -> Tensor:
    return tensor
