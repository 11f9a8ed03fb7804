"""The one-launch Adam step: every parameter updated, and the next step's learning rate worked out, in one kernel.

Programs ``0 .. num_evaluators - 1`` are evaluators (float64 scalars, one lane per group and tensor); the others are
updaters (chunks of BLOCK_SIZE elements). Evaluators write one slot of the scalars while updaters read the other. The
last program to retire ticks the clock. Tables are laid out by `fused_clr.plan` and `fused_clr.backends.triton`.
"""

import triton
import triton.language as tl

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

# Words of the clock, int64[CLOCK_WORDS].
SCHEDULE_STEP = tl.constexpr(0)
SLOT = tl.constexpr(1)
DONE = tl.constexpr(2)
GENERATION = tl.constexpr(3)
# Sticky flags: a tabulated scale_fn ran past its table; a captured launch of an older generation was replayed.
OVERRUN = tl.constexpr(4)
STALE = tl.constexpr(5)
CLOCK_WORDS = tl.constexpr(8)

# Columns of the tensor table, int64[num_tensors, TENSOR_COLUMNS]. Addresses of parts a tensor lacks are 0.
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
EXP_AVG = tl.constexpr(2)
EXP_AVG_SQ = tl.constexpr(3)
MAX_EXP_AVG_SQ = tl.constexpr(4)
NUMEL = tl.constexpr(5)
GROUP = tl.constexpr(6)
ACTIVE = tl.constexpr(7)
TENSOR_COLUMNS = tl.constexpr(8)

# Columns of the scalars, [2, num_tensors, SCALAR_COLUMNS].
STEP_SIZE = tl.constexpr(0)
BIAS_CORRECTION2_SQRT = tl.constexpr(1)
ONE_MINUS_BETA1 = tl.constexpr(2)
ONE_MINUS_BETA2 = tl.constexpr(3)
SCALAR_EPS = tl.constexpr(4)
SCALAR_L2_DECAY = tl.constexpr(5)
DECAY_FACTOR = tl.constexpr(6)
SCALAR_GRAD_SIGN = tl.constexpr(7)
SCALAR_COLUMNS = tl.constexpr(8)

# Rows of the live mirrors, float64[LIVE_ROWS, num_groups]: what the last step applied, what the next one will.
APPLIED_LR = tl.constexpr(0)
APPLIED_BETA1 = tl.constexpr(1)
NEXT_LR = tl.constexpr(2)
NEXT_BETA1 = tl.constexpr(3)
LIVE_ROWS = tl.constexpr(4)

# A word of the chunk table: tensor id in the upper half, chunk of that tensor in the lower.
CHUNK_BITS = tl.constexpr(32)
CHUNK_MASK = tl.constexpr((1 << 32) - 1)


