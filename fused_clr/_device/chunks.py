"""Cuts the tensors of a step into chunks, and assigns the chunks to launches."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .tensors import real_dtype, real_numel

# A chunk's index within its tensor takes the lower half of a word of the chunk table.
CHUNK_BITS = 32


class DtypeCombination(NamedTuple):
    """What one launch is compiled for."""

    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    num_states: int


class ChunkRange(NamedTuple):
    """The chunks of one launch: a range of the chunk table. Those of idle tensors, which are averaged, come last."""

    combination: DtypeCombination
    first: int
    num_chunks: int
    block_size: int
    num_idle_chunks: int = 0


class NormChunks(NamedTuple):
    """The chunks of the norm launch, of all dtypes: another range of the chunk table."""

    first: int
    num_chunks: int
    block_size: int
    grad_dtypes: frozenset[torch.dtype]


class Chunks(NamedTuple):
    """The chunks of a step.

    Attributes:
        chunk_table: int64[num_chunks]: tensor index << 32 | chunk of that tensor; one launch after another. One unused
            word if nothing is updated, since a table needs an address.
        launches: The ranges of ``chunk_table``, one per dtype combination; at least one, perhaps empty.
        norm: The range of the norm launch, which runs first; None if no norm is computed.
    """

    chunk_table: NDArray[np.int64]
    launches: list[ChunkRange]
    norm: NormChunks | None = None


def block_size_of(param_dtype: torch.dtype, block_size: int) -> int:
    """Elements of a chunk: half as many in float64, which takes twice the registers and would spill."""
    return block_size // 2 if param_dtype == torch.float64 else block_size


def cut_into_chunks(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    num_states: Sequence[int],
    idle_states: int,
    block_size: int,
    measured: Collection[int] | None = None,
    idle: Collection[int] = (),
) -> Chunks:
    """Sorts the tensors that have gradients into launches and cuts them into chunks.

    Args:
        params: Parameters of one device.
        grads: Their gradients; None: the parameter is not updated.
        num_states: How many state tensors each has.
        idle_states: How many a launch is compiled for that updates nothing.
        block_size: Elements of a chunk of 32-bit or smaller parameters (see `block_size_of`), and of all norm chunks.
        measured: The tensors whose gradients the norm launch covers; None for no norm launch.
        idle: Tensors without a gradient that are averaged.

    Returns:
        The chunks. They hold no tensor and no address.
    """
    combinations: dict[DtypeCombination, list[int]] = {}
    for index, grad in enumerate(grads):
        if grad is not None and grad.numel():
            dtypes = real_dtype(params[index].dtype), real_dtype(grad.dtype)
            combinations.setdefault(DtypeCombination(*dtypes, num_states[index]), []).append(index)
    idle_by_dtype: dict[torch.dtype, list[int]] = {}
    for index in idle:
        idle_by_dtype.setdefault(real_dtype(params[index].dtype), []).append(index)
    for dtype in idle_by_dtype:
        if not any(combination.param_dtype == dtype for combination in combinations):
            combinations[DtypeCombination(dtype, dtype, idle_states)] = []

    tables, launches, first = [], [], 0
    for combination, indices in combinations.items():
        own_block_size = block_size_of(combination.param_dtype, block_size)
        # Any launch of their dtype can average them.
        idle_indices = idle_by_dtype.pop(combination.param_dtype, [])
        own, others = (
            chunk_words(part, [real_numel(params[index]) for index in part], own_block_size)
            for part in (indices, idle_indices)
        )
        tables += [own, others]
        launches.append(ChunkRange(combination, first, len(own), own_block_size, len(others)))
        first += len(own) + len(others)
    if not launches:
        # A launch without chunks still advances the schedule.
        launches = [ChunkRange(DtypeCombination(torch.float32, torch.float32, idle_states), 0, 0, block_size)]
        tables = [np.zeros(1, np.int64)]
    norm = None
    if measured is not None:
        wanted = set(measured)
        in_norm = [index for indices in combinations.values() for index in indices if index in wanted]
        words = chunk_words(in_norm, [real_numel(params[index]) for index in in_norm], block_size)
        norm = NormChunks(
            sum(map(len, tables)),
            len(words),
            block_size,
            frozenset(combination.grad_dtype for combination, indices in combinations.items() if indices),
        )
        tables.append(words)
    return Chunks(np.concatenate(tables), launches, norm)


def chunk_words(tensor_ids: Sequence[int], numels: Sequence[int], block_size: int) -> NDArray[np.int64]:
    """The chunk table of some tensors.

    Args:
        tensor_ids: Row of each in the tensor table.
        numels: Elements of each; beyond 2**31 is fine.
        block_size: Elements of a chunk.

    Returns:
        int64[num_chunks].
    """
    counts = -(-np.asarray(numels, np.int64) // block_size)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    chunks = np.arange(counts.sum(), dtype=np.int64) - starts
    words: NDArray[np.int64] = (np.repeat(np.asarray(tensor_ids, np.int64), counts) << CHUNK_BITS) | chunks
    return words
