"""Evaluators: the programs that work out a schedule step's scalars in float64, one lane per group and tensor."""

import triton
import triton.language as tl

from .layout import (
    ACTIVE,
    APPLIED_BETA1,
    APPLIED_LR,
    BIAS_CORRECTION2_SQRT,
    CLIP_COEFFICIENT,
    DECAY_FACTOR,
    ENTRY,
    ENTRY_CLIP_COEFFICIENT,
    ENTRY_GRAD_NORM,
    ENTRY_GRAD_SCALE,
    ENTRY_LR,
    ENTRY_MOMENTUM,
    ENTRY_SKIPPED,
    ENTRY_STEP,
    GRAD_NORM,
    GROUP,
    HISTORY_COLUMNS,
    KINDS,
    MAX_UNIT_SHIFT,
    NEXT_BETA1,
    NEXT_LR,
    ONE_MINUS_BETA1,
    ONE_MINUS_BETA2,
    OVERRUN,
    SCALAR_COLUMNS,
    SCALAR_EPS,
    SCALAR_GRAD_SIGN,
    SCALAR_L2_DECAY,
    SCALE_TABLE,
    SCHEDULE_STEP,
    SLOT,
    STEP_SIZE,
    TENSOR_COLUMNS,
)
from .schedule import (
    BETA2,
    DECOUPLED_DECAY,
    EPS,
    GRAD_SIGN,
    HYPER_COLUMNS,
    L2_DECAY,
    LOG2_BETA2,
    cyclic_lr_and_momentum,
)


