"""What a launch reads and writes, what it promises of addresses, and tensors of more than 2**31 elements."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from fused_clr import FusedAdam
from fused_clr._device.chunks import CHUNK_BITS, block_size_of, chunk_words
from fused_clr.kernels import layout
from fused_clr.kernels.adam import adam_update
from fused_clr.kernels.layout import AVERAGE, MAX_RULE_SCALARS, RULE_SCALARS, SCALAR_COLUMNS
from fused_clr.kernels.step import update, update_chunk
from tests.helpers.many_programs import (
    BLOCK_SIZE,
    clock_of,
    device_memory,
    engine_of,
    make_optimizer,
    params_of,
    same_bits,
    set_gradients,
)

pytestmark = pytest.mark.usefixtures("triton_backend", "small_chunks")


# -- memory ------------------------------------------------------------------------------------------------------------
def test_no_access_outside_the_tensors(allow_access: Callable[[Sequence[Tensor]], None]) -> None:
    optimizer = make_optimizer(amsgrad=True)
    set_gradients(optimizer, 0)
    engine = engine_of(optimizer)
    engine.prepare()
    (plan,) = engine._plans.plans()
    memory = engine.state.memory
    grads = [param.grad for param in params_of(optimizer) if param.grad is not None]
    read = [memory.settings, memory.group_table, *engine.state._schedule_tables]
    read += [memory.no_grad_scale, memory.no_found_inf]
    read += [plan.tensor_table, plan.chunk_table, *grads]
    allow_access([*read, *device_memory(optimizer)])
    optimizer.step()
    optimizer.step()
    assert clock_of(optimizer)["SCHEDULE_STEP"] == 2
    # The check is one: without the last gradient among the allowed, its load is refused.
    allow_access([*read[:-1], *device_memory(optimizer)])
    with pytest.raises(interpreter.InterpreterError, match="outside the given tensors"):
        optimizer.step()


# -- promises ----------------------------------------------------------------------------------------------------------
PARTS = ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("moved", [None, *PARTS])
def test_alignment_is_promised_only_where_it_is_true(
    moved: str | None, dtype: torch.dtype, promised: list[int]
) -> None:
    numel = 2 * BLOCK_SIZE + 1

    def tensor(part: str) -> Tensor:
        """Nonzero values, one element away from an aligned address for the part that is moved."""
        buffer = torch.linspace(1, 2, numel + 1).to(dtype)
        return buffer[1:] if part == moved else buffer[:-1].clone()

    parts = {part: tensor(part) for part in PARTS}
    param = torch.nn.Parameter(parts["param"])
    param.grad = parts["grad"]
    optimizer = FusedAdam([param], lr=0.1, amsgrad=True)
    optimizer.state[param] = {"step": torch.tensor(3.0)} | {part: parts[part] for part in PARTS[2:]}
    before = {part: value.clone() for part, value in parts.items()}
    optimizer.step()
    assert optimizer.state[param]["exp_avg"].data_ptr() == parts["exp_avg"].data_ptr()
    # The full chunks of five tensors; the ragged one is masked, and promises nothing.
    addresses = [parts[part].data_ptr() for part in PARTS]
    assert promised == ([] if moved else numel // block_size_of(dtype, BLOCK_SIZE) * addresses)

    # And every way through is the same update.
    twin = torch.nn.Parameter(before["param"])
    twin.grad = before["grad"].clone()
    reference = FusedAdam([twin], lr=0.1, amsgrad=True)
    reference.state[twin] = {"step": torch.tensor(3.0)} | {part: before[part].clone() for part in PARTS[2:]}
    reference.step()
    assert torch.equal(param, twin)
    for part in PARTS[2:]:
        assert torch.equal(optimizer.state[param][part], reference.state[twin][part])


@triton.jit
def one_chunk_kernel(
    tensor_table_ptr,
    scalars_ptr,
    BLOCK_SIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    addresses, scalars = (), ()
    for i in tl.static_range(4):
        addresses += (tl.load(tensor_table_ptr + i),)
    for i in tl.static_range(MAX_RULE_SCALARS):
        scalars += (tl.load(scalars_ptr + RULE_SCALARS + i),)
    average = (tensor_table_ptr + AVERAGE, scalars_ptr)
    update_chunk(
        addresses,
        tl.zeros((), tl.int64),
        tl.arange(0, BLOCK_SIZE),
        None,
        1.0,
        1.0,
        scalars,
        average,
        adam_update,
        tl.float32,
        tl.float32,
        False,
        ALIGNED,
    )


@pytest.mark.parametrize("column", range(5), ids=[*PARTS[:4], "average"])
def test_a_false_promise_is_caught(column: int, promised: list[int]) -> None:
    parts = [torch.ones(BLOCK_SIZE + 1) for _ in range(5)]
    *addresses, average = [part.data_ptr() + 4 * (column == i) for i, part in enumerate(parts)]
    table = torch.tensor([*addresses, 0, BLOCK_SIZE, 0, 1, layout.FLOAT32.value, average])
    scalars = torch.ones(SCALAR_COLUMNS.value)
    with pytest.raises(interpreter.InterpreterError, match="promised to be a multiple of 16"):
        one_chunk_kernel[(1,)](table, scalars, BLOCK_SIZE, True)
    # The average's address is looked at last.
    assert column == 4 or all(torch.equal(part, torch.ones(BLOCK_SIZE + 1)) for part in parts)
    one_chunk_kernel[(1,)](table, scalars, BLOCK_SIZE, False)
    assert not torch.equal(parts[0], torch.ones(BLOCK_SIZE + 1))


# -- offsets -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("numel", [2**31 - 1, 2**31, 2**31 + 1, 2**40 + 1])
def test_chunk_words_of_huge_tensors(numel: int) -> None:
    block_size = 2**20
    words = chunk_words([3, 2**31 - 1], [numel, 1], block_size)
    chunks = -(-numel // block_size)
    assert words.dtype == np.int64
    assert np.array_equal(words[:-1] >> CHUNK_BITS, np.full(chunks, 3))
    assert np.array_equal(words[:-1] & (2**CHUNK_BITS - 1), np.arange(chunks))
    assert words[-1] == (2**31 - 1) << CHUNK_BITS


@triton.jit
def one_update_kernel(
    tensor_table_ptr,
    chunk_table_ptr,
    scalars_ptr,
    BLOCK_SIZE: tl.constexpr,
):
    update(
        tl.load(chunk_table_ptr),
        0,
        tensor_table_ptr,
        scalars_ptr,
        1.0,
        1,
        adam_update,
        2,
        tl.float32,
        tl.float32,
        False,
        True,
        BLOCK_SIZE,
    )


@pytest.mark.parametrize(
    "chunk", [2**31 // BLOCK_SIZE - 1, 2**31 // BLOCK_SIZE, 2**32 // BLOCK_SIZE, 2**CHUNK_BITS - 1]
)
@pytest.mark.parametrize("missing", [0, 5], ids=["full", "ragged"])
def test_offsets_beyond_two_to_the_31(
    chunk: int, missing: int, allow_access: Callable[[Sequence[Tensor]], None]
) -> None:
    """The tensors begin so far before a small buffer that this chunk of theirs lies in it."""
    numel = (chunk + 1) * BLOCK_SIZE - missing
    far, near = ([torch.linspace(1, 2, BLOCK_SIZE) for _ in range(5)] for _ in range(2))
    scalars = torch.full((SCALAR_COLUMNS.value,), 0.5)
    for parts, index, size in ((far, chunk, numel), (near, 0, BLOCK_SIZE - missing)):
        *addresses, average = [part.data_ptr() - 4 * BLOCK_SIZE * index for part in parts]
        table = torch.tensor([*addresses, 0, size, 0, 1, layout.FLOAT32.value, average])
        chunks = torch.tensor([index])
        allow_access([*parts, table, chunks, scalars])
        one_update_kernel[(1,)](table, chunks, scalars, BLOCK_SIZE)
    assert not torch.equal(near[0], torch.linspace(1, 2, BLOCK_SIZE))
    assert same_bits(far, near)
    # What lies beyond the end stays as it was.
    assert torch.equal(far[0][BLOCK_SIZE - missing :], torch.linspace(1, 2, BLOCK_SIZE)[BLOCK_SIZE - missing :])
