"""The step in one launch: updates every parameter, and computes the next step's learning rate.

Programs ``0 .. num_evaluators - 1`` are evaluators (float64 scalars, one lane per group and tensor); the others are
updaters (chunks of BLOCK_SIZE elements). Evaluators write one slot of the scalars while updaters read the other. The
last program to finish advances the schedule step. The update rule gives the arithmetic: UPDATE and SCALARS.
"""

import triton
import triton.language as tl

from .evaluate import evaluate, load_lanes, record_history
from .layout import (
    APPLIED_STEPS,
    AVERAGE,
    CHUNK_BITS,
    CHUNK_MASK,
    CLIP_COEFFICIENT,
    DONE,
    GENERATION,
    GRAD,
    GRAD_NORM,
    MAX_RULE_SCALARS,
    NUMEL,
    OVERFLOW,
    PARAM,
    RULE_SCALARS,
    SCALAR_AVERAGE_WEIGHT,
    SCALAR_COLUMNS,
    SCALAR_GRAD_SIGN,
    SCHEDULE_STEP,
    SKIPPED_STEPS,
    SLOT,
    STALE,
    STATES,
    TENSOR_COLUMNS,
)


@triton.jit
def to_pointer(address, offset, DTYPE: tl.constexpr, PROMISE: tl.constexpr):
    """A pointer to an element of a tensor.

    Args:
        address: int64 scalar. The tensor's.
        offset: int64 scalar. The element.
        DTYPE: dtype of the elements.
        PROMISE: Bytes that the address is a multiple of; 0 promises nothing. A false promise faults.

    Returns:
        Pointer to DTYPE.
    """
    pointer = address.to(tl.pointer_type(DTYPE))
    return (tl.multiple_of(pointer, PROMISE) if PROMISE else pointer) + offset


@triton.jit
def average_elements(average_ptr, offsets, mask, param, weight):
    """Moves an average towards the parameter, as torch's lerp. A weight of 1 copies, whatever the average was.

    Args:
        average_ptr: float32 or float64 pointer.
        offsets: int32 block.
        mask: bool block or None.
        param: block of the average's dtype.
        weight: scalar in (0, 1], likewise.
    """
    average = tl.load(average_ptr + offsets, mask=mask)
    change = param - average
    # Scalars, not blocks, take the branch.
    if weight < 0.5:
        average += weight * change
    elif weight < 1:
        average = param - change * (1 - weight)
    else:
        average = param
    tl.store(average_ptr + offsets, average, mask=mask)


