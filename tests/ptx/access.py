"""Decodes the instructions that reach memory or other lanes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .compute import Run
from .dtypes import FULL, LANES, NUMPY, WARP
from .faults import PtxError
from .memory import Synchronization
from .operands import Operands

if TYPE_CHECKING:
    from .machine import Warp

ATOMICS: dict[str, Callable[..., Any]] = {
    "add": lambda old, b: old + b,
    "exch": lambda old, b: b,
    "min": min,
    "max": max,
    "and": lambda old, b: old & b,
    "or": lambda old, b: old | b,
    "xor": lambda old, b: old ^ b,
    "cas": lambda old, b, c: c if old == b else old,
}
# What generic addresses of local memory begin with.
LOCAL_WINDOW = 1 << 62


class _Access(NamedTuple):
    """The modifiers of an access."""

    space: str
    number: int
    kind: str


def _take_access(o: Operands) -> _Access:
    kind = o.take_type()
    # Through the read-only cache: what it reads must not be written in the launch, which the race detector sees.
    o.take("nc")
    space = o.take("global", "shared", "shared::cta", "param", "local").removesuffix("::cta") or "generic"
    return _Access(space, {"": 1, "v2": 2, "v4": 4}[o.take("v2", "v4")], kind)


def lanes_of(mask: Any) -> Any:
    """The lanes of a mask."""
    return LANES if mask is None else np.flatnonzero(mask)


def decode_load(o: Operands, target: str, address: str) -> Run:
    """ld."""
    access = _take_access(o)
    names, dtype = o.vector(target), NUMPY[access.kind]
    if len(names) != access.number:
        raise o.refuse("vector")
    writes = [o.destination(name, access.kind) for name in names]
    if access.space == "param":
        name, start = _parameter(o, address)

        def load_param(w: Warp, mask: Any) -> None:
            for k, write in enumerate(writes):
                first = start + k * dtype.itemsize
                octets = np.ascontiguousarray(w.params[name][:, first : first + dtype.itemsize])
                write(w, octets.view(dtype)[:, 0], mask)

        return load_param
    read_address = o.address(address)

    def load(w: Warp, mask: Any) -> None:
        lanes = lanes_of(mask)
        memory, addresses = w.memory(access.space, read_address(w)[lanes])
        for loaded, write in zip(memory.load(w, o, lanes, addresses, dtype, access.number), writes, strict=True):
            if mask is None:
                write(w, loaded, None)
            else:
                value = np.empty(WARP, dtype)
                value[lanes] = loaded
                write(w, value, mask)

    return load


def decode_store(o: Operands, address: str, source: str) -> Run:
    """st."""
    access = _take_access(o)
    names, dtype = o.vector(source), NUMPY[access.kind]
    if len(names) != access.number:
        raise o.refuse("vector")
    reads = [o.source(name, access.kind) for name in names]
    if access.space == "param":
        name, start = _parameter(o, address)

        def store_param(w: Warp, mask: Any) -> None:
            octets = w.params.setdefault(name, np.zeros((WARP, 64), np.uint8))
            lanes = lanes_of(mask)
            for k, read in enumerate(reads):
                first = start + k * dtype.itemsize
                value = np.ascontiguousarray(read(w)).view(np.uint8).reshape(WARP, -1)
                octets[lanes, first : first + dtype.itemsize] = value[lanes]

        return store_param
    read_address = o.address(address)

    def store(w: Warp, mask: Any) -> None:
        lanes = lanes_of(mask)
        memory, addresses = w.memory(access.space, read_address(w)[lanes])
        memory.store(w, o, lanes, addresses, [read(w)[lanes] for read in reads])

    return store


def _parameter(o: Operands, address: str) -> tuple[str, int]:
    """Name of a kernel's or function's parameter, and an offset in it."""
    match = re.fullmatch(r"\[\s*([\w$]+)(?:\+(\d+))?\s*\]", address)
    if match is None:
        raise o.refuse("parameter")
    return match[1], int(match[2] or 0)


def decode_atomic(o: Operands, target: str, address: str, *values: str) -> Run:
    """atom, lane after lane in a random order."""
    access = _take_access(o)
    semantics = o.take("relaxed", "acquire", "release", "acq_rel") or "relaxed"
    sync = Synchronization(semantics, o.take("cta", "gpu", "sys") or "gpu")
    function, dtype = ATOMICS[o.take(*ATOMICS)], NUMPY[access.kind]
    if access.number != 1 or access.space != "global" or access.kind not in ("b32", "b64", "u32", "u64", "s32", "s64"):
        raise o.refuse("atomic of this type or space")
    read_address, write = o.address(address), o.destination(target, access.kind)
    reads = [o.source(value, access.kind) for value in values]

    def run(w: Warp, mask: Any) -> None:
        lanes = lanes_of(mask).tolist()
        w.grid.random.shuffle(lanes)
        addresses, arguments = read_address(w), [read(w) for read in reads]
        old = np.zeros(WARP, dtype)
        for lane in lanes:
            own = [argument[lane] for argument in arguments]
            old[lane] = w.grid.memory.atomic(w, o, lane, addresses[lane], dtype, function, own, sync)
        write(w, old, mask)

    return run


def decode_generic_address(o: Operands, target: str, source: str) -> Run:
    """cvta: generic addresses are those of global memory, and local memory has a window in them."""
    inward, space = o.take("to"), o.take("global", "local")
    if not space:
        raise o.refuse()
    kind = o.take_type()
    offset = np.uint64(0 if space == "global" else (-LOCAL_WINDOW if inward else LOCAL_WINDOW) % 2**64)
    read, write = o.source(source, kind), o.destination(target, kind)
    return lambda w, mask: write(w, read(w) + offset, mask)


# -- lanes of a warp ---------------------------------------------------------------------------------------------------
def decode_shuffle(o: Operands, target: str, value: str, lane: str, clamp: str, _members: str) -> Run:
    """shfl.sync: the value of another lane, which must take part."""
    o.take("sync"), o.take_type()
    mode = o.take("bfly", "idx")
    if not mode:
        raise o.refuse()
    write = o.destination(target, "b32")
    a, b, c = o.source(value, "b32"), o.source(lane, "b32"), o.source(clamp, "b32")

    def run(w: Warp, mask: Any) -> None:
        offset, limit = (b(w) & 31).astype(np.int64), c(w).astype(np.int64)
        segment = (limit >> 8) & 31
        chosen = LANES ^ offset if mode == "bfly" else (LANES & segment) | (offset & ~segment)
        chosen = np.where(chosen <= (LANES & segment) | (limit & 31 & ~segment), chosen, LANES)
        active = FULL if mask is None else mask
        if not active[chosen[active]].all():
            raise PtxError(f"shfl reads a lane that does not take part: {o.instruction}, {w}")
        write(w, a(w)[chosen], mask)

    return run


def decode_matrix_load(o: Operands, registers: str, address: str) -> Run:
    """ldmatrix of 8 x 8 matrices of 16 bits: lane i gives the address of row i."""
    transposed, number = _take_matrix(o)
    writes, read_address = [o.destination(name, "b32") for name in o.vector(registers)], o.address(address)
    row, column = np.divmod(LANES, 4)

    def run(w: Warp, mask: Any) -> None:
        lanes = _whole_warp(o, w, mask)[: 8 * number]
        words = w.program.shared.load(w, o, lanes, read_address(w)[lanes], np.dtype("u4"), 4)
        matrices = np.stack(words, axis=1).view(np.uint16).reshape(number, 8, 8)
        for matrix, write in zip(matrices, writes, strict=True):
            rows = matrix.T if transposed else matrix
            write(w, np.stack([rows[row, 2 * column + half] for half in (0, 1)], axis=1).view(np.uint32)[:, 0], None)

    return run


def decode_matrix_store(o: Operands, address: str, registers: str) -> Run:
    """stmatrix: the inverse of ldmatrix."""
    transposed, number = _take_matrix(o)
    reads, read_address = [o.source(name, "b32") for name in o.vector(registers)], o.address(address)
    row, column = np.divmod(LANES, 4)

    def run(w: Warp, mask: Any) -> None:
        lanes = _whole_warp(o, w, mask)[: 8 * number]
        matrices = np.empty((number, 8, 8), np.uint16)
        for matrix, read in zip(matrices, reads, strict=True):
            rows, pairs = matrix.T if transposed else matrix, read(w).view(np.uint16).reshape(WARP, 2)
            for half in (0, 1):
                rows[row, 2 * column + half] = pairs[:, half]
        words = matrices.reshape(8 * number, 8).view(np.uint32).T.copy()
        w.program.shared.store(w, o, lanes, read_address(w)[lanes], list(words))

    return run


def _take_matrix(o: Operands) -> tuple[bool, int]:
    for word in ("sync", "aligned", "m8n8", "shared", "b16"):
        if not o.take(word):
            raise o.refuse(f"not {word}")
    return bool(o.take("trans")), {"x1": 1, "x2": 2, "x4": 4}[o.take("x1", "x2", "x4")]


def _whole_warp(o: Operands, w: Warp, mask: Any) -> Any:
    if mask is not None:
        raise PtxError(f"a part of a warp executes {o.instruction}, {w}")
    return LANES
