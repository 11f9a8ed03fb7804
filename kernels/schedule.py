"""Schedules on the device: schedule step -> learning rate and momentum, in float64.

A row of the group table points to the parts of its group's schedule, and a row of the part table to its segments.
`fused_clr.schedules` defines both, and `fused_clr._device.schedule_tables` writes their tables. Integer columns hold
the bits of an int64.
"""

import triton
import triton.language as tl

# Columns of the group table, float64[num_groups, GROUP_COLUMNS]. `schedule_at` reads the first four. Values of a group
# without a schedule; MOMENTUM also of a group whose schedule does not set it:
LR = tl.constexpr(0)
MOMENTUM = tl.constexpr(1)
# Integers. NUM_PARTS is 0 without a schedule.
FIRST_PART = tl.constexpr(2)
NUM_PARTS = tl.constexpr(3)
# The same four columns for the weight decay, which may have a schedule of its own.
WEIGHT_DECAY = tl.constexpr(4)
# Float64: -1 where the group maximizes, else 1.
GRAD_SIGN = tl.constexpr(8)
# The columns of the update rule begin here.
RULE_COLUMNS = tl.constexpr(9)
GROUP_COLUMNS = tl.constexpr(16)

# First column of both tables below: where a row starts. An integer.
START = tl.constexpr(0)

# Columns of the part table, float64[num_parts, PART_COLUMNS]. Integers:
# The step of the part from which it holds its last value; `NEVER` for one that repeats.
END = tl.constexpr(1)
# Length of all segments, in units; a step is 2**UNIT_SHIFT units.
PERIOD = tl.constexpr(2)
UNIT_SHIFT = tl.constexpr(3)
FIRST_SEGMENT = tl.constexpr(4)
NUM_SEGMENTS = tl.constexpr(5)
# START of the second segment, `NEVER` if there is none: parts of up to two segments need no search.
SECOND_START = tl.constexpr(6)
DRIVES_MOMENTUM = tl.constexpr(7)
# One of the scalings below, and what it counts: cycles or steps.
SCALING = tl.constexpr(8)
SCALES_PER_STEP = tl.constexpr(9)
TABLE_OFFSET = tl.constexpr(10)
TABLE_LENGTH = tl.constexpr(11)
# Float64:
LOG2_FACTOR = tl.constexpr(12)
ABOUT_LR = tl.constexpr(13)
ABOUT_MOMENTUM = tl.constexpr(14)
PART_COLUMNS = tl.constexpr(16)

# Columns of the segment table, float64[num_segments, SEGMENT_COLUMNS]. Integers, positions in units:
FOOT = tl.constexpr(1)
LENGTH = tl.constexpr(2)
SHAPE = tl.constexpr(3)
# Float64. PARAMETER is the exponent of POLYNOMIAL and POWER, log2 of the ratio of EXPONENTIAL, and of INVERSE_SQRT the
# ratio's square less 1.
PARAMETER = tl.constexpr(4)
LR_OFFSET = tl.constexpr(5)
LR_SPAN = tl.constexpr(6)
MOMENTUM_OFFSET = tl.constexpr(7)
MOMENTUM_SPAN = tl.constexpr(8)
# Integer. 1: the segment ends a fall of the learning rate, and a cycle with it.
ENDS_CYCLE = tl.constexpr(9)
SEGMENT_COLUMNS = tl.constexpr(10)

# Words of the settings, int64[SETTINGS_WORDS], which the host writes with the tables. Addresses are in memory, not
# arguments, so that captured launches follow a new schedule.
IN_USE = tl.constexpr(0)
# The first stride of a search, a power of two; 0 if there is nothing to search.
PART_STRIDE = tl.constexpr(1)
SEGMENT_STRIDE = tl.constexpr(2)
MAX_UNIT_SHIFT = tl.constexpr(3)
PART_TABLE = tl.constexpr(4)
SEGMENT_TABLE = tl.constexpr(5)
SCALE_TABLE = tl.constexpr(6)
# Which steps average the parameters, see `fused_clr.averaging`: the number of steps between two, 0 for one a cycle; the
# first step; and as float64 the weight, 0 for equal weights.
AVERAGE_EVERY = tl.constexpr(7)
AVERAGE_START = tl.constexpr(8)
AVERAGE_WEIGHT = tl.constexpr(9)
SETTINGS_WORDS = tl.constexpr(10)

