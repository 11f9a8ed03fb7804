"""`begin_decay` in the middle of a loop equals a torch loop that changes to another scheduler there."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from fused_clr import FusedAdam, testing
from fused_clr.schedules import Constant, Decay
from tests.helpers.pairs import (
    Pair,
    all_equal,
    assert_same_params,
    copies,
    make_both,
    make_pair,
    rewrite_gradients,
    set_gradients,
)

BEFORE, DECAY = 9, 8
REMAINING = {
    "1-sqrt": lambda x: 1 - math.sqrt(x),
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
}


def torch_loop(pair: Pair, shape: str, final_lr: float, after: int) -> None:
    """torch's pair for `BEFORE` steps; then LambdaLR from the lr that its scheduler has reached, and that beta1."""
    for step in range(BEFORE):
        rewrite_gradients(pair, step)
        pair.optimizer.step()
        pair.scheduler.step()
    starts = [group["lr"] for group in pair.optimizer.param_groups]
    for group, start in zip(pair.optimizer.param_groups, starts, strict=True):
        group["initial_lr"] = start
    remaining = REMAINING[shape]
    factors = [
        lambda step, start=start: (final_lr + (start - final_lr) * remaining(min(step / DECAY, 1.0))) / start
        for start in starts
    ]
    scheduler = torch.optim.lr_scheduler.LambdaLR(pair.optimizer, factors)
    for step in range(BEFORE, BEFORE + after):
        rewrite_gradients(pair, step)
        pair.optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("final_lr", [0.0, 1e-5])
@pytest.mark.parametrize("shape", REMAINING)
def test_eager_and_replayed_steps_equal_torch_that_changes_its_scheduler(
    backend: str, shape: Any, final_lr: float
) -> None:
    after = DECAY + 4
    ours, theirs = make_both(dtype=torch.float64)
    torch_loop(theirs, shape, final_lr, after)
    graph = None
    for step in range(BEFORE + after):
        if step == BEFORE:
            ours.optimizer.begin_decay(DECAY, shape, final_lr)
        rewrite_gradients(ours, step)
        if backend == "triton" and step == 2:
            with testing.record_launches() as graph:
                ours.optimizer.step()
        elif graph is not None:
            # The same graph before and after.
            ours.optimizer.check_replay()
            graph.replay()
        else:
            ours.optimizer.step()
    assert_same_params(ours, theirs, 1e-11, 1e-12)
    assert [group["lr"] for group in ours.optimizer.param_groups] == pytest.approx([final_lr] * 2, abs=1e-18)
    momenta = [group["betas"][0] for group in theirs.optimizer.param_groups]
    assert [group["betas"][0] for group in ours.optimizer.param_groups] == pytest.approx(momenta, rel=1e-12)


def test_between_the_two_steps(backend: str) -> None:
    """Before ``scheduler.step()`` the groups show what was applied; the decay begins with what comes next."""
    ours, other = make_pair(True), make_pair(True)
    for pair in (ours, other):
        for step in range(5):
            set_gradients(pair.params, step)
            pair.optimizer.step()
            if step < 4:
                pair.scheduler.step()
    applied = [group["lr"] for group in ours.optimizer.param_groups]
    ours.optimizer.begin_decay(10)
    assert [group["lr"] for group in ours.optimizer.param_groups] == applied
    ours.scheduler.step()
    other.scheduler.step()
    assert [g["lr"] for g in ours.optimizer.param_groups] == [g["lr"] for g in other.optimizer.param_groups]
    other.optimizer.begin_decay(10)
    for pair in (ours, other):
        set_gradients(pair.params, 9)
        pair.optimizer.step()
    assert all_equal(ours.params, other.params)


def test_a_checkpoint_branches(backend: str) -> None:
    """The decay can begin from a checkpoint, and goes on from one bit by bit; the long run is not changed."""
    long = make_pair(True)
    for step in range(7):
        rewrite_gradients(long, step)
        long.optimizer.step()
    saved, params = copy.deepcopy(long.optimizer.state_dict()), copies(long.params)
    long.optimizer.begin_decay(6, "cosine")
    branch = make_pair(True)
    with torch.no_grad():
        for own, value in zip(branch.params, params, strict=True):
            own.copy_(value)
    branch.optimizer.load_state_dict(saved)
    branch.optimizer.begin_decay(6, "cosine")
    for step in range(7, 10):
        for pair in (long, branch):
            rewrite_gradients(pair, step)
            pair.optimizer.step()
    assert all_equal(long.params, branch.params)
    resumed = make_pair(True)
    with torch.no_grad():
        for own, value in zip(resumed.params, branch.params, strict=True):
            own.copy_(value)
    resumed.optimizer.load_state_dict(copy.deepcopy(branch.optimizer.state_dict()))
    for step in range(10, 16):
        for pair in (branch, resumed):
            rewrite_gradients(pair, step)
            pair.optimizer.step()
    assert all_equal(branch.params, resumed.params)
    assert resumed.optimizer.param_groups[0]["lr"] == 0.0


def test_groups_without_a_schedule_and_the_first_step(backend: str) -> None:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = FusedAdam([{"params": [params[0]], "lr": 0.25}, {"params": [params[1]], "lr": torch.tensor(0.5)}])
    optimizer.begin_decay(4, "linear")
    assert [group["schedule"] for group in optimizer.param_groups] == [
        Decay(0.25, 4, "linear"),
        Decay(0.5, 4, "linear"),
    ]
    seen = []
    for _ in range(6):
        seen.append([group["lr"] for group in optimizer.param_groups])
        for param in params:
            param.grad = torch.ones(3)
        optimizer.step()
    assert seen == [[0.25 * x, 0.5 * x] for x in (1, 0.75, 0.5, 0.25, 0, 0)]
    # A second decay holds what the first has reached.
    with pytest.raises(ValueError, match=r"final_lr must not exceed the present .* of param_groups\[0\], 0.0"):
        optimizer.begin_decay(4, final_lr=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, r"steps must be an integer in \[1, 2\*\*53\), got 0"),
        ({"steps": 2.5}, "steps must be an integer"),
        ({"steps": True}, "steps must be an integer"),
        ({"steps": 4, "shape": "sqrt"}, r"shape must be one of \('1-sqrt', 'linear', 'cosine'\), got 'sqrt'"),
        ({"steps": 4, "shape": ["linear"]}, "shape must be one of"),
        ({"steps": 4, "final_lr": -1.0}, "final_lr must be a finite number >= 0, got -1.0"),
        ({"steps": 4, "final_lr": float("nan")}, "final_lr must be a finite number >= 0, got nan"),
        ({"steps": 4, "final_lr": "0"}, "final_lr must be a finite number >= 0, got '0'"),
        ({"steps": 4, "final_lr": 0.15}, r"present learning rate of param_groups\[1\], 0.1, got 0.15"),
    ],
)
def test_refused(backend: str, arguments: dict[str, Any], message: str) -> None:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    groups = [{"params": [param], "schedule": Constant(lr)} for param, lr in zip(params, (0.2, 0.1), strict=True)]
    optimizer = FusedAdam(groups)
    with pytest.raises(ValueError, match=message):
        optimizer.begin_decay(**arguments)
    assert [group["schedule"] for group in optimizer.param_groups] == [Constant(0.2), Constant(0.1)]
