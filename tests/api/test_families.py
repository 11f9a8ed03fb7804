"""Families and combinators: the laws they obey, what they refuse, and checkpoints. Their values: test_schedules.py."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fused_clr import FusedAdam
from fused_clr.schedules import (
    Constant,
    Cosine,
    CosineRestarts,
    Cyclic,
    Decay,
    Exponential,
    InverseSqrt,
    Linear,
    OneCycle,
    Part,
    Polynomial,
    Scaling,
    Schedule,
    Segment,
    Shape,
    WarmupStableDecay,
    sequence,
    warmup,
)

from ..helpers.schedules import Given, families

# -- laws --------------------------------------------------------------------------------------------------------------
lrs = st.just(0.0) | st.floats(1e-6, 2.0)
positive = st.floats(1e-6, 2.0)
steps = st.integers(1, 40) | st.floats(0.25, 40.0)
counts = st.integers(1, 40)
flags = st.booleans()
alone = st.one_of(
    st.builds(Constant, lrs),
    st.builds(Linear, lrs, lrs, steps),
    st.builds(Exponential, positive, positive, steps),
    st.builds(Polynomial, lrs, lrs, steps, st.floats(0.3, 4.0)),
    st.builds(Cosine, lrs, lrs, steps),
    st.builds(OneCycle, lrs, st.integers(12, 60), st.floats(0.1, 0.5), st.sampled_from(["cos", "linear"]), flags),
    st.builds(OneCycle, lrs, st.integers(12, 60), st.floats(0.1, 0.5), three_phase=flags),
    st.builds(CosineRestarts, lrs, counts, st.integers(1, 3), lrs),
    st.builds(InverseSqrt, positive, counts),
    st.builds(Decay, lrs, steps, st.sampled_from(["1-sqrt", "linear", "cosine"]), lrs, st.none() | st.floats(0, 0.99)),
    st.builds(WarmupStableDecay, lrs, steps, steps, steps, st.sampled_from(["1-sqrt", "linear", "cosine"]), lrs),
    st.builds(Cyclic, lrs, lrs, steps, mode=st.sampled_from(["triangular", "triangular2"]), cycle_momentum=flags),
)


def sequences(inner: st.SearchStrategy[Schedule]) -> st.SearchStrategy[Schedule]:
    return st.tuples(inner, inner, counts).map(lambda drawn: sequence(*drawn[:2], milestones=[drawn[2]]))


any_schedule: st.SearchStrategy[Schedule] = st.recursive(
    alone,
    lambda inner: sequences(inner) | st.builds(Schedule.scaled, inner, st.floats(0.01, 10.0)),
    max_leaves=3,
)
factors = st.floats(1e-3, 1e3)
at = st.integers(0, 200)
laws = settings(derandomize=True, max_examples=150, deadline=None)


def same(left: tuple[float, float], right: tuple[float, float]) -> bool:
    """Whether learning rates and momenta are equal; a momentum that is not set is NaN."""
    return left[0] == right[0] and (left[1] == right[1] or (math.isnan(left[1]) and math.isnan(right[1])))


@laws
@given(st.lists(any_schedule, min_size=1, max_size=4), st.lists(counts, min_size=3, max_size=3), at)
def test_a_sequence_is_its_schedules(schedules: list[Schedule], gaps: list[int], step: int) -> None:
    milestones = np.cumsum(gaps[: len(schedules) - 1])
    current = int(np.searchsorted(milestones, step, side="right"))
    own_step = step - (int(milestones[current - 1]) if current else 0)
    together = sequence(*schedules, milestones=milestones.tolist())
    assert same(together.lr_and_momentum(step), schedules[current].lr_and_momentum(own_step))


@laws
@given(any_schedule, any_schedule, any_schedule, counts, counts, at)
def test_sequences_flatten(a: Schedule, b: Schedule, c: Schedule, first: int, second: int, step: int) -> None:
    flat = sequence(a, b, c, milestones=[first, first + second])
    nested = sequence(a, sequence(b, c, milestones=[second]), milestones=[first])
    assert (
        flat.parts()
        == nested.parts()
        == sequence(sequence(a, b, milestones=[first]), c, milestones=[first + second]).parts()
    )
    assert same(flat.lr_and_momentum(step), nested.lr_and_momentum(step))


@laws
@given(any_schedule, any_schedule, counts, factors, at)
def test_scaling_commutes(a: Schedule, b: Schedule, milestone: int, factor: float, step: int) -> None:
    scaled = sequence(a, b, milestones=[milestone]).scaled(factor)
    assert scaled.parts() == sequence(a.scaled(factor), b.scaled(factor), milestones=[milestone]).parts()
    lr, momentum = a.lr_and_momentum(step)
    assert a.scaled(factor).lr(step) == pytest.approx(factor * lr, rel=1e-12, abs=1e-300)
    assert same((0.0, a.scaled(factor).momentum(step)), (0.0, momentum))


@laws
@given(any_schedule, counts, st.floats(0.0, 2.0), factors, at)
def test_a_warmup_then_a_schedule_is_the_schedule_shifted(
    then: Schedule, length: int, start_factor: float, factor: float, step: int
) -> None:
    assume(then.lr(0) > 0)
    warmed = warmup(length, then, start_factor)
    assert same(warmed.lr_and_momentum(length + step), then.lr_and_momentum(step))
    rising = min(step, length - 1)
    expected = then.lr(0) * (start_factor + (1 - start_factor) * rising / length)
    assert warmed.lr(rising) == pytest.approx(expected, rel=1e-12)
    assert same((0.0, warmed.momentum(rising)), (0.0, then.momentum(0)))
    assert warmed.scaled(factor).lr(step) == pytest.approx(
        warmup(length, then.scaled(factor), start_factor).lr(step), rel=1e-12, abs=1e-300
    )


@laws
@given(any_schedule, at)
def test_past_its_end_a_schedule_holds_its_last_value(schedule: Schedule, more: int) -> None:
    assume(schedule.end_step() < math.inf)
    end = int(schedule.end_step())
    last = schedule.parts()[-1].segments[-1]
    assert schedule.lr(end) == pytest.approx(last.lr[1], rel=1e-15)
    for step in (end + more, 2**53 - 1):
        assert same(schedule.lr_and_momentum(step), schedule.lr_and_momentum(end))


def test_ends() -> None:
    assert Linear(0.0, 1.0, 10.5).end_step() == 11
    assert sequence(Linear(0.0, 1.0, 10), Cosine(1.0, 0.0, 30), milestones=[20]).end_step() == 50
    assert OneCycle(0.1, 100).end_step() == 99
    for schedule in (Cyclic(0.1, 0.2), CosineRestarts(0.1, 5), CosineRestarts(0.1, 5, 2), InverseSqrt(0.1, 5)):
        assert schedule.end_step() == math.inf
        assert sequence(Constant(0.1), schedule, milestones=[5]).end_step() == math.inf
    # Without milestones each begins where the one before ends.
    ends = sequence(Linear(0.0, 1.0, 10.5), Cosine(1.0, 0.0, 30), Cyclic(0.1, 0.2))
    assert ends == sequence(Linear(0.0, 1.0, 10.5), Cosine(1.0, 0.0, 30), Cyclic(0.1, 0.2), milestones=[11, 41])


def test_momentum_bounds() -> None:
    one_cycle = OneCycle(0.1, 100)
    # Constant in the warm-up.
    for schedule in (one_cycle, warmup(10, then=one_cycle), sequence(Constant(0.1), one_cycle).scaled(2.0)):
        assert schedule.momentum_bounds == (0.85, 0.95)
    assert Cyclic(0.1, 0.2, base_momentum=0.9, max_momentum=0.9).momentum_bounds == (0.9, 0.9)
    with pytest.raises(ValueError, match="must drive the momentum to have momentum_bounds, got Constant"):
        _ = Constant(0.1).momentum_bounds


# -- bad input ---------------------------------------------------------------------------------------------------------
NO_NUMBERS = (None, True, "0.1", math.nan, math.inf, -1.0, [0.1], torch.ones(2))
MINIMAL: dict[Callable[..., Schedule], dict[str, Any]] = {
    Constant: {"lr": 0.1},
    Linear: {"start_lr": 0.1, "end_lr": 0.2, "steps": 10},
    Exponential: {"start_lr": 0.1, "end_lr": 0.2, "steps": 10},
    Polynomial: {"start_lr": 0.1, "end_lr": 0.2, "steps": 10, "power": 2.0},
    Cosine: {"start_lr": 0.1, "end_lr": 0.2, "steps": 10},
    OneCycle: {
        "max_lr": 0.1,
        "total_steps": 100,
        "pct_start": 0.3,
        "base_momentum": 0.8,
        "max_momentum": 0.9,
        "div_factor": 10.0,
        "final_div_factor": 100.0,
    },
    CosineRestarts: {"max_lr": 0.1, "T_0": 10, "T_mult": 2, "eta_min": 0.01},
    InverseSqrt: {"peak_lr": 0.1, "warmup_steps": 10},
    WarmupStableDecay: {
        "peak_lr": 0.1,
        "warmup_steps": 10,
        "stable_steps": 10,
        "decay_steps": 10,
        "final_lr": 0.01,
    },
    warmup: {"steps": 10, "then": Constant(0.1), "start_factor": 0.1},
    Constant(0.1).scaled: {"factor": 2.0},
}
NUMBERS = [(make, name) for make, arguments in MINIMAL.items() for name in arguments if name != "then"]
by_argument = pytest.mark.parametrize(
    ("make", "name"), NUMBERS, ids=[f"{make.__name__}-{name}" for make, name in NUMBERS]
)


@by_argument
def test_an_argument_that_is_no_number_is_named(make: Callable[..., Schedule], name: str) -> None:
    is_length = "steps" in name or name in ("T_0", "T_mult", "power", "div_factor", "final_div_factor", "pct_start")
    for value in (*NO_NUMBERS, 0) if is_length else NO_NUMBERS:
        with pytest.raises(ValueError, match=rf"^{name} must (be|have) .*, got "):
            make(**MINIMAL[make] | {name: value})


@by_argument
def test_numbers_of_numpy_and_of_tensors_become_plain(make: Callable[..., Schedule], name: str) -> None:
    value = MINIMAL[make][name]
    kinds = (np.int64, np.int16) if isinstance(value, int) else (np.float64, np.float32, torch.tensor)
    for kind in kinds:
        schedule = make(**MINIMAL[make] | {name: kind(value)})
        file = io.BytesIO()
        torch.save(schedule.to_dict(), file)
        file.seek(0)
        assert Schedule.from_dict(torch.load(file, weights_only=True)) == schedule
        assert schedule.lr(7) == pytest.approx(make(**MINIMAL[make]).lr(7), rel=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Exponential(0.0, 1.0, 5), "start_lr must be a finite number > 0, got 0.0"),
        (
            lambda: Exponential(1e-300, 1e20, 5),
            r"end_lr must be within a factor of exp\(700\) of start_lr=1e-300, got 1e",
        ),
        (lambda: Linear(0.0, 1.0, 2**62), r"steps=\d+ must not be too large or too far apart: .* below 2\*\*62"),
        (lambda: OneCycle(0.1, 100.0), r"total_steps must be an integer in \[1, 2\*\*53\), got 100.0"),  # type: ignore[arg-type]
        (lambda: OneCycle(0.1, 100, 1.0), r"pct_start must be a number in \(0, 1\), got 1.0"),
        (lambda: OneCycle(0.1, 100, 0.0), r"pct_start must be a number in \(0, 1\), got 0.0"),
        (lambda: OneCycle(0.1, 3), r"pct_start \* total_steps must be above 1, got 0.3 \* 3"),
        (lambda: OneCycle(0.1, 100, 0.6, three_phase=True), r"below \(total_steps \+ 1\) / 2 .*, got 0.6 \* 100"),
        (lambda: OneCycle(0.1, 100, anneal_strategy="cosine"), r"one of \('cos', 'linear'\), got 'cosine'"),
        (lambda: OneCycle(0.1, 100, cycle_momentum=1), "cycle_momentum must be True or False, got 1"),  # type: ignore[arg-type]
        (lambda: OneCycle(0.1, 100, three_phase=None), "three_phase must be True or False, got None"),  # type: ignore[arg-type]
        (lambda: OneCycle(0.1, 100, max_momentum=1.0), r"max_momentum must be a number in \[0, 1\), got 1.0"),
        (lambda: OneCycle(1e300, 100, div_factor=1e-100), "div_factor must leave the learning rate finite, got 1e-100"),
        (lambda: CosineRestarts(0.1, 10, 1.5), r"T_mult must be an integer in \[1, 2\*\*53\), got 1.5"),  # type: ignore[arg-type]
        (lambda: CosineRestarts(0.1, 2**40, 2**52), "must end below step 2.*62, got T_0=1099511627776, T_mult=450"),
        (lambda: InverseSqrt(0.0, 10), "peak_lr must be a finite number >= 1e-299, got 0.0"),
        (
            lambda: WarmupStableDecay(0.1, 1, 1, 1, "sqrt"),
            r"decay must be one of \('1-sqrt', 'linear', 'cosine'\), got 's",
        ),
        (lambda: WarmupStableDecay(0.1, 1e-9, 1e12, 1), "warmup_steps=1e-09 and stable_steps=1000000000000 and decay_"),
        (lambda: warmup(10, 0.1), "then must be a Schedule, got 0.1"),  # type: ignore[arg-type]
        (lambda: warmup(2.5, Constant(0.1)), r"steps must be an integer in \[1, 2\*\*53\), got 2.5"),  # type: ignore[arg-type]
        (lambda: warmup(10, InverseSqrt(0.1, 5)), "then must begin with a learning rate > 0 .*, got InverseSqrt"),
        (lambda: Constant(0.1).scaled(-1.0), "factor must be a finite number >= 0, got -1.0"),
        (lambda: Constant(1e300).scaled(1e10), "factor=10000000000.0 makes a learning rate too large"),
        (
            lambda: Exponential(1e-300, 1e-301, 4).scaled(1e-30),
            "factor=1e-30 makes a learning rate too large or too small",
        ),
        (
            lambda: sequence(Cyclic(0.1, 0.2), Constant(0.1)),
            r"milestones must be given, since schedules\[0\] has no end",
        ),
        (lambda: sequence(Constant(0.1), InverseSqrt(0.1, 5), Constant(0.1)), r"since schedules\[1\] has no end: Inv"),
        (lambda: sequence(0.1, Constant(0.1)), r"schedules\[0\] must be a Schedule, got 0.1"),  # type: ignore[arg-type]
        (lambda: sequence(Constant(0.1), Constant(0.2), milestones=[True]), "strictly increasing integers > 0, got"),
        (lambda: sequence(Constant(0.1), Constant(0.2), milestones="5"), "strictly increasing integers > 0, got '5'"),  # type: ignore[arg-type]
        (lambda: sequence(Constant(0.1), Constant(0.2), milestones=[-5]), "strictly increasing integers > 0, got"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_refused(make: Callable[[], Schedule], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


LINE = Segment(4, Shape.LINEAR, (0.1, 0.5))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (None, r"parts\[0\] must be a Part, got None"),
        (LINE, r"parts\[0\] must be a Part, got Segment\("),
        (Part(LINE), r"parts\[0\].segments\[0\] must be a Segment, got 4"),  # type: ignore[arg-type]
        (Part(3), r"parts\[0\].segments must hold at least one segment, got 3"),  # type: ignore[arg-type]
        (Part((LINE, None)), r"parts\[0\].segments\[1\] must be a Segment, got None"),  # type: ignore[arg-type]
        (Part((LINE,), start=2.5), r"parts\[0\].start must be an integer >= 0, got 2.5"),  # type: ignore[arg-type]
        (Part((LINE,), start=-1), r"parts\[0\].start must be an integer >= 0, got -1"),
        (Part((LINE,), repeats=1), r"parts\[0\].repeats must be True or False, got 1"),  # type: ignore[arg-type]
        (Part((LINE,), scaling=0.5), r"parts\[0\].scaling must be a Scaling, got 0.5"),  # type: ignore[arg-type]
        (Part((LINE,), scaling=Scaling("2")), r"scaling.factor must be a finite number >= 0, got '2'"),  # type: ignore[arg-type]
        (Part((LINE,), scaling=Scaling(per=None)), r"scaling.per must be 'cycle' or 'step', got None"),  # type: ignore[arg-type]
        (Part((LINE,), scaling=Scaling(scale_fn=3)), r"scaling.scale_fn must be callable or None, got 3"),  # type: ignore[arg-type]
        (Part((LINE,), scaling=Scaling(about_lr=math.nan)), r"scaling.about_lr must be a finite number, got nan"),
        (Part((LINE,), scaling=Scaling(about_momentum=True)), r"scaling.about_momentum must be a finite number, got T"),
        (
            Part((LINE,), scaling=Scaling(total_steps=0.5)),
            r"scaling.total_steps must be an integer >= 1 or None, got 0",
        ),  # type: ignore[arg-type]
        (Part((LINE._replace(lr=0.5),)), r"segments\[0\].lr must be two finite numbers >= 0, got 0.5"),  # type: ignore[arg-type]
        (Part((LINE._replace(lr=(0.1, 0.2, 0.3)),)), r"lr must be two finite numbers >= 0, got \(0.1, 0.2, 0.3\)"),
        (Part((LINE._replace(lr=(0.1, -0.2)),)), r"lr must be two finite numbers >= 0, got \(0.1, -0.2\)"),
        (Part((LINE._replace(lr=(math.nan, 0.2)),)), r"lr must be two finite numbers >= 0, got \(nan, 0.2\)"),
        (Part((LINE._replace(lr=(torch.tensor(0.1), 0.2)),)), r"lr must be two finite numbers >= 0, got \(tensor\(0.1"),
        (Part((LINE._replace(lr=("0.1", 0.2)),)), r"lr must be two finite numbers >= 0, got \('0.1', 0.2\)"),
        (Part((LINE._replace(steps="4"),)), r"steps must be a finite number > 0, got '4'"),
        (Part((LINE._replace(steps=True),)), r"steps must be a finite number > 0, got True"),
        (Part((LINE._replace(shape=1),)), r"shape must be one Shape, got 1"),
        (Part((LINE._replace(shape="LINEAR"),)), r"shape must be one Shape, got 'LINEAR'"),
        (Part((LINE._replace(momentum=0.9),)), r"momentum must be two numbers in \[0, 1\) or None, got 0.9"),
        (Part((LINE._replace(power=None),)), r"power must be a finite number > 0, got None"),
        (
            Part((LINE._replace(shape=Shape.INVERSE_SQRT, momentum=(0.9, 0.8)),)),
            "momentum must be None where .* INVERSE",
        ),
        (
            Part((LINE._replace(shape=Shape.INVERSE_SQRT, lr=(0.1, 0.0)),)),
            "two numbers > 0 where the shape is INVERSE_S",
        ),
        (
            Part((LINE._replace(shape=Shape.INVERSE_SQRT, lr=(1e-300, 1.0)),)),
            "too far apart for a shape that is INVERSE",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_malformed_parts(part: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Given((part,)).lr(0)


@pytest.mark.parametrize(
    "parts", [None, 3, torch.ones(2), Part((LINE,)), iter([Part((LINE,))])], ids=lambda x: type(x).__name__
)
def test_parts_that_are_no_tuple(parts: Any) -> None:
    with pytest.raises(ValueError, match="a schedule must have at least one part, got |must be a Part, got"):
        Given(parts).lr(0)


def test_numpy_numbers_in_parts_become_plain() -> None:
    segment = Segment(np.int64(4), Shape.LINEAR, (np.float32(0.5), np.float64(1.0)), (np.float16(0.5), 0.75))  # type: ignore[arg-type]
    schedule = Given((Part((segment,), scaling=Scaling(factor=np.float32(0.5), about_lr=np.float32(0.25))),))  # type: ignore[arg-type]
    assert type(schedule.lr(1)) is float
    assert type(schedule.momentum(1)) is float
    (bounds,) = schedule.timeline.bounds[0]
    assert all(type(value) is float for value in bounds)


# -- checkpoints -------------------------------------------------------------------------------------------------------
COMBINED = {
    "warmup": warmup(10, then=OneCycle(0.1, 100), start_factor=0.1),
    "scaled": warmup(10, then=Cosine(0.1, 0.0, 50)).scaled(0.5).scaled(3.0),
    "sequence": sequence(Linear(0.0, 0.1, 10), CosineRestarts(0.1, 10, 2).scaled(2.0), milestones=[10]),
}


@pytest.mark.parametrize("name", [*COMBINED, *families()])
def test_dict_round_trips(name: str) -> None:
    schedule = COMBINED[name] if name in COMBINED else families()[name][0]
    file = io.BytesIO()
    torch.save(schedule.to_dict(), file)
    file.seek(0)
    loaded = Schedule.from_dict(torch.load(file, weights_only=True))
    assert loaded == schedule
    assert loaded.parts() == schedule.parts()


def test_a_scale_fn_in_a_combination_is_found_again() -> None:
    tabulated = Cyclic(0.1, 0.2, 4, scale_fn=lambda cycle: 1 / cycle)
    for schedule in (tabulated.scaled(2.0), warmup(5, then=tabulated), sequence(tabulated, milestones=[])):
        with pytest.warns(UserWarning, match="cannot be saved"):
            saved = schedule.to_dict()
        assert Schedule.from_dict(saved, present=schedule) == schedule


def test_an_optimizer_s_checkpoint_holds_every_family() -> None:
    schedules = [own for own, _ in families().values()] + list(COMBINED.values())

    def make(given: list[Schedule | None]) -> FusedAdam:
        return FusedAdam([{"params": [torch.nn.Parameter(torch.ones(1))], "schedule": own} for own in given])

    saving, loading = make([*schedules]), make([None] * len(schedules))
    for _ in range(7):
        saving.step()
    file = io.BytesIO()
    torch.save(saving.state_dict(), file)
    file.seek(0)
    loading.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(2):
        for one, other, schedule in zip(saving.param_groups, loading.param_groups, schedules, strict=True):
            assert other["schedule"] == schedule
            assert (one["lr"], one["betas"]) == (other["lr"], other["betas"])
        for optimizer in (saving, loading):
            optimizer.step()
