"""`schedule_at` against the host, exact rationals and torch's schedulers."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from fused_clr._device.schedule_tables import encode_schedules
from fused_clr.kernels import schedule as columns
from fused_clr.kernels.schedule import GROUP_COLUMNS, schedule_at
from fused_clr.reference import exact_lr, exact_momentum
from fused_clr.schedules import Cyclic, Part, Schedule, Segment, Shape, sequence

from ..helpers.schedules import (
    CYCLIC,
    EXP_RANGE_RTOL,
    LAST_STEP,
    ULPS,
    Given,
    assert_within_ulps,
    edge_steps,
    families,
    halving,
    once,
    repeated,
    shape_segments,
    steps_of,
    torch_peers,
    torch_values,
    waning,
)

GROUP_LR, GROUP_MOMENTUM = 0.25, 0.75


@triton.jit
def evaluate_kernel(
    steps_ptr,
    group_table_ptr,
    settings_ptr,
    overrun_ptr,
    out_ptr,
    num_groups,
    SCALE_FNS: tl.constexpr,
    LANES: tl.constexpr,
):
    group_id = tl.arange(0, LANES).to(tl.int64)
    valid = group_id < num_groups
    step = tl.load(steps_ptr + tl.program_id(0))
    group_id = tl.where(valid, group_id, 0)
    group_ptr = group_table_ptr + group_id * GROUP_COLUMNS
    lr, momentum, ends_cycle = schedule_at(step, group_ptr, valid, settings_ptr, overrun_ptr, SCALE_FNS)
    row_ptr = out_ptr + tl.program_id(0) * 3 * num_groups
    tl.store(row_ptr + group_id, lr, mask=valid)
    tl.store(row_ptr + num_groups + group_id, momentum, mask=valid)
    tl.store(row_ptr + 2 * num_groups + group_id, ends_cycle.to(tl.float64), mask=valid)


class Evaluated(NamedTuple):
    """[steps, groups] of learning rates, of momenta and of cycles' ends, and the sticky flag."""

    lr: np.ndarray
    momentum: np.ndarray
    ends_cycle: np.ndarray
    overrun: bool


def from_kernel(schedules: list[Schedule | None], steps: list[int]) -> Evaluated:
    tables = encode_schedules(schedules)
    group_table = torch.full((len(schedules), columns.GROUP_COLUMNS.value), torch.nan, dtype=torch.float64)
    group_table[:, columns.LR.value], group_table[:, columns.MOMENTUM.value] = GROUP_LR, GROUP_MOMENTUM
    integers = group_table.view(torch.int64)
    integers[:, columns.FIRST_PART.value] = torch.from_numpy(tables.first_part)
    integers[:, columns.NUM_PARTS.value] = torch.from_numpy(tables.num_parts)

    # Without a schedule an address is none that may be read.
    addresses = [a.ctypes.data if tables.in_use else 0 for a in (tables.parts, tables.segments, tables.scale_table)]
    words = [0] * columns.SETTINGS_WORDS.value
    words[columns.IN_USE.value] = tables.in_use
    words[columns.PART_STRIDE.value] = tables.part_stride
    words[columns.SEGMENT_STRIDE.value] = tables.segment_stride
    words[columns.MAX_UNIT_SHIFT.value] = tables.max_unit_shift
    words[columns.PART_TABLE.value], words[columns.SEGMENT_TABLE.value], words[columns.SCALE_TABLE.value] = addresses

    out = torch.full((len(steps), 3, len(schedules)), torch.nan, dtype=torch.float64)
    overrun = torch.zeros(1, dtype=torch.int64)
    evaluate_kernel[(len(steps),)](
        torch.tensor(steps),
        group_table,
        torch.tensor(words),
        overrun,
        out,
        len(schedules),
        SCALE_FNS=tables.scale_functions,
        LANES=triton.next_power_of_2(len(schedules) + 1),
    )
    return Evaluated(out[:, 0].numpy(), out[:, 1].numpy(), out[:, 2].numpy() != 0, bool(overrun.item()))