@triton.jit
def evaluate(
    first_lane,
    step,
    slot,
    hyper_table_ptr,
    tensor_table_ptr,
    scale_table_ptr,
    clock_ptr,
    scalars_ptr,
    scalars_float64_ptr,
    update_steps_ptr,
    step_mirror_ptr,
    live_ptr,
    num_groups,
    num_tensors,
    ADVANCE: tl.constexpr,
    KINDS: tl.constexpr,
    MAX_UNIT_SHIFT: tl.constexpr,
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
        hyper_table_ptr: float64 pointer to [num_groups, HYPER_COLUMNS].
        tensor_table_ptr: int64 pointer to [num_tensors, TENSOR_COLUMNS].
        scale_table_ptr: float64 pointer. Tables of the tabulated scale functions.
        clock_ptr: int64 pointer to [CLOCK_WORDS].
        scalars_ptr: float32 pointer to [2, num_tensors, SCALAR_COLUMNS].
        scalars_float64_ptr: float64 pointer, likewise.
        update_steps_ptr: int64 pointer to [num_tensors]. Updates each tensor got.
        step_mirror_ptr: float32 pointer to [num_tensors]. What users see as ``state[p]["step"]``; never read here.
        live_ptr: float64 pointer to [LIVE_ROWS, num_groups].
        num_groups: int32 scalar.
        num_tensors: int32 scalar.
        ADVANCE: Count an update of each active tensor first (a step), or not (prime).
        KINDS: Bit set of the schedule kinds in use.
        MAX_UNIT_SHIFT: The largest UNIT_SHIFT in the hyper table.
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
        scale_table_ptr,
        clock_ptr + OVERRUN,
        KINDS,
        MAX_UNIT_SHIFT,
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
        update_step += tl.load(tensor_row_ptr + ACTIVE, mask=is_tensor, other=0)
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
def adam_update(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, scalar_row_ptr, grad_scale, AMSGRAD: tl.constexpr):
    """Adam's element update (Kingma & Ba 2015, arXiv:1412.6980, algorithm 1; AMSGrad: Reddi et al. 2018, algorithm 2).

    Args:
        param: float32 or float64 block; so are ``grad``, ``exp_avg``, ``exp_avg_sq`` and ``max_exp_avg_sq``.
        grad: Gradients, still multiplied by the loss scale.
        exp_avg: First moment.
        exp_avg_sq: Second moment.
        max_exp_avg_sq: Largest second moment so far; unused without AMSGRAD.
        scalar_row_ptr: pointer to [SCALAR_COLUMNS], of the blocks' dtype.
        grad_scale: scalar of the blocks' dtype. The loss scale.
        AMSGRAD: Divide by the largest second moment.

    Returns:
        The new param, exp_avg, exp_avg_sq and max_exp_avg_sq.
    """
    step_size = tl.load(scalar_row_ptr + STEP_SIZE)
    bias_correction2_sqrt = tl.load(scalar_row_ptr + BIAS_CORRECTION2_SQRT)
    l2_decay = tl.load(scalar_row_ptr + SCALAR_L2_DECAY)
    inv_scale = tl.load(scalar_row_ptr + SCALAR_GRAD_SIGN) / grad_scale

    grad = grad * inv_scale
    # Without decay an infinite parameter must not turn its gradient into NaN.
    grad = tl.where(l2_decay == 0, grad, grad + l2_decay * param)
    param = param * tl.load(scalar_row_ptr + DECAY_FACTOR)
    exp_avg += tl.load(scalar_row_ptr + ONE_MINUS_BETA1) * (grad - exp_avg)
    # An overflowed second moment stays infinite and stops its element, as in torch, where inf - inf would be NaN.
    grad_sq = grad * grad
    next_exp_avg_sq = exp_avg_sq + tl.load(scalar_row_ptr + ONE_MINUS_BETA2) * (grad_sq - exp_avg_sq)
    exp_avg_sq = tl.where(exp_avg_sq == float("inf"), exp_avg_sq, next_exp_avg_sq)
    if AMSGRAD:
        max_exp_avg_sq = tl.maximum(max_exp_avg_sq, exp_avg_sq, propagate_nan=tl.PropagateNan.ALL)
        second_moment = max_exp_avg_sq
    else:
        second_moment = exp_avg_sq
    eps = tl.load(scalar_row_ptr + SCALAR_EPS)
    if param.dtype == tl.float64:
        denominator = tl.sqrt(second_moment) / bias_correction2_sqrt + eps
        param -= step_size * (exp_avg / denominator)
    else:
        denominator = tl.div_rn(tl.sqrt_rn(second_moment), bias_correction2_sqrt) + eps
        param -= step_size * tl.div_rn(exp_avg, denominator)
    return param, exp_avg, exp_avg_sq, max_exp_avg_sq


@triton.jit
def update_chunk(
    tensor_row_ptr,
    offset,
    n_elements,
    scalar_row_ptr,
    grad_scale,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Updates one chunk: loads it by address, updates it, stores it.

    Args:
        tensor_row_ptr: int64 pointer to [TENSOR_COLUMNS].
        offset: int64 scalar. First element of the chunk.
        n_elements: int64 scalar. Elements of the tensor.
        scalar_row_ptr: float32 or float64 pointer to [SCALAR_COLUMNS].
        grad_scale: float32 scalar.
        PARAM_DTYPE: dtype of the parameter and its moments.
        GRAD_DTYPE: dtype of the gradient.
        AMSGRAD: See ``adam_update``.
        BLOCK_SIZE: Elements of a chunk.
        ALIGNED: Promise that all addresses are multiples of 16 bytes. A false promise faults.
        MASKED: The chunk may end before BLOCK_SIZE elements.
    """
    COMPUTE_DTYPE: tl.constexpr = tl.float64 if PARAM_DTYPE == tl.float64 else tl.float32
    param_ptr = tl.load(tensor_row_ptr + PARAM).to(tl.pointer_type(PARAM_DTYPE))
    grad_ptr = tl.load(tensor_row_ptr + GRAD).to(tl.pointer_type(GRAD_DTYPE))
    exp_avg_ptr = tl.load(tensor_row_ptr + EXP_AVG).to(tl.pointer_type(PARAM_DTYPE))
    exp_avg_sq_ptr = tl.load(tensor_row_ptr + EXP_AVG_SQ).to(tl.pointer_type(PARAM_DTYPE))
    max_exp_avg_sq_ptr = tl.load(tensor_row_ptr + MAX_EXP_AVG_SQ).to(tl.pointer_type(PARAM_DTYPE))
    if ALIGNED:
        param_ptr = tl.multiple_of(param_ptr, 16)
        grad_ptr = tl.multiple_of(grad_ptr, 16)
        exp_avg_ptr = tl.multiple_of(exp_avg_ptr, 16)
        exp_avg_sq_ptr = tl.multiple_of(exp_avg_sq_ptr, 16)
        max_exp_avg_sq_ptr = tl.multiple_of(max_exp_avg_sq_ptr, 16)

    offsets = offset + tl.arange(0, BLOCK_SIZE)
    mask = offsets < n_elements if MASKED else None
    param = tl.load(param_ptr + offsets, mask=mask).to(COMPUTE_DTYPE)
    grad = tl.load(grad_ptr + offsets, mask=mask).to(COMPUTE_DTYPE)
    exp_avg = tl.load(exp_avg_ptr + offsets, mask=mask).to(COMPUTE_DTYPE)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + offsets, mask=mask).to(COMPUTE_DTYPE)
    if AMSGRAD:
        max_exp_avg_sq = tl.load(max_exp_avg_sq_ptr + offsets, mask=mask).to(COMPUTE_DTYPE)
    else:
        max_exp_avg_sq = exp_avg_sq

    param, exp_avg, exp_avg_sq, max_exp_avg_sq = adam_update(
        param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, scalar_row_ptr, grad_scale.to(COMPUTE_DTYPE), AMSGRAD
    )
    tl.store(param_ptr + offsets, param.to(PARAM_DTYPE), mask=mask)
    tl.store(exp_avg_ptr + offsets, exp_avg.to(PARAM_DTYPE), mask=mask)
    tl.store(exp_avg_sq_ptr + offsets, exp_avg_sq.to(PARAM_DTYPE), mask=mask)
    if AMSGRAD:
        tl.store(max_exp_avg_sq_ptr + offsets, max_exp_avg_sq.to(PARAM_DTYPE), mask=mask)


@triton.jit
def update(
    chunk,
    slot,
    tensor_table_ptr,
    chunk_table_ptr,
    scalars_ptr,
    grad_scale,
    num_tensors,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Looks up a chunk and updates it in the cheapest way that is safe for it.

    Args:
        chunk: int64 scalar. Row of the chunk table.
        slot: int64 scalar. The half of the scalars to read.
        tensor_table_ptr: int64 pointer to [num_tensors, TENSOR_COLUMNS].
        chunk_table_ptr: int64 pointer to [num_chunks].
        scalars_ptr: float32 pointer (float64 for float64 parameters) to [2, num_tensors, SCALAR_COLUMNS].
        grad_scale: float32 scalar.
        num_tensors: int32 scalar.
        PARAM_DTYPE: See ``update_chunk``.
        GRAD_DTYPE: See ``update_chunk``.
        AMSGRAD: See ``adam_update``.
        BLOCK_SIZE: Elements of a chunk.
    """
    word = tl.load(chunk_table_ptr + chunk)
    tensor_id = word >> CHUNK_BITS
    offset = (word & CHUNK_MASK) * BLOCK_SIZE
    tensor_row_ptr = tensor_table_ptr + tensor_id * TENSOR_COLUMNS
    scalar_row_ptr = scalars_ptr + (slot * num_tensors + tensor_id) * SCALAR_COLUMNS
    n_elements = tl.load(tensor_row_ptr + NUMEL)
    # Alignment is a property of today's addresses, so it is found here and not promised by a plan.
    addresses = tl.load(tensor_row_ptr + PARAM) | tl.load(tensor_row_ptr + GRAD)
    addresses |= tl.load(tensor_row_ptr + EXP_AVG) | tl.load(tensor_row_ptr + EXP_AVG_SQ)
    if AMSGRAD:
        addresses |= tl.load(tensor_row_ptr + MAX_EXP_AVG_SQ)
    aligned = (addresses & 15) == 0

    # A mask, even one that is all true, would cost the 128-bit accesses: branch once per chunk instead.
    if offset + BLOCK_SIZE > n_elements:
        update_chunk(
            tensor_row_ptr,
            offset,
            n_elements,
            scalar_row_ptr,
            grad_scale,
            PARAM_DTYPE,
            GRAD_DTYPE,
            AMSGRAD,
            BLOCK_SIZE,
            ALIGNED=False,
            MASKED=True,
        )
    elif aligned:
        update_chunk(
            tensor_row_ptr,
            offset,
            n_elements,
            scalar_row_ptr,
            grad_scale,
            PARAM_DTYPE,
            GRAD_DTYPE,
            AMSGRAD,
            BLOCK_SIZE,
            ALIGNED=True,
            MASKED=False,
        )
    else:
        update_chunk(
            tensor_row_ptr,
            offset,
            n_elements,
            scalar_row_ptr,
            grad_scale,
            PARAM_DTYPE,
            GRAD_DTYPE,
            AMSGRAD,
            BLOCK_SIZE,
            ALIGNED=False,
            MASKED=False,
        )


@triton.jit(
    do_not_specialize=["num_groups", "num_tensors", "num_evaluators", "num_chunks", "generation"],
    do_not_specialize_on_alignment=["chunk_table_ptr", "grad_scale_ptr", "found_inf_ptr"],
)
def adam_kernel(
    clock_ptr,
    hyper_table_ptr,
    scale_table_ptr,
    tensor_table_ptr,
    chunk_table_ptr,
    scalars_ptr,
    scalars_float64_ptr,
    update_steps_ptr,
    step_mirror_ptr,
    live_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    num_groups,
    num_tensors,
    num_evaluators,
    num_chunks,
    generation,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    IS_LAST: tl.constexpr,
    KINDS: tl.constexpr,
    MAX_UNIT_SHIFT: tl.constexpr,
    SCALE_FNS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LANES: tl.constexpr,
):
    """One optimizer step: evaluators, updaters, and a tick by the last program to retire.

    A step over several dtype combinations is several launches in one stream; only the last evaluates and retires, so
    that a launch that never came (an interrupt, a compile error) cannot leave a partial count behind.

    Args:
        clock_ptr: int64 pointer to [CLOCK_WORDS].
        hyper_table_ptr: float64 pointer to [num_groups, HYPER_COLUMNS].
        scale_table_ptr: float64 pointer. Tables of tabulated scale functions.
        tensor_table_ptr: int64 pointer to [num_tensors, TENSOR_COLUMNS].
        chunk_table_ptr: int64 pointer to [num_chunks]. Chunks of this launch's dtype combination.
        scalars_ptr: float32 pointer to [2, num_tensors, SCALAR_COLUMNS].
        scalars_float64_ptr: float64 pointer, likewise.
        update_steps_ptr: int64 pointer to [num_tensors].
        step_mirror_ptr: float32 pointer to [num_tensors].
        live_ptr: float64 pointer to [LIVE_ROWS, num_groups].
        grad_scale_ptr: float32 pointer to [1]. Loss scale that gradients are divided by.
        found_inf_ptr: float32 pointer to [1]. Not 0: skip this step. It is a sum over devices, so it may be 2.
        num_groups: int32 scalar.
        num_tensors: int32 scalar.
        num_evaluators: int32 scalar. 0 unless IS_LAST.
        num_chunks: int32 scalar.
        generation: int32 scalar. The clock's when this launch was made; a launch of another one does nothing.
        PARAM_DTYPE: dtype of the parameters and moments.
        GRAD_DTYPE: dtype of the gradients.
        AMSGRAD: See ``adam_update``.
        IS_LAST: This launch evaluates and retires.
        KINDS: Bit set of the schedule kinds in use.
        MAX_UNIT_SHIFT: The largest UNIT_SHIFT in the hyper table.
        SCALE_FNS: Tuple of ``@triton.jit`` scale functions.
        BLOCK_SIZE: Elements of a chunk.
        LANES: Lanes of an evaluator, no more than its threads.
    """
    program_id = tl.program_id(0)
    step = tl.load(clock_ptr + SCHEDULE_STEP)
    slot = tl.load(clock_ptr + SLOT)
    if tl.load(clock_ptr + GENERATION) == generation:
        # `!=` and not `> 0`: a NaN must skip too.
        skip = tl.load(found_inf_ptr) != 0
        if not skip:
            if IS_LAST and program_id < num_evaluators:
                evaluate(
                    program_id * LANES,
                    step + 1,
                    1 - slot,
                    hyper_table_ptr,
                    tensor_table_ptr,
                    scale_table_ptr,
                    clock_ptr,
                    scalars_ptr,
                    scalars_float64_ptr,
                    update_steps_ptr,
                    step_mirror_ptr,
                    live_ptr,
                    num_groups,
                    num_tensors,
                    True,
                    KINDS,
                    MAX_UNIT_SHIFT,
                    SCALE_FNS,
                    LANES,
                )
            else:
                own_scalars_ptr = scalars_float64_ptr if PARAM_DTYPE == tl.float64 else scalars_ptr
                grad_scale = tl.load(grad_scale_ptr)
                num_updaters = tl.num_programs(0) - num_evaluators
                for chunk in range(program_id - num_evaluators, num_chunks, num_updaters):
                    update(
                        chunk,
                        slot,
                        tensor_table_ptr,
                        chunk_table_ptr,
                        own_scalars_ptr,
                        grad_scale,
                        num_tensors,
                        PARAM_DTYPE,
                        GRAD_DTYPE,
                        AMSGRAD,
                        BLOCK_SIZE,
                    )
        if IS_LAST:
            # Triton puts no barrier before a scalar atomic: without this one, a warp could count its program as done
            # while another has not yet read the clock.
            tl.debug_barrier()
            done = tl.atomic_add(clock_ptr + DONE, 1, sem="acq_rel")
            if done == tl.num_programs(0) - 1:
                tl.store(clock_ptr + DONE, 0)
                if not skip:
                    tl.store(clock_ptr + SCHEDULE_STEP, step + 1)
                    tl.store(clock_ptr + SLOT, 1 - slot)
    else:
        tl.store(clock_ptr + STALE, 1)


@triton.jit(do_not_specialize=["num_groups", "num_tensors"])
def prime_kernel(
    clock_ptr,
    hyper_table_ptr,
    scale_table_ptr,
    tensor_table_ptr,
    scalars_ptr,
    scalars_float64_ptr,
    update_steps_ptr,
    step_mirror_ptr,
    live_ptr,
    num_groups,
    num_tensors,
    KINDS: tl.constexpr,
    MAX_UNIT_SHIFT: tl.constexpr,
    SCALE_FNS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Evaluates the current schedule step into the current slot; advances nothing.

    Runs after anything but a step has changed what the next step needs. Arguments as in ``adam_kernel``.
    """
    evaluate(
        tl.program_id(0) * LANES,
        tl.load(clock_ptr + SCHEDULE_STEP),
        tl.load(clock_ptr + SLOT),
        hyper_table_ptr,
        tensor_table_ptr,
        scale_table_ptr,
        clock_ptr,
        scalars_ptr,
        scalars_float64_ptr,
        update_steps_ptr,
        step_mirror_ptr,
        live_ptr,
        num_groups,
        num_tensors,
        False,
        KINDS,
        MAX_UNIT_SHIFT,
        SCALE_FNS,
        LANES,
    )
