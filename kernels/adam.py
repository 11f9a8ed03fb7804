"""The one-launch Adam step: every parameter updated, and the next step's learning rate worked out, in one kernel.

Programs ``0 .. num_evaluators - 1`` are evaluators (float64 scalars, one lane per group and tensor); the others are
updaters (chunks of BLOCK_SIZE elements). Evaluators write one slot of the scalars while updaters read the other. The
last program to retire ticks the clock. Tables are laid out by `fused_clr.plan` and `fused_clr.backends.triton`.
"""

import triton
import triton.language as tl

from .evaluate import evaluate, record_history
from .layout import (
    APPLIED_STEPS,
    BIAS_CORRECTION2_SQRT,
    CHUNK_BITS,
    CHUNK_MASK,
    CLIP_COEFFICIENT,
    DECAY_FACTOR,
    DONE,
    EXP_AVG,
    EXP_AVG_SQ,
    GENERATION,
    GRAD,
    MAX_EXP_AVG_SQ,
    NUMEL,
    ONE_MINUS_BETA1,
    ONE_MINUS_BETA2,
    OVERFLOW,
    PARAM,
    SCALAR_COLUMNS,
    SCALAR_EPS,
    SCALAR_GRAD_SIGN,
    SCALAR_L2_DECAY,
    SCHEDULE_STEP,
    SKIPPED_STEPS,
    SLOT,
    STALE,
    STEP_SIZE,
    TENSOR_COLUMNS,
)


@triton.jit
def adam_update(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, scalar_row_ptr, AMSGRAD: tl.constexpr):
    """Adam's element update (Kingma & Ba 2015, arXiv:1412.6980, algorithm 1; AMSGrad: Reddi et al. 2018, algorithm 2).

    Args:
        param: float32 or float64 block; so are ``grad``, ``exp_avg``, ``exp_avg_sq`` and ``max_exp_avg_sq``.
        grad: Gradients, unscaled and clipped.
        exp_avg: First moment.
        exp_avg_sq: Second moment.
        max_exp_avg_sq: Largest second moment so far; unused without AMSGRAD.
        scalar_row_ptr: pointer to [SCALAR_COLUMNS], of the blocks' dtype.
        AMSGRAD: Divide by the largest second moment.

    Returns:
        The new param, exp_avg, exp_avg_sq and max_exp_avg_sq.
    """
    step_size = tl.load(scalar_row_ptr + STEP_SIZE)
    bias_correction2_sqrt = tl.load(scalar_row_ptr + BIAS_CORRECTION2_SQRT)
    l2_decay = tl.load(scalar_row_ptr + SCALAR_L2_DECAY)

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
    clip_coefficient,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    STORE_GRADS: tl.constexpr,
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
        grad_scale: float32 scalar. The loss scale that gradients are still multiplied by.
        clip_coefficient: float64 scalar. What unscaled gradients are multiplied by.
        PARAM_DTYPE: dtype of the parameter and its moments.
        GRAD_DTYPE: dtype of the gradient.
        AMSGRAD: See ``adam_update``.
        STORE_GRADS: Write the unscaled and clipped gradients back.
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

    grad_sign = tl.load(scalar_row_ptr + SCALAR_GRAD_SIGN)
    if COMPUTE_DTYPE == tl.float64:
        unscale = clip_coefficient / grad_scale.to(tl.float64)
    else:
        unscale = tl.div_rn(clip_coefficient.to(tl.float32), grad_scale)
    if STORE_GRADS:
        grad = grad * unscale
        tl.store(grad_ptr + offsets, grad.to(GRAD_DTYPE), mask=mask)
        grad = grad * grad_sign
    else:
        grad = grad * (unscale * grad_sign)
    param, exp_avg, exp_avg_sq, max_exp_avg_sq = adam_update(
        param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, scalar_row_ptr, AMSGRAD
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
    clip_coefficient,
    num_tensors,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    STORE_GRADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Looks up a chunk and updates it in the cheapest way that is safe for it.

    Args:
        chunk: int64 scalar. Row of the chunk table.
        slot: int64 scalar. The half of the scalars to read.
        tensor_table_ptr: int64 pointer to [num_tensors, TENSOR_COLUMNS].
        chunk_table_ptr: int64 pointer to [num_chunks].
        scalars_ptr: float32 pointer (float64 for float64 parameters) to [2, num_tensors, SCALAR_COLUMNS].
        grad_scale: float32 scalar. See ``update_chunk``.
        clip_coefficient: float64 scalar. See ``update_chunk``.
        num_tensors: int32 scalar.
        PARAM_DTYPE: See ``update_chunk``.
        GRAD_DTYPE: See ``update_chunk``.
        AMSGRAD: See ``adam_update``.
        STORE_GRADS: See ``update_chunk``.
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
            clip_coefficient,
            PARAM_DTYPE,
            GRAD_DTYPE,
            AMSGRAD,
            STORE_GRADS,
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
            clip_coefficient,
            PARAM_DTYPE,
            GRAD_DTYPE,
            AMSGRAD,
            STORE_GRADS,
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
            clip_coefficient,
            PARAM_DTYPE,
            GRAD_DTYPE,
            AMSGRAD,
            STORE_GRADS,
            BLOCK_SIZE,
            ALIGNED=False,
            MASKED=False,
        )


