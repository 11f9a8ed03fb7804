"""Schedules against torch's CyclicLR and exact rationals, on the host and from the kernel."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import random
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CyclicLR

from fused_clr.backends.hyper_table import encode
from fused_clr.hyperparameters import Hyperparameters
from fused_clr.kernels.schedule import cyclic_lr_and_momentum
from fused_clr.reference import exact_lr, exact_momentum
from fused_clr.schedules import Cyclic

LAST_STEP = 2**53 - 1
# A rounding each in the difference, the quotient and the product, each up to an ulp, and half an ulp in the sum.
ULPS = 4
# gamma**step = exp2(step * log2(gamma)): half an ulp of log2, times at most 1,074, times log(2).
EXP_RANGE_RTOL = 1e-12

SCHEDULES = {
    "symmetric": Cyclic(1e-4, 1e-2, 2000),
    "asymmetric": Cyclic(1e-3, 1e-2, 7, 5),
    "one-step-up": Cyclic(0.0, 0.1, 1, 12),
    "long": Cyclic(2.5e-4, 1e-3, 102_000),
    "triangular2": Cyclic(2.5e-4, 1e-3, 102_000, mode="triangular2"),
    "triangular2-short": Cyclic(0.0, 0.3, 3, 4, mode="triangular2"),
    "equal-bounds": Cyclic(0.1, 0.1, 11),
    "huge-period": Cyclic(1e-5, 1e-3, 2**51, 2**50 + 1),
    "halves": Cyclic(1e-4, 1e-2, 2.5, 3.25),
    "tenths": Cyclic(1e-4, 1e-2, 0.1, 7.3),
}


def edge_steps(schedule: Cyclic) -> list[int]:
    """The ends and peaks of early, late and last cycles, their neighbours, and random steps."""
    period = Fraction(schedule.step_size_up) + Fraction(schedule.step_size_down)
    edges = {0, 1, LAST_STEP, LAST_STEP - 1, 2**24, 2**24 + 1, 2**31, 2**32 + 1}
    for cycle in (0, 1, 2, 30, 1021, 1022, 1023, 1031, 1074, 1075, 3000, int(LAST_STEP / period) - 1):
        for corner in (int(cycle * period), int(cycle * period + Fraction(schedule.step_size_up))):
            edges |= {corner - 1, corner, corner + 1}
    rng = random.Random(0)
    edges |= {rng.randrange(2 ** rng.randrange(1, 54)) for _ in range(60)}
    return sorted(step for step in edges if 0 <= step <= LAST_STEP)


def assert_within_ulps(actual: float, exact: Fraction, ulp_of: float | None = None) -> None:
    ulp = Fraction(math.ulp(float(exact) if ulp_of is None else ulp_of))
    assert abs(Fraction(actual) - exact) <= ULPS * ulp, (
        f"{actual!r} is {float((Fraction(actual) - exact) / ulp):.2f} ulp off"
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_host_within_4_ulp_of_exact(name: str) -> None:
    schedule = SCHEDULES[name]
    steps = edge_steps(schedule)
    lrs, momenta = schedule.lr(np.array(steps)), schedule.momentum(np.array(steps))
    for index, step in enumerate(steps):
        lr, momentum = exact_lr(schedule, step), exact_momentum(schedule, step)
        assert_within_ulps(schedule.lr(step), lr)
        assert_within_ulps(lrs[index], lr)
        assert_within_ulps(momenta[index], momentum, ulp_of=schedule.max_momentum)
        assert schedule.lr_and_momentum(step) == (schedule.lr(step), schedule.momentum(step))
        if isinstance(schedule.step_size_up, int):
            assert (lrs[index], momenta[index]) == (schedule.lr(step), schedule.momentum(step))


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


def halving(x: float) -> float:
    return 0.5 ** (x - 1)


def waning(x: float) -> float:
    return 1 / (1 + 0.01 * x)


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
def test_torch_steps(sizes: tuple[float, float | None], arguments: dict[str, Any], cycle_momentum: bool) -> None:
    common = {"step_size_up": sizes[0], "step_size_down": sizes[1], "cycle_momentum": cycle_momentum, **arguments}
    schedule = Cyclic(1e-4, 1e-2, **common)
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))])
    scheduler = CyclicLR(optimizer, 1e-4, 1e-2, **common)
    optimizer.step()
    for step in range(80):
        group = optimizer.param_groups[0]
        assert schedule.lr(step) == pytest.approx(group["lr"], rel=1e-12)
        if cycle_momentum:
            assert schedule.momentum(step) == pytest.approx(group["betas"][0], rel=1e-12)
        scheduler.step()


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


# -- from the kernel ---------------------------------------------------------------------------------------------------
@triton.jit
def evaluate_kernel(
    steps_ptr,
    hyper_table_ptr,
    scale_table_ptr,
    overrun_ptr,
    out_ptr,
    num_groups,
    kinds,
    max_unit_shift,
    SCALE_FNS: tl.constexpr,
    LANES: tl.constexpr,
):
    group_id = tl.arange(0, LANES).to(tl.int64)
    valid = group_id < num_groups
    step = tl.load(steps_ptr + tl.program_id(0))
    group_id = tl.where(valid, group_id, 0)
    lr, momentum = cyclic_lr_and_momentum(
        step, group_id, valid, hyper_table_ptr, scale_table_ptr, overrun_ptr, kinds, max_unit_shift, SCALE_FNS
    )
    row_ptr = out_ptr + tl.program_id(0) * 2 * num_groups
    tl.store(row_ptr + group_id, lr, mask=valid)
    tl.store(row_ptr + num_groups + group_id, momentum, mask=valid)


def from_kernel(schedules: list[Cyclic | None], steps: list[int]) -> tuple[np.ndarray, np.ndarray, bool]:
    """float64[steps, groups] of learning rates and of beta1s, and the overrun flag."""
    groups = [Hyperparameters(0.25, 0.75, 0.999, 1e-8, 0.0, False, False, False, schedule) for schedule in schedules]
    table = encode(groups)
    out = torch.full((len(steps), 2, len(groups)), torch.nan, dtype=torch.float64)
    overrun = torch.zeros(1, dtype=torch.int64)
    evaluate_kernel[(len(steps),)](
        torch.tensor(steps),
        torch.from_numpy(table.rows),
        torch.from_numpy(table.scale_table),
        overrun,
        out,
        len(groups),
        table.kinds,
        table.max_unit_shift,
        SCALE_FNS=table.scale_functions,
        LANES=16,
    )
    return out[:, 0].numpy(), out[:, 1].numpy(), bool(overrun.item())


def test_kernel_within_4_ulp_of_exact() -> None:
    names = [name for name in SCHEDULES if name not in ("halves", "tenths")]
    steps = sorted({step for name in names for step in edge_steps(SCHEDULES[name])})[::5]
    steps.append(LAST_STEP)
    lrs, momenta, overrun = from_kernel([*(SCHEDULES[name] for name in names), None], steps)
    assert not overrun
    for row, step in enumerate(steps):
        for column, name in enumerate(names):
            assert_within_ulps(lrs[row, column], exact_lr(SCHEDULES[name], step))
            assert_within_ulps(momenta[row, column], exact_momentum(SCHEDULES[name], step), ulp_of=0.9)
        # The group without a schedule keeps what it has.
        assert (lrs[row, -1], momenta[row, -1]) == (0.25, 0.75)


@pytest.mark.parametrize("name", ["halves", "tenths"])
def test_kernel_with_step_sizes_that_are_no_integers(name: str) -> None:
    steps = [*edge_steps(SCHEDULES[name])[::8], LAST_STEP]
    lrs, _, _ = from_kernel([SCHEDULES[name]], steps)
    for row, step in enumerate(steps):
        assert_within_ulps(lrs[row, 0], exact_lr(SCHEDULES[name], step))


def test_kernel_exp_range_beside_constants() -> None:
    gammas = (0.0, 0.5, 0.99994, 1.0, 1.0001)
    schedules: list[Cyclic | None] = [Cyclic(0.0, 0.1, 7, 5, mode="exp_range", gamma=gamma) for gamma in gammas]
    steps = [0, 1, 2, 6, 7, 8, 100, 1003, 5000]
    lrs, _, _ = from_kernel([*schedules, None], steps)
    for row, step in enumerate(steps):
        expected = [float(exact_lr(schedule, step)) for schedule in schedules if schedule] + [0.25]
        assert lrs[row].tolist() == pytest.approx(expected, rel=EXP_RANGE_RTOL)


def test_kernel_leaves_beta1_alone_without_cycle_momentum() -> None:
    _, momenta, _ = from_kernel([Cyclic(0.1, 0.2, 3, cycle_momentum=False), Cyclic(0.1, 0.2, 3)], [0, 2, 3])
    assert momenta[:, 0].tolist() == [0.75] * 3
    assert momenta[2, 1] == pytest.approx(0.8, rel=1e-15)


def test_kernel_table_of_a_python_function() -> None:
    by_cycle = Cyclic(0.0, 1.0, 2, scale_fn=halving, horizon=12, cycle_momentum=False)
    by_step = Cyclic(0.0, 1.0, 2, scale_fn=waning, scale_mode="iterations", horizon=12, cycle_momentum=False)
    steps = list(range(13))
    lrs, _, overrun = from_kernel([by_cycle, by_step], steps)
    assert lrs.T.tolist() == [[schedule.lr(step) for step in steps] for schedule in (by_cycle, by_step)]
    assert not overrun
    lrs, _, overrun = from_kernel([by_step], [13])
    assert overrun
    # The last value, at the height of step 13.
    assert lrs[0, 0] == 0.5 * waning(12)


@triton.jit
def jit_waning(x):
    return 1 / (1 + 0.01 * x)


@triton.jit
def jit_exponential(x):
    return tl.exp(-0.1 * x)


def test_kernel_with_triton_functions() -> None:
    common = {"step_size_up": 3, "cycle_momentum": False}
    schedules = [
        Cyclic(0.0, 1.0, scale_fn=jit_waning, **common),
        Cyclic(0.0, 1.0, scale_fn=jit_waning, scale_mode="iterations", **common),
        Cyclic(0.0, 1.0, scale_fn=jit_exponential, scale_mode="iterations", **common),
        Cyclic(0.0, 1.0, mode="triangular2", **common),
    ]
    steps = [0, 1, 3, 4, 7, 8, 15, 100]
    lrs, _, _ = from_kernel(list(schedules), steps)
    plain = Cyclic(0.0, 1.0, scale_fn=lambda x: math.exp(-0.1 * x), scale_mode="iterations", **common)
    twins = [schedules[0], schedules[1], plain, schedules[3]]
    for row, step in enumerate(steps):
        assert lrs[row].tolist() == pytest.approx([twin.lr(step) for twin in twins], rel=1e-14)


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
        ({"horizon": 0}, "horizon must be .* got 0"),
        ({"horizon": 1.5}, "horizon must be .* got 1.5"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_validation(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cyclic(**({"base_lr": 0.1, "max_lr": 0.2} | arguments))


def test_steps_must_not_be_negative() -> None:
    schedule = Cyclic(0.1, 0.2)
    for step in (-1, np.array([3, -2])):
        with pytest.raises(ValueError, match="step must be >= 0, got -"):
            schedule.lr(step)


def test_schedules_are_values() -> None:
    schedule = Cyclic(0.1, 0.2, 7, mode="triangular2")
    assert schedule == Cyclic(0.1, 0.2, 7, 7, "triangular2")
    assert hash(schedule) == hash(copy.deepcopy(schedule))
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert dataclasses.replace(schedule, max_lr=0.3).lr(7) == 0.3
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.max_lr = 1.0  # type: ignore[misc]


def test_tabulated_scale() -> None:
    assert Cyclic(0, 1, 2, scale_fn=halving, horizon=9).tabulated_scale().tolist() == [1.0, 0.5, 0.25]
    assert len(Cyclic(0, 1, 2, scale_fn=halving).tabulated_scale()) == 1000
    by_step = Cyclic(0, 1, 2, scale_fn=waning, scale_mode="iterations", horizon=3)
    assert by_step.tabulated_scale().tolist() == [waning(step) for step in range(4)]
    with pytest.raises(ValueError, match="horizon must be given"):
        dataclasses.replace(by_step, horizon=None).tabulated_scale()
    with pytest.raises(ValueError, match="scale_fn must return finite numbers, got inf for 3"):
        Cyclic(0, 1, 2, scale_fn=lambda x: math.inf if x == 3 else 1.0).tabulated_scale()
