"""Evaluators: the programs that compute the scalars of a schedule step in float64, one lane per group and tensor."""

import triton
import triton.language as tl

from .layout import (
    ACTIVE,
    APPLIED_LR,
    APPLIED_MOMENTUM,
    ENTRY,
    ENTRY_CLIP_COEFFICIENT,
    ENTRY_GRAD_NORM,
    ENTRY_GRAD_SCALE,
    ENTRY_LR,
    ENTRY_MOMENTUM,
    ENTRY_SKIPPED,
    ENTRY_STEP,
    GROUP,
    HISTORY_COLUMNS,
    MAX_RULE_SCALARS,
    NEXT_LR,
    NEXT_MOMENTUM,
    OVERRUN,
    RULE_SCALARS,
    SCALAR_AVERAGE_WEIGHT,
    SCALAR_COLUMNS,
    SCALAR_GRAD_SIGN,
    SCHEDULE_STEP,
    SLOT,
    TENSOR_COLUMNS,
)
from .schedule import (
    AVERAGE_EVERY,
    AVERAGE_START,
    AVERAGE_WEIGHT,
    DECAY_SCHEDULES,
    GRAD_SIGN,
    GROUP_COLUMNS,
    IN_USE,
    RULE_COLUMNS,
    WEIGHT_DECAY,
    schedule_at,
)


@triton.jit
def average_weight(step, ends_cycle, count, settings_ptr):
    """The weight that the update at ``step`` has in the average of its parameter; see `fused_clr.averaging`.

    Args:
        step: int64 scalar. The schedule step.
        ends_cycle: bool block. Whether it is the last one of a cycle.
        count: int64 block. Averages before it.
        settings_ptr: int64 pointer to [SETTINGS_WORDS].

    Returns:
        float64 block; 0 where the step does not average.
    """
    every = tl.load(settings_ptr + AVERAGE_EVERY)
    is_due = tl.where(every > 0, (step + 1) % tl.maximum(every, 1) == 0, ends_cycle)
    is_due = is_due & (step >= tl.load(settings_ptr + AVERAGE_START))
    weight = tl.load((settings_ptr + AVERAGE_WEIGHT).to(tl.pointer_type(tl.float64)))
    weight = tl.where(weight == 0.0, 1.0 / (count + 1).to(tl.float64), weight)
    return tl.where(is_due, tl.where(count == 0, 1.0, weight), 0.0)


@triton.jit
def load_lanes(first_lane, tensor_table_ptr, update_steps_ptr, live_ptr, num_groups, num_tensors, LANES: tl.constexpr):
    """Loads what an evaluator's lanes need and know the address of: together, since each wait is long.

    Arguments as in ``evaluate``.

    Returns:
        Tuple of int64 blocks: group, number of updates, 1 if this step updates the tensor; and of float64 blocks: the
        learning rate and the momentum that this step applies.
    """
    lane = first_lane + tl.arange(0, LANES)
    is_group = lane < num_groups
    tensor_id = (lane - num_groups).to(tl.int64)
    is_tensor = (lane >= num_groups) & (lane < num_groups + num_tensors)
    tensor_row_ptr = tensor_table_ptr + tensor_id * TENSOR_COLUMNS
    group_id = tl.load(tensor_row_ptr + GROUP, mask=is_tensor, other=0)
    active = tl.load(tensor_row_ptr + ACTIVE, mask=is_tensor, other=0)
    update_step = tl.load(update_steps_ptr + tensor_id, mask=is_tensor, other=0)
    lr = tl.load(live_ptr + NEXT_LR * num_groups + lane, mask=is_group)
    momentum = tl.load(live_ptr + NEXT_MOMENTUM * num_groups + lane, mask=is_group)
    return tl.where(is_group, lane.to(tl.int64), group_id), update_step, active, lr, momentum