# Bits of IN_USE; 0 if no group has a schedule. The shapes are those of `fused_clr.schedules.Shape`.
LINEAR = tl.constexpr(1)
COSINE = tl.constexpr(2)
POLYNOMIAL = tl.constexpr(4)
POWER = tl.constexpr(8)
EXPONENTIAL = tl.constexpr(16)
INVERSE_SQRT = tl.constexpr(32)
GEOMETRIC = tl.constexpr(64)
TABULATED = tl.constexpr(128)
# Some group's weight decay has a schedule.
DECAY_SCHEDULES = tl.constexpr(256)

# Values of SCALING: a factor to the power of the count, 1 among others; a table; a `@triton.jit` scale_fn,
# SCALE_FUNCTION + its index in SCALE_FNS.
BY_FACTOR = tl.constexpr(0)
BY_TABLE = tl.constexpr(1)
SCALE_FUNCTION = tl.constexpr(2)

# A start or an end that no step reaches.
NEVER = tl.constexpr(1 << 62)
# The last float64 below 1024: a scale that grows without end stays finite.
MAX_LOG2_SCALE = tl.constexpr(1023.9999999999999)
# A larger cycle index makes no difference to a scale, and would overflow in the doubling below.
MAX_CYCLE = tl.constexpr(1 << 61)
# The smallest normal float64: a positive number whose logarithm is finite.
TINY = tl.constexpr(2.2250738585072014e-308)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def locate_in_cycle(step, period, unit_shift, max_unit_shift):
    """Zero-based cycle index of ``step`` and its phase within the cycle, both exact.

    Step sizes need not be integers: a float64 is an integer over ``2**unit_shift``, so the phase is
    ``(step * 2**unit_shift) mod period``, computed by doubling, within int64.

    Args:
        step: int64 block >= 0. Steps of the part.
        period: int64 block in (0, 2**62). Steps of one cycle, times ``2**unit_shift``.
        unit_shift: int64 block >= 0.
        max_unit_shift: int64 scalar. The largest ``unit_shift`` of any part; 0 where all step sizes are integers.

    Returns:
        int64 block, the cycle index (saturating at ``MAX_CYCLE``); int64 block, the phase in units.
    """
    cycle = step // period
    phase = step - cycle * period
    for bit in range(max_unit_shift):
        doubling = bit < unit_shift
        doubled = phase * 2
        wrapped = doubled >= period
        phase = tl.where(doubling, tl.where(wrapped, doubled - period, doubled), phase)
        cycle = tl.where(doubling, tl.minimum(cycle * 2 + wrapped.to(tl.int64), MAX_CYCLE), cycle)
    return cycle, phase


@triton.jit
def search_started(position, row, end_row, stride, table_ptr, COLUMNS: tl.constexpr):
    """The last row of each lane whose START is not beyond ``position``: a binary search.

    Args:
        position: int64 block. Steps for parts, units for segments.
        row: int64 block. A row of the lane whose START is not beyond ``position``.
        end_row: int64 block. The row after the lane's last. Its rows are in ascending order of START.
        stride: int64 scalar. A power of two, more than half of the rows after ``row`` in any lane; 0 for no search.
        table_ptr: int64 pointer to [rows, COLUMNS].
        COLUMNS: Words of a row.

    Returns:
        int64 block, a row of the table.
    """
    while stride > 0:
        later = row + stride
        start = tl.load(table_ptr + later * COLUMNS + START, mask=later < end_row, other=NEVER)
        row = tl.where(position >= start, later, row)
        stride //= 2
    return row


