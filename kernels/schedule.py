"""Cyclical schedules on the device: schedule step -> learning rate and momentum, in float64.

The formulas are those of Smith 2017 (arXiv:1506.01186, sec. 3) as `torch.optim.lr_scheduler.CyclicLR` states them. One
row of the hyper table describes one param group; its columns are the constants below (`fused_clr.schedules` and
`fused_clr.backends.hyper_table` write it). Integer columns hold the bits of an int64.
"""

import triton
import triton.language as tl

# How a group's learning rate is made. Powers of two, so that a launch's kinds are a bit set.
CONSTANT = tl.constexpr(1)
TRIANGULAR = tl.constexpr(2)
TRIANGULAR2 = tl.constexpr(4)
EXP_RANGE = tl.constexpr(8)
TABULATED = tl.constexpr(16)
# A `@triton.jit` scale_fn: SCALE_FUNCTION + its index in SCALE_FNS.
SCALE_FUNCTION = tl.constexpr(32)

# Columns of the hyper table. Integers (bits of int64):
KIND = tl.constexpr(0)
CYCLE_MOMENTUM = tl.constexpr(1)
SCALE_BY_ITERATION = tl.constexpr(2)
STEP_UNITS_UP = tl.constexpr(3)
PERIOD_UNITS = tl.constexpr(4)
UNIT_SHIFT = tl.constexpr(5)
TABLE_OFFSET = tl.constexpr(6)
TABLE_LENGTH = tl.constexpr(7)
# Float64:
BASE_LR = tl.constexpr(8)
MAX_LR = tl.constexpr(9)
BASE_MOMENTUM = tl.constexpr(10)
MAX_MOMENTUM = tl.constexpr(11)
LOG2_GAMMA = tl.constexpr(12)
BETA2 = tl.constexpr(13)
LOG2_BETA2 = tl.constexpr(14)
EPS = tl.constexpr(15)
L2_DECAY = tl.constexpr(16)
DECOUPLED_DECAY = tl.constexpr(17)
GRAD_SIGN = tl.constexpr(18)
HYPER_COLUMNS = tl.constexpr(20)

# A cycle index beyond this is of no use to any scale and would overflow the doubling below.
MAX_CYCLE = tl.constexpr(1 << 61)


@triton.jit
def locate_in_cycle(step, period_units, unit_shift, max_unit_shift):
    """Zero-based cycle index of ``step`` and its phase within the cycle, both exact.

    Step sizes need not be integers: a float64 is an integer over ``2**unit_shift``, so the phase is
    ``(step * 2**unit_shift) mod period_units``, found by doubling and without ever leaving int64.

    Args:
        step: int64 block >= 0. Schedule steps.
        period_units: int64 block in (0, 2**62). Steps of one cycle, times ``2**unit_shift``.
        unit_shift: int64 block >= 0.
        max_unit_shift: int64 scalar. The largest ``unit_shift`` of any group; 0 where all step sizes are integers.

    Returns:
        int64 block, the cycle index (saturating at ``MAX_CYCLE``); int64 block, the phase in units.
    """
    cycle = step // period_units
    phase = step % period_units
    for bit in range(max_unit_shift):
        doubling = bit < unit_shift
        doubled = phase * 2
        wrapped = doubled >= period_units
        phase = tl.where(doubling, tl.where(wrapped, doubled - period_units, doubled), phase)
        cycle = tl.where(doubling, tl.minimum(cycle * 2 + wrapped.to(tl.int64), MAX_CYCLE), cycle)
    return cycle, phase


@triton.jit
def power_of_half(exponent):
    """``2.0 ** -exponent`` exactly, down to the subnormals and 0.

    Args:
        exponent: int64 block >= 0.

    Returns:
        float64 block.
    """
    exponent = tl.minimum(exponent, 2000)
    first = exponent // 2
    second = exponent - first
    # The bits of a power of two: an exponent alone. Two factors, since one would run out of exponents at 1022.
    first_bits = (1023 - first) << 52
    second_bits = (1023 - second) << 52
    return first_bits.to(tl.float64, bitcast=True) * second_bits.to(tl.float64, bitcast=True)


