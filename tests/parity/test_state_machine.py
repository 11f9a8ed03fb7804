"""Random sequences of what a training loop may do leave ours equal to a torch reference machine."""

from __future__ import annotations

import copy
import os
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fused_clr import testing
from fused_clr._device.engines import VARIABLE
from tests.cases import ADAM, OPTIMIZERS, SCHEDULES, OptimizerCase, ScheduleCase, momenta_of

SHAPES = ((3,), (2, 5), (17,), ())
LAST_STEP = 400


@cache
def torch_table(name: str) -> list[tuple[float, float]]:
    """The learning rates and momenta that torch's own pair goes through."""
    case = SCHEDULES[name]
    optimizer = ADAM.torch_peer([torch.nn.Parameter(torch.ones(1))])
    scheduler = case.torch_peer(optimizer, **case.of_group(0))
    values = []
    for _ in range(min(LAST_STEP, case.end) + 1):
        values.append((optimizer.param_groups[0]["lr"], momenta_of(optimizer.param_groups[0])[0]))
        optimizer.step()
        scheduler.step()
    # After its end, ours holds its last value.
    return values + values[-1:] * (LAST_STEP + 1 - len(values))


class Machine(RuleBasedStateMachine):
    """Ours and torch's optimizer over twin parameters; torch's numbers are set by hand from its scheduler's table."""

    backend = "cpu"

    @initialize(
        optimizer_case=st.sampled_from(list(OPTIMIZERS.values())),
        schedule_case=st.sampled_from(list(SCHEDULES.values())),
        max_grad_norm=st.sampled_from([None, 1.0]),
        advance_schedule_on_skip=st.booleans(),
        flag=st.booleans(),
    )
    def start(
        self,
        optimizer_case: OptimizerCase,
        schedule_case: ScheduleCase,
        max_grad_norm: float | None,
        advance_schedule_on_skip: bool,
        flag: bool,
    ) -> None:
        self.optimizer_case, self.schedule = optimizer_case, schedule_case.schedule()
        self.table = torch_table(schedule_case.name)
        self.environment = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = self.backend
        generator = torch.Generator().manual_seed(0)
        self.ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
        self.theirs = [torch.nn.Parameter(param.detach().clone()) for param in self.ours]
        flags = optimizer_case.options(flag)
        self.options = {"max_grad_norm": max_grad_norm, "advance_schedule_on_skip": advance_schedule_on_skip, **flags}
        self.optimizer = self.new_optimizer()
        self.reference = optimizer_case.torch_peer(self.theirs, **flags)
        self.step = self.applied = self.skipped = self.recorded = 0
        self.graph: testing.RecordedGraph | None = None
        self.static: list[torch.Tensor] = []

    def new_optimizer(self) -> Any:
        groups = [{"params": self.ours[: len(SHAPES)]}, *({"params": [param]} for param in self.ours[len(SHAPES) :])]
        return self.optimizer_case.ours(groups, schedule=self.schedule, **self.options)

    def teardown(self) -> None:
        if self.environment is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = self.environment

    def gradients(self, seed: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(param.shape, generator=generator) for param in self.theirs]

    def step_reference(self, gradients: list[torch.Tensor | None]) -> None:
        for param, gradient in zip(self.theirs, gradients, strict=True):
            param.grad = None if gradient is None else gradient.clone()
        if self.options["max_grad_norm"] is not None:
            torch.nn.utils.clip_grad_norm_(self.theirs, self.options["max_grad_norm"])
        lr, momentum = self.table[self.step]
        for group in self.reference.param_groups:
            group["lr"] = lr
            if "betas" in group:
                group["betas"] = momentum, group["betas"][1]
            elif self.schedule.drives_momentum:
                group["momentum"] = momentum
        self.reference.step()
        self.step += 1
        self.applied += 1
        self.recorded += 1

    @rule(seed=st.integers(0, 99), active=st.sets(st.integers(0, 5)), moved=st.booleans())
    def take_step(self, seed: int, active: set[int], moved: bool) -> None:
        gradients: list[Any] = [g if i in active else None for i, g in enumerate(self.gradients(seed))]
        for param, gradient in zip(self.ours, gradients, strict=True):
            if gradient is None or param.grad is None or moved:
                param.grad = None if gradient is None else gradient.clone()
            else:
                param.grad.copy_(gradient)
        self.optimizer.step()
        self.step_reference(gradients)

    @rule(found_inf=st.sampled_from([1.0, 2.0, float("inf")]))
    def skip(self, found_inf: float) -> None:
        self.optimizer.found_inf = torch.tensor(found_inf)
        for param, gradient in zip(self.ours, self.gradients(0), strict=True):
            param.grad = gradient * torch.inf
        self.optimizer.step()
        del self.optimizer.found_inf
        self.step += self.options["advance_schedule_on_skip"]
        self.skipped += 1
        self.recorded += 1

    @rule(step=st.integers(0, LAST_STEP // 2))
    def set_step(self, step: int) -> None:
        self.optimizer.set_schedule_step(step)
        self.step = step

    @precondition(lambda self: len(self.ours) < 6)
    @rule()
    def add_group(self) -> None:
        self.ours.append(torch.nn.Parameter(torch.ones(7)))
        self.theirs.append(torch.nn.Parameter(torch.ones(7)))
        self.optimizer.add_param_group({"params": [self.ours[-1]]})
        self.reference.add_param_group({"params": [self.theirs[-1]]})
        self.recorded = 0
        if self.graph is not None:
            self.optimizer._ready()
            with pytest.raises(RuntimeError, match="capture the step again"):
                self.optimizer.check_replay()
            self.graph.replay()
            assert self.optimizer.status().stale_replay
            self.graph = None

    @rule(fresh=st.booleans())
    def save_and_load(self, fresh: bool) -> None:
        saved = copy.deepcopy(self.optimizer.state_dict())
        if fresh:
            self.optimizer, self.graph = self.new_optimizer(), None
            self.applied = self.skipped = self.recorded = 0
        self.optimizer.load_state_dict(saved)

    @rule(value=st.sampled_from([0.0, 0.1]))
    def set_weight_decay(self, value: float) -> None:
        for optimizer in (self.optimizer, self.reference):
            optimizer.param_groups[0]["weight_decay"] = value

    @rule(seed=st.integers(0, 99))
    def record(self, seed: int) -> None:
        if self.backend == "cpu":
            return
        gradients = self.gradients(seed)
        for param, gradient in zip(self.ours, gradients, strict=True):
            param.grad = gradient.clone()
        with testing.record_launches() as self.graph:
            self.optimizer.step()
        self.static = [param.grad for param in self.ours]
        self.step_reference(list(gradients))

    @precondition(lambda self: getattr(self, "graph", None) is not None)
    @rule(seed=st.integers(0, 99))
    def replay(self, seed: int) -> None:
        gradients = self.gradients(seed)
        for param, static, gradient in zip(self.ours, self.static, gradients, strict=True):
            static.copy_(gradient)
            param.grad = static
        self.optimizer.check_replay()
        self.graph.replay()
        self.step_reference(list(gradients))

    @invariant()
    def both_agree(self) -> None:
        if not hasattr(self, "optimizer"):
            return
        assert self.optimizer.status().schedule_step == self.step
        assert [group["lr"] for group in self.optimizer.param_groups] == pytest.approx(
            [self.table[self.step][0]] * len(self.optimizer.param_groups), rel=1e-12
        )
        assert (int(self.optimizer.live.applied_steps), int(self.optimizer.live.skipped_steps)) == (
            self.applied,
            self.skipped,
        )
        assert len(self.optimizer.history().skipped) == min(self.recorded, 256)
        for mine, torchs in zip(self.ours, self.theirs, strict=True):
            # As in tolerances.py: a few float32 roundings a step, magnified where the second moment is small.
            torch.testing.assert_close(mine, torchs, rtol=5e-5, atol=5e-6)
            if "step" in self.reference.state.get(torchs, {}):
                assert self.optimizer.state[mine]["step"] == self.reference.state[torchs]["step"]


class TritonMachine(Machine):
    backend = "triton"


TestOnCpu = Machine.TestCase
TestOnTriton = TritonMachine.TestCase
TestOnCpu.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestOnTriton.settings = settings(max_examples=4, stateful_step_count=30, deadline=None)
