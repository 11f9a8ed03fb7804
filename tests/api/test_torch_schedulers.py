"""The schedulers with torch's signatures other than `CyclicLR`: whole runs, boundaries, conversions, bad input."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

import fused_clr
from fused_clr import (
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    ExponentialLR,
    FusedAdam,
    LinearLR,
    OneCycleLR,
    PolynomialLR,
    SequentialLR,
    fuse,
    schedules,
    unfuse,
)
from fused_clr.scheduler import KINDS
from tests.cases import FAMILIES, ScheduleCase
from tests.helpers.pairs import (
    Pair,
    all_equal,
    assert_same_params,
    copies,
    make_both,
    make_pair,
    record_step,
    rewrite_gradients,
    train,
)
from tests.helpers.tolerances import AFTER_STEPS, SCHEDULED

by_family = pytest.mark.parametrize("case", FAMILIES.values(), ids=FAMILIES)
# Within a segment, at and around milestones, ends and restarts, and past the end where torch holds too.
BOUNDARIES = {
    "one-cycle": (0, 3, 7, 8, 78),
    "one-cycle-three-phases": (5, 6, 12, 13, 78),
    "cosine": (1, 40, 79),
    "restarts": (4, 5, 6, 15, 16),
    "linear": (0, 4, 9, 12),
    "exponential": (6,),
    "polynomial": (4, 9, 12),
    "constant": (6, 7, 8),
    "sequence": (3, 4, 6, 7, 8, 12, 15),
}
AT_BOUNDARIES = [(name, step) for name, steps in BOUNDARIES.items() for step in steps]
# Torch's recursive formulas end a little off 0.
NEAR_ZERO = 1e-16
GROUP_KEYS = ("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum")


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_CLR_BACKEND", "cpu")


def adam(ours: bool = True, lr: float = 0.1, num_groups: int = 1, **arguments: Any) -> Any:
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))]} for _ in range(num_groups)]
    return (FusedAdam if ours else torch.optim.Adam)(groups, lr=lr, **arguments)


def told(pair: Pair) -> list[float]:
    groups = pair.optimizer.param_groups
    values = [value for group in groups for value in (group["lr"], *(group.get(key, 0.0) for key in GROUP_KEYS))]
    return [*values, *(group["betas"][0] for group in groups), *pair.scheduler.get_last_lr(), pair.scheduler.last_epoch]


def assert_tell_the_same(first: Pair, second: Pair) -> None:
    assert told(first) == pytest.approx(told(second), rel=SCHEDULED.rtol, abs=NEAR_ZERO)


def assert_go_on_alike(first: Pair, second: Pair, steps: int) -> None:
    assert_tell_the_same(first, second)
    for one, other in zip(train(first, steps, seed=2), train(second, steps, seed=2), strict=True):
        for mine, torchs in zip(one, other, strict=True):
            assert mine == pytest.approx(torchs, rel=SCHEDULED.rtol, abs=NEAR_ZERO)
    assert_tell_the_same(first, second)
    assert_same_params(first, second, *AFTER_STEPS[torch.float32][:2])


def loaded(target: Pair, source: Pair, optimizer_first: bool = True) -> Pair:
    """A new pair with the parameters and states of another."""
    with torch.no_grad():
        for param, other in zip(target.params, source.params, strict=True):
            param.copy_(other)
    states = copy.deepcopy([each.state_dict() for each in (source.optimizer, source.scheduler)])
    loads = [target.optimizer.load_state_dict, target.scheduler.load_state_dict]
    for index in (0, 1) if optimizer_first else (1, 0):
        loads[index](states[index])
    return target


def steps_left(case: ScheduleCase, step: int, most: int = 7) -> int:
    return min(most, case.end - step)


# -- torch's ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", KINDS)
def test_signatures_are_torchs(name: str) -> None:
    def arguments(kind: type[Any]) -> list[tuple[str, Any]]:
        return [(own.name, own.default) for own in inspect.signature(kind).parameters.values()]

    ours, theirs = arguments(getattr(fused_clr, name)), arguments(getattr(lr_scheduler, name))
    assert ours[: len(theirs)] == theirs
    assert [own for own, _ in ours[len(theirs) :]] == (["total_steps"] if name == "CyclicLR" else [])


@by_family
def test_whole_runs(on_cpu: None, case: ScheduleCase) -> None:
    assert_go_on_alike(*make_both(schedule_case=case), steps_left(case, 0, most=60 if case.end > 100 else case.end))


@by_family
def test_attributes_are_torchs(on_cpu: None, case: ScheduleCase) -> None:
    ours, theirs = make_both(schedule_case=case)
    for pair in (ours, theirs):
        train(pair, 6)
    attributes = [name for name in vars(theirs.scheduler) if not name.startswith("_") and name != "optimizer"]
    assert "last_epoch" in attributes
    for name in attributes:
        assert getattr(ours.scheduler, name) == pytest.approx(getattr(theirs.scheduler, name)), name
        if name != "last_epoch":
            with pytest.raises(AttributeError, match="no setter|can't set"):
                setattr(ours.scheduler, name, getattr(theirs.scheduler, name))


# -- boundaries ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("backend_name", "name", "step"),
    [("cpu", *own) for own in AT_BOUNDARIES] + [("triton", "sequence", 12), ("triton", "restarts", 5)],
)
def test_resuming_is_bitwise(monkeypatch: pytest.MonkeyPatch, backend_name: str, name: str, step: int) -> None:
    monkeypatch.setenv("FUSED_CLR_BACKEND", backend_name)
    case = FAMILIES[name]
    source = make_pair(True, schedule_case=case)
    train(source, step)
    resumed = [
        *(
            loaded(make_pair(True, seed=5, schedule_case=case), source, optimizer_first=order)
            for order in (True, False)
        ),
        Pair(*pickle.loads(pickle.dumps(tuple(source)))),
    ]
    expected = train(source, 7, seed=2)
    for pair in resumed:
        assert train(pair, 7, seed=2) == expected
        assert all_equal(copies(pair.params), copies(source.params))
        assert pair.scheduler.state_dict() == source.scheduler.state_dict()


@pytest.mark.parametrize(("name", "step"), AT_BOUNDARIES)
def test_from_torch_to_ours_and_back(on_cpu: None, name: str, step: int) -> None:
    """By checkpoints, in either order, and by fuse and unfuse."""
    case = FAMILIES[name]

    def torchs(steps: int) -> Pair:
        pair = make_pair(False, schedule_case=case)
        train(pair, min(steps, step))
        train(pair, max(steps - step, 0), seed=2)
        return pair

    source, carried = torchs(step), torchs(step)
    ours = loaded(make_pair(True, seed=5, schedule_case=case), source, optimizer_first=step % 2 == 0)
    fused = Pair(carried.params, *fuse(carried.optimizer, carried.scheduler))
    assert type(fused.scheduler).__name__ == type(carried.scheduler).__name__
    steps = steps_left(case, step, most=4)
    for pair in (ours, fused):
        assert_go_on_alike(pair, torchs(step), steps)
    back = loaded(make_pair(False, seed=6, schedule_case=case), ours, optimizer_first=step % 2 == 1)
    # Without its scheduler, the schedules tell the class.
    scheduler = fused.scheduler if step % 2 else None
    unfused = Pair(fused.params, *unfuse(fused.optimizer, scheduler))
    assert type(unfused.scheduler) is type(source.scheduler)
    for pair in (back, unfused):
        assert_go_on_alike(pair, torchs(step + steps), steps_left(case, step + steps))


def test_a_sequence_resumes_with_last_epoch(backend: str) -> None:
    case = FAMILIES["sequence"]
    straight, resumed = make_pair(True, schedule_case=case), make_pair(True, schedule_case=case)
    train(straight, 9)
    scheduler = case.ours(resumed.optimizer, **case.arguments, last_epoch=8)
    assert scheduler.last_epoch == 9
    assert scheduler.get_last_lr() == straight.scheduler.get_last_lr()


ENDS: dict[str, Callable[[Any], Any]] = {
    "OneCycleLR": lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=8),
    "CosineAnnealingLR": lambda optimizer: CosineAnnealingLR(optimizer, 7, 1e-3),
    "SequentialLR": lambda optimizer: SequentialLR(
        optimizer, [ConstantLR(optimizer), CosineAnnealingLR(optimizer, 3, 1e-3)], [4]
    ),
}


@pytest.mark.parametrize("name", ENDS)
def test_past_its_end_ours_holds_and_what_torch_does_is_not_converted(backend: str, name: str) -> None:
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = FusedAdam([param], lr=0.1)
    pair = Pair([param], optimizer, ENDS[name](optimizer))
    rewrite_gradients(pair, 0, (0,))
    graph = None if backend == "cpu" else record_step(pair)
    while pair.scheduler.last_epoch < 7:
        pair.optimizer.step() if graph is None else graph.replay()
        pair.scheduler.step()
    last = pair.scheduler.get_last_lr()
    unfuse(pair.optimizer, pair.scheduler)
    for _ in range(3):
        pair.optimizer.step() if graph is None else graph.replay()
        pair.scheduler.step()
    assert pair.scheduler.get_last_lr() == last
    with pytest.raises(ValueError, match="schedule step 10 cannot be converted: it is past the end"):
        unfuse(pair.optimizer, pair.scheduler)


def test_a_cosine_of_torchs_past_its_end_is_refused(on_cpu: None) -> None:
    # Rounded to six digits, torch's second learning rate past the end is the first.
    optimizer, ours = adam(ours=False), adam()
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 10_000)
    optimizer.step()
    for _ in range(10_001):
        scheduler.step()
    with pytest.raises(ValueError, match="past the end of Cosine.*cannot be converted"):
        fuse(optimizer, scheduler)
    target = CosineAnnealingLR(ours, 5)
    before = target.state_dict()
    with pytest.raises(ValueError, match=r"state_dict\['last_epoch'\] must not be past the end .*, got 10001"):
        target.load_state_dict(scheduler.state_dict())
    assert target.state_dict() == before


# -- several on one optimizer ----------------------------------------------------------------------------------------
def test_the_last_scheduler_drives_and_all_begin_at_the_initial_lr(backend: str) -> None:
    optimizer = adam(lr=0.5)
    first = LinearLR(optimizer, 0.5)
    assert optimizer.param_groups[0]["lr"] == 0.25
    second = ExponentialLR(optimizer, 0.9)
    assert (second.base_lrs, second.get_last_lr()) == ([0.5], [0.5])
    optimizer.step()
    second.step()
    assert optimizer.param_groups[0]["lr"] == 0.5 * 0.9
    with pytest.raises(RuntimeError, match="this LinearLR no longer drives its optimizer: a later scheduler"):
        first.step()
    optimizer.set_schedule(schedules.ExponentialDecay(0.5, 0.8))
    both = SequentialLR(optimizer, [first, second], [3])
    assert (both.last_epoch, both.get_last_lr()) == (0, [0.25])
    # Where a scheduler still drives, the group's schedule counts.
    assert both.schedules[0].lr(4) == 0.5 * 0.8


def test_a_new_scheduler_after_loading_begins_at_the_initial_lr(backend: str) -> None:
    source, target = adam(lr=0.5), adam(lr=0.125)
    scheduler = LinearLR(source, 0.5)
    source.step()
    scheduler.step()
    target.load_state_dict(source.state_dict())
    assert LinearLR(target, 0.25).base_lrs == [0.5]
    assert target.param_groups[0]["lr"] == 0.125


def test_an_lr_written_before_the_scheduler_counts_as_in_torch(on_cpu: None) -> None:
    for name, arguments in {
        "LinearLR": {"start_factor": 0.5},
        "ExponentialLR": {"gamma": 0.5},
        "CosineAnnealingWarmRestarts": {"T_0": 4},
    }.items():
        lrs = []
        for ours in (True, False):
            optimizer = adam(ours, lr=0.1)
            optimizer.param_groups[0]["initial_lr"] = 0.4
            scheduler = getattr(fused_clr if ours else lr_scheduler, name)(optimizer, **arguments)
            optimizer.step()
            scheduler.step()
            lrs.append(optimizer.param_groups[0]["lr"])
            assert optimizer.param_groups[0]["initial_lr"] == 0.4
        assert lrs[0] == pytest.approx(lrs[1], rel=1e-14)


def test_a_group_that_stands_still(on_cpu: None) -> None:
    for case in FAMILIES.values():
        if case.name.startswith("one-cycle"):
            continue
        optimizer = FusedAdam([torch.nn.Parameter(torch.ones(2))], lr=0.0)
        scheduler = case.ours(optimizer, **case.arguments)
        assert scheduler.base_lrs == [0.0] if case.name != "sequence" else True
        optimizer.step()
        scheduler.step()
        assert scheduler.get_last_lr()[0] in (0.0, pytest.approx(0.0, abs=1e-4))


def test_two_one_cycles_in_a_sequence_survive_a_checkpoint_and_are_not_converted(on_cpu: None) -> None:
    """Torch's share the group's keys, and the first becomes the second."""

    def make() -> Pair:
        optimizer = adam()
        both = [OneCycleLR(optimizer, max_lr, total_steps=20) for max_lr in (0.1, 0.3)]
        return Pair(optimizer.param_groups[0]["params"], optimizer, SequentialLR(optimizer, both, [15]))

    source = make()
    train(source, 4)
    target = loaded(make(), source)
    assert train(target, 15, seed=2) == train(source, 15, seed=2)
    with pytest.raises(ValueError, match="more than one OneCycleLR"):
        unfuse(target.optimizer)


def test_a_sequence_in_a_sequence(on_cpu: None) -> None:
    def make() -> Pair:
        optimizer = adam()
        inner = SequentialLR(optimizer, [LinearLR(optimizer), ExponentialLR(optimizer, 0.9)], [3])
        outer = SequentialLR(optimizer, [ConstantLR(optimizer), inner, PolynomialLR(optimizer)], [2, 8])
        return Pair(optimizer.param_groups[0]["params"], optimizer, outer)

    source = make()
    lrs = [lr[0] for lr, _ in train(source, 6)]
    assert lrs[2:6] == pytest.approx([0.1 / 3, 0.1 * (1 / 3 + 2 / 15), 0.1 * (1 / 3 + 4 / 15), 0.1])
    assert train(loaded(make(), source), 6, seed=2) == train(source, 6, seed=2)
    with pytest.raises(ValueError, match="a SequentialLR after a milestone, where torch's raises"):
        unfuse(source.optimizer, source.scheduler)


def test_momentum_in_some_phases_alone_is_not_converted(on_cpu: None) -> None:
    optimizer = adam(ours=False)
    parts = [lr_scheduler.LinearLR(optimizer), lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, 4)]
    with pytest.raises(ValueError, match="drives the momentum in only some of its schedulers"):
        fuse(optimizer, lr_scheduler.SequentialLR(optimizer, parts, [4]))


def test_fuse_reads_the_schedulers_of_a_sequence_by_name(on_cpu: None) -> None:
    optimizer = adam(ours=False)
    parts = [lr_scheduler.LinearLR(optimizer), lr_scheduler.StepLR(optimizer, 4)]
    scheduler = lr_scheduler.SequentialLR(optimizer, parts, [4])
    with pytest.raises(TypeError, match=r"scheduler._schedulers\[1\] must be one of .* got torch.*StepLR"):
        fuse(optimizer, scheduler)
    optimizer = adam(ours=False)
    linear = lr_scheduler.LinearLR(optimizer)
    scheduler = lr_scheduler.SequentialLR(optimizer, [linear, lr_scheduler.ExponentialLR(optimizer, 0.9)], [4])
    optimizer.step()
    linear.step()
    with pytest.raises(ValueError, match=r"_schedulers\[0\]\['last_epoch'\] must be 0 .*, got 1"):
        fuse(optimizer, scheduler)
    optimizer = adam(ours=False)
    with pytest.raises(ValueError, match="total_steps must be None unless the scheduler is a CyclicLR, got 5"):
        fuse(optimizer, lr_scheduler.LinearLR(optimizer), total_steps=5)


@pytest.mark.parametrize(
    "schedule",
    [schedules.Constant(0.1), schedules.InverseSqrt(0.1, 5), schedules.Linear(0.1, 0.2, 5)],
    ids=lambda own: type(own).__name__,
)
def test_a_schedule_that_no_scheduler_of_torch_makes_is_named(on_cpu: None, schedule: Any) -> None:
    optimizer = FusedAdam([torch.nn.Parameter(torch.ones(2))], schedule=schedule)
    with pytest.raises(ValueError, match=rf"param_groups\[0\] has the schedule {type(schedule).__name__}"):
        unfuse(optimizer)


# -- bad input -------------------------------------------------------------------------------------------------------
NAN = float("nan")
BAD: dict[str, tuple[Callable[[Any], Any], str]] = {
    "factor": (lambda o: ConstantLR(o, 1.5), r"factor must be a number in \[0, 1\], got 1.5"),
    "total_iters": (lambda o: ConstantLR(o, 0.5, 0), "total_iters must be an integer in .*, got 0"),
    "total_iters-negative": (lambda o: LinearLR(o, total_iters=-3), "total_iters must be an integer in .*, got -3"),
    "total_iters-fraction": (lambda o: PolynomialLR(o, 2.5), "total_iters must be an integer in .*, got 2.5"),
    "start_factor": (lambda o: LinearLR(o, 0.0), r"start_factor must be a number in \(0, 1\], got 0.0"),
    "end_factor": (lambda o: LinearLR(o, 0.5, 1.1), r"end_factor must be a number in \[0, 1\], got 1.1"),
    "gamma": (lambda o: ExponentialLR(o, -0.9), "gamma must be a finite number >= 0, got -0.9"),
    "gamma-nan": (lambda o: ExponentialLR(o, NAN), "gamma must be a finite number >= 0, got nan"),
    "power": (lambda o: PolynomialLR(o, 5, 0.0), "power must be a finite number > 0, got 0.0"),
    "T_max": (lambda o: CosineAnnealingLR(o, 0), "T_max must be a finite number of steps > 0, got 0"),
    "eta_min": (lambda o: CosineAnnealingLR(o, 5, -1e-3), "eta_min must be a finite number >= 0, got -0.001"),
    "T_0": (lambda o: CosineAnnealingWarmRestarts(o, 0), "T_0 must be an integer in .*, got 0"),
    "T_mult": (lambda o: CosineAnnealingWarmRestarts(o, 3, 1.5), "T_mult must be an integer in .*, got 1.5"),
    "total_steps": (lambda o: OneCycleLR(o, 0.1, total_steps=-5), "total_steps must be an integer in .*, got -5"),
    "no-total_steps": (lambda o: OneCycleLR(o, 0.1, epochs=3), "total_steps must be given, or both"),
    "epochs": (lambda o: OneCycleLR(o, 0.1, epochs=0, steps_per_epoch=3), "epochs must be an integer in .*, got 0"),
    "pct_start": (lambda o: OneCycleLR(o, 0.1, 20, pct_start=1.0), r"pct_start must be a number in \(0, 1\), got 1.0"),
    "pct_start-empty": (lambda o: OneCycleLR(o, 0.1, 5, pct_start=0.1), "a phase would be empty"),
    "anneal_strategy": (lambda o: OneCycleLR(o, 0.1, 20, anneal_strategy="exp"), "anneal_strategy must be one of"),
    "max_lr": (lambda o: OneCycleLR(o, [0.1, 0.2, 0.3], 20), "max_lr must have 2 entries, one per param group, got 3"),
    "last_epoch": (lambda o: LinearLR(o, last_epoch=-2), "last_epoch must be >= -1, .*, got -2"),
    "no-schedulers": (lambda o: SequentialLR(o, [], []), "schedulers must be a list of at least one scheduler"),
    "milestones": (lambda o: SequentialLR(o, [LinearLR(o), ConstantLR(o)], [0]), "milestones must be strictly incr"),
    "milestones-falling": (
        lambda o: SequentialLR(o, [LinearLR(o), ConstantLR(o), ConstantLR(o)], [5, 5]),
        r"milestones must be strictly increasing integers > 0, got \(5, 5\)",
    ),
    "milestones-few": (lambda o: SequentialLR(o, [LinearLR(o), ConstantLR(o)], []), "milestones must be one fewer"),
    "milestones-none": (lambda o: SequentialLR(o, [LinearLR(o)], None), "milestones must be a list of integers"),
    "another-optimizer": (
        lambda o: SequentialLR(o, [LinearLR(adam())], []),
        r"schedulers\[0\] must drive this optimizer, got the scheduler of another one",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_attach_nothing(on_cpu: None, name: str) -> None:
    make, message = BAD[name]
    optimizer = adam(num_groups=2)
    kept = LinearLR(optimizer, 0.25, total_iters=9)
    optimizer.step()
    kept.step()
    before = str(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        make(optimizer)
    if "LinearLR(o)" not in inspect.getsource(make):
        assert str(optimizer.state_dict()) == before
        assert kept.last_epoch == 1
    # The schedulers for a sequence are there, and the last one drives.
    optimizer.step()


def test_schedulers_and_optimizers_of_torchs_are_refused_by_name(on_cpu: None) -> None:
    optimizer = adam()
    for name, case in FAMILIES.items():
        if name != "sequence":
            with pytest.raises(
                TypeError, match="optimizer must be a FusedAdam, FusedAdamW or FusedSGD, got Adam; torch.optim"
            ):
                case.ours(adam(ours=False), **case.of_group(0))
            with pytest.raises(KeyError, match="has no 'initial_lr', which last_epoch=3 needs"):
                case.ours(adam(), **case.of_group(0), last_epoch=3)
    with pytest.raises(TypeError, match=r"schedulers\[0\] must be a scheduler of fused_clr, got torch.*LinearLR"):
        SequentialLR(optimizer, [lr_scheduler.LinearLR(optimizer)], [])
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['lr'\] must be a finite number >= 0, got -1.0"):
        optimizer.param_groups[0]["lr"] = -1.0
        LinearLR(optimizer)


def test_a_sequence_drives_all_groups_or_none(on_cpu: None) -> None:
    optimizer = adam()
    linear = LinearLR(optimizer)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    with pytest.raises(ValueError, match=r"schedulers\[0\] drives 1 param groups, and the optimizer has 2"):
        SequentialLR(optimizer, [linear], [])


def test_a_one_cycle_with_other_learning_rates_than_the_groups_is_refused(on_cpu: None) -> None:
    """As in torch, its state_dict does not hold ``max_lr``: the groups do."""
    source = adam(ours=False)
    scheduler = lr_scheduler.OneCycleLR(source, 0.3, total_steps=40, div_factor=7.0)
    optimizer = adam()
    target = OneCycleLR(optimizer, 0.5, total_steps=40)
    before = str(target.state_dict()), str(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"\['base_lrs'\]\[0\] must be the initial_lr .* load the optimizer's state_d"):
        target.load_state_dict(scheduler.state_dict())
    assert (str(target.state_dict()), str(optimizer.state_dict())) == before
    optimizer.load_state_dict(source.state_dict())
    target.load_state_dict(scheduler.state_dict())
    assert target.get_last_lr() == pytest.approx(scheduler.get_last_lr(), rel=SCHEDULED.rtol)
    assert target.schedules[0].max_lr == 0.3


def test_a_learning_rate_that_something_else_wrote_is_not_loaded(on_cpu: None) -> None:
    source = adam(ours=False)
    scheduler = lr_scheduler.ExponentialLR(source, 0.9)
    source.step()
    source.param_groups[0]["lr"] = 0.05
    scheduler.step()
    target = ExponentialLR(adam(), 0.5)
    with pytest.raises(ValueError, match=r"state_dict\['_last_lr'\] must agree .* give 0.09.*, got \[0.04.*something"):
        target.load_state_dict(scheduler.state_dict())
    assert target.gamma == 0.5


def test_step_with_an_epoch_takes_whole_steps(on_cpu: None) -> None:
    scheduler = CosineAnnealingWarmRestarts(adam(), 4)
    with pytest.raises(ValueError, match="epoch must be an integer .*, got 0.5"):
        scheduler.step(0.5)
    assert (scheduler.T_cur, scheduler.T_i) == (0, 4)
    # As in torch, this one is not deprecated.
    scheduler.step(6)
    assert (scheduler.T_cur, scheduler.last_epoch) == (2, 6)
    with pytest.warns(UserWarning, match="epoch parameter"):
        LinearLR(adam()).step(6)
