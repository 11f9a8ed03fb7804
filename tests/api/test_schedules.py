"""Schedules on the host, against exact rationals and torch's schedulers; schedules as values."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import math
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CyclicLR

import fused_clr.schedules
from fused_clr.reference import exact_lr, exact_momentum
from fused_clr.schedules import (
    Constant,
    CosineRestarts,
    Cyclic,
    Linear,
    OneCycle,
    Part,
    Scaling,
    Schedule,
    Segment,
    Shape,
    sequence,
    warmup,
)

from ..helpers.schedules import (
    CYCLIC,
    EXP_RANGE_RTOL,
    LAST_STEP,
    Given,
    assert_within_ulps,
    edge_steps,
    exact_one_cycle,
    families,
    halving,
    once,
    progress_of,
    repeated,
    shape_segments,
    steps_of,
    torch_peers,
    torch_values,
    waning,
)

LINE = Segment(4, Shape.LINEAR, (0.1, 0.5))


# -- values at a step --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", CYCLIC)
def test_within_4_ulp_of_exact(name: str) -> None:
    schedule = CYCLIC[name]
    steps = edge_steps(schedule)
    lrs, momenta = schedule.lr(np.array(steps)), schedule.momentum(np.array(steps))
    for index, step in enumerate(steps):
        assert_within_ulps(schedule.lr(step), exact_lr(schedule, step))
        assert_within_ulps(schedule.momentum(step), exact_momentum(schedule, step), ulp_of=schedule.max_momentum)
        assert schedule.lr_and_momentum(step) == (schedule.lr(step), schedule.momentum(step))
        assert (lrs[index], momenta[index]) == schedule.lr_and_momentum(step)


def test_bounds_the_wrong_way_round() -> None:
    schedule = Cyclic(0.5, 1e-3, 7, 5, mode="triangular2")
    for step in edge_steps(schedule):
        assert_within_ulps(schedule.lr(step), exact_lr(schedule, step), ulp_of=0.5)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.99994, 1.0, 1.0001])
def test_exp_range(gamma: float) -> None:
    schedule = Cyclic(0.0, 0.1, 7, 5, mode="exp_range", gamma=gamma)
    for step in (0, 1, 2, 6, 7, 8, 100, 1003, 5000):
        exact = float(exact_lr(schedule, step))
        assert schedule.lr(step) == pytest.approx(exact, rel=EXP_RANGE_RTOL)
        assert schedule.lr(np.array([step]))[0] == pytest.approx(exact, rel=EXP_RANGE_RTOL)


def test_scales_beyond_float64_do_not_raise() -> None:
    grows = Cyclic(0.25, 1.25, 3, mode="exp_range", gamma=1.5)
    assert grows.lr(4000) > 1e300
    # Not inf * 0.
    assert grows.lr(6000) == 0.25
    tiny = Cyclic(0.125, 0.5, 2.0**-1070, mode="triangular2")
    assert tiny.lr(LAST_STEP) == 0.125


@pytest.mark.parametrize("cycle_momentum", [True, False])
@pytest.mark.parametrize(
    "arguments",
    [
        {"mode": "triangular"},
        {"mode": "triangular2"},
        {"mode": "exp_range", "gamma": 0.97},
        {"scale_fn": halving, "scale_mode": "cycle"},
        {"scale_fn": waning, "scale_mode": "iterations"},
        {"mode": "none of torch's", "scale_fn": waning},
    ],
    ids=lambda arguments: "-".join(map(str, arguments)),
)
@pytest.mark.parametrize("sizes", [(7, None), (7, 4), (1, 9), (2.5, 3.25)], ids=str)
def test_torch_cyclic(sizes: tuple[float, float | None], arguments: dict[str, Any], cycle_momentum: bool) -> None:
    common = {"step_size_up": sizes[0], "step_size_down": sizes[1], "cycle_momentum": cycle_momentum, **arguments}
    schedule = Cyclic(1e-4, 1e-2, **common)
    assert schedule.drives_momentum == cycle_momentum
    for step, lr, beta1 in torch_values((schedule, lambda o: CyclicLR(o, 1e-4, 1e-2, **common), 80)):
        assert schedule.lr(step) == pytest.approx(lr, rel=1e-12)
        if cycle_momentum:
            assert schedule.momentum(step) == pytest.approx(beta1, rel=1e-12)
        else:
            assert math.isnan(schedule.momentum(step))


@pytest.mark.parametrize("mode", ["triangular", "triangular2"])
def test_torch_late_steps_where_it_has_not_drifted(mode: str) -> None:
    schedule = Cyclic(2.5e-4, 1e-3, 102_000, 101_000, mode=mode)
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))])
    scheduler = CyclicLR(optimizer, 2.5e-4, 1e-3, 102_000, 101_000, mode)
    optimizer.step()
    rng = random.Random(1)
    for step in [*(rng.randrange(2**24) for _ in range(300)), 2**24]:
        scheduler.last_epoch = step - 1
        scheduler.step()
        # Torch's 1 + step / period - cycle is off by 2**-53 * 84 cycles, over a height of order 1.
        assert schedule.lr(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)


@pytest.mark.parametrize("name", torch_peers())
def test_torch_peers(name: str) -> None:
    peer = torch_peers()[name]
    for step, lr, beta1 in torch_values(peer):
        # Near 0, torch's recursions leave what they have cancelled.
        assert peer[0].lr(step) == pytest.approx(lr, rel=1e-12, abs=1e-16)
        if peer[0].drives_momentum:
            assert peer[0].momentum(step) == pytest.approx(beta1, rel=1e-12)


@pytest.mark.parametrize("name", families())
def test_families_in_exact_arithmetic(name: str) -> None:
    schedule, exact = families()[name]
    for step in steps_of(schedule):
        assert schedule.lr(step) == pytest.approx(float(exact(step)), rel=1e-14, abs=1e-40), step
        if isinstance(schedule, OneCycle):
            assert schedule.momentum(step) == pytest.approx(float(exact_one_cycle(schedule, step)[1]), rel=1e-14)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(
    step=st.integers(0, LAST_STEP),
    up=st.integers(1, 10**9),
    down=st.integers(1, 10**9),
    bounds=st.tuples(st.floats(0, 10), st.floats(0, 10)).map(sorted),
)
def test_properties(step: int, up: int, down: int, bounds: list[float]) -> None:
    schedule = Cyclic(bounds[0], bounds[1], up, down)
    lr = schedule.lr(step)
    assert_within_ulps(lr, exact_lr(schedule, step))
    assert bounds[0] <= lr <= bounds[1] + 4 * math.ulp(bounds[1])
    assert lr == schedule.lr(step % (up + down))
    assert schedule.lr(0) == bounds[0]


@pytest.mark.parametrize("name", shape_segments())
def test_shapes(name: str) -> None:
    segments = shape_segments()[name]
    for repeats in (False, True):
        schedule = Given((Part(segments, repeats),))
        for step in range(53):
            segment = segments[min(step // 24, 2)]
            progress = progress_of(segment, (step % 24) / segment.steps)
            lr = segment.lr[0] + (segment.lr[1] - segment.lr[0]) * progress
            # The formulas of the curves here lose what cancels in first * ratio**x - first.
            assert schedule.lr(step) == pytest.approx(lr, rel=1e-12)
            if segment.momentum is not None:
                momentum = segment.momentum[0] + (segment.momentum[1] - segment.momentum[0]) * progress
                assert schedule.momentum(step) == pytest.approx(momentum, rel=1e-12)
        assert schedule.lr(53) == (1e-4 if repeats else 0.25)


def test_both_ends_of_a_segment_are_met() -> None:
    for first, last, *_ in shape_segments().values():
        rising, falling = once(first), once(last)
        for schedule, segment in ((rising, first), (falling, last)):
            # A square root of rounded squares is met within three roundings.
            rel = 2**-51 if segment.shape == Shape.INVERSE_SQRT else 2**-52
            assert schedule.lr(0) == pytest.approx(segment.lr[0], rel=rel)
            assert schedule.lr(24) == pytest.approx(segment.lr[1], rel=rel)


def test_curves_of_nearly_equal_ends() -> None:
    for ratio in (1.0, 1 + 2**-50, 1 + 2**-27, 1 + 2**-25):
        schedule = once(Segment(4, Shape.EXPONENTIAL, (0.1, 0.1 * ratio), (0.9, 0.8)))
        for step in range(5):
            assert schedule.lr(step) == pytest.approx(0.1 * ratio ** (step / 4), rel=2**-51)
            assert schedule.momentum(step) == pytest.approx(0.9 - 0.1 * step / 4, rel=1e-8)
        for ends in ((0.1, 0.1 * ratio), (0.1 * ratio, 0.1)):
            schedule = once(Segment(4, Shape.INVERSE_SQRT, ends))
            for step in range(5):
                exact = math.fsum([ends[0], (ends[1] - ends[0]) * step / 4])
                assert schedule.lr(step) == pytest.approx(exact, rel=2**-51 + (ratio - 1) ** 2)


def test_it_holds_its_last_value_past_its_end() -> None:
    for steps in (7, 6.5, 0.25):
        segment = Segment(steps, Shape.LINEAR, (0.1, 0.25), (0.9, 0.8))
        # Scaled per step, by the step of the end: the first one at or past it.
        schedule = once(segment, factor=0.5, per="step")
        end = math.ceil(steps)
        for step in (end, end + 1, 10**6, LAST_STEP):
            assert schedule.lr_and_momentum(step) == (0.25 * 0.5**end, 0.8 * 0.5**end)
            assert schedule.lr(step) == exact_lr(schedule, step)
        assert schedule.last_step() == math.inf


def test_scaling_is_about_a_value() -> None:
    rising = Segment(4, Shape.LINEAR, (0.5, 1.0), (0.75, 0.5))
    schedule = repeated(rising, factor=0.25, about_lr=0.5, about_momentum=0.875)
    for step in range(12):
        height, scale = step % 4 / 4, 0.25 ** (step // 4)
        assert schedule.lr(step) == 0.5 + 0.5 * height * scale
        assert schedule.momentum(step) == 0.875 - (0.125 + 0.25 * height) * scale


# -- cycles ------------------------------------------------------------------------------------------------------------
FALLS: dict[str, tuple[Schedule, list[int]]] = {
    "cyclic": (Cyclic(1e-4, 1e-2, 4, 3), [6, 13, 20, 27, 34]),
    # Cycles of 3.75 steps: the last step is the one within which the cycle ends.
    "fractional": (Cyclic(1e-4, 1e-2, 2.5, 1.25), [3, 7, 11, 14, 18, 22, 26, 29, 33, 37]),
    "bounds the wrong way round": (Cyclic(1e-2, 1e-4, 4, 3), [3, 10, 17, 24, 31, 38]),
    "restarts": (CosineRestarts(1.0, 5, 2), [4, 14, 34]),
    "one cycle": (OneCycle(1e-2, 20), [18]),
    # The second fall goes on with the first.
    "three phases": (OneCycle(1e-2, 20, three_phase=True), [18]),
    "warm-up": (warmup(5, Cyclic(1e-4, 1e-2, 4, 3)), [11, 18, 25, 32, 39]),
    "a fall, then cycles": (sequence(Linear(1.0, 0.1, 5), Cyclic(1e-4, 1e-2, 4, 3)), [4, 11, 18, 25, 32, 39]),
    "cut off": (sequence(CosineRestarts(1.0, 8), Constant(0.1), milestones=[20]), [7, 15]),
    "constant": (Constant(0.1), []),
    "rising": (Linear(0.1, 1.0, 5), []),
    "no amplitude": (Cyclic(0.1, 0.1, 4), []),
}


@pytest.mark.parametrize("name", FALLS)
def test_ends_of_cycles(name: str) -> None:
    schedule, ends = FALLS[name]
    assert [step for step in range(40) if schedule.ends_cycle(step)] == ends
    assert schedule.has_cycles == bool(ends)


@pytest.mark.parametrize("period", [4, 11])
def test_late_ends_of_cycles_are_exact(period: int) -> None:
    schedule = Cyclic(0.0, 1.0, 1, period - 1)
    first = LAST_STEP - 3 * period
    ends = [step for step in range(first, LAST_STEP) if schedule.ends_cycle(step)]
    assert ends == [step for step in range(first, LAST_STEP) if (step + 1) % period == 0]


# -- sequences ---------------------------------------------------------------------------------------------------------
def test_a_sequence_equals_its_parts() -> None:
    warmup = once(Segment(10, Shape.LINEAR, (0.0, 0.1)))
    wave, last = CYCLIC["asymmetric"], once(Segment(30.5, Shape.COSINE, (0.1, 0.0), (0.9, 0.7)), factor=0.5, per="step")
    schedule = sequence(warmup, wave, last, milestones=[16, 100])
    for step in (*range(140), LAST_STEP):
        own, start = (warmup, 0) if step < 16 else (wave, 16) if step < 100 else (last, 100)
        np.testing.assert_array_equal(schedule.lr_and_momentum(step), own.lr_and_momentum(step - start))
    assert schedule.lr(15) == 0.1
    assert schedule.drives_momentum
    steps = np.arange(140).reshape(7, 20)
    assert schedule.lr(steps).tolist() == [[schedule.lr(int(step)) for step in row] for row in steps]
    for step in (3, 20, 99):
        assert_within_ulps(schedule.lr(step), exact_lr(schedule, step))


def test_sequences_nest() -> None:
    a, b, c, d = (Cyclic(0.1 * i, 0.2 * i, 3) for i in range(1, 5))
    inner = sequence(b, c, milestones=(10,))
    nested, flat = sequence(a, inner, d, milestones=(5, 40)), sequence(a, b, c, d, milestones=(5, 15, 40))
    assert nested.parts() == flat.parts()
    # A part that would begin at or after the next milestone is never reached.
    assert sequence(inner, d, milestones=[10]).parts() == sequence(b, d, milestones=[10]).parts()
    assert sequence(a, milestones=()).parts() == a.parts()


@pytest.mark.parametrize(
    ("schedules", "milestones", "message"),
    [
        ((), (), "schedules must hold at least one schedule, got none"),
        ((Cyclic(0, 1), 0.1), (5,), r"schedules\[1\] must be a Schedule, got 0.1"),
        ((Cyclic(0, 1),), (5,), r"milestones must be one fewer than the 1 schedules, got \(5,\)"),
        ((Cyclic(0, 1),) * 3, (5,), r"milestones must be one fewer than the 3 schedules, got \(5,\)"),
        ((Cyclic(0, 1),) * 2, (0,), r"milestones must be strictly increasing integers > 0, got \(0,\)"),
        ((Cyclic(0, 1),) * 3, (5, 5), r"milestones must be strictly increasing integers > 0, got \(5, 5\)"),
        ((Cyclic(0, 1),) * 2, (2.5,), r"milestones must be strictly increasing integers > 0, got \(2.5,\)"),
        ((Cyclic(0, 1),) * 2, 5, r"milestones must be strictly increasing integers > 0, got 5"),
    ],
)
def test_validation_of_sequences(schedules: Any, milestones: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sequence(*schedules, milestones=milestones)


# -- tables of scale functions -----------------------------------------------------------------------------------------
def tabulated(schedule: Schedule, part: int = 0) -> list[float]:
    return schedule.timeline.tabulated_scale(part).tolist()


def test_tabulated_scale() -> None:
    assert tabulated(Cyclic(0, 1, 2, scale_fn=halving, total_steps=9)) == [1.0, 0.5, 0.25]
    by_cycle = Cyclic(0, 1, 2, scale_fn=halving)
    assert len(tabulated(by_cycle)) == 1000
    assert by_cycle.last_step() == 3999
    by_step = Cyclic(0, 1, 2, scale_fn=waning, scale_mode="iterations", total_steps=3)
    assert tabulated(by_step) == [waning(step) for step in range(4)]
    assert by_step.last_step() == 3
    with pytest.raises(ValueError, match="total_steps must be given"):
        tabulated(dataclasses.replace(by_step, total_steps=None))
    with pytest.raises(ValueError, match="scale_fn must return finite numbers, got inf for 3"):
        tabulated(Cyclic(0, 1, 2, scale_fn=lambda x: math.inf if x == 3 else 1.0))
    assert CYCLIC["tenths"].last_step() == math.inf


def test_a_table_ends_where_its_part_does() -> None:
    by_step = Cyclic(0, 1, 2, scale_fn=waning, scale_mode="iterations")
    by_cycle = Cyclic(0, 1, 2, scale_fn=halving)
    plain = Cyclic(0, 1, 2)
    # The milestone says how many steps there are.
    schedule = sequence(plain, by_step, plain, milestones=[7, 20])
    assert tabulated(schedule, 1) == [waning(step) for step in range(13)]
    assert schedule.last_step() == math.inf
    assert len(tabulated(sequence(by_cycle, plain, milestones=[9]))) == 3
    assert sequence(by_cycle, plain, milestones=[4001]).last_step() == 3999
    assert sequence(plain, by_cycle, milestones=[100]).last_step() == 4099
    fewer = dataclasses.replace(by_step, total_steps=5)
    assert sequence(plain, fewer, plain, milestones=[7, 20]).last_step() == 12
    assert tabulated(once(LINE, scale_fn=waning, per="step")) == [waning(step) for step in range(5)]


# -- values ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_lr": -1.0}, "base_lr must be a finite number >= 0, got -1.0"),
        ({"base_lr": "low"}, "base_lr must be .* got 'low'"),
        ({"max_lr": math.inf}, "max_lr must be .* got inf"),
        ({"max_lr": math.nan}, "max_lr must be .* got nan"),
        ({"step_size_up": 0}, "step_size_up must be .* got 0"),
        ({"step_size_up": None}, "step_size_up must be .* got None"),
        ({"step_size_down": math.nan}, "step_size_down must be .* got nan"),
        ({"step_size_down": -2}, "step_size_down must be .* got -2"),
        ({"step_size_up": 2**62}, "too large or too far apart"),
        ({"step_size_up": 1e-9, "step_size_down": 1e12}, "too large or too far apart"),
        ({"mode": "sine"}, "mode must be one of .*'exp_range'.* got mode='sine'"),
        ({"gamma": -0.1}, "gamma must be .* got -0.1"),
        ({"gamma": math.nan}, "gamma must be .* got nan"),
        ({"base_momentum": 1.0}, r"base_momentum must be a number in \[0, 1\), got 1.0"),
        ({"max_momentum": -0.1}, "max_momentum must be .* got -0.1"),
        ({"scale_fn": 3.0}, "scale_fn must be callable or None, got 3.0"),
        ({"scale_fn": halving, "scale_mode": "epoch"}, "scale_mode must be one of .* got 'epoch'"),
        ({"total_steps": 0}, "total_steps must be .* got 0"),
        ({"total_steps": 1.5}, "total_steps must be .* got 1.5"),
        ({"total_steps": "many"}, "total_steps must be .* got 'many'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_validation_of_cyclic(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cyclic(**({"base_lr": 0.1, "max_lr": 0.2} | arguments))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((), "at least one part, got none"),
        ((Part(()),), r"parts\[0\].segments must hold at least one segment, got none"),
        ((Part((LINE,)), Part((LINE,))), r"parts must start at 0, .* got starts \[0, 0\]"),
        ((Part((LINE,)), Part((LINE,), start=2**62)), r"parts must start .* below 2\*\*62, got starts \[0, 461"),
        ((Part((LINE,), start=1),), r"parts must start at 0, .* got starts \[1\]"),
        ((Part((LINE, LINE._replace(momentum=(0.8, 0.9)))),), r"parts\[0\].segments must all have a momentum, or none"),
        ((Part((LINE,), scaling=Scaling(per="epoch")),), r"scaling.per must be 'cycle' or 'step', got 'epoch'"),
        ((Part((LINE,), scaling=Scaling(factor=-1.0)),), r"scaling.factor must be a finite number >= 0, got -1.0"),
        ((Part((LINE._replace(steps=0),)),), r"parts\[0\].segments\[0\].steps must be a finite number > 0, got 0"),
        ((Part((LINE._replace(steps=2**62),)),), r"too large or too far apart"),
        ((Part((LINE._replace(shape=Shape.LINEAR | Shape.COSINE),)),), "shape must be one Shape"),
        (
            (Part((LINE._replace(lr=(0.1, math.inf)),)),),
            r"segments\[0\].lr must be two finite numbers >= 0, got \(0.1, inf\)",
        ),
        ((Part((LINE._replace(momentum=(0.1, 1.0)),)),), r"momentum must be two numbers in \[0, 1\)"),
        ((Part((LINE._replace(power=0.0),)),), "power must be a finite number > 0, got 0.0"),
        ((Part((LINE._replace(shape=Shape.CONSTANT),)),), r"equal first and last values .* got \(0.1, 0.5\)"),
        ((Part((LINE._replace(shape=Shape.EXPONENTIAL, lr=(0, 1)),)),), "two numbers > 0 where the shape is EXPONENT"),
        ((Part((LINE._replace(shape=Shape.EXPONENTIAL, lr=(1e-300, 1e20)),)),), "too far apart"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_validation_of_parts(parts: tuple[Part, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Given(parts).lr(0)


def test_steps_must_be_integers_and_not_negative() -> None:
    schedule = Cyclic(0.1, 0.2)
    for step in (-1, np.array([3, -2]), np.int64(-1)):
        with pytest.raises(ValueError, match="step must be >= 0, got -"):
            schedule.lr(step)
    for step in (1.5, np.array([1.5]), "1", None):
        with pytest.raises(ValueError, match="step must be an integer or an array of integers, got "):
            schedule.momentum(step)  # type: ignore[call-overload]


def test_kinds_of_steps() -> None:
    schedule = CYCLIC["asymmetric"]
    expected = schedule.lr(2**40 + 3)
    # In int64, a shift by the unit of a step size would overflow.
    fine = CYCLIC["tenths"]
    for step in (np.int64(2**40 + 3), np.uint64(2**40 + 3), torch.tensor(2**40 + 3)):
        assert type(schedule.lr(step)) is float  # type: ignore[call-overload]
        assert schedule.lr(step) == expected  # type: ignore[call-overload]
        assert fine.lr(step) == fine.lr(2**40 + 3)  # type: ignore[call-overload]
    for array in (np.array(3, np.int32), np.zeros((0, 2), np.int64), np.arange(12).reshape(3, 4)[:, ::2]):
        assert schedule.lr(array).shape == array.shape
        assert schedule.momentum(array).dtype == np.float64
        assert schedule.lr(array).ravel().tolist() == [schedule.lr(step) for step in array.ravel().tolist()]


def test_schedules_are_values() -> None:
    schedule = Cyclic(0.1, 0.2, 7, mode="triangular2")
    assert schedule == Cyclic(0.1, 0.2, 7, 7, "triangular2")
    assert schedule.lr(7) == 0.2
    assert hash(schedule) == hash(copy.deepcopy(schedule))
    assert dataclasses.replace(schedule, max_lr=0.3).lr(7) == 0.3
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.max_lr = 1.0  # type: ignore[misc]
    chain = sequence(schedule, Cyclic(0.1, 0.2), milestones=[9])
    for value in (schedule, chain):
        assert value.lr(7) == 0.2
        # The compiled form stays behind.
        again = pickle.loads(pickle.dumps(value))
        assert "timeline" not in vars(again)
        assert again == value == copy.copy(value)
        assert again.lr(7) == 0.2
        assert hash(again) == hash(value)


def test_what_engines_read_of_a_timeline() -> None:
    schedules = [
        sequence(Cyclic(low, high, 7, 2.5, mode="triangular2", cycle_momentum=momentum), last, milestones=[50])
        for low, high, momentum, last in [
            (0.1, 0.2, True, once(Segment(10, Shape.COSINE, (0.1, 0.0)))),
            (0.3, 0.01, False, once(Segment(10, Shape.COSINE, (5.0, 0.3), (0.9, 0.8)))),
        ]
    ]
    first, second = (schedule.timeline for schedule in schedules)
    assert first.key == second.key
    assert hash(first.key) == hash(second.key)
    for step in (0, 5, 8, 23, 49, 50, 53, 60, 99):
        assert first.locate(step) == second.locate(step)
        part, segment, height, scale = first.locate(step)
        for schedule in schedules:
            b = schedule.timeline.bounds[part][segment]
            assert b.about_lr + (b.lr_offset + b.lr_span * height) * scale == schedule.lr(step)
            if b.about_momentum is None:
                assert b[3:] == (None, None, None)
                assert math.isnan(schedule.momentum(step))
            else:
                momentum = b.about_momentum + (b.momentum_offset + b.momentum_span * height) * scale
                assert momentum == schedule.momentum(step)
    others = [
        Cyclic(0.1, 0.2, 7),
        Cyclic(0.1, 0.2, 7, 2.5),
        Cyclic(0.1, 0.2, 7, mode="triangular2"),
        Cyclic(0.1, 0.2, 7, mode="exp_range", gamma=0.5),
        Cyclic(0.1, 0.2, 7, scale_fn=halving),
        Cyclic(0.1, 0.2, 7, scale_fn=waning),
        Cyclic(0.1, 0.2, 7, scale_fn=waning, scale_mode="iterations"),
        once(Segment(10, Shape.EXPONENTIAL, (0.1, 0.2))),
        once(Segment(10, Shape.EXPONENTIAL, (0.1, 0.3))),
    ]
    assert len({schedule.timeline.key for schedule in others}) == len(others)


def test_schedules_need_neither_torch_nor_triton() -> None:
    package = Path(fused_clr.schedules.__file__).parent.parent
    code = (
        "import sys, types; sys.modules |= {'torch': None, 'triton': None};"
        "package = types.ModuleType('fused_clr'); sys.modules['fused_clr'] = package;"
        f"package.__path__ = [{str(package)!r}];"
        "from fused_clr.schedules import Cyclic; print(Cyclic(0.25, 0.75, 4).lr(2))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "0.5\n"


# -- checkpoints -------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Pair(Schedule):
    """A family of a user's, with a schedule and a tuple in it."""

    first: Schedule
    sizes: tuple[int, ...]
    note: str | None = None

    def parts(self) -> tuple[Part, ...]:
        return self.first.parts()