@triton.jit
def evaluate(
    first_lane,
    step,
    slot,
    settings_ptr,
    group_table_ptr,
    control_ptr,
    scalars_ptr,
    scalars_float64_ptr,
    update_steps_ptr,
    step_mirror_ptr,
    average_counts_ptr,
    live_ptr,
    loaded,
    num_groups,
    num_tensors,
    applied,
    ADVANCE: tl.constexpr,
    SCALARS: tl.constexpr,
    HAS_DECAY_SCHEDULE: tl.constexpr,
    HAS_AVERAGING: tl.constexpr,
    HAS_FLOAT64: tl.constexpr,
    SCALE_FNS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Evaluates the schedule at ``step`` into ``slot``: one lane per group (live values) and per tensor (scalars).

    Args:
        first_lane: int32 scalar. Lanes ``0 .. num_groups - 1`` are groups, the next ``num_tensors`` are tensors.
        step: int64 scalar. The schedule step to evaluate.
        slot: int64 scalar. The half of the scalars to write.
        settings_ptr: int64 pointer to [SETTINGS_WORDS].
        group_table_ptr: float64 pointer to [num_groups, GROUP_COLUMNS].
        control_ptr: int64 pointer to [CONTROL_WORDS].
        scalars_ptr: float32 pointer to [2, num_tensors, SCALAR_COLUMNS].
        scalars_float64_ptr: float64 pointer, likewise.
        update_steps_ptr: int64 pointer to [num_tensors]. Number of updates of each tensor.
        step_mirror_ptr: float32 pointer to [num_tensors]. What users see as ``state[p]["step"]``; never read here.
        average_counts_ptr: int64 pointer to [num_tensors]. How often each tensor was averaged; all tensors of a group
            as often.
        live_ptr: float64 pointer to [LIVE_ROWS, num_groups].
        loaded: Tuple of ``load_lanes``.
        num_groups: int32 scalar.
        num_tensors: int32 scalar.
        applied: int64 scalar. 1: count an update of each active tensor, and an average where it is one's turn; 0: only
            the schedule advances.
        ADVANCE: True in a step: the values that were next become the applied ones. False in a reevaluation.
        SCALARS: The rule's scalars, see `step_kernel`.
        HAS_DECAY_SCHEDULE: See `step_kernel`.
        HAS_AVERAGING: See `step_kernel`.
        HAS_FLOAT64: See `step_kernel`.
        SCALE_FNS: Tuple of ``@triton.jit`` scale functions.
        LANES: Lanes of this program.
    """
    lane = first_lane + tl.arange(0, LANES)
    is_group = lane < num_groups
    tensor_id = (lane - num_groups).to(tl.int64)
    is_tensor = (lane >= num_groups) & (lane < num_groups + num_tensors)
    live_lane_ptr = live_ptr + lane
    group_id, update_step = loaded[0], loaded[1]
    if ADVANCE:
        tl.store(live_lane_ptr + APPLIED_LR * num_groups, loaded[3], mask=is_group)
        tl.store(live_lane_ptr + APPLIED_MOMENTUM * num_groups, loaded[4], mask=is_group)
        update_step += applied * loaded[2]
        tl.store(update_steps_ptr + tensor_id, update_step, mask=is_tensor)
        tl.store(step_mirror_ptr + tensor_id, update_step.to(tl.float32), mask=is_tensor)
    group_row_ptr = group_table_ptr + group_id * GROUP_COLUMNS

    in_group = is_group | is_tensor
    overrun_ptr = control_ptr + OVERRUN
    weight_decay = tl.load(group_row_ptr + WEIGHT_DECAY)
    if HAS_DECAY_SCHEDULE:
        if (tl.load(settings_ptr + IN_USE) & DECAY_SCHEDULES) != 0:
            weight_decay, _, _ = schedule_at(
                step, group_row_ptr + WEIGHT_DECAY, in_group, settings_ptr, overrun_ptr, SCALE_FNS
            )
    lr, momentum, ends_cycle = schedule_at(step, group_row_ptr, in_group, settings_ptr, overrun_ptr, SCALE_FNS)
    tl.store(live_lane_ptr + NEXT_LR * num_groups, lr, mask=is_group)
    tl.store(live_lane_ptr + NEXT_MOMENTUM * num_groups, momentum, mask=is_group)

    row = (slot * num_tensors + tensor_id) * SCALAR_COLUMNS
    if HAS_AVERAGING:
        count = tl.load(average_counts_ptr + tensor_id, mask=is_tensor, other=0)
        if ADVANCE:
            own_row = ((1 - slot) * num_tensors + tensor_id) * SCALAR_COLUMNS
            own_weight = tl.load(scalars_ptr + own_row + SCALAR_AVERAGE_WEIGHT, mask=is_tensor, other=0.0)
            count += applied * (own_weight != 0).to(tl.int64)
            tl.store(average_counts_ptr + tensor_id, count, mask=is_tensor)
        weight = average_weight(step, ends_cycle, count, settings_ptr)
        store_scalar(scalars_ptr, scalars_float64_ptr, row + SCALAR_AVERAGE_WEIGHT, weight, is_tensor, HAS_FLOAT64)

    scalars = SCALARS(lr, momentum, weight_decay, (update_step + 1).to(tl.float64), group_row_ptr + RULE_COLUMNS)
    tl.static_assert(len(scalars) <= MAX_RULE_SCALARS, "a rule has too many scalars")
    grad_sign = tl.load(group_row_ptr + GRAD_SIGN)
    store_scalar(scalars_ptr, scalars_float64_ptr, row + SCALAR_GRAD_SIGN, grad_sign, is_tensor, HAS_FLOAT64)
    for i in tl.static_range(len(scalars)):
        store_scalar(scalars_ptr, scalars_float64_ptr, row + RULE_SCALARS + i, scalars[i], is_tensor, HAS_FLOAT64)


@triton.jit
def store_scalar(scalars_ptr, scalars_float64_ptr, offsets, values, mask, HAS_FLOAT64: tl.constexpr):
    """Stores a column of the scalars, rounded to float32, and as it is where a parameter needs it.

    Args:
        scalars_ptr: float32 pointer.
        scalars_float64_ptr: float64 pointer.
        offsets: int64 block.
        values: float64 block.
        mask: bool block.
        HAS_FLOAT64: See `step_kernel`.
    """
    tl.store(scalars_ptr + offsets, values.to(tl.float32), mask=mask)
    if HAS_FLOAT64:
        tl.store(scalars_float64_ptr + offsets, values, mask=mask)


@triton.jit
def record_history(
    first_lane,
    step,
    entry,
    skipped,
    history_ptr,
    history_rows,
    applied_lr,
    applied_momentum,
    grad_norm,
    clip_coefficient,
    grad_scale,
    num_groups,
    LANES: tl.constexpr,
):
    """Writes a row of the history: what this step applies or, if it is skipped, would have applied.

    Args:
        first_lane: int32 scalar. Lanes ``0 .. num_groups - 1`` are groups.
        step: int64 scalar. The schedule step.
        entry: int64 scalar. Steps recorded so far.
        skipped: int64 scalar. 1: the step is skipped.
        history_ptr: float64 pointer to [history_rows, num_groups, HISTORY_COLUMNS].
        history_rows: int32 scalar > 0.
        applied_lr: float64 block.
        applied_momentum: float64 block.
        grad_norm: float64 scalar.
        clip_coefficient: float64 scalar.
        grad_scale: float32 scalar. The loss scale.
        num_groups: int32 scalar.
        LANES: Lanes of this program.
    """
    lane = first_lane + tl.arange(0, LANES)
    is_group = lane < num_groups
    row_ptr = history_ptr + ((entry % history_rows) * num_groups + lane) * HISTORY_COLUMNS
    tl.store(row_ptr + ENTRY, (entry + 1).to(tl.float64), mask=is_group)
    tl.store(row_ptr + ENTRY_STEP, step.to(tl.float64), mask=is_group)
    tl.store(row_ptr + ENTRY_LR, applied_lr, mask=is_group)
    tl.store(row_ptr + ENTRY_MOMENTUM, applied_momentum, mask=is_group)
    tl.store(row_ptr + ENTRY_GRAD_NORM, grad_norm, mask=is_group)
    tl.store(row_ptr + ENTRY_CLIP_COEFFICIENT, clip_coefficient, mask=is_group)
    tl.store(row_ptr + ENTRY_GRAD_SCALE, grad_scale.to(tl.float64), mask=is_group)
    tl.store(row_ptr + ENTRY_SKIPPED, skipped.to(tl.float64), mask=is_group)


@triton.jit(do_not_specialize=["num_groups", "num_tensors"])
def reevaluate_kernel(
    control_ptr,
    settings_ptr,
    group_table_ptr,
    tensor_table_ptr,
    scalars_ptr,
    scalars_float64_ptr,
    update_steps_ptr,
    step_mirror_ptr,
    average_counts_ptr,
    live_ptr,
    num_groups,
    num_tensors,
    SCALARS: tl.constexpr,
    HAS_DECAY_SCHEDULE: tl.constexpr,
    HAS_AVERAGING: tl.constexpr,
    HAS_FLOAT64: tl.constexpr,
    SCALE_FNS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Evaluates the current schedule step into the current slot; advances nothing.

    Runs after something other than a step changed the inputs of the next step. Arguments as in `step_kernel`.
    """
    first_lane = tl.program_id(0) * LANES
    evaluate(
        first_lane,
        tl.load(control_ptr + SCHEDULE_STEP),
        tl.load(control_ptr + SLOT),
        settings_ptr,
        group_table_ptr,
        control_ptr,
        scalars_ptr,
        scalars_float64_ptr,
        update_steps_ptr,
        step_mirror_ptr,
        average_counts_ptr,
        live_ptr,
        load_lanes(first_lane, tensor_table_ptr, update_steps_ptr, live_ptr, num_groups, num_tensors, LANES),
        num_groups,
        num_tensors,
        0,
        False,
        SCALARS,
        HAS_DECAY_SCHEDULE,
        HAS_AVERAGING,
        HAS_FLOAT64,
        SCALE_FNS,
        LANES,
    )
