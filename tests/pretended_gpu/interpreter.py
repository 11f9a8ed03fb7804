"""The second process: runs Triton kernels in the interpreter, on memory that it shares with the pretended device.

A request is (module, kernel, grid, arguments), an answer (traceback or None, accesses); see `device.Interpreter`.
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
import os
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder

from tests.helpers import interpreter

# As in driver.cpp.
ARENA, ARENA_BYTES, GRANULE_BITS = 0x400000000000, 256 << 30, 6
MAP_NORESERVE, MAP_FIXED_NOREPLACE = 0x4000, 0x100000
POINTERS = {
    "i1": torch.bool,
    "i8": torch.int8,
    "u8": torch.uint8,
    "i32": torch.int32,
    "i64": torch.int64,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}

# (address, bytes, whether it is written)
accesses: set[tuple[int, int, bool]] = set()


def map_arena(path: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    flags = mmap.MAP_SHARED | MAP_NORESERVE | MAP_FIXED_NOREPLACE
    file = os.open(path, os.O_RDWR)
    got = libc.mmap(ARENA, ARENA_BYTES, mmap.PROT_READ | mmap.PROT_WRITE, flags, file, 0)
    assert got == ARENA, os.strerror(ctypes.get_errno())


def watch(name: str, pointer: int, mask: int, writes: bool) -> None:
    """Makes a method of the interpreter note what it accesses; ``pointer`` and ``mask`` are places of its arguments."""
    method = getattr(InterpreterBuilder, name)

    def watched(self: Any, *args: Any) -> Any:
        addresses = np.asarray(args[pointer].data).ravel()
        present = np.broadcast_to(np.asarray(args[mask].data), np.shape(args[pointer].data)).ravel().astype(bool)
        granules = np.unique(addresses[present] >> GRANULE_BITS)
        if granules.size:
            breaks = np.flatnonzero(np.diff(granules) > 1)
            firsts, lasts = granules[[0, *(breaks + 1)]], granules[[*breaks, -1]]
            for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
                accesses.add((first << GRANULE_BITS, (last - first + 1) << GRANULE_BITS, writes))
        return method(self, *args)

    setattr(InterpreterBuilder, name, watched)


def tensor_at(type_name: str, address: int) -> torch.Tensor:
    dtype = POINTERS[type_name.lstrip("*k")]
    if address == 0:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer((ctypes.c_char * dtype.itemsize).from_address(address), dtype=dtype)


def constant(value: Any) -> Any:
    """The opposite of `device.portable`."""
    if not isinstance(value, tuple):
        return value
    kind, *rest = value
    if kind == "function":
        return getattr(importlib.import_module(rest[0]), rest[1])
    return getattr(tl, rest[0]) if kind == "dtype" else tuple(map(constant, rest))


def run(module: str, kernel: str, grid: tuple[int, ...], arguments: list[tuple[str, Any]]) -> str | None:
    """Runs a kernel. Returns a traceback, or None."""
    try:
        values = [
            constant(value) if kind == "constexpr" else tensor_at(kind, value) if kind.startswith("*") else value
            for kind, value in arguments
        ]
        getattr(importlib.import_module(module), kernel)[grid](*values)
    except Exception:
        return traceback.format_exc()
    return None


def main() -> None:
    torch.set_num_threads(1)
    map_arena(sys.argv[1])
    interpreter.round_to_bfloat16()
    interpreter.patch_once_a_launch()
    watch("create_masked_load", 0, 1, writes=False)
    watch("create_masked_store", 0, 2, writes=True)
    watch("create_atomic_rmw", 1, 3, writes=True)
    with Connection(int(sys.argv[2])) as connection:
        while True:
            try:
                request = connection.recv()
            except EOFError:
                return
            accesses.clear()
            connection.send((run(*request), sorted(accesses)))


if __name__ == "__main__":
    main()