@triton.jit
def half_cosine(x):
    """``(1 - cos(pi x)) / 2`` to a few ulp.

    The Taylor series of the cosine about the nearer end; the first omitted term is below 1e-18 of the first term.
    ``tl.cos`` would use 40 bytes of stack, for large arguments that do not occur here.

    Args:
        x: float64 block in [0, 1].

    Returns:
        float64 block in [0, 1].
    """
    is_far = x > 0.5
    angle = tl.where(is_far, 1.0 - x, x) * 3.141592653589793
    z = angle * angle
    # Coefficients (-1)**k / (2 k)!, from k = 12 down to 1.
    series = tl.full(x.shape, 1.6117375710961184e-24, tl.float64)
    series = series * z + (-8.896791392450574e-22)
    series = series * z + (4.110317623312165e-19)
    series = series * z + (-1.5619206968586225e-16)
    series = series * z + (4.779477332387385e-14)
    series = series * z + (-1.1470745597729725e-11)
    series = series * z + (2.08767569878681e-09)
    series = series * z + (-2.755731922398589e-07)
    series = series * z + (2.48015873015873e-05)
    series = series * z + (-0.001388888888888889)
    series = series * z + (0.041666666666666664)
    series = series * z + (-0.5)
    height = -0.5 * z * series
    return tl.where(is_far, 1.0 - height, height)


@triton.jit
def power_of(x, exponent):
    """``x**exponent``.

    Args:
        x: float64 block in [0, 1].
        exponent: float64 block > 0.

    Returns:
        float64 block in [0, 1].
    """
    return tl.where(x > 0.0, tl.exp2(exponent * tl.log2(tl.maximum(x, TINY))), 0.0)


@triton.jit
def power_from_one(y, exponent):
    """``1 - (1 - y)**exponent``, accurate also where it is small.

    Args:
        y: float64 block in [0, 1].
        exponent: float64 block > 0.

    Returns:
        float64 block in [0, 1].
    """
    rest = 1.0 - y
    # With what was lost in the difference, to first order.
    log2_rest = tl.log2(tl.maximum(rest, TINY)) + ((1.0 - rest) - y) * LOG2_E
    log2_power = exponent * log2_rest
    # 1 - exp2 would lose what is small. Coefficients 1 / k!, from k = 14 down to 1, of (exp(z) - 1) / z.
    z = tl.maximum(log2_power, -1.0) * LN_2
    series = tl.full(y.shape, 1.1470745597729725e-11, tl.float64)
    series = series * z + 1.6059043836821613e-10
    series = series * z + 2.08767569878681e-09
    series = series * z + 2.505210838544172e-08
    series = series * z + 2.755731922398589e-07
    series = series * z + 2.7557319223985893e-06
    series = series * z + 2.48015873015873e-05
    series = series * z + 0.0001984126984126984
    series = series * z + 0.001388888888888889
    series = series * z + 0.008333333333333333
    series = series * z + 0.041666666666666664
    series = series * z + 0.16666666666666666
    series = series * z + 0.5
    series = series * z + 1.0
    height = tl.where(log2_power > -0.5, -z * series, 1.0 - tl.exp2(log2_power))
    return tl.where(rest > 0.0, height, 1.0)


@triton.jit
def height_at(y, shape, parameter, in_use):
    """Height of a segment, ``y`` of its length away from its foot.

    Args:
        y: float64 block in [0, 1].
        shape: int64 block. LINEAR, COSINE, ...
        parameter: float64 block. The segment's PARAMETER.
        in_use: int64 scalar. The settings word IN_USE; shapes not in use cost nothing.

    Returns:
        float64 block: 0 at the foot, 1 at the other end; EXPONENTIAL: ``ratio**y - 1``; INVERSE_SQRT:
        ``1 / sqrt(1 + parameter * y)``.
    """
    height = y
    if (in_use & COSINE) != 0:
        height = tl.where(shape == COSINE, half_cosine(y), height)
    if (in_use & POLYNOMIAL) != 0:
        height = tl.where(shape == POLYNOMIAL, power_from_one(y, parameter), height)
    if (in_use & POWER) != 0:
        height = tl.where(shape == POWER, power_of(y, parameter), height)
    if (in_use & EXPONENTIAL) != 0:
        # Other shapes' parameters are exponents, and may overflow here.
        log2_ratio = tl.where(shape == EXPONENTIAL, parameter, 0.0)
        height = tl.where(shape == EXPONENTIAL, tl.exp2(y * log2_ratio) - 1.0, height)
    if (in_use & INVERSE_SQRT) != 0:
        growth = tl.where(shape == INVERSE_SQRT, parameter, 0.0)
        height = tl.where(shape == INVERSE_SQRT, 1.0 / tl.sqrt(1.0 + growth * y), height)
    return height


