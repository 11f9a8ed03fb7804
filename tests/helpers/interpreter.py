"""Triton's interpreter as the tests need it: rounding as GPUs do, faster, in any order, and watched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton import language
from triton.runtime import interpreter


def round_to_bfloat16() -> None:
    """Makes the interpreter round float32 to bfloat16 as GPUs do, to nearest even; by itself it cuts 16 bits off.

    That is a bias which moments add up, and which torch's own kernels do not have.
    """

    def convert_float(value: Any, from_dtype: Any, to_dtype: Any, rounding_mode: Any) -> Any:
        if (str(from_dtype), str(to_dtype)) != ("fp32", "bf16"):
            return original(value, from_dtype, to_dtype, rounding_mode)
        return torch.from_numpy(value.copy()).bfloat16().view(torch.uint16).numpy()

    original = interpreter._convert_float
    interpreter._convert_float = convert_float


def patch_once_a_launch() -> None:
    """The interpreter replaces triton.language's functions for a launch, and once more at every call within it.

    That is a fifth of its time, and changes nothing.
    """

    class Scope:
        def __init__(self, function: Any, modules: set[Any]) -> None:
            self.patches, self.modules = patch(function), modules
            patched.update(modules)

        def restore(self) -> None:
            patched.difference_update(self.modules)
            self.patches.restore()

    def patch_once(function: Any) -> Scope | None:
        names = function.__globals__
        if id(names) not in modules_of:
            found = {m for m in (language, language.core) if any(value is m for value in names.values())}
            modules_of[id(names)] = found
        modules = modules_of[id(names)]
        return None if modules <= patched else Scope(function, modules)

    modules_of: dict[int, set[Any]] = {}
    patch, patched = interpreter._patch_lang, set[Any]()
    interpreter._patch_lang = patch_once


def run_programs_in_order(monkeypatch: pytest.MonkeyPatch, permuted: Callable[[int], Sequence[int]]) -> None:
    """Runs a grid's programs in the order that ``permuted`` gives for their number."""
    orders: dict[int, Sequence[int]] = {}

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        if x == 0:
            orders[0] = permuted(self.grid_dim[0])
        self.grid_idx = (orders[0][x], y, z)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", set_grid_idx)


def watch_promises(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collects every address that a kernel promises to be a multiple of 16; makes a false promise an error."""
    addresses: list[int] = []
    set_attr = interpreter.TensorHandle.set_attr

    def checked(handle: Any, name: str, value: Any) -> None:
        if name == "tt.divisibility":
            assert not np.any(handle.data % value[0]), f"{handle.data} is promised to be a multiple of {value[0]}"
            addresses.extend(handle.data.ravel().tolist())
        set_attr(handle, name, value)

    monkeypatch.setattr(interpreter.TensorHandle, "set_attr", checked)
    return addresses


def watch_accesses(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[Tensor]], None]:
    """Gives a function that makes every access of a kernel outside given tensors an error, before it happens."""
    spans = np.array([(0, 2**64 - 1)], np.uint64)

    def check(pointers: Any, mask: Any) -> None:
        first = np.broadcast_to(pointers.data, mask.data.shape)[mask.data.astype(bool)].reshape(-1, 1)
        last = first + np.uint64(pointers.get_element_ty().primitive_bitwidth // 8)
        inside = ((first >= spans[:, 0]) & (last <= spans[:, 1])).any(axis=1)
        assert inside.all(), f"{(~inside).sum()} accesses outside the given tensors"

    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def allow(tensors: Sequence[Tensor]) -> None:
        nonlocal spans
        spans = np.array([(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors], np.uint64)

    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(builder, "create_masked_store", checked_store)
    return allow
