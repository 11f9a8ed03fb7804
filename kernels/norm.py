"""The global gradient norm in one launch, over all tensors and dtypes, and the clip coefficient that follows from it.

The order of summation depends only on the plan, so the same gradients give the same bits: a program sums its own
chunks in order, and the last program to finish sums the programs' partial sums in order.
"""

import triton
import triton.language as tl

from .layout import (
    BFLOAT16,
    CHUNK_BITS,
    CHUNK_MASK,
    CLIP_COEFFICIENT,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    GENERATION,
    GRAD,
    GRAD_DTYPE,
    GRAD_NORM,
    MAX_NORM,
    NORM_DONE,
    NUMEL,
    OVERFLOW,
    STALE,
    SUM_OF_SQUARES,
    TENSOR_COLUMNS,
)


@triton.jit
def squares(tensor_row_ptr, offset, n_elements, grad_scale, DTYPE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Squares of a chunk of unscaled gradients.

    Args:
        tensor_row_ptr: int64 pointer to [TENSOR_COLUMNS].
        offset: int64 scalar. First element of the chunk.
        n_elements: int64 scalar. Elements of the tensor.
        grad_scale: float32 scalar. The loss scale.
        DTYPE: dtype of the gradient.
        BLOCK_SIZE: Elements of a chunk.

    Returns:
        float32 block (float64 where DTYPE is), 0 past the end of the tensor.
    """
    COMPUTE_DTYPE: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    address = tl.load(tensor_row_ptr + GRAD)
    offsets = offset + tl.arange(0, BLOCK_SIZE)
    # A mask, even if all true, would prevent 128-bit accesses: branch once per chunk instead.
    if (offset + BLOCK_SIZE <= n_elements) & ((address & 15) == 0):
        grad = tl.load(tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16) + offsets)
    else:
        grad = tl.load(address.to(tl.pointer_type(DTYPE)) + offsets, mask=offsets < n_elements, other=0.0)
    if COMPUTE_DTYPE == tl.float64:
        grad = grad / grad_scale.to(tl.float64)
    else:
        # Unscaled before the square: squares of scaled gradients would overflow earlier.
        grad = grad.to(tl.float32) * tl.div_rn(1.0, grad_scale)
    return grad * grad


@triton.jit(
    do_not_specialize=["num_chunks", "generation", "skip_if_nonfinite"],
    do_not_specialize_on_alignment=["chunk_table_ptr", "grad_scale_ptr"],
)
def norm_kernel(
    control_ptr,
    norm_ptr,
    tensor_table_ptr,
    chunk_table_ptr,
    partial_sums_ptr,
    grad_scale_ptr,
    num_chunks,
    generation,
    skip_if_nonfinite,
    DTYPES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PARTIALS: tl.constexpr,
    CLIP_EPS: tl.constexpr,
):
    """The 2-norm of all unscaled gradients, and the coefficient of `torch.nn.utils.clip_grad_norm_`.

    Args:
        control_ptr: int64 pointer to [CONTROL_WORDS].
        norm_ptr: float64 pointer to [NORM_WORDS].
        tensor_table_ptr: int64 pointer to [num_tensors, TENSOR_COLUMNS].
        chunk_table_ptr: int64 pointer to [num_chunks]. Chunks of BLOCK_SIZE elements of every tensor with a gradient.
        partial_sums_ptr: float64 pointer to [number of programs].
        grad_scale_ptr: float32 pointer to [1]. Loss scale that gradients are divided by.
        num_chunks: int32 scalar.
        generation: int32 scalar. See `step_kernel`.
        skip_if_nonfinite: int32 scalar. 1: skip the step if the norm is not finite.
        DTYPES: Bit set of the gradients' dtype codes.
        BLOCK_SIZE: Elements of a chunk.
        PARTIALS: Partial sums that are added at a time.
        CLIP_EPS: Added to the norm before MAX_NORM is divided by it.
    """
    program_id = tl.program_id(0)
    num_programs = tl.num_programs(0)
    if tl.load(control_ptr + GENERATION) == generation:
        grad_scale = tl.load(grad_scale_ptr)
        sums = tl.zeros([BLOCK_SIZE], tl.float32)
        sums_float64 = tl.zeros([BLOCK_SIZE if FLOAT64 & DTYPES else 1], tl.float64)
        for chunk in range(program_id, num_chunks, num_programs):
            word = tl.load(chunk_table_ptr + chunk)
            offset = (word & CHUNK_MASK) * BLOCK_SIZE
            tensor_row_ptr = tensor_table_ptr + (word >> CHUNK_BITS) * TENSOR_COLUMNS
            n_elements = tl.load(tensor_row_ptr + NUMEL)
            dtype = tl.load(tensor_row_ptr + GRAD_DTYPE)
            if FLOAT32 & DTYPES:
                if dtype == FLOAT32:
                    sums += squares(tensor_row_ptr, offset, n_elements, grad_scale, tl.float32, BLOCK_SIZE)
            if BFLOAT16 & DTYPES:
                if dtype == BFLOAT16:
                    sums += squares(tensor_row_ptr, offset, n_elements, grad_scale, tl.bfloat16, BLOCK_SIZE)
            if FLOAT16 & DTYPES:
                if dtype == FLOAT16:
                    sums += squares(tensor_row_ptr, offset, n_elements, grad_scale, tl.float16, BLOCK_SIZE)
            if FLOAT64 & DTYPES:
                if dtype == FLOAT64:
                    sums_float64 += squares(tensor_row_ptr, offset, n_elements, grad_scale, tl.float64, BLOCK_SIZE)
        partial_sum = tl.sum(sums.to(tl.float64))
        if FLOAT64 & DTYPES:
            partial_sum += tl.sum(sums_float64)
        # A scalar store, by the thread that does the atomic: AMD's barrier orders no global memory.
        tl.store(partial_sums_ptr + program_id, partial_sum)
        tl.debug_barrier()
        done = tl.atomic_add(control_ptr + NORM_DONE, 1, sem="acq_rel")
        if done == num_programs - 1:
            tl.store(control_ptr + NORM_DONE, 0)
            sum_of_squares = tl.zeros([PARTIALS], tl.float64)
            for first in range(0, num_programs, PARTIALS):
                offsets = first + tl.arange(0, PARTIALS)
                sum_of_squares += tl.load(partial_sums_ptr + offsets, mask=offsets < num_programs, other=0.0)
            write_norm(norm_ptr, tl.sum(sum_of_squares), skip_if_nonfinite, CLIP_EPS)
    else:
        tl.store(control_ptr + STALE, 1)


@triton.jit
def write_norm(norm_ptr, sum_of_squares, skip_if_nonfinite, CLIP_EPS: tl.constexpr):
    """Writes the norm, the clip coefficient and whether the step must be skipped.

    As in torch, a norm of inf makes the coefficient 0 and a NaN makes it NaN.

    Args:
        norm_ptr: float64 pointer to [NORM_WORDS].
        sum_of_squares: float64 scalar.
        skip_if_nonfinite: int32 scalar.
        CLIP_EPS: See `norm_kernel`.
    """
    norm = tl.sqrt(sum_of_squares)
    ratio = tl.load(norm_ptr + MAX_NORM) / (norm + CLIP_EPS)
    # A comparison: a minimum would drop a NaN.
    coefficient = tl.where(ratio > 1.0, 1.0, ratio)
    is_finite = norm < float("inf")
    tl.store(norm_ptr + SUM_OF_SQUARES, sum_of_squares)
    tl.store(norm_ptr + GRAD_NORM, norm)
    tl.store(norm_ptr + CLIP_COEFFICIENT, coefficient)
    tl.store(norm_ptr + OVERFLOW, tl.where(is_finite, 0, skip_if_nonfinite).to(tl.float64))


@triton.jit(do_not_specialize=["skip_if_nonfinite"], do_not_specialize_on_alignment=["sum_of_squares_ptr"])
def shared_norm_kernel(norm_ptr, sum_of_squares_ptr, skip_if_nonfinite, CLIP_EPS: tl.constexpr):
    """Writes the norm over several devices or processes, from the total of their sums of squares. One program.

    Args:
        norm_ptr: float64 pointer to [NORM_WORDS].
        sum_of_squares_ptr: float64 pointer to [1].
        skip_if_nonfinite: int32 scalar. See `norm_kernel`.
        CLIP_EPS: See `norm_kernel`.
    """
    write_norm(norm_ptr, tl.load(sum_of_squares_ptr), skip_if_nonfinite, CLIP_EPS)