def ulps_of(schedule: Schedule) -> float:
    """How far the kernel may be from the host, in ulp of the largest value."""
    ratios = [max(s.lr) / min(s.lr) for part in schedule.parts() for s in part.segments if s.shape == Shape.EXPONENTIAL]
    # An exponent of exp2 is rounded twice, relative to its own size; times log(2), in the sum with the roundings above.
    return 2 * ULPS + math.log2(max(ratios, default=1.0))


def assert_equals_host(schedules: list[Schedule | None], steps: list[int]) -> None:
    lrs, momenta, ends_cycle, overrun = from_kernel(schedules, steps)
    assert not overrun
    for column, schedule in enumerate(schedules):
        if schedule is None:
            assert (lrs[:, column] == GROUP_LR).all()
            assert (momenta[:, column] == GROUP_MOMENTUM).all()
            assert not ends_cycle[:, column].any()
            continue
        largest = max(abs(lr) for part in schedule.parts() for segment in part.segments for lr in segment.lr)
        for row, step in enumerate(steps):
            lr, momentum = schedule.lr_and_momentum(step)
            assert ends_cycle[row, column] == schedule.ends_cycle(step)
            assert_within_ulps(lrs[row, column], lr, ulp_of=largest, ulps=ulps_of(schedule))
            if math.isnan(momentum):
                assert momenta[row, column] == GROUP_MOMENTUM
            else:
                assert_within_ulps(momenta[row, column], momentum, ulp_of=1.0, ulps=ulps_of(schedule))


def test_the_codes_of_shapes_are_those_of_the_host() -> None:
    for shape in Shape:
        assert shape.name == "CONSTANT" or getattr(columns, str(shape.name)).value == shape
    bits = [columns.GEOMETRIC.value, columns.TABULATED.value]
    assert all(bit > max(Shape) for bit in bits)


# -- exact values ------------------------------------------------------------------------------------------------------
def test_within_4_ulp_of_exact() -> None:
    names = [name for name in CYCLIC if name not in ("halves", "tenths")]
    steps = sorted({step for name in names for step in edge_steps(CYCLIC[name])})[::5]
    steps.append(LAST_STEP)
    lrs, momenta, _, overrun = from_kernel([*(CYCLIC[name] for name in names), None], steps)
    assert not overrun
    for row, step in enumerate(steps):
        for column, name in enumerate(names):
            assert_within_ulps(lrs[row, column], exact_lr(CYCLIC[name], step))
            assert_within_ulps(momenta[row, column], exact_momentum(CYCLIC[name], step), ulp_of=0.9)
        # The group without a schedule keeps what it has.
        assert (lrs[row, -1], momenta[row, -1]) == (GROUP_LR, GROUP_MOMENTUM)


@pytest.mark.parametrize("name", ["halves", "tenths"])
def test_step_sizes_that_are_no_integers(name: str) -> None:
    steps = [*edge_steps(CYCLIC[name])[::8], LAST_STEP]
    lrs, *_ = from_kernel([CYCLIC[name]], steps)
    for row, step in enumerate(steps):
        assert_within_ulps(lrs[row, 0], exact_lr(CYCLIC[name], step))


def test_late_steps_of_lines_in_a_sequence() -> None:
    begin = 2**52 + 1
    line = Segment(2**51 + 3, Shape.LINEAR, (1e-5, 0.1), (0.9, 0.8))
    schedule = sequence(
        CYCLIC["tenths"], once(line, Segment(12, Shape.LINEAR, (0.1, 1e-5), (0.8, 0.9))), milestones=[begin]
    )
    steps = [
        begin - 1,
        begin,
        begin + 1,
        begin + 2**50,
        begin + 2**51 + 2,
        begin + 2**51 + 4,
        begin + 2**51 + 14,
        LAST_STEP,
    ]
    lrs, momenta, *_ = from_kernel([schedule], steps)
    for row, step in enumerate(steps):
        assert_within_ulps(lrs[row, 0], exact_lr(schedule, step))
        assert_within_ulps(momenta[row, 0], exact_momentum(schedule, step), ulp_of=0.9)