@triton.jit(
    do_not_specialize=[
        "num_groups",
        "num_tensors",
        "num_evaluators",
        "num_chunks",
        "history_rows",
        "generation",
        "counts",
        "advance_on_skip",
    ],
    do_not_specialize_on_alignment=["chunk_table_ptr", "grad_scale_ptr", "found_inf_ptr"],
)
def adam_kernel(
    clock_ptr,
    norm_ptr,
    live_ptr,
    history_ptr,
    settings_ptr,
    hyper_table_ptr,
    tensor_table_ptr,
    chunk_table_ptr,
    scalars_ptr,
    scalars_float64_ptr,
    update_steps_ptr,
    step_mirror_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    num_groups,
    num_tensors,
    num_evaluators,
    num_chunks,
    history_rows,
    generation,
    counts,
    advance_on_skip,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    STORE_GRADS: tl.constexpr,
    IS_LAST: tl.constexpr,
    SCALE_FNS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LANES: tl.constexpr,
):
    """One optimizer step: evaluators, updaters, and a tick by the last program to retire.

    A step over several dtype combinations is several launches in one stream; only the last evaluates and retires, so
    that a launch that never came (an interrupt, a compile error) cannot leave a partial count behind.

    Args:
        clock_ptr: int64 pointer to [CLOCK_WORDS].
        norm_ptr: float64 pointer to [NORM_WORDS]. Without clipping: coefficient 1, no overflow.
        live_ptr: float64 pointer to [LIVE_ROWS, num_groups].
        history_ptr: float64 pointer to [history_rows, num_groups, HISTORY_COLUMNS].
        settings_ptr: int64 pointer to [SETTINGS_WORDS].
        hyper_table_ptr: float64 pointer to [num_groups, HYPER_COLUMNS].
        tensor_table_ptr: int64 pointer to [num_tensors, TENSOR_COLUMNS].
        chunk_table_ptr: int64 pointer to [num_chunks]. Chunks of this launch's dtype combination.
        scalars_ptr: float32 pointer to [2, num_tensors, SCALAR_COLUMNS].
        scalars_float64_ptr: float64 pointer, likewise.
        update_steps_ptr: int64 pointer to [num_tensors].
        step_mirror_ptr: float32 pointer to [num_tensors].
        grad_scale_ptr: float32 pointer to [1]. Loss scale that gradients are divided by.
        found_inf_ptr: float32 pointer to [1]. Not 0: skip this step. It is a sum over devices, so it may be 2.
        num_groups: int32 scalar.
        num_tensors: int32 scalar.
        num_evaluators: int32 scalar. 0 unless IS_LAST.
        num_chunks: int32 scalar.
        history_rows: int32 scalar. 0: keep no history.
        generation: int32 scalar. The clock's when this launch was made; a launch of another one does nothing.
        counts: int32 scalar. 1: count this step and record it in the history; 0: only tick the schedule.
        advance_on_skip: int32 scalar. 1: a skipped step ticks the schedule all the same.
        PARAM_DTYPE: dtype of the parameters and moments.
        GRAD_DTYPE: dtype of the gradients.
        AMSGRAD: See ``adam_update``.
        STORE_GRADS: See ``update_chunk``.
        IS_LAST: This launch evaluates and retires.
        SCALE_FNS: Tuple of ``@triton.jit`` scale functions.
        BLOCK_SIZE: Elements of a chunk.
        LANES: Lanes of an evaluator, no more than its threads.
    """
    program_id = tl.program_id(0)
    step = tl.load(clock_ptr + SCHEDULE_STEP)
    slot = tl.load(clock_ptr + SLOT)
    applied_steps = tl.load(clock_ptr + APPLIED_STEPS)
    skipped_steps = tl.load(clock_ptr + SKIPPED_STEPS)
    if tl.load(clock_ptr + GENERATION) == generation:
        # `!=` and not `> 0`: a NaN must skip too.
        skip = ((tl.load(found_inf_ptr) != 0) | (tl.load(norm_ptr + OVERFLOW) != 0)) & (counts != 0)
        ticks = (skip == 0) | (advance_on_skip != 0)
        skipped = skip.to(tl.int64)
        grad_scale = tl.load(grad_scale_ptr)
        if IS_LAST and program_id < num_evaluators:
            if (history_rows != 0) & (counts != 0):
                # Before the evaluation: the live mirrors still tell what this step applies.
                record_history(
                    program_id * LANES,
                    step,
                    applied_steps + skipped_steps,
                    skipped,
                    history_ptr,
                    history_rows,
                    live_ptr,
                    norm_ptr,
                    grad_scale,
                    num_groups,
                    LANES,
                )
            if ticks:
                evaluate(
                    program_id * LANES,
                    step + 1,
                    1 - slot,
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
                    1 - skipped,
                    True,
                    SCALE_FNS,
                    LANES,
                )
        else:
            if skip == 0:
                own_scalars_ptr = scalars_float64_ptr if PARAM_DTYPE == tl.float64 else scalars_ptr
                clip_coefficient = tl.load(norm_ptr + CLIP_COEFFICIENT)
                num_updaters = tl.num_programs(0) - num_evaluators
                for chunk in range(program_id - num_evaluators, num_chunks, num_updaters):
                    update(
                        chunk,
                        slot,
                        tensor_table_ptr,
                        chunk_table_ptr,
                        own_scalars_ptr,
                        grad_scale,
                        clip_coefficient,
                        num_tensors,
                        PARAM_DTYPE,
                        GRAD_DTYPE,
                        AMSGRAD,
                        STORE_GRADS,
                        BLOCK_SIZE,
                    )
        if IS_LAST:
            # Triton puts no barrier before a scalar atomic: without this one, a warp could count its program as done
            # while another has not yet read the clock.
            tl.debug_barrier()
            done = tl.atomic_add(clock_ptr + DONE, 1, sem="acq_rel")
            if done == tl.num_programs(0) - 1:
                tl.store(clock_ptr + DONE, 0)
                tl.store(clock_ptr + APPLIED_STEPS, applied_steps + counts * (1 - skipped))
                tl.store(clock_ptr + SKIPPED_STEPS, skipped_steps + counts * skipped)
                if ticks:
                    tl.store(clock_ptr + SCHEDULE_STEP, step + 1)
                    tl.store(clock_ptr + SLOT, 1 - slot)
    else:
        tl.store(clock_ptr + STALE, 1)
