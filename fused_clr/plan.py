"""Which tensors a step updates, in which chunks and launches: everything about a step that rarely changes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# A chunk's index within its tensor takes the lower half of a word of the chunk table.
CHUNK_BITS = 32


class DtypeCombination(NamedTuple):
    """What one launch is compiled for."""

    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    amsgrad: bool


class ChunkRange(NamedTuple):
    """The chunks of one launch: a range of the chunk table."""

    combination: DtypeCombination
    first: int
    num_chunks: int
    block_size: int


class NormChunks(NamedTuple):
    """The chunks of the norm launch, of all dtypes: another range of the chunk table."""

    first: int
    num_chunks: int
    block_size: int
    grad_dtypes: frozenset[torch.dtype]


class LaunchPlan(NamedTuple):
    """The launches of a step, as host tables.

    Attributes:
        active: int, indices of the tensors that are updated, in order.
        chunk_table: int64[num_chunks]: tensor index << 32 | chunk of that tensor; one launch after another. One unused
            word where nothing is updated, since a table needs an address.
        launches: The ranges of ``chunk_table``, one per dtype combination; at least one, perhaps empty.
        norm: The range of the norm launch, which comes first; None where no norm is wanted.
    """

    active: list[int]
    chunk_table: NDArray[np.int64]
    launches: list[ChunkRange]
    norm: NormChunks | None = None


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of an element's real numbers: a complex tensor is updated as pairs of reals."""
    return dtype.to_real() if dtype.is_complex else dtype


def real_numel(tensor: Tensor) -> int:
    """How many real numbers a tensor holds."""
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def block_size_of(param_dtype: torch.dtype, block_size: int) -> int:
    """Elements of a chunk: half as many in float64, which takes twice the registers and would spill."""
    return block_size // 2 if param_dtype == torch.float64 else block_size


def plan_launches(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    amsgrad: Sequence[bool],
    block_size: int,
    measured: Collection[int] | None = None,
) -> LaunchPlan:
    """Sorts the tensors that have gradients into launches and cuts them into chunks.

    Args:
        params: Parameters of one device.
        grads: Their gradients; None: the parameter is not updated.
        amsgrad: Whether each keeps the largest second moment.
        block_size: Elements of a chunk of 32-bit or smaller parameters (see `block_size_of`), and of all norm chunks.
        measured: Plan a norm launch over the gradients of these tensors; None: none.

    Returns:
        The plan. It holds no tensor and no address.
    """
    active = [index for index, grad in enumerate(grads) if grad is not None]
    combinations: dict[DtypeCombination, list[int]] = {}
    for index in active:
        grad = grads[index]
        if grad is not None and grad.numel():
            dtypes = real_dtype(params[index].dtype), real_dtype(grad.dtype)
            combinations.setdefault(DtypeCombination(*dtypes, amsgrad[index]), []).append(index)

    tables, launches, first = [], [], 0
    for combination, indices in combinations.items():
        own_block_size = block_size_of(combination.param_dtype, block_size)
        words = chunk_words(indices, [real_numel(params[index]) for index in indices], own_block_size)
        tables.append(words)
        launches.append(ChunkRange(combination, first, len(words), own_block_size))
        first += len(words)
    if not launches:
        # The schedule ticks all the same.
        launches = [ChunkRange(DtypeCombination(torch.float32, torch.float32, False), 0, 0, block_size)]
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
            frozenset(combination.grad_dtype for combination in combinations),
        )
        tables.append(words)
    return LaunchPlan(active, np.concatenate(tables), launches, norm)


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