@triton.jit
def average_idle(
    word, slot, tensor_table_ptr, scalars_ptr, num_tensors, PARAM_DTYPE: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """Averages a chunk of a tensor that this step does not update. Arguments as in ``update``."""
    tensor_id = word >> CHUNK_BITS
    weight = tl.load(scalars_ptr + (slot * num_tensors + tensor_id) * SCALAR_COLUMNS + SCALAR_AVERAGE_WEIGHT)
    if weight != 0:
        COMPUTE_DTYPE: tl.constexpr = tl.float64 if PARAM_DTYPE == tl.float64 else tl.float32
        tensor_row_ptr = tensor_table_ptr + tensor_id * TENSOR_COLUMNS
        offset = (word & CHUNK_MASK) * BLOCK_SIZE
        param_ptr = to_pointer(tl.load(tensor_row_ptr + PARAM), offset, PARAM_DTYPE, 0)
        average_ptr = to_pointer(tl.load(tensor_row_ptr + AVERAGE), offset, COMPUTE_DTYPE, 0)
        # In parts as in ``update``.
        PART_SIZE: tl.constexpr = BLOCK_SIZE // 2
        part_end = tl.minimum(tl.load(tensor_row_ptr + NUMEL) - offset, BLOCK_SIZE).to(tl.int32)
        for part in range(0, part_end, PART_SIZE):
            offsets = part + tl.arange(0, PART_SIZE)
            mask = offsets < part_end
            param = tl.load(param_ptr + offsets, mask=mask).to(COMPUTE_DTYPE)
            average_elements(average_ptr, offsets, mask, param, weight)


@triton.jit
def update_chunk(
    addresses,
    offset,
    offsets,
    mask,
    unscale,
    grad_sign,
    scalars,
    average,
    UPDATE: tl.constexpr,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    WRITE_BACK_GRADS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Updates a chunk, or a part of one: loads it by its addresses, updates and stores it.

    Args:
        addresses: Tuple of int64 scalars: the parameter's, the gradient's and those of the state tensors.
        offset: int64 scalar. First element of the chunk.
        offsets: int32 block. Elements to update, counted from ``offset``.
        mask: bool block, or None for all of ``offsets``.
        unscale: float32 or float64 scalar. The factor that unscales and clips gradients.
        grad_sign: Scalar of the same dtype. -1 or 1.
        scalars: Tuple of scalars, see ``UPDATE``.
        average: Tuple of pointers to the address of the parameter's average and to its weight. Empty: there is none.
        UPDATE: The rule's element update.
        PARAM_DTYPE: dtype of the parameter and its state tensors.
        GRAD_DTYPE: dtype of the gradient.
        WRITE_BACK_GRADS: Write the unscaled and clipped gradients back.
        ALIGNED: Promise that all addresses are multiples of 16 bytes. A false promise faults.
    """
    COMPUTE_DTYPE: tl.constexpr = tl.float64 if PARAM_DTYPE == tl.float64 else tl.float32
    # As many elements an access for both dtypes: else one would change to the layout of the other in shared memory.
    WIDEST: tl.constexpr = max(PARAM_DTYPE.primitive_bitwidth, GRAD_DTYPE.primitive_bitwidth)
    PROMISE: tl.constexpr = 16 * PARAM_DTYPE.primitive_bitwidth // WIDEST if ALIGNED else 0
    GRAD_PROMISE: tl.constexpr = 16 * GRAD_DTYPE.primitive_bitwidth // WIDEST if ALIGNED else 0
    param_ptr = to_pointer(addresses[0], offset, PARAM_DTYPE, PROMISE)
    grad_ptr = to_pointer(addresses[1], offset, GRAD_DTYPE, GRAD_PROMISE)
    state_ptrs = ()
    for i in tl.static_range(len(addresses) - 2):
        state_ptrs = state_ptrs + (to_pointer(addresses[2 + i], offset, PARAM_DTYPE, PROMISE),)

    param = tl.load(param_ptr + offsets, mask=mask).to(COMPUTE_DTYPE)
    grad = tl.load(grad_ptr + offsets, mask=mask).to(COMPUTE_DTYPE)
    states = ()
    for i in tl.static_range(len(state_ptrs)):
        states = states + (tl.load(state_ptrs[i] + offsets, mask=mask).to(COMPUTE_DTYPE),)

    if WRITE_BACK_GRADS:
        grad = grad * unscale
        tl.store(grad_ptr + offsets, grad.to(GRAD_DTYPE), mask=mask)
        grad = grad * grad_sign
    else:
        grad = grad * (unscale * grad_sign)
    param, states = UPDATE(param, grad, states, scalars)
    tl.store(param_ptr + offsets, param.to(PARAM_DTYPE), mask=mask)
    for i in tl.static_range(len(state_ptrs)):
        tl.store(state_ptrs[i] + offsets, states[i].to(PARAM_DTYPE), mask=mask)
    if len(average) == 2:
        # Loaded here, and not with the others: registers.
        weight = tl.load(average[1])
        if weight != 0:
            average_ptr = to_pointer(tl.load(average[0]), offset, COMPUTE_DTYPE, 16 if ALIGNED else 0)
            # What was stored, and not what it was rounded from.
            average_elements(average_ptr, offsets, mask, param.to(PARAM_DTYPE).to(COMPUTE_DTYPE), weight)


@triton.jit
def update(
    word,
    slot,
    tensor_table_ptr,
    scalars_ptr,
    unscale,
    num_tensors,
    UPDATE: tl.constexpr,
    NUM_STATES: tl.constexpr,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    WRITE_BACK_GRADS: tl.constexpr,
    HAS_AVERAGING: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Updates a chunk with the fastest accesses that are safe for it.

    Args:
        word: int64 scalar. A word of the chunk table.
        slot: int64 scalar. The half of the scalars to read.
        tensor_table_ptr: int64 pointer to [num_tensors, TENSOR_COLUMNS].
        scalars_ptr: float32 pointer (float64 for float64 parameters) to [2, num_tensors, SCALAR_COLUMNS].
        unscale: float32 or float64 scalar. See ``update_chunk``; so are the arguments not listed here.
        num_tensors: int32 scalar.
        UPDATE: The rule's element update.
        NUM_STATES: State tensors of the rule.
        PARAM_DTYPE: dtype of the parameter and its state tensors.
        GRAD_DTYPE: dtype of the gradient.
        WRITE_BACK_GRADS: Write the unscaled and clipped gradients back.
        HAS_AVERAGING: Average the parameter, if its scalars say so.
        BLOCK_SIZE: Elements of a chunk.
    """
    tensor_id = word >> CHUNK_BITS
    offset = (word & CHUNK_MASK) * BLOCK_SIZE
    tensor_row_ptr = tensor_table_ptr + tensor_id * TENSOR_COLUMNS
    remaining = tl.load(tensor_row_ptr + NUMEL) - offset
    addresses = (tl.load(tensor_row_ptr + PARAM), tl.load(tensor_row_ptr + GRAD))
    for i in tl.static_range(NUM_STATES):
        addresses = addresses + (tl.load(tensor_row_ptr + STATES + i),)
    # Checked here and not in the plan: addresses change from step to step.
    all_addresses = addresses[0]
    for i in tl.static_range(1, len(addresses)):
        all_addresses |= addresses[i]
    if HAS_AVERAGING:
        all_addresses |= tl.load(tensor_row_ptr + AVERAGE)
    aligned = (all_addresses & 15) == 0

    scalar_row_ptr = scalars_ptr + (slot * num_tensors + tensor_id) * SCALAR_COLUMNS
    grad_sign = tl.load(scalar_row_ptr + SCALAR_GRAD_SIGN)
    scalars = ()
    for i in tl.static_range(MAX_RULE_SCALARS):
        scalars = scalars + (tl.load(scalar_row_ptr + RULE_SCALARS + i),)
    average = ()
    if HAS_AVERAGING:
        average = (tensor_row_ptr + AVERAGE, scalar_row_ptr + SCALAR_AVERAGE_WEIGHT)

    # A mask, even if all true, would prevent 128-bit accesses: branch once per chunk instead.
    if aligned & (remaining >= BLOCK_SIZE):
        update_chunk(
            addresses,
            offset,
            tl.arange(0, BLOCK_SIZE),
            None,
            unscale,
            grad_sign,
            scalars,
            average,
            UPDATE,
            PARAM_DTYPE,
            GRAD_DTYPE,
            WRITE_BACK_GRADS,
            ALIGNED=True,
        )
    else:
        # Blocks of another shape: those of the whole chunk would have its layout, and be converted to the layout of
        # narrow accesses through shared memory, with barriers.
        PART_SIZE: tl.constexpr = BLOCK_SIZE // 2
        part_end = tl.minimum(remaining, BLOCK_SIZE).to(tl.int32)
        for part in range(0, part_end, PART_SIZE):
            offsets = part + tl.arange(0, PART_SIZE)
            update_chunk(
                addresses,
                offset,
                offsets,
                offsets < part_end,
                unscale,
                grad_sign,
                scalars,
                average,
                UPDATE,
                PARAM_DTYPE,
                GRAD_DTYPE,
                WRITE_BACK_GRADS,
                ALIGNED=False,
            )


@triton.jit(
    do_not_specialize=[
        "num_groups",
        "num_tensors",
        "num_evaluators",
        "num_chunks",
        "num_idle_chunks",
        "history_rows",
        "generation",
        "counts",
        "advance_schedule_on_skip",
    ],
    do_not_specialize_on_alignment=["chunk_table_ptr", "grad_scale_ptr", "found_inf_ptr"],
)
def step_kernel(
    control_ptr,
    norm_ptr,
    live_ptr,
    history_ptr,
    settings_ptr,
    group_table_ptr,
    tensor_table_ptr,
    chunk_table_ptr,
    scalars_ptr,
    scalars_float64_ptr,
    update_steps_ptr,
    step_mirror_ptr,
    average_counts_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    num_groups,
    num_tensors,
    num_evaluators,
    num_chunks,
    num_idle_chunks,
    history_rows,
    generation,
    counts,
    advance_schedule_on_skip,
    UPDATE: tl.constexpr,
    SCALARS: tl.constexpr,
    HAS_DECAY_SCHEDULE: tl.constexpr,
    HAS_AVERAGING: tl.constexpr,
    HAS_FLOAT64: tl.constexpr,
    NUM_STATES: tl.constexpr,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    WRITE_BACK_GRADS: tl.constexpr,
    IS_LAST: tl.constexpr,
    SCALE_FNS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LANES: tl.constexpr,
):
    """One optimizer step: evaluators and updaters; the last program to finish advances the schedule step.

    A step over several dtype combinations is several launches in one stream. Only the last one evaluates and advances:
    if a launch is missing (an interrupt, a compile error), no partial count remains.

    Args:
        control_ptr: int64 pointer to [CONTROL_WORDS].
        norm_ptr: float64 pointer to [NORM_WORDS]. Without clipping: coefficient 1, no overflow.
        live_ptr: float64 pointer to [LIVE_ROWS, num_groups].
        history_ptr: float64 pointer to [history_rows, num_groups, HISTORY_COLUMNS].
        settings_ptr: int64 pointer to [SETTINGS_WORDS].
        group_table_ptr: float64 pointer to [num_groups, GROUP_COLUMNS].
        tensor_table_ptr: int64 pointer to [num_tensors, TENSOR_COLUMNS].
        chunk_table_ptr: int64 pointer to [num_chunks + num_idle_chunks]. Chunks of this launch's dtype combination.
        scalars_ptr: float32 pointer to [2, num_tensors, SCALAR_COLUMNS].
        scalars_float64_ptr: float64 pointer, likewise.
        update_steps_ptr: int64 pointer to [num_tensors].
        step_mirror_ptr: float32 pointer to [num_tensors].
        average_counts_ptr: int64 pointer to [num_tensors]. Read and written with HAS_AVERAGING only.
        grad_scale_ptr: float32 pointer to [1]. Loss scale that gradients are divided by.
        found_inf_ptr: float32 pointer to [1]. Not 0: skip this step. It is a sum over devices, so it may be 2.
        num_groups: int32 scalar.
        num_tensors: int32 scalar.
        num_evaluators: int32 scalar. 0 unless IS_LAST.
        num_chunks: int32 scalar.
        num_idle_chunks: int32 scalar. Chunks of tensors without a gradient, which are only averaged.
        history_rows: int32 scalar. 0: keep no history.
        generation: int32 scalar. That of the control block when this launch was made. If they differ, it does nothing.
        counts: int32 scalar. 1: count this step and record it in the history; 0: only advance the schedule.
        advance_schedule_on_skip: int32 scalar. 1: a skipped step also advances the schedule.
        UPDATE: The rule's element update: (param, grad, states, scalars) -> param, states.
        SCALARS: The rule's scalars: (lr, momentum, weight_decay, update_step, group_row_ptr) -> tuple.
        HAS_DECAY_SCHEDULE: Whether weight decay may have a schedule of its own. Costs registers.
        HAS_AVERAGING: Whether steps average the parameters.
        HAS_FLOAT64: Whether some parameter of the optimizer is float64 and needs scalars of that dtype.
        NUM_STATES: State tensors of the rule.
        PARAM_DTYPE: dtype of the parameters and state tensors.
        GRAD_DTYPE: dtype of the gradients.
        WRITE_BACK_GRADS: See ``update_chunk``.
        IS_LAST: This launch evaluates, and advances the schedule step.
        SCALE_FNS: Tuple of ``@triton.jit`` scale functions.
        BLOCK_SIZE: Elements of a chunk.
        LANES: Lanes of an evaluator, no more than its threads.
    """
    program_id = tl.program_id(0)
    step = tl.load(control_ptr + SCHEDULE_STEP)
    slot = tl.load(control_ptr + SLOT)
    applied_steps = tl.load(control_ptr + APPLIED_STEPS)
    skipped_steps = tl.load(control_ptr + SKIPPED_STEPS)
    if tl.load(control_ptr + GENERATION) == generation:
        # Not `> 0`: a NaN must skip too.
        skip = ((tl.load(found_inf_ptr) != 0) | (tl.load(norm_ptr + OVERFLOW) != 0)) & (counts != 0)
        ticks = (skip == 0) | (advance_schedule_on_skip != 0)
        skipped = skip.to(tl.int64)
        grad_scale = tl.load(grad_scale_ptr)
        if IS_LAST and program_id < num_evaluators:
            first_lane = program_id * LANES
            loaded = load_lanes(
                first_lane, tensor_table_ptr, update_steps_ptr, live_ptr, num_groups, num_tensors, LANES
            )
            grad_norm = tl.load(norm_ptr + GRAD_NORM)
            clip_coefficient = tl.load(norm_ptr + CLIP_COEFFICIENT)
            if (history_rows != 0) & (counts != 0):
                record_history(
                    first_lane,
                    step,
                    applied_steps + skipped_steps,
                    skipped,
                    history_ptr,
                    history_rows,
                    loaded[3],
                    loaded[4],
                    grad_norm,
                    clip_coefficient,
                    grad_scale,
                    num_groups,
                    LANES,
                )
            if ticks:
                evaluate(
                    first_lane,
                    step + 1,
                    1 - slot,
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
                    counts * (1 - skipped),
                    True,
                    SCALARS,
                    HAS_DECAY_SCHEDULE,
                    HAS_AVERAGING,
                    HAS_FLOAT64,
                    SCALE_FNS,
                    LANES,
                )
        else:
            if skip == 0:
                clip_coefficient = tl.load(norm_ptr + CLIP_COEFFICIENT)
                if PARAM_DTYPE == tl.float64:
                    own_scalars_ptr = scalars_float64_ptr
                    unscale = clip_coefficient / grad_scale.to(tl.float64)
                else:
                    own_scalars_ptr = scalars_ptr
                    unscale = tl.div_rn(clip_coefficient.to(tl.float32), grad_scale)
                num_updaters = tl.num_programs(0) - num_evaluators
                for chunk in range(program_id - num_evaluators, num_chunks, num_updaters):
                    update(
                        tl.load(chunk_table_ptr + chunk),
                        slot,
                        tensor_table_ptr,
                        own_scalars_ptr,
                        unscale,
                        num_tensors,
                        UPDATE,
                        NUM_STATES,
                        PARAM_DTYPE,
                        GRAD_DTYPE,
                        WRITE_BACK_GRADS,
                        HAS_AVERAGING,
                        BLOCK_SIZE,
                    )
                if HAS_AVERAGING:
                    if counts != 0:
                        first = num_chunks + program_id - num_evaluators
                        for chunk in range(first, num_chunks + num_idle_chunks, num_updaters):
                            average_idle(
                                tl.load(chunk_table_ptr + chunk),
                                slot,
                                tensor_table_ptr,
                                own_scalars_ptr,
                                num_tensors,
                                PARAM_DTYPE,
                                BLOCK_SIZE,
                            )
        if IS_LAST:
            # Triton puts no barrier before a scalar atomic: without this one, a warp could count its program as done
            # before another warp has read the schedule step.
            tl.debug_barrier()
            done = tl.atomic_add(control_ptr + DONE, 1, sem="acq_rel")
            if done == tl.num_programs(0) - 1:
                tl.store(control_ptr + DONE, 0)
                tl.store(control_ptr + APPLIED_STEPS, applied_steps + counts * (1 - skipped))
                tl.store(control_ptr + SKIPPED_STEPS, skipped_steps + counts * skipped)
                if ticks:
                    tl.store(control_ptr + SCHEDULE_STEP, step + 1)
                    tl.store(control_ptr + SLOT, 1 - slot)
    else:
        tl.store(control_ptr + STALE, 1)