@pytest.mark.parametrize(
    "schedule",
    [
        CYCLIC["halves"],
        Cyclic(0.1, 0.2, 7, mode="exp_range", gamma=0.5, cycle_momentum=False, total_steps=9),
        sequence(Cyclic(0.1, 0.2), sequence(Cyclic(0, 1), Cyclic(0, 2), milestones=[3]), milestones=[np.int64(9)]),
        Pair(CYCLIC["long"], (1, 2)),
    ],
    ids=["cyclic", "exp_range", "nested", "own"],
)
def test_dict_round_trip(schedule: Schedule) -> None:
    saved = schedule.to_dict()
    assert saved["type"] == type(schedule).__name__
    assert Schedule.from_dict(saved) == schedule
    assert type(schedule).from_dict(json.loads(json.dumps(saved))) == schedule
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    assert Schedule.from_dict(torch.load(file, weights_only=True)) == schedule


def test_a_scale_fn_leaves_its_name() -> None:
    scaled, plain = Cyclic(0.1, 0.2, scale_fn=halving), Cyclic(0, 1)
    for schedule in (scaled, sequence(plain, scaled, milestones=[5])):
        with pytest.warns(UserWarning, match="scale_fn 'halving' cannot be saved") as record:
            saved = schedule.to_dict()
        assert [warning.filename for warning in record] == [__file__]
        json.dumps(saved)
        assert Schedule.from_dict(saved, present=schedule) == schedule
        others = (None, plain, sequence(plain, plain, milestones=[5]), sequence(scaled, plain, milestones=[5]))
        for present in others:
            with pytest.raises(ValueError, match="scale_fn 'halving', which a checkpoint cannot hold"):
                Schedule.from_dict(saved, present)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (3, "a saved Schedule must be what its to_dict.. returned, got 3"),
        ({}, "'type' of a saved schedule must be one of .*'Cyclic'.* got None"),
        ({"type": "Sine"}, "'type' of a saved schedule must be one of .* got 'Sine'"),
        ({"type": "Cyclic", "base_lr": 0.1}, r"a saved Cyclic must have the keys \['type', 'base_lr'.* got \['type'"),
        (Cyclic(0, 1).to_dict() | {"step": 3}, r"a saved Cyclic must have the keys .*'step'\]"),
        (Cyclic(0, 1).to_dict() | {"gamma": -1.0}, "gamma must be .* got -1.0"),
        ({"type": "ScheduleSequence", "schedules": [3], "milestones": []}, r"schedules\[0\] must be a Schedule, got 3"),
        (
            {"type": "ScheduleSequence", "schedules": 3, "milestones": []},
            "a saved ScheduleSequence has a value of a wrong",
        ),
    ],
)
def test_dicts_that_are_no_schedules(saved: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule.from_dict(saved)


def test_from_dict_of_another_type() -> None:
    with pytest.raises(ValueError, match="a saved Pair must be what its"):
        Pair.from_dict(Cyclic(0, 1).to_dict())


# -- classes of users --------------------------------------------------------------------------------------------------
def test_a_second_class_of_a_name_is_refused() -> None:
    with pytest.raises(TypeError, match="got 'Cyclic' in .* and in fused_clr.schedules.cyclic"):
        type("Cyclic", (Schedule,), {"parts": lambda self: ()})
    assert Schedule.from_dict(Cyclic(0.1, 0.5).to_dict()) == Cyclic(0.1, 0.5)


def test_a_class_that_is_not_a_frozen_dataclass_is_refused() -> None:
    class Loose(Schedule):
        def parts(self) -> tuple[Part, ...]:
            return Cyclic(0.1, 0.5).parts()

    with pytest.raises(TypeError, match="must be a frozen dataclass, got Loose"):
        Loose().lr(0)
