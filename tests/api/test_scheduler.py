"""`CyclicLR` and param groups: torch's sequences however it is called, and current values as floats."""

from __future__ import annotations

import copy
import json
import pickle
import re
import warnings
from typing import Any

import pytest
import torch
import triton
import triton.language as tl  # noqa: F401 - the interpreter wants to see it beside a jit function
from torch.optim import lr_scheduler

from fused_clr import CyclicLR, FusedAdam
from fused_clr.schedules import Cyclic
from tests.cases import SCHEDULES, TRIANGULAR2, ScheduleCase, by_rows, by_schedule
from tests.helpers.pairs import Pair, assert_same_params, make_both, make_pair, record_step, set_gradients, train


def told(pair: Pair) -> list[Any]:
    groups = pair.optimizer.param_groups
    return [
        [g["lr"] for g in groups],
        [g["betas"] for g in groups],
        pair.scheduler.get_last_lr(),
        pair.scheduler.last_epoch,
    ]


def assert_tell_the_same(ours: Pair, theirs: Pair) -> None:
    for mine, torchs in zip(told(ours), told(theirs), strict=True):
        torch.testing.assert_close(torch.tensor(mine, dtype=torch.float64), torch.tensor(torchs, dtype=torch.float64))


# o: optimizer.step(), s: scheduler.step()
CALLS = [(calls, TRIANGULAR2) for calls in ("osososos", "oossosso", "ssssssssssssssssssssssss", "ooooso")]
CALLS += [("sosssoos", case) for case in SCHEDULES.values()]

# Torch's SequentialLR begins again, whatever ``last_epoch`` says.
RESUMED = [case for case in SCHEDULES.values() if case.name != "sequence"]
# Torch's others continue from the present learning rate, and CosineAnnealingWarmRestarts has another counter too.
COUNTED = [TRIANGULAR2, SCHEDULES["exp_range-constant-momentum"], SCHEDULES["one-cycle"]]


@by_rows("calls schedule_case", CALLS)
def test_learning_rates_are_torchs_however_the_scheduler_is_called(
    backend: str, calls: str, schedule_case: ScheduleCase
) -> None:
    pairs = make_both(schedule_case=schedule_case)
    for call in calls:
        # Where the optimizer steps twice in a row, ours ticks twice: the schedule counts optimizer steps.
        if call == "o" and pairs[0].optimizer._awaits_scheduler:
            pairs[1].scheduler.step()
        for pair in pairs:
            if call == "o":
                for param in pair.params:
                    param.grad = torch.ones_like(param)
                pair.optimizer.step()
            else:
                with warnings.catch_warnings():
                    # Torch warns of scheduler steps without an optimizer step.
                    warnings.simplefilter("ignore", UserWarning)
                    pair.scheduler.step()
        assert_tell_the_same(*pairs)


def test_a_scheduler_step_ticks_nothing_after_an_optimizer_step(backend: str) -> None:
    pair = make_pair(True)
    pair.optimizer.step()
    assert pair.optimizer.status().schedule_step == 1
    pair.scheduler.step()
    assert pair.optimizer.status().schedule_step == 1
    pair.scheduler.step()
    assert pair.optimizer.status().schedule_step == 2


