"""PTX's types as numpy's, and the lanes of a warp."""

from __future__ import annotations

from typing import Any

import numpy as np

WARP = 32
LANES = np.arange(WARP)
FULL = np.ones(WARP, bool)

NUMPY: dict[str, np.dtype[Any]] = {
    f"{kind}{bits}": np.dtype(f"{code}{bits // 8}")
    for kind, code in (("b", "u"), ("u", "u"), ("s", "i"))
    for bits in (8, 16, 32, 64)
}
NUMPY |= {"f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8"), "pred": np.dtype(bool)}
# numpy has no bfloat16; pairs of 16 bits are bits too.
NUMPY |= {"bf16": np.dtype("u2"), "f16x2": np.dtype("u4"), "bf16x2": np.dtype("u4")}
STORAGE: dict[int, np.dtype[Any]] = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}
# What a register holds before it is written: nothing that could pass for a result.
POISON = {
    np.dtype(bool): np.zeros(WARP, bool),
    np.dtype("u1"): np.full(WARP, 0xA5, np.uint8),
    np.dtype("u2"): np.full(WARP, 0xDEAD, np.uint16),
    np.dtype("u4"): np.full(WARP, 0xFFDEAD00, np.uint32),
    np.dtype("u8"): np.full(WARP, 0xFFFFDEADDEADDEAD, np.uint64),
}


def is_float(kind: str) -> bool:
    """Whether a type is a floating-point one."""
    return kind in ("f16", "f32", "f64", "bf16")
