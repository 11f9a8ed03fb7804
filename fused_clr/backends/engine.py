"""What the backends share: the tensors of one device, their Adam state, and which of them a step updates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..hyperparameters import Hyperparameters, StepOptions, check_gradient, same_layout
from ..sharding import is_dtensor, local_gradient, local_tensor, norm_shares, placement_of, sum_over
from ..telemetry import History, Status
from ..watched import OptimizerState
from .capture import EngineCapture
from .layout_guard import LayoutGuard

Plan = TypeVar("Plan")

read_grad = attrgetter("grad")

# Sets of gradients whose plans are kept; a training loop has one or a few.
MAX_PLANS = 32


class TensorRecord(NamedTuple):
    """One parameter: what it is called in messages, and its group."""

    name: str
    param: Tensor
    group_index: int


class DevicesChangedError(Exception):
    """A parameter has left this engine's device, or is sharded anew; the optimizer must sort its parameters anew."""


def moment_names(amsgrad: bool) -> tuple[str, ...]:
    """Keys of the state tensors that have the parameter's shape."""
    return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if amsgrad else ("exp_avg", "exp_avg_sq")


class Engine(ABC, Generic[Plan]):
    """Runs the steps of all parameters on one device, and their schedule's clock.

    Args:
        device: Where the parameters are.
        records: The parameters, in the order of ``optimizer.param_groups``.
        state: ``optimizer.state``.
        hyperparameters: One entry per param group, also of groups with no parameter here.
        options: What holds for all groups.
        schedule_step: Where the clock starts.
        update_steps: Updates each parameter got so far.
    """

    # Live tensors. float64[num_groups]: what the next step applies.
    live_lr: Tensor
    live_beta1: Tensor
    # float64[], int64[], int64[].
    grad_norm: Tensor
    applied_steps: Tensor
    skipped_steps: Tensor

    def __init__(
        self,
        device: torch.device,
        records: Sequence[TensorRecord],
        state: OptimizerState,
        hyperparameters: Sequence[Hyperparameters],
        options: StepOptions,
        schedule_step: int,
        update_steps: Sequence[int],
    ) -> None:
        self.device = device
        self.records = list(records)
        # What a step writes: of a sharded parameter, the shard in this process.
        self.params = [local_tensor(record.param) for record in records]
        self.is_sharded = any(is_dtensor(record.param) for record in records)
        self._norm_shares = norm_shares([record.param for record in records])
        self.state = state
        # The clock as far as the host knows it: replays and skips happen behind its back.
        self.host_step = schedule_step
        self.hyperparameters = list(hyperparameters)
        self.options = options
        # Updates per tensor as users see them, ``state[p]["step"]``, each a 0-dim view.
        self.step_mirror = torch.tensor(list(update_steps), dtype=torch.float32, device=device)
        for view, record in zip(self.step_mirror, self.records, strict=True):
            if state.get(record.param):
                dict.__setitem__(state[record.param], "step", view)
        # Where a parameter's grad_dtype is None, its gradient's dtype does not tell its own.
        self._grad_dtypes_vary = any(getattr(r.param, "grad_dtype", r.param.dtype) is None for r in self.records)
        self._has_complex = any(param.is_complex() for param in self.params)
        self.drop_plans()

    # What a backend provides.
    @abstractmethod
    def build_plan(self, grads: Sequence[Tensor | None]) -> Plan:
        """Plans the update of the parameters whose gradient is not None."""

    @abstractmethod
    def prepare(self) -> EngineCapture | None:
        """Readies the next launch. Every error a user can cause is raised here, before anything has changed.

        Returns:
            What a captured or recorded step assumes; None for an eager one.
        """

    @abstractmethod
    def measure(self, grad_scale: Tensor | None, skip_nonfinite: bool) -> None:
        """Computes the norm of the gradients that `prepare` found and `measured` names, and their clip coefficient.

        Args:
            grad_scale: The loss scale.
            skip_nonfinite: A norm that is not finite makes `launch` skip.
        """

    @abstractmethod
    def launch(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Updates what `prepare` found, and ticks; neither where ``found_inf`` or an overflow says so."""

    @abstractmethod
    def get_measured_sum(self) -> Tensor:
        """float64[], the square of the norm that `measure` found."""

    @abstractmethod
    def set_sum_of_squares(self, total: Tensor, skip_nonfinite: bool) -> None:
        """Makes the norm that of several devices' gradients."""

    @abstractmethod
    def tick(self) -> None:
        """Advances the schedule alone."""

    @abstractmethod
    def set_hyperparameters(self, hyperparameters: Sequence[Hyperparameters]) -> None:
        """Takes new hyperparameters and schedules, in place."""

    @abstractmethod
    def read_lr_and_beta1(self, group_index: int, applied: bool) -> tuple[float, float]:
        """The present values of a group: what the last step applied, or what the next one will."""

    @abstractmethod
    def get_schedule_step(self) -> int:
        """Reads the clock."""

    @abstractmethod
    def set_schedule_step(self, step: int) -> None:
        """Sets the clock, in place."""

    @abstractmethod
    def get_update_steps(self) -> list[int]:
        """Reads how many updates each parameter got."""

    @abstractmethod
    def set_update_steps(self, steps: Sequence[int]) -> None:
        """Sets how many updates each parameter got, in place."""

    @abstractmethod
    def set_max_grad_norm(self, max_grad_norm: float) -> None:
        """Takes a new limit, in place."""

    @abstractmethod
    def copy_status(self) -> Tensor:
        """Sends for the engine's status without waiting for it; `parse_status` reads what has arrived."""

    @abstractmethod
    def parse_status(self, words: Tensor) -> Status:
        """Reads what `copy_status` gave."""

    @abstractmethod
    def read_history(self, count: int) -> History:
        """The latest steps, in one copy."""

    @abstractmethod
    def get_counts(self) -> tuple[int, int]:
        """Reads how many steps were applied and skipped."""

    @abstractmethod
    def set_counts(self, applied_steps: int, skipped_steps: int) -> None:
        """Sets how many were, in place; and the history then starts anew."""

    def refresh(self) -> None:
        """Takes over what was written in place, which nobody watches."""

    def get_stale_replay(self) -> bool:
        """Whether a captured launch was replayed that no longer fits."""
        return False

    def get_schedule_exhausted(self) -> bool:
        """Whether a tabulated scale_fn has no value left for the next step."""
        return False

    def retire(self) -> None:
        """Makes launches that were captured from this engine do nothing, since another engine takes its place."""

    # What they share.
    def read_grads(self) -> list[Tensor | None]:
        """The gradients, one entry per parameter: of a sharded one, what lies in this process."""
        if not self.is_sharded:
            return list(map(read_grad, self.params))
        params = [local_tensor(record.param) for record in self.records]
        if any(now is not then for now, then in zip(params, self.params, strict=True)):
            if any(now.shape != then.shape for now, then in zip(params, self.params, strict=True)):
                raise DevicesChangedError
            self.params = params
            self.drop_plans()
        grads = [record.param.grad for record in self.records]
        return [g if g is None else local_gradient(r.param, g) for r, g in zip(self.records, grads, strict=True)]

    def moment(self, index: int, key: str) -> Tensor:
        """A parameter's state tensor, in this process."""
        return local_tensor(self.state[self.records[index].param][key])

    @property
    def measured(self) -> list[int]:
        """Which gradients `measure` takes: the first of those that lie in the same processes."""
        return self._norm_shares[0].indices if self._norm_shares else []

    def sum_of_squares(self, grad_scale: Tensor | None) -> Tensor:
        """float64[], over all gradients and all processes that hold shards of them. After `measure`."""
        if not self._norm_shares:
            return self.get_measured_sum()
        total = sum_over(self._norm_shares[0].process_groups, self.get_measured_sum())
        grads = self.read_grads() if len(self._norm_shares) > 1 else []
        for share in self._norm_shares[1:]:
            present = [grad for grad in (grads[index] for index in share.indices) if grad is not None]
            norm = torch.nn.utils.get_total_norm(present).to(self.device, torch.float64)
            if grad_scale is not None:
                norm = norm / grad_scale.to(self.device)
            total = total + sum_over(share.process_groups, norm.square())
        return total

    def drop_plans(self) -> None:
        """Forgets all plans: the state tensors may be others than before."""
        self._plans: dict[Any, tuple[Plan, LayoutGuard]] = {}
        self._plan: Plan | None = None
        self._guard = LayoutGuard([])

    def refuse_new_plan(self, names: Sequence[str]) -> None:
        """Raises where a plan must not be made: during capture.

        Args:
            names: Parameters whose state tensors would have to be made.
        """

    def plan_for(self, grads: list[Tensor | None]) -> Plan:
        """The plan for these gradients: the last one, one from the cache, or a new one.

        Args:
            grads: One entry per parameter; None where it has none.

        Raises:
            RuntimeError: A gradient cannot update its parameter; the message names it.
            DevicesChangedError: A parameter has moved.
        """
        if self._plan is not None and not self._grad_dtypes_vary and self._guard.matches(grads):
            return self._plan
        key = self._layout_of(grads)
        plan, guard = self._plans.get(key, (None, None)) if key is not None else (None, None)
        if plan is None:
            plan = self._new_plan(grads)
            if len(self._plans) >= MAX_PLANS:
                self._plans.pop(next(iter(self._plans)))
        # Asked in vain, it was made in another state of torch's dispatcher: an autocast region, say.
        if guard is None or guard is self._guard:
            guard = LayoutGuard(grads)
        self._plans[key] = plan, guard
        self._plan, self._guard = plan, guard
        return plan

    def _layout_of(self, grads: list[Tensor | None]) -> tuple[Any, ...] | None:
        """Whatever makes a plan another; None for gradients that no plan can be for."""
        try:
            layout: list[Any] = [g if g is None else g.stride() for g in grads]
        except RuntimeError:
            # Sparse tensors have no strides; the checks of a new plan name them.
            return None
        # A model may be cast between steps, and its gradients with it.
        layout += [g if g is None else g.dtype for g in grads]
        if self._grad_dtypes_vary:
            layout += [param.dtype for param in self.params]
        if self._has_complex:
            # Both bits mean that memory does not hold what the tensor says.
            layout += [g if g is None else (g.is_conj(), g.is_neg()) for g in grads]
        return tuple(layout)

    def _new_plan(self, grads: Sequence[Tensor | None]) -> Plan:
        if any(param.device != self.device for param in self.params):
            raise DevicesChangedError
        active = [record for record, grad in zip(self.records, grads, strict=True) if grad is not None]
        for record, param, grad in zip(self.records, self.params, grads, strict=True):
            if grad is not None:
                check_gradient(record.name, param, grad)
                self.check_state(record)
        self.refuse_new_plan([record.name for record in active if self._lacks_state(record)])
        replaced = [self.prepare_state(index) for index, grad in enumerate(grads) if grad is not None]
        if any(replaced):
            # Other plans hold the moments that were replaced.
            self.drop_plans()
        return self.build_plan(grads)

    def _lacks_state(self, record: TensorRecord) -> bool:
        state = self.state.get(record.param) or {}
        return not set(moment_names(self.hyperparameters[record.group_index].amsgrad)) <= set(state)

    def check_state(self, record: TensorRecord) -> None:
        """Checks state tensors that a user may have put in place.

        Raises:
            ValueError: One is of no use; the message names it.
        """
        state = self.state.get(record.param) or {}
        for key in moment_names(self.hyperparameters[record.group_index].amsgrad):
            value = state.get(key)
            if value is not None and getattr(value, "shape", None) != record.param.shape:
                raise ValueError(
                    f"state[{key!r}] of {record.name} must be a tensor of shape {tuple(record.param.shape)}, got "
                    f"{tuple(value.shape) if isinstance(value, Tensor) else repr(value)}"
                )
            if value is not None and placement_of(value) != placement_of(record.param):
                raise ValueError(
                    f"state[{key!r}] of {record.name} must be sharded as the parameter is, "
                    f"{placement_of(record.param)}, got {placement_of(value)}"
                )

    def prepare_state(self, index: int) -> bool:
        """Creates the state tensors that a parameter lacks; gives the others its dtype, device and layout.

        Returns:
            Whether one that was there has been replaced.
        """
        replaced = False
        record = self.records[index]
        param, state = record.param, self.state[record.param]
        # Written past the watch: these are the engine's own doing and no news to it.
        if "step" not in state:
            dict.__setitem__(state, "step", self.step_mirror[index])
        for key in moment_names(self.hyperparameters[record.group_index].amsgrad):
            value = state.get(key)
            if value is None:
                value = torch.zeros_like(param, memory_format=torch.preserve_format, requires_grad=False)
            elif (
                value.dtype != param.dtype
                or value.device != param.device
                or not same_layout(local_tensor(value), self.params[index])
            ):
                value = torch.empty_like(param, requires_grad=False).copy_(value)
                replaced = True
            dict.__setitem__(state, key, value)
        return replaced

    def adopt_state(self) -> None:
        """Takes over what a user wrote into ``optimizer.state``: steps at once, moments when they are next used."""
        steps = self.get_update_steps()
        for index, (view, record) in enumerate(zip(self.step_mirror, self.records, strict=True)):
            state = self.state.get(record.param)
            step = state.get("step") if state else None
            if state is None or step is None:
                steps[index] = 0
            elif not (isinstance(step, Tensor) and step.data_ptr() == view.data_ptr()):
                steps[index] = int(step)
                dict.__setitem__(state, "step", view)
        self.set_update_steps(steps)
        self.drop_plans()