@triton.jit
def scale_at(step, cycle, part_ptr, valid, scale_table_ptr, overrun_ptr, in_use, SCALE_FNS: tl.constexpr):
    """The scale of a part's amplitude: a power of its factor, or the value of its ``scale_fn``.

    Past the last entry of a tabulated ``scale_fn``, uses that entry and sets the sticky flag at ``overrun_ptr``.

    Args:
        step: int64 block. Steps of the part.
        cycle: int64 block. Zero-based cycle indices; a ``scale_fn`` is given torch's, which start at 1.
        part_ptr: float64 pointer block. Rows of the part table.
        valid: bool block. Lanes of groups with a schedule.
        scale_table_ptr: float64 pointer. The tables of all parts, one after another.
        overrun_ptr: int64 pointer. The sticky flag.
        in_use: int64 scalar. The settings word IN_USE; what is not in use costs nothing.
        SCALE_FNS: Tuple of ``@triton.jit`` functions, float64 block -> float64 block.

    Returns:
        float64 block.
    """
    scale = tl.full(step.shape, 1.0, tl.float64)
    integer_ptr = part_ptr.to(tl.pointer_type(tl.int64))
    if (in_use & GEOMETRIC) != 0:
        count = tl.where(tl.load(integer_ptr + SCALES_PER_STEP) != 0, step, cycle)
        # A factor of 0 has log2 -inf, and -inf * 0 would be NaN where 0**0 is 1. Others have log2 0.
        exponent = tl.maximum(count, 1).to(tl.float64) * tl.load(part_ptr + LOG2_FACTOR)
        # Where the wave is 0, inf * 0 would be NaN.
        scale = tl.where(count == 0, 1.0, tl.exp2(tl.minimum(exponent, MAX_LOG2_SCALE)))
    if (in_use & TABULATED) != 0:
        tabulated = valid & (tl.load(integer_ptr + SCALING) == BY_TABLE)
        length = tl.load(integer_ptr + TABLE_LENGTH)
        entry = tl.where(tl.load(integer_ptr + SCALES_PER_STEP) != 0, step, cycle)
        tl.store(overrun_ptr + tl.zeros_like(entry), 1, mask=tabulated & (entry >= length))
        entry = tl.load(integer_ptr + TABLE_OFFSET) + tl.minimum(entry, length - 1)
        scale = tl.where(tabulated, tl.load(scale_table_ptr + entry, mask=tabulated, other=1.0), scale)
    for i in tl.static_range(len(SCALE_FNS)):
        argument = tl.where(tl.load(integer_ptr + SCALES_PER_STEP) != 0, step, cycle + 1).to(tl.float64)
        is_own = tl.load(integer_ptr + SCALING) == SCALE_FUNCTION + i
        scale = tl.where(is_own, SCALE_FNS[i](argument).to(tl.float64), scale)
    return scale


