"""What is SGD's own, against `torch.optim.SGD`: when a momentum buffer begins, and what is saved of it."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.optim import SGD, lr_scheduler

from fused_clr import CyclicLR, FusedSGD, OneCycleLR, testing
from fused_clr.schedules import Constant, Cyclic, Schedule
from tests.helpers.tolerances import AFTER_STEPS

pytestmark = pytest.mark.usefixtures("backend")

DAMPED = {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}


class Twins:
    """Ours and torch's over two tensors, with equal gradients."""

    def __init__(self, **arguments: Any) -> None:
        self.params, self.torchs = ([torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (40, 7)] for _ in range(2))
        self.ours, self.theirs = FusedSGD(self.params, **arguments), SGD(self.torchs, foreach=False, **arguments)
        self.number = 0

    def step(self, active: tuple[int, ...] = (0, 1), overflow: float = 0.0) -> None:
        """One step of both; an overflow skips it."""
        self.number += 1
        generator = torch.Generator().manual_seed(self.number)
        for index, pair in enumerate(zip(self.params, self.torchs, strict=True)):
            gradient = torch.randn(pair[0].shape, generator=generator)
            for param in pair:
                param.grad = gradient.clone() if index in active else None
        self.ours.grad_scale, self.ours.found_inf = torch.ones(()), torch.tensor(overflow)
        self.ours.step()
        del self.ours.grad_scale, self.ours.found_inf
        if not overflow:
            self.theirs.step()

    def assert_same(self) -> None:
        tolerance = AFTER_STEPS[torch.float32]
        for mine, theirs in zip(self.params, self.torchs, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=tolerance.rtol, atol=tolerance.atol)

    def saved(self) -> tuple[Any, Any]:
        return copy.deepcopy(self.ours.state_dict()), copy.deepcopy(self.theirs.state_dict())

    def load(self, state: Any) -> None:
        for optimizer in (self.ours, self.theirs):
            optimizer.load_state_dict(copy.deepcopy(state))


def test_the_first_update_of_each_tensor_is_not_dampened() -> None:
    twins = Twins(**DAMPED)
    twins.step(active=(0,))
    twins.step(overflow=1.0)
    for _ in range(3):
        twins.step()
        twins.assert_same()


def test_a_momentum_that_is_set_later_begins_then() -> None:
    twins = Twins(lr=0.1, dampening=0.3)
    for momentum in (0.0, 0.0, 0.9, 0.9, 0.0, 0.0, 0.8, 0.8):
        for optimizer in (twins.ours, twins.theirs):
            optimizer.param_groups[0]["momentum"] = momentum
        twins.step()
        twins.assert_same()


@pytest.mark.parametrize("way", ["pickle", "checkpoint", "torchs-checkpoint"])
@pytest.mark.parametrize("steps", [0, 2])
def test_what_has_begun_is_saved(way: str, steps: int) -> None:
    """Of no tensor, and of one of the two: another, which a skipped step has given a buffer of zeros, is not."""
    twins = Twins(**DAMPED)
    for _ in range(steps):
        twins.step(active=(0,))
    twins.step(overflow=1.0)
    ours, theirs = twins.saved()
    assert ours["state"].keys() == theirs["state"].keys()
    if way == "pickle":
        twins.ours, twins.params = copy.deepcopy((twins.ours, twins.params))
    else:
        twins.load(ours if way == "checkpoint" else theirs)
    for _ in range(2):
        twins.step()
        twins.assert_same()


def test_torchs_checkpoints_of_buffers_that_are_none() -> None:
    twins = Twins(**DAMPED)
    twins.step()
    saved = twins.saved()[1]
    saved["state"][1]["momentum_buffer"] = None
    twins.load(saved)
    twins.step()
    twins.assert_same()


def test_a_buffer_that_a_user_writes_has_begun() -> None:
    twins = Twins(**DAMPED)
    # Leaves buffers of zeros, which have not.
    twins.step(overflow=1.0)
    for optimizer, params in ((twins.ours, twins.params), (twins.theirs, twins.torchs)):
        optimizer.state[params[0]]["momentum_buffer"] = torch.ones(40)
    twins.step()
    twins.assert_same()
    for optimizer, params in ((twins.ours, twins.params), (twins.theirs, twins.torchs)):
        del optimizer.state[params[0]]
    twins.step()
    twins.assert_same()


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_cycle_through_a_momentum_of_zero(nesterov: bool) -> None:
    twins = Twins(lr=0.1, momentum=0.9, nesterov=nesterov)
    cycle = {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 2, "base_momentum": 0.0}
    schedulers = CyclicLR(twins.ours, **cycle), lr_scheduler.CyclicLR(twins.theirs, **cycle)
    for number in range(8):
        twins.step()
        assert twins.ours.param_groups[0]["momentum"] == pytest.approx((0.9, 0.45, 0.0, 0.45)[number % 4], abs=1e-12)
        for scheduler in schedulers:
            scheduler.step()
        twins.assert_same()
        for mine, theirs in zip(twins.params, twins.torchs, strict=True):
            torch.testing.assert_close(
                twins.ours.state[mine]["momentum_buffer"], twins.theirs.state[theirs]["momentum_buffer"]
            )