@triton.jit
def evaluate(
    first_lane,
    step,
    slot,
    settings_ptr,
    hyper_table_ptr,
    tensor_table_ptr,
    clock_ptr,
    scalars_ptr,
    scalars_float64_ptr,
    update_steps_ptr,
    step_mirror_ptr,
    live_ptr,
    num_groups,
    num_tensors,
    applied,
    ADVANCE: tl.constexpr,
    SCALE_FNS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Evaluates the schedule at ``step`` into ``slot``: one lane per group (live mirrors) and per tensor (scalars).

    Bias corrections follow Kingma & Ba 2015 (arXiv:1412.6980, algorithm 1), in float64: in float32,
    ``1 - 0.9999**t`` would be off by 1e-4.

    Args:
        first_lane: int32 scalar. Lanes ``0 .. num_groups - 1`` are groups, the next ``num_tensors`` are tensors.
        step: int64 scalar. The schedule step to evaluate.
        slot: int64 scalar. The half of the scalars to write.
        settings_ptr: int64 pointer to [SETTINGS_WORDS].
        hyper_table_ptr: float64 pointer to [num_groups, HYPER_COLUMNS].
        tensor_table_ptr: int64 pointer to [num_tensors, TENSOR_COLUMNS].
        clock_ptr: int64 pointer to [CLOCK_WORDS].
        scalars_ptr: float32 pointer to [2, num_tensors, SCALAR_COLUMNS].
        scalars_float64_ptr: float64 pointer, likewise.
        update_steps_ptr: int64 pointer to [num_tensors]. Updates each tensor got.
        step_mirror_ptr: float32 pointer to [num_tensors]. What users see as ``state[p]["step"]``; never read here.
        live_ptr: float64 pointer to [LIVE_ROWS, num_groups].
        num_groups: int32 scalar.
        num_tensors: int32 scalar.
        applied: int64 scalar. 1: count an update of each active tensor; 0: the schedule alone moves on.
        ADVANCE: A step, or a tick, and not a prime: what was next is now applied.
        SCALE_FNS: Tuple of ``@triton.jit`` scale functions.
        LANES: Lanes of this program.
    """
    lane = first_lane + tl.arange(0, LANES)
    is_group = lane < num_groups
    tensor_id = (lane - num_groups).to(tl.int64)
    is_tensor = (lane >= num_groups) & (lane < num_groups + num_tensors)
    tensor_row_ptr = tensor_table_ptr + tensor_id * TENSOR_COLUMNS
    group_id = tl.load(tensor_row_ptr + GROUP, mask=is_tensor, other=0)
    group_id = tl.where(is_group, lane.to(tl.int64), group_id)

    lr, beta1 = cyclic_lr_and_momentum(
        step,
        group_id,
        is_group | is_tensor,
        hyper_table_ptr,
        tl.load(settings_ptr + SCALE_TABLE).to(tl.pointer_type(tl.float64)),
        clock_ptr + OVERRUN,
        tl.load(settings_ptr + KINDS),
        tl.load(settings_ptr + MAX_UNIT_SHIFT),
        SCALE_FNS,
    )
    live_lane_ptr = live_ptr + lane
    if ADVANCE:
        applied_lr = tl.load(live_lane_ptr + NEXT_LR * num_groups, mask=is_group)
        applied_beta1 = tl.load(live_lane_ptr + NEXT_BETA1 * num_groups, mask=is_group)
        tl.store(live_lane_ptr + APPLIED_LR * num_groups, applied_lr, mask=is_group)
        tl.store(live_lane_ptr + APPLIED_BETA1 * num_groups, applied_beta1, mask=is_group)
    tl.store(live_lane_ptr + NEXT_LR * num_groups, lr, mask=is_group)
    tl.store(live_lane_ptr + NEXT_BETA1 * num_groups, beta1, mask=is_group)

    update_step = tl.load(update_steps_ptr + tensor_id, mask=is_tensor, other=0)
    if ADVANCE:
        update_step += applied * tl.load(tensor_row_ptr + ACTIVE, mask=is_tensor, other=0)
        tl.store(update_steps_ptr + tensor_id, update_step, mask=is_tensor)
        tl.store(step_mirror_ptr + tensor_id, update_step.to(tl.float32), mask=is_tensor)

    row_ptr = hyper_table_ptr + group_id * HYPER_COLUMNS
    next_update = (update_step + 1).to(tl.float64)
    bias_correction1 = 1.0 - tl.exp2(next_update * tl.log2(beta1))
    bias_correction2 = 1.0 - tl.exp2(next_update * tl.load(row_ptr + LOG2_BETA2))
    step_size = lr / bias_correction1
    decay_factor = 1.0 - lr * tl.load(row_ptr + DECOUPLED_DECAY)

    row = (slot * num_tensors + tensor_id) * SCALAR_COLUMNS
    store_scalar(scalars_ptr, scalars_float64_ptr, row + STEP_SIZE, step_size, is_tensor)
    store_scalar(scalars_ptr, scalars_float64_ptr, row + BIAS_CORRECTION2_SQRT, tl.sqrt(bias_correction2), is_tensor)
    store_scalar(scalars_ptr, scalars_float64_ptr, row + ONE_MINUS_BETA1, 1.0 - beta1, is_tensor)
    store_scalar(scalars_ptr, scalars_float64_ptr, row + ONE_MINUS_BETA2, 1.0 - tl.load(row_ptr + BETA2), is_tensor)
    store_scalar(scalars_ptr, scalars_float64_ptr, row + SCALAR_EPS, tl.load(row_ptr + EPS), is_tensor)
    store_scalar(scalars_ptr, scalars_float64_ptr, row + SCALAR_L2_DECAY, tl.load(row_ptr + L2_DECAY), is_tensor)
    store_scalar(scalars_ptr, scalars_float64_ptr, row + DECAY_FACTOR, decay_factor, is_tensor)
    store_scalar(scalars_ptr, scalars_float64_ptr, row + SCALAR_GRAD_SIGN, tl.load(row_ptr + GRAD_SIGN), is_tensor)


@triton.jit
def store_scalar(scalars_ptr, scalars_float64_ptr, offsets, values, mask):
    """Stores a column of the scalars, rounded to float32 and as it is.

    Args:
        scalars_ptr: float32 pointer.
        scalars_float64_ptr: float64 pointer.
        offsets: int64 block.
        values: float64 block.
        mask: bool block.
    """
    tl.store(scalars_ptr + offsets, values.to(tl.float32), mask=mask)
    tl.store(scalars_float64_ptr + offsets, values, mask=mask)


@triton.jit
def record_history(
    first_lane,
    step,
    entry,
    skipped,
    history_ptr,
    history_rows,
    live_ptr,
    norm_ptr,
    grad_scale,
    num_groups,
    LANES: tl.constexpr,
):
    """Writes a row of the history: what this step applies, or would have applied had it not been skipped.

    Args:
        first_lane: int32 scalar. Lanes ``0 .. num_groups - 1`` are groups.
        step: int64 scalar. The schedule step.
        entry: int64 scalar. Steps recorded so far.
        skipped: int64 scalar. 1: the step is skipped.
        history_ptr: float64 pointer to [history_rows, num_groups, HISTORY_COLUMNS].
        history_rows: int32 scalar > 0.
        live_ptr: float64 pointer to [LIVE_ROWS, num_groups].
        norm_ptr: float64 pointer to [NORM_WORDS].
        grad_scale: float32 scalar. The loss scale.
        num_groups: int32 scalar.
        LANES: Lanes of this program.
    """
    lane = first_lane + tl.arange(0, LANES)
    is_group = lane < num_groups
    row_ptr = history_ptr + ((entry % history_rows) * num_groups + lane) * HISTORY_COLUMNS
    tl.store(row_ptr + ENTRY, (entry + 1).to(tl.float64), mask=is_group)
    tl.store(row_ptr + ENTRY_STEP, step.to(tl.float64), mask=is_group)
    tl.store(row_ptr + ENTRY_LR, tl.load(live_ptr + NEXT_LR * num_groups + lane, mask=is_group), mask=is_group)
    tl.store(row_ptr + ENTRY_MOMENTUM, tl.load(live_ptr + NEXT_BETA1 * num_groups + lane, mask=is_group), mask=is_group)
    tl.store(row_ptr + ENTRY_GRAD_NORM, tl.load(norm_ptr + GRAD_NORM), mask=is_group)
    tl.store(row_ptr + ENTRY_CLIP_COEFFICIENT, tl.load(norm_ptr + CLIP_COEFFICIENT), mask=is_group)
    tl.store(row_ptr + ENTRY_GRAD_SCALE, grad_scale.to(tl.float64), mask=is_group)
    tl.store(row_ptr + ENTRY_SKIPPED, skipped.to(tl.float64), mask=is_group)


@triton.jit(do_not_specialize=["num_groups", "num_tensors"])
def prime_kernel(
    clock_ptr,
    settings_ptr,
    hyper_table_ptr,
    tensor_table_ptr,
    scalars_ptr,
    scalars_float64_ptr,
    update_steps_ptr,
    step_mirror_ptr,
    live_ptr,
    num_groups,
    num_tensors,
    SCALE_FNS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Evaluates the current schedule step into the current slot; advances nothing.

    Runs after anything but a step has changed what the next step needs. Arguments as in `adam_kernel`.
    """
    evaluate(
        tl.program_id(0) * LANES,
        tl.load(clock_ptr + SCHEDULE_STEP),
        tl.load(clock_ptr + SLOT),
        settings_ptr,
        hyper_table_ptr,
        tensor_table_ptr,
        clock_ptr,
        scalars_ptr,
        scalars_float64_ptr,
        update_steps_ptr,
        step_mirror_ptr,
        live_ptr,
        num_groups,
        num_tensors,
        0,
        False,
        SCALE_FNS,
        LANES,
    )