@triton.jit
def scale_of_cycle(
    step,
    cycle,
    kind,
    log2_gamma,
    by_iteration,
    table_offset,
    table_length,
    valid,
    scale_table_ptr,
    overrun_ptr,
    kinds,
    SCALE_FNS: tl.constexpr,
):
    """What the triangle's height is multiplied by: 1, ``2**-cycle``, ``gamma**step`` or the user's ``scale_fn``.

    A tabulated ``scale_fn`` past its last entry keeps that entry and raises the sticky flag behind ``overrun_ptr``.

    Args:
        step: int64 block. Schedule steps.
        cycle: int64 block. Zero-based cycle indices; a ``scale_fn`` is given torch's, which start at 1.
        kind: int64 block. CONSTANT, TRIANGULAR, ...
        log2_gamma: float64 block.
        by_iteration: bool block. ``scale_mode == "iterations"``: the ``scale_fn`` is given the step.
        table_offset: int64 block. First entry of the group's table.
        table_length: int64 block.
        valid: bool block. Lanes that stand for a group.
        scale_table_ptr: float64 pointer. The tables of all groups, one after another.
        overrun_ptr: int64 pointer. The sticky flag.
        kinds: int64 scalar. Bit set of the kinds in use; the others cost nothing.
        SCALE_FNS: Tuple of ``@triton.jit`` functions, float64 block -> float64 block.

    Returns:
        float64 block.
    """
    scale = tl.full(step.shape, 1.0, tl.float64)
    if (kinds & TRIANGULAR2) != 0:
        scale = tl.where(kind == TRIANGULAR2, power_of_half(cycle), scale)
    if (kinds & EXP_RANGE) != 0:
        # gamma = 0 has log2 -inf, and -inf * 0 would be NaN where 0**0 is 1.
        power = tl.where(step == 0, 1.0, tl.exp2(tl.maximum(step, 1).to(tl.float64) * log2_gamma))
        scale = tl.where(kind == EXP_RANGE, power, scale)
    if (kinds & TABULATED) != 0:
        tabulated = valid & (kind == TABULATED)
        index = tl.where(by_iteration, step, cycle)
        overrun = tabulated & (index >= table_length)
        tl.store(overrun_ptr + tl.zeros_like(index), 1, mask=overrun)
        index = table_offset + tl.minimum(index, table_length - 1)
        scale = tl.where(tabulated, tl.load(scale_table_ptr + index, mask=tabulated, other=1.0), scale)
    for i in tl.static_range(len(SCALE_FNS)):
        argument = tl.where(by_iteration, step, cycle + 1).to(tl.float64)
        scale = tl.where(kind == SCALE_FUNCTION + i, SCALE_FNS[i](argument).to(tl.float64), scale)
    return scale


@triton.jit
def cyclic_lr_and_momentum(
    step,
    group_id,
    valid,
    hyper_table_ptr,
    scale_table_ptr,
    overrun_ptr,
    kinds,
    max_unit_shift,
    SCALE_FNS: tl.constexpr,
):
    """Learning rate and beta1 of the groups ``group_id`` at schedule step ``step``.

    Args:
        step: int64 scalar >= 0. The schedule step, torch's ``last_epoch``.
        group_id: int64 block. Rows of the hyper table; any valid row where ``valid`` is false.
        valid: bool block.
        hyper_table_ptr: float64 pointer to [num_groups, HYPER_COLUMNS].
        scale_table_ptr: float64 pointer. See ``scale_of_cycle``.
        overrun_ptr: int64 pointer. See ``scale_of_cycle``.
        kinds: int64 scalar. Bit set of the kinds in use.
        max_unit_shift: int64 scalar. The largest UNIT_SHIFT in the table.
        SCALE_FNS: See ``scale_of_cycle``.

    Returns:
        float64 block, the learning rate; float64 block, beta1.
    """
    row_ptr = hyper_table_ptr + group_id * HYPER_COLUMNS
    lr = tl.load(row_ptr + BASE_LR)
    momentum = tl.load(row_ptr + BASE_MOMENTUM)
    # Nothing but constants: no division, no modulo.
    if kinds != CONSTANT:
        integer_row_ptr = row_ptr.to(tl.pointer_type(tl.int64))
        kind = tl.load(integer_row_ptr + KIND)
        step_units_up = tl.load(integer_row_ptr + STEP_UNITS_UP)
        period_units = tl.load(integer_row_ptr + PERIOD_UNITS)
        steps = step + tl.zeros_like(group_id)
        cycle, phase = locate_in_cycle(steps, period_units, tl.load(integer_row_ptr + UNIT_SHIFT), max_unit_shift)

        rising = phase <= step_units_up
        numerator = tl.where(rising, phase, period_units - phase).to(tl.float64)
        height = numerator / tl.where(rising, step_units_up, period_units - step_units_up).to(tl.float64)
        scale = scale_of_cycle(
            steps,
            cycle,
            kind,
            tl.load(row_ptr + LOG2_GAMMA),
            tl.load(integer_row_ptr + SCALE_BY_ITERATION) != 0,
            tl.load(integer_row_ptr + TABLE_OFFSET),
            tl.load(integer_row_ptr + TABLE_LENGTH),
            valid,
            scale_table_ptr,
            overrun_ptr,
            kinds,
            SCALE_FNS,
        )
        is_cyclic = kind != CONSTANT
        max_momentum = tl.load(row_ptr + MAX_MOMENTUM)
        cycled_lr = lr + (tl.load(row_ptr + MAX_LR) - lr) * height * scale
        cycled_momentum = max_momentum - (max_momentum - momentum) * height * scale
        cycles_momentum = is_cyclic & (tl.load(integer_row_ptr + CYCLE_MOMENTUM) != 0)
        lr = tl.where(is_cyclic, cycled_lr, lr)
        momentum = tl.where(cycles_momentum, cycled_momentum, momentum)
    return lr, momentum