def test_dampening_and_a_scheduled_momentum_of_zero_are_refused() -> None:
    twins = Twins(**DAMPED)
    twins.ours.set_schedule(Cyclic(0.01, 0.1, 2, base_momentum=0.0))
    with pytest.raises(ValueError, match="dampening must be 0 where a schedule sets the momentum to 0, got 0.3"):
        twins.step()
    twins.ours.param_groups[0]["dampening"] = 0.0
    twins.step()


def test_no_momentum_no_state() -> None:
    twins = Twins(lr=0.1, weight_decay=0.1)
    twins.step()
    twins.assert_same()
    assert len(twins.ours.state) == 0
    assert twins.ours.state_dict()["state"] == {}


@pytest.mark.parametrize("arguments", [{}, {"momentum": 0.9, "dampening": 0.1}], ids=str)
def test_nesterov_needs_momentum(arguments: dict[str, Any]) -> None:
    param = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="nesterov must be False without momentum or with dampening, got momentum="):
        FusedSGD([param], nesterov=True, **arguments)
    FusedSGD([param], nesterov=True, schedule=Cyclic(0.01, 0.1, 2))


@pytest.mark.parametrize("arguments", [{"momentum": -0.1}, {"dampening": float("nan")}, {"nesterov": 1}], ids=str)
def test_bad_arguments(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be"):
        FusedSGD([torch.nn.Parameter(torch.ones(2))], **arguments)


@pytest.mark.parametrize(("momentum", "warns"), [(0.0, False), (0.9, False), (0.5, True)])
def test_a_chosen_momentum_that_a_schedule_overrides(momentum: float, warns: bool) -> None:
    context = (
        pytest.warns(UserWarning, match=r"momentum 0.5 \(momentum\) with 0.85 to 0.95") if warns else nullcontext()
    )
    with context:
        OneCycleLR(FusedSGD([torch.nn.Parameter(torch.ones(2))], momentum=momentum), 0.1, total_steps=9)


@pytest.mark.parametrize("schedule", [Cyclic(0.01, 0.1, 5), Constant(0.1)], ids=["cyclic", "constant"])
def test_a_checkpoint_that_torchs_pair_has_trained_on(schedule: Schedule) -> None:
    """It carries our schedule along as it was: the learning rate tells, since no updates are saved."""
    param = torch.nn.Parameter(torch.ones(3))
    ours, theirs = FusedSGD([param], momentum=0.9, schedule=schedule), SGD([param], momentum=0.9)
    param.grad = torch.ones(3)
    ours.step()
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert ours.status().schedule_step == 1
    theirs.param_groups[0]["lr"] = 0.07
    ours.set_schedule_step(4)
    with pytest.warns(UserWarning, match="has old schedules, since another optimizer .* they are not loaded"):
        ours.load_state_dict(theirs.state_dict())
    assert ours.status().schedule_step == 4


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_replays_follow_a_cycled_momentum() -> None:
    twins = Twins(lr=0.1, momentum=0.9)
    cycle = {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3, "step_size_down": 2}
    CyclicLR(twins.ours, **cycle)
    scheduler = lr_scheduler.CyclicLR(twins.theirs, **cycle)
    for param in (*twins.params, *twins.torchs):
        param.grad = torch.full_like(param, 0.5)
    with testing.record_launches() as graph:
        twins.ours.step()
    for number in range(12):
        if number:
            graph.replay()
        twins.theirs.step()
        scheduler.step()
        twins.assert_same()
    assert len(graph) == 1


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize(("before", "after"), [(0.9, 0.0), (0.0, 0.9)])
def test_a_captured_step_does_not_fit_a_momentum_that_began_or_ended(before: float, after: float) -> None:
    twins = Twins(lr=0.1, momentum=before)
    for param in twins.params:
        param.grad = torch.ones_like(param)
    with testing.record_launches():
        twins.ours.step()
    twins.ours.param_groups[0]["momentum"] = after
    with pytest.raises(RuntimeError, match="whether an SGD group has momentum changed"):
        twins.ours.check_replay()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_gradients_are_unscaled_and_stored(dtype: torch.dtype) -> None:
    param = torch.nn.Parameter(torch.linspace(-1, 1, 64).to(dtype))
    gradient = torch.linspace(1, 2, 64).to(dtype)
    expected = (param.detach().float() - 0.1 * gradient.float() / 4).to(dtype)
    optimizer = FusedSGD([param], lr=0.1, momentum=0.9, write_back_grads=True)
    param.grad = gradient.clone()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    optimizer.step()
    torch.testing.assert_close(param.detach(), expected, rtol=AFTER_STEPS[dtype].rtol, atol=0)
    assert torch.equal(param.grad, gradient / 4)
    assert torch.equal(optimizer.state[param]["momentum_buffer"], gradient / 4)