@pytest.mark.parametrize("schedule_case", RESUMED, ids=lambda case: case.name)
def test_resuming_with_last_epoch(backend: str, schedule_case: ScheduleCase) -> None:
    pairs = make_both(schedule_case=schedule_case)
    for pair in pairs:
        train(pair, 5)
    resumed = []
    for pair, kind in zip(pairs, (schedule_case.ours, schedule_case.torch_peer), strict=True):
        scheduler = kind(pair.optimizer, **schedule_case.arguments, last_epoch=8 if schedule_case.jumps else 4)
        resumed.append(pair._replace(scheduler=scheduler))
    assert_tell_the_same(*resumed)
    fresh = FusedAdam([torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(KeyError, match="initial_lr"):
        schedule_case.ours(fresh, **schedule_case.of_group(0), last_epoch=3)


def test_the_deprecated_epoch_argument_sets_last_epoch(backend: str) -> None:
    pairs = make_both()
    for pair in pairs:
        pair.optimizer.step()
        with pytest.warns(UserWarning, match="epoch parameter"):
            pair.scheduler.step(9)
    assert_tell_the_same(*pairs)


# A number: it is assigned to scheduler.last_epoch. p: the pair is pickled.
ASSIGNMENTS = ("5sosos", "oso7sos", "o5sosos", "os5oosos", "os9os2sos", "osos-1sos", "oso3psos", "5osp4ss", "o20sos0s")


@pytest.mark.parametrize("calls", ASSIGNMENTS)
@pytest.mark.parametrize("schedule_case", [TRIANGULAR2, SCHEDULES["exp_range"]], ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore:Detected call of")
def test_assigning_last_epoch(backend: str, calls: str, schedule_case: ScheduleCase) -> None:
    """As in torch, nothing but ``last_epoch`` changes before the next scheduler step, which goes one further."""
    pairs = list(make_both(schedule_case=schedule_case))
    previous = ""
    for call in re.findall(r"-?\d+|\w", calls):
        for index, pair in enumerate(pairs):
            if call == "o":
                # Where the optimizer steps twice in a row, ours ticks twice: that is no torch loop.
                assert previous != "o" or "5oo" in calls
                set_gradients(pair.params, seed=1)
                pair.optimizer.step()
            elif call == "s":
                pair.scheduler.step()
            elif call == "p":
                pairs[index] = pickle.loads(pickle.dumps(pair)) if index == 0 else copy.deepcopy(pair)
            else:
                pair.scheduler.last_epoch = int(call)
        previous = call
        if "oo" not in calls:
            assert_tell_the_same(*pairs)
    assert_tell_the_same(*pairs)
    if "oo" not in calls:
        assert_same_params(*pairs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", ["3", None, 1.5, float("nan"), 2**60, True, -2, [1]], ids=str)
def test_a_bad_last_epoch_is_not_assigned(backend: str, value: Any) -> None:
    pair = make_pair(True)
    train(pair, 2)
    pair.optimizer.step()
    before = pair.scheduler.state_dict()
    with pytest.raises(ValueError, match=f"last_epoch must be >= -1, and an integer .*, got {re.escape(repr(value))}"):
        pair.scheduler.last_epoch = value
    assert pair.scheduler.state_dict() == before
    pair.scheduler.step()
    assert pair.scheduler.last_epoch == 3


def test_a_set_schedule_step_replaces_an_assigned_last_epoch(backend: str) -> None:
    pair = make_pair(True)
    pair.scheduler.last_epoch = 5
    pair.optimizer.set_schedule_step(9)
    assert pair.scheduler.last_epoch == 9
    pair.scheduler.step()
    assert pair.scheduler.last_epoch == 10


def test_an_assigned_last_epoch_counts_between_replays(triton_backend: None) -> None:
    pair = make_pair(True)
    set_gradients(pair.params, seed=1)
    graph = record_step(pair)
    pair.scheduler.last_epoch = 5
    graph.replay()
    assert pair.scheduler.last_epoch == 5
    pair.scheduler.step()
    assert pair.optimizer.status().schedule_step == 6
    graph.replay()
    assert pair.optimizer.status().schedule_step == 7


@pytest.mark.parametrize("first", [True, False], ids=["before the step", "after the step"])
@pytest.mark.parametrize("schedule_case", COUNTED, ids=lambda case: case.name)
def test_a_loop_that_counts_last_epoch_itself(backend: str, schedule_case: ScheduleCase, first: bool) -> None:
    """What ignite's wrapper of torch's schedulers does at every iteration; it never calls ``scheduler.step()``."""

    def write_and_count(scheduler: Any) -> None:
        scheduler._get_lr_called_within_step = True
        lrs = scheduler.get_lr()
        scheduler._get_lr_called_within_step = False
        for group, lr in zip(scheduler.optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr
        scheduler.last_epoch += 1

    pairs = make_both(schedule_case=schedule_case)
    for pair in pairs:
        if not first:
            pair.scheduler.last_epoch += 1
    for iteration in range(schedule_case.steps):
        for pair in pairs:
            set_gradients(pair.params, seed=iteration)
            if first:
                write_and_count(pair.scheduler)
            pair.optimizer.step()
            if not first:
                write_and_count(pair.scheduler)
        mine, torchs = (
            [*(group["lr"] for group in pair.optimizer.param_groups), pair.scheduler.last_epoch] for pair in pairs
        )
        assert mine == pytest.approx(torchs, rel=1e-12)
    assert_same_params(*pairs, rtol=1e-5, atol=1e-6)
    # As a simulation does: no step in between.
    for pair in pairs:
        for _ in range(3):
            write_and_count(pair.scheduler)
        pair.optimizer.step()
    assert [group["lr"] for group in pairs[0].optimizer.param_groups] == pytest.approx(
        [group["lr"] for group in pairs[1].optimizer.param_groups], rel=1e-12
    )
    assert_same_params(*pairs, rtol=1e-5, atol=1e-6)
    # And no other value.
    with pytest.raises(RuntimeError, match=r"\['lr'\] cannot be set"):
        pairs[0].optimizer.param_groups[0]["lr"] = 0.123


def test_a_later_scheduler_replaces_the_first(backend: str) -> None:
    pair = make_pair(True)
    train(pair, 3)
    second = CyclicLR(pair.optimizer, 0.1, 0.2, 3)
    assert second.get_last_lr() == [0.1, 0.1]
    with pytest.raises(RuntimeError, match="a later scheduler was created"):
        pair.scheduler.step()


def test_a_scheduler_that_steps_once_an_epoch_is_warned_about_once(backend: str) -> None:
    pair = make_pair(True)
    for _ in range(20):
        pair.optimizer.step()
    with pytest.warns(UserWarning, match="after 20 optimizer steps"):
        pair.scheduler.step()
    for _ in range(20):
        pair.optimizer.step()
    pair.scheduler.step()


@pytest.mark.parametrize("make", [lambda o: lr_scheduler.StepLR(o, 3), lambda o: lr_scheduler.LinearLR(o)])
def test_a_torch_scheduler_on_a_scheduled_group_is_refused_by_name(backend: str, make: Any) -> None:
    pair = make_pair(True)
    with pytest.raises(RuntimeError, match="by (StepLR|LinearLR): the schedule drives lr"):
        make(pair.optimizer)
    assert train(pair, 3) == train(make_pair(True), 3)


def test_torch_schedulers_drive_unscheduled_groups(backend: str) -> None:
    results = []
    for kind in (FusedAdam, torch.optim.Adam):
        param = torch.nn.Parameter(torch.ones(5))
        optimizer = kind([param], lr=0.1)
        scheduler = lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=20)
        for _ in range(15):
            param.grad = param.detach().clone()
            optimizer.step()
            scheduler.step()
        results.append((param, optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"][0]))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert results[0][1:] == results[1][1:]


def test_writing_scheduled_values_is_an_error_and_other_values_count_from_the_next_step(backend: str) -> None:
    pairs = make_both()
    group = pairs[0].optimizer.param_groups[0]
    with pytest.raises(RuntimeError, match=r"\['lr'\] cannot be set: .*set_schedule"):
        group["lr"] = 1.0
    with pytest.raises(RuntimeError, match=r"\['betas'\]\[0\] cannot be set"):
        group.update(betas=(0.5, 0.99))
    with pytest.raises(ValueError, match="eps must be"):
        group["eps"] = -1.0
    assert group["lr"] == 1e-4
    for pair in pairs:
        train(pair, 3)
        pair.optimizer.param_groups[0]["weight_decay"] = 0.5
        pair.optimizer.param_groups[1]["maximize"] = True
        betas = pair.optimizer.param_groups[1]["betas"]
        pair.optimizer.param_groups[1]["betas"] = (betas[0], 0.9)
        train(pair, 5, seed=2)
    for mine, torchs in zip(pairs[0].params, pairs[1].params, strict=True):
        torch.testing.assert_close(mine, torchs)


def test_every_way_of_reading_a_group_tells_the_present(backend: str) -> None:
    pair = make_pair(True)
    train(pair, 4)
    group = pair.optimizer.param_groups[0]
    lr = group["schedule"].lr(4)
    assert lr != group.stored("lr")
    readings = [
        group.get("lr"),
        dict(group)["lr"],
        {**group}["lr"],
        dict(**group)["lr"],
        dict(group.items())["lr"],
        group.copy()["lr"],
        copy.copy(group)["lr"],
        (group | {})["lr"],
        ({} | group)["lr"],
        list(group.values())[list(group.keys()).index("lr")],
        json.loads(json.dumps({k: v for k, v in group.items() if k in ("lr", "betas")}))["lr"],
    ]
    assert readings == [pytest.approx(lr, rel=1e-15)] * len(readings)
    assert type(group["lr"]) is float
    assert type(copy.deepcopy(group)) is dict
    assert f"lr: {group['lr']}" in repr(pair.optimizer)


@by_schedule
def test_live_values_are_what_the_next_step_applies(backend: str, schedule_case: ScheduleCase) -> None:
    pair = make_pair(True, schedule_case=schedule_case)
    optimizer = pair.optimizer
    live_lr, live_beta1 = optimizer.live.lr, optimizer.live.momentum
    for _ in range(5):
        pair.optimizer.step()
        pair.scheduler.step()
        assert live_lr.tolist() == [group["lr"] for group in optimizer.param_groups]
        assert live_beta1.tolist() == [group["betas"][0] for group in optimizer.param_groups]
    assert live_lr.dtype == torch.float64


def test_a_later_group_keeps_its_constant_lr_or_takes_its_own_schedule(backend: str) -> None:
    pair = make_pair(True)
    train(pair, 3)
    constant, scheduled = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    own = Cyclic(0.5, 1.0, 10, cycle_momentum=False)
    pair.optimizer.add_param_group({"params": [constant], "lr": 0.25})
    pair.optimizer.add_param_group({"params": [scheduled], "schedule": own})
    pair.params.extend([constant, scheduled])
    lrs = [lr for lr, _ in train(pair, 4)]
    assert [lr[2] for lr in lrs] == [0.25] * 4
    assert [lr[3] for lr in lrs] == [own.lr(step) for step in range(3, 7)]
    assert [lr[:2] for lr in lrs] == [lr for lr, _ in train(make_pair(True), 7)[3:]]
    assert pair.optimizer.state[constant]["step"].item() == 4


def test_later_groups_follow_the_constructors_schedule_unless_they_say_none(backend: str) -> None:
    schedule = Cyclic(0.1, 0.5, 4, cycle_momentum=False)

    def group(**values: Any) -> dict[str, Any]:
        param = torch.nn.Parameter(torch.ones(2))
        param.grad = torch.ones(2)
        return {"params": [param], **values}

    optimizer = FusedAdam([group(lr=0.25), group(lr=0.25, schedule=None)], schedule=schedule)
    optimizer.step()
    for values in ({"lr": 0.25}, {"lr": 0.25, "schedule": None}):
        optimizer.add_param_group(group(**values))
    for step in range(1, 4):
        expected = [schedule.lr(step), 0.25, schedule.lr(step), 0.25]
        assert [group["lr"] for group in optimizer.param_groups] == expected
        before = [group["params"][0].detach().clone() for group in optimizer.param_groups]
        optimizer.step()
        # All gradients are 1: Adam moves by the learning rate.
        after = [group["params"][0] for group in optimizer.param_groups]
        moved = [(old - new)[0].item() for old, new in zip(before, after, strict=True)]
        assert moved == pytest.approx(expected, rel=1e-4)


def test_set_schedule_and_set_schedule_step(backend: str) -> None:
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = FusedAdam([param], lr=0.5)
    schedule = Cyclic(0.1, 0.9, 4, mode="triangular2")
    optimizer.set_schedule(schedule)
    optimizer.set_schedule_step(11)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(schedule.lr(11), rel=1e-15)
    assert optimizer.param_groups[0]["betas"][0] == pytest.approx(schedule.momentum(11), rel=1e-15)
    optimizer.set_schedule(None)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(schedule.lr(11), rel=1e-15)
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.25
    for bad in (-1, 1.5, 3.0, 2**53 + 1, "3", None, float("nan"), True):
        with pytest.raises(ValueError, match="step must be an integer"):
            optimizer.set_schedule_step(bad)
    with pytest.raises(ValueError, match="1 entries"):
        optimizer.set_schedule([schedule, schedule])
    with pytest.raises(TypeError, match="schedule must be"):
        optimizer.set_schedule("triangular")


def test_an_overridden_beta1_is_warned_about_once() -> None:
    def make(**arguments: Any) -> FusedAdam:
        return FusedAdam([torch.nn.Parameter(torch.ones(1))], **arguments)

    with pytest.warns(UserWarning, match=r"momentum 0.95 \(betas\) with 0.8 to 0.9") as caught:
        CyclicLR(make(betas=(0.95, 0.99)), 1e-3, 1e-2)
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="momentum 0.95"):
        make(betas=(0.95, 0.99), schedule=Cyclic(1e-3, 1e-2))
    # Silent: the default beta1, the bounds' own, and no cycling.
    CyclicLR(make(), 1e-3, 1e-2, base_momentum=0.85, max_momentum=0.95)
    CyclicLR(make(betas=(0.95, 0.99)), 1e-3, 1e-2, max_momentum=0.95)
    CyclicLR(make(betas=(0.95, 0.99)), 1e-3, 1e-2, cycle_momentum=False)


def by_iteration(x: int) -> float:
    return 1 / (1 + x)


@triton.jit
def jit_scale(x):
    return 1 / (1 + x)


@pytest.mark.parametrize("scale_mode", ["cycle", "iterations"])
@pytest.mark.parametrize("scale_fn", [by_iteration, jit_scale], ids=["python", "triton-jit"])
def test_scale_functions(backend: str, scale_fn: Any, scale_mode: str) -> None:
    arguments = {"scale_fn": scale_fn, "scale_mode": scale_mode}
    ours = make_pair(True, cyclic={**arguments, "total_steps": 60})
    theirs = make_pair(False, cyclic={**arguments, "scale_fn": by_iteration})
    for mine, torchs in zip(train(ours, 50), train(theirs, 50), strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(torchs), rtol=1e-12, atol=0)


def test_running_past_a_table_is_an_error_in_eager_mode(triton_backend: None) -> None:
    param = torch.nn.Parameter(torch.ones(2))
    schedule = Cyclic(0.1, 0.2, 3, scale_fn=by_iteration, scale_mode="iterations", total_steps=5)
    optimizer = FusedAdam([param], schedule=schedule)
    param.grad = torch.ones(2)
    for _ in range(5):
        optimizer.step()
        assert not optimizer.status().schedule_exhausted
    optimizer.step()
    assert optimizer.status().schedule_exhausted
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match="schedule step 6 .*total_steps"):
        optimizer.step()
    assert torch.equal(param, before)
    with pytest.raises(ValueError, match="total_steps must be given"):
        FusedAdam([param], schedule=Cyclic(0.1, 0.2, scale_fn=by_iteration, scale_mode="iterations")).step()


def test_a_tensor_lr_under_a_schedule_is_without_effect(backend: str) -> None:
    runs = []
    for lr in (1e-3, torch.tensor(0.123)):
        param = torch.nn.Parameter(torch.ones(3))
        optimizer = FusedAdam([param], lr=lr)
        scheduler = CyclicLR(optimizer, 0.1, 0.5, 4)
        for _ in range(6):
            param.grad = torch.ones(3)
            optimizer.step()
            scheduler.step()
        runs.append((scheduler.get_last_lr(), param.tolist()))
    assert runs[0] == runs[1]


# -- one truth: the groups' schedules ---------------------------------------------------------------------------------
def test_bounds_are_written_whole_or_by_entry(backend: str) -> None:
    param = torch.nn.Parameter(torch.ones(2))
    ours, theirs = FusedAdam([param]), torch.optim.Adam([param])
    mine, torchs = CyclicLR(ours, 0.1, 0.5, 4), lr_scheduler.CyclicLR(theirs, 0.1, 0.5, 4)
    for scheduler in (mine, torchs):
        scheduler.max_lrs[0] = 0.9
        scheduler.base_lrs = [0.2]
        scheduler.optimizer.step()
        scheduler.step()
    assert mine.max_lrs == torchs.max_lrs == [0.9]
    assert mine.get_last_lr() == pytest.approx(torchs.get_last_lr(), rel=1e-15)
    with pytest.raises(ValueError, match="max_lrs must have 1 entries, one per param group, got 2"):
        mine.max_lrs = [0.1, 0.2]
    with pytest.raises(ValueError, match="max_lr must be a finite number >= 0, got -1"):
        mine.max_lrs[0] = -1.0
    assert mine.max_lrs == [0.9]
    for name in ("mode", "gamma", "scale_fn", "cycle_momentum", "total_size"):
        with pytest.raises(AttributeError, match="no setter|can't set"):
            setattr(mine, name, getattr(mine, name))


def test_a_scheduler_of_groups_that_differ_in_more_than_bounds_says_so() -> None:
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))]} for _ in range(2)]
    optimizer = FusedAdam(groups)
    scheduler = CyclicLR(optimizer, 0.1, 0.5, 4)
    optimizer.param_groups[1]["schedule"] = Cyclic(0.2, 0.9, 10, mode="exp_range", gamma=0.9)
    with pytest.raises(ValueError, match=r"param_groups\[1\] has step_size_up=10 and param_groups\[0\] 4"):
        scheduler.state_dict()
    with pytest.raises(ValueError, match=r"param_groups\[1\] has step_size_up"):
        _ = scheduler.mode
    assert scheduler.max_lrs == [0.5, 0.9]
    optimizer.set_schedule(None)
    with pytest.raises(RuntimeError, match=r"no longer drives param_groups\[0\]"):
        _ = scheduler.max_lrs


def test_momentum_keys_of_the_group_are_torchs_whichever_is_greater() -> None:
    param = torch.nn.Parameter(torch.ones(2))
    bounds = {"base_momentum": 0.95, "max_momentum": 0.8}
    ours, theirs = FusedAdam([param]), torch.optim.Adam([param])
    CyclicLR(ours, 0.1, 0.5, **bounds)
    lr_scheduler.CyclicLR(theirs, 0.1, 0.5, **bounds)
    for key, value in bounds.items():
        assert ours.param_groups[0][key] == theirs.param_groups[0][key] == value