def test_families_in_exact_arithmetic() -> None:
    schedules = families()
    steps = [*sorted({step for schedule, _ in schedules.values() for step in steps_of(schedule)})[::9], LAST_STEP]
    lrs, *_ = from_kernel([schedule for schedule, _ in schedules.values()], steps)
    for column, (name, (_, exact)) in enumerate(schedules.items()):
        for row, step in enumerate(steps):
            assert lrs[row, column] == pytest.approx(float(exact(step)), rel=1e-12, abs=1e-40), (name, step)


def test_powers_of_half_are_exact() -> None:
    # A factor shared with one that is none, and cycles to below the smallest subnormal.
    schedules = [Cyclic(0.0, 1.0, 1, mode="triangular2"), Cyclic(0.0, 1.0, 1, mode="exp_range", gamma=0.9)]
    steps = [1, 3, 5, 2 * 1022 + 1, 2 * 1073 + 1, 2 * 1074 + 1, 2 * 1075 + 1, 2 * 3000 + 1, LAST_STEP]
    lrs, *_ = from_kernel(list(schedules), steps)
    assert lrs[:, 0].tolist() == [math.ldexp(1.0, -(step // 2)) for step in steps]


def test_exp_range_beside_constants() -> None:
    gammas = (0.0, 0.5, 0.99994, 1.0, 1.0001)
    schedules: list[Schedule | None] = [Cyclic(0.0, 0.1, 7, 5, mode="exp_range", gamma=gamma) for gamma in gammas]
    steps = [0, 1, 2, 6, 7, 8, 100, 1003, 5000]
    lrs, *_ = from_kernel([*schedules, None], steps)
    for row, step in enumerate(steps):
        expected = [float(exact_lr(schedule, step)) for schedule in schedules if schedule] + [GROUP_LR]
        assert lrs[row].tolist() == pytest.approx(expected, rel=EXP_RANGE_RTOL)


# -- the host's values -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", shape_segments())
def test_a_shape_alone(name: str) -> None:
    segments = shape_segments()[name]
    tables = encode_schedules([once(*segments)])
    # Nothing else is in use. Seen from its other end, POLYNOMIAL is POWER.
    others = {Shape.POLYNOMIAL, Shape.POWER} if segments[0].power != 1 else {segments[0].shape}
    assert tables.in_use == sum(others | {Shape.LINEAR})
    assert_equals_host([once(*segments), repeated(*segments)], [*range(54), 10**6, LAST_STEP])


def test_all_mixed() -> None:
    shapes = shape_segments()
    twice = sequence(once(*shapes["cosine"]), repeated(*shapes["power-half"]), milestones=[60])
    without_momentum = [segment._replace(momentum=None) for segment in shapes["polynomial"]]
    schedules: list[Schedule | None] = [
        *(repeated(*segments) for segments in shapes.values()),
        None,
        *(Given((Part(tuple(s._replace(steps=s.steps / 3.2) for s in segments)),)) for segments in shapes.values()),
        *(repeated(*segments, factor=0.9, about_lr=0.2, about_momentum=0.9) for segments in shapes.values()),
        None,
        CYCLIC["asymmetric"],
        CYCLIC["halves"],
        CYCLIC["triangular2-short"],
        twice,
        sequence(CYCLIC["halves"], twice, once(*without_momentum), milestones=[7, 120]),
        once(*without_momentum, factor=0.75, per="step"),
    ]
    steps = [
        0,
        1,
        6,
        7,
        8,
        11,
        12,
        23,
        24,
        25,
        47,
        48,
        52,
        53,
        54,
        59,
        60,
        66,
        67,
        100,
        119,
        120,
        121,
        143,
        144,
        172,
        173,
        174,
    ]
    assert_equals_host(schedules, [*steps, 2**31 + 5])
    assert_equals_host(schedules[::-1], steps[::4])


def test_curves_that_are_scaled_about_more_than_their_largest_value() -> None:
    shapes = shape_segments()
    schedules = [repeated(*shapes[name], factor=0.9, about_lr=0.6) for name in ("exponential", "inverse-sqrt")]
    assert_equals_host(schedules, list(range(0, 120, 7)))


def test_the_end_of_a_part_whose_units_are_tiny() -> None:
    schedules: list[Schedule | None] = [
        once(Segment(steps, Shape.LINEAR, (0.1, 0.5))) for steps in (2.0**-60, 2.0**-1070, 1 + 2.0**-50, 2.5)
    ]
    assert_equals_host(schedules, [0, 1, 2, 3, LAST_STEP])


def test_a_jump_between_segments() -> None:
    low, high = Segment(3, Shape.CONSTANT, (0.1, 0.1)), Segment(3, Shape.CONSTANT, (0.5, 0.5))
    schedules: list[Schedule | None] = [once(low, high), repeated(low, high, low), once(high, low, high)]
    assert_equals_host(schedules, list(range(12)))


def test_long_searches() -> None:
    counts = [*range(1, 10), 54]
    segments = [[Segment(2, Shape.CONSTANT, (i / 64, i / 64)) for i in range(count)] for count in counts]
    schedules: list[Schedule | None] = [once(*own) for own in segments]
    schedules += [sequence(*map(once, own), milestones=range(2, 2 * len(own), 2)) for own in segments]
    expected = [[min(step // 2, count - 1) / 64 for step in range(110)] for count in counts * 2]
    # Side by side, the strides are those of the longest.
    tables = encode_schedules(schedules)
    assert (tables.part_stride, tables.segment_stride) == (32, 32)
    assert from_kernel(schedules, list(range(110))).lr.T.tolist() == expected
    for schedule, values in zip(schedules, expected, strict=True):
        steps = [0, 3, 5, 9, 13, 17, 106]
        assert from_kernel([schedule], steps).lr[:, 0].tolist() == [values[step] for step in steps]


@pytest.mark.parametrize("power", [0.5, 1.5, 3.0, 40.0])
def test_a_curve_is_exact_near_its_foot(power: float) -> None:
    falls = once(Segment(2**52, Shape.POWER, (0.5, 0.0), power=power))
    steps = [2**52 - 2**bits for bits in (0, 1, 10, 30, 45, 49, 51)] + [2**50, 1, 0]
    lrs, *_ = from_kernel([falls], steps)
    assert lrs[:, 0].tolist() == pytest.approx([falls.lr(step) for step in steps], rel=1e-14, abs=1e-300)


@pytest.mark.parametrize("power", [1e-4, 1e25])
def test_an_extreme_power(power: float) -> None:
    shapes = (Shape.POLYNOMIAL, Shape.POWER)
    schedules = [once(Segment(8, shape, ends, power=power)) for shape in shapes for ends in ((0.0, 0.5), (0.5, 0.0))]
    assert_equals_host(schedules, list(range(10)))


def test_past_its_end_a_schedule_is_in_its_first_cycle() -> None:
    line = Segment(4, Shape.LINEAR, (0.1, 0.5))
    schedules: list[Schedule | None] = [
        once(line, factor=0.5),
        once(line, scale_fn=waning),
        once(line, scale_fn=jit_waning),
    ]
    assert_equals_host(schedules, [3, 4, 5, 100])


def test_nobody_has_a_schedule() -> None:
    assert encode_schedules([None, None]).in_use == 0
    assert_equals_host([None, None], [0, 5])


def test_groups_that_share_a_schedule_share_its_rows() -> None:
    tables = encode_schedules([CYCLIC["long"], None, CYCLIC["long"], CYCLIC["halves"]])
    assert len(tables.parts) == 2
    assert tables.first_part.tolist() == [0, 0, 0, 1]
    assert tables.num_parts.tolist() == [1, 0, 1, 1]
    assert (tables.part_stride, tables.segment_stride, tables.max_unit_shift) == (0, 0, 2)
    assert tables.last_step == math.inf


# -- scale functions ---------------------------------------------------------------------------------------------------
def test_tables_of_python_functions() -> None:
    by_cycle = Cyclic(0.0, 1.0, 2, scale_fn=halving, total_steps=12, cycle_momentum=False)
    by_step = Cyclic(0.0, 1.0, 2, scale_fn=waning, scale_mode="iterations", total_steps=12, cycle_momentum=False)
    steps = list(range(13))
    assert encode_schedules([by_cycle, by_step, None]).last_step == 12
    lrs, _, _, overrun = from_kernel([by_cycle, by_step, None], steps)
    assert lrs.T.tolist() == [[s.lr(step) for step in steps] for s in (by_cycle, by_step)] + [[GROUP_LR] * 13]
    assert not overrun
    lrs, _, _, overrun = from_kernel([by_step], [13])
    assert overrun
    # The last value, at the height of step 13.
    assert lrs[0, 0] == 0.5 * waning(12)


def test_a_group_without_a_schedule_does_not_overrun() -> None:
    # Its lane reads the first part of the table, which is another group's and not reached there yet.
    by_step = Cyclic(0.0, 1.0, 2, scale_fn=waning, scale_mode="iterations", total_steps=5)
    late = sequence(by_step, CYCLIC["halves"], milestones=[5])
    assert not from_kernel([late, None], [100]).overrun
    assert not from_kernel([None, late], [100]).overrun
    assert from_kernel([by_step, None], [100]).overrun


def test_a_table_in_a_sequence_counts_from_its_part() -> None:
    by_step = Cyclic(0.0, 1.0, 3, scale_fn=waning, scale_mode="iterations")
    by_cycle = Cyclic(0.0, 1.0, 3, scale_fn=halving)
    ending = once(Segment(4, Shape.LINEAR, (0.1, 0.5)), scale_fn=waning, per="step")
    schedules: list[Schedule | None] = [
        sequence(CYCLIC["long"], by_step, by_cycle, milestones=[10, 40]),
        sequence(by_cycle, ending, milestones=[20]),
    ]
    assert_equals_host(schedules, [*range(0, 60, 3), 1000])


@triton.jit
def jit_waning(x):
    return 1 / (1 + 0.01 * x)


@triton.jit
def jit_exponential(x):
    return tl.exp(-0.1 * x)


def test_triton_functions() -> None:
    def cyclic(**arguments: object) -> Cyclic:
        return Cyclic(0.0, 1.0, 3, cycle_momentum=False, **arguments)  # type: ignore[arg-type]

    schedules = [
        cyclic(scale_fn=jit_waning),
        cyclic(scale_fn=jit_waning, scale_mode="iterations"),
        cyclic(scale_fn=jit_exponential, scale_mode="iterations"),
        cyclic(mode="triangular2"),
        sequence(cyclic(), cyclic(scale_fn=jit_waning, scale_mode="iterations"), milestones=[4]),
    ]
    assert len(encode_schedules(schedules).scale_functions) == 2
    steps = [0, 1, 3, 4, 7, 8, 15, 100]
    lrs, *_ = from_kernel(list(schedules), steps)
    plain = cyclic(scale_fn=lambda x: math.exp(-0.1 * x), scale_mode="iterations")
    twins = [schedules[0], schedules[1], plain, schedules[3], schedules[4]]
    for row, step in enumerate(steps):
        assert lrs[row].tolist() == pytest.approx([twin.lr(step) for twin in twins], rel=1e-14)


# -- torch's schedulers ------------------------------------------------------------------------------------------------
def test_torch_peers() -> None:
    # Every step of them: tests/parity/test_schedules.py.
    peers = torch_peers()
    steps = [0, 1, 6, 7, 8, 20, 30, 35, 40, 55, 60, 61, 80, 100, 104, 105, 118]
    lrs, momenta, *_ = from_kernel([schedule for schedule, _, _ in peers.values()], steps)
    for column, (name, peer) in enumerate(peers.items()):
        for step, lr, beta1 in torch_values(peer):
            if step in steps:
                # Near 0, torch's recursions leave what they have cancelled.
                assert lrs[steps.index(step), column] == pytest.approx(lr, rel=1e-12, abs=1e-16), name
                if peer[0].drives_momentum:
                    assert momenta[steps.index(step), column] == pytest.approx(beta1, rel=1e-12), name