@triton.jit
def schedule_at(step, group_ptr, valid, settings_ptr, overrun_ptr, SCALE_FNS: tl.constexpr):
    """Learning rate and momentum of groups at schedule step ``step``; or their weight decay, from its own four columns.

    And whether it is the last step of a cycle.

    Past its end a schedule holds its last value.

    Args:
        step: int64 scalar in [0, 2**62). The schedule step, torch's ``last_epoch``.
        group_ptr: float64 pointer block to the columns LR, MOMENTUM, FIRST_PART and NUM_PARTS of a row of the group
            table; of any row where ``valid`` is false.
        valid: bool block.
        settings_ptr: int64 pointer to [SETTINGS_WORDS].
        overrun_ptr: int64 pointer. See ``scale_at``.
        SCALE_FNS: See ``scale_at``.

    Returns:
        float64 block, the learning rate; float64 block, the momentum; bool block, see `Schedule.ends_cycle`.
    """
    lr = tl.load(group_ptr + LR)
    momentum = tl.load(group_ptr + MOMENTUM)
    ends_cycle = tl.zeros(lr.shape, tl.int1)
    in_use = tl.load(settings_ptr + IN_USE)
    # No schedule at all: no division, no search.
    if in_use != 0:
        integer_group_ptr = group_ptr.to(tl.pointer_type(tl.int64))
        first_part = tl.load(integer_group_ptr + FIRST_PART)
        num_parts = tl.load(integer_group_ptr + NUM_PARTS)
        part_table_ptr = tl.load(settings_ptr + PART_TABLE).to(tl.pointer_type(tl.int64))
        segment_table_ptr = tl.load(settings_ptr + SEGMENT_TABLE).to(tl.pointer_type(tl.int64))
        part_stride = tl.load(settings_ptr + PART_STRIDE)
        segment_stride = tl.load(settings_ptr + SEGMENT_STRIDE)

        part = search_started(step, first_part, first_part + num_parts, part_stride, part_table_ptr, PART_COLUMNS)
        integer_part_ptr = part_table_ptr + part * PART_COLUMNS
        part_ptr = integer_part_ptr.to(tl.pointer_type(tl.float64))
        end = tl.load(integer_part_ptr + END)
        period = tl.load(integer_part_ptr + PERIOD)
        unit_shift = tl.load(integer_part_ptr + UNIT_SHIFT)
        first_segment = tl.load(integer_part_ptr + FIRST_SEGMENT)
        num_segments = tl.load(integer_part_ptr + NUM_SEGMENTS)
        second_start = tl.load(integer_part_ptr + SECOND_START)

        part_step = tl.minimum(step - tl.load(integer_part_ptr + START), end)
        cycle, phase = locate_in_cycle(part_step, period, unit_shift, tl.load(settings_ptr + MAX_UNIT_SHIFT))
        phase = tl.where(part_step < end, phase, period)
        cycle = tl.where(part_step < end, cycle, 0)

        segment = first_segment + (phase >= second_start).to(tl.int64)
        end_segment = first_segment + num_segments
        segment = search_started(phase, segment, end_segment, segment_stride, segment_table_ptr, SEGMENT_COLUMNS)
        integer_segment_ptr = segment_table_ptr + segment * SEGMENT_COLUMNS
        segment_ptr = integer_segment_ptr.to(tl.pointer_type(tl.float64))
        # The distance is exact, and small near the foot, where the value may be small too.
        distance = tl.abs(phase - tl.load(integer_segment_ptr + FOOT)).to(tl.float64)
        length = tl.load(integer_segment_ptr + LENGTH)
        y = distance / length.to(tl.float64)
        shape = tl.load(integer_segment_ptr + SHAPE)
        height = height_at(y, shape, tl.load(segment_ptr + PARAMETER), in_use)

        has_schedule = num_parts > 0
        one = tl.full(unit_shift.shape, 1, tl.int64)
        is_last = phase + (one << unit_shift) >= tl.load(integer_segment_ptr + START) + length
        ends_fall = tl.load(integer_segment_ptr + ENDS_CYCLE) != 0
        ends_cycle = has_schedule & (part_step < end) & is_last & ends_fall
        scale_table_ptr = tl.load(settings_ptr + SCALE_TABLE).to(tl.pointer_type(tl.float64))
        scale = scale_at(
            part_step, cycle, part_ptr, valid & has_schedule, scale_table_ptr, overrun_ptr, in_use, SCALE_FNS
        )
        lr_change = (tl.load(segment_ptr + LR_OFFSET) + tl.load(segment_ptr + LR_SPAN) * height) * scale
        scheduled_lr = tl.load(part_ptr + ABOUT_LR) + lr_change
        momentum_span = tl.load(segment_ptr + MOMENTUM_SPAN)
        momentum_change = (tl.load(segment_ptr + MOMENTUM_OFFSET) + momentum_span * height) * scale
        scheduled_momentum = tl.load(part_ptr + ABOUT_MOMENTUM) + momentum_change
        drives_momentum = has_schedule & (tl.load(integer_part_ptr + DRIVES_MOMENTUM) != 0)
        lr = tl.where(has_schedule, scheduled_lr, lr)
        momentum = tl.where(drives_momentum, scheduled_momentum, momentum)
    return lr, momentum, ends_cycle
