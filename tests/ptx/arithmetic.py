"""What PTX instructions compute, on numpy vectors of lanes, rounded as PTX says."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from .dtypes import NUMPY, STORAGE, is_float

_libm = ctypes.CDLL("libm.so.6")
_libm.fma.restype, _libm.fma.argtypes = ctypes.c_double, [ctypes.c_double] * 3
_fma_objects = np.frompyfunc(_libm.fma, 3, 1)
WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def widen_bfloat16(bits: Any) -> Any:
    """The bits of bfloat16 as float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def round_to_bfloat16(x: Any) -> Any:
    """float32 to the bits of bfloat16, to nearest even; NaN is the canonical one."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def flush(x: Any) -> Any:
    """Subnormal float32 to zero of its sign."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def fma(a: Any, b: Any, c: Any) -> Any:
    """``a * b + c``, rounded once."""
    if a.dtype != np.float32:
        return _fma_objects(a, b, c).astype(np.float64)
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + addend
    # The sum, rounded to float64 and again to float32, can be wrong only next to a midpoint of float32 or where that is
    # subnormal.
    suspicious = (total.view(np.int64) & 0x1FFFFFFF) == 0x10000000
    suspicious |= (np.abs(total) < 2.0**-125) & (total != 0)
    if suspicious.any():
        # Rounded to odd: what the first rounding dropped decides the second one.
        other = total - product
        error = (product - (total - other)) + (addend - other)
        inexact = (error != 0) & np.isfinite(error) & ((total.view(np.int64) & 1) == 0)
        total = np.where(inexact, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)
    return total.astype(np.float32)


def divide_integers(a: Any, b: Any) -> tuple[Any, Any]:
    """Quotient towards zero and remainder, as in C; by 0, nothing that counts."""
    if a.dtype.kind == "u":
        return a // b, a % b
    unsigned = STORAGE[a.dtype.itemsize]
    parts = divide_integers(np.abs(a).view(unsigned), np.abs(b).view(unsigned))
    quotient, remainder = (part.view(a.dtype) for part in parts)
    return np.where((a < 0) != (b < 0), -quotient, quotient), np.where(a < 0, -remainder, remainder)


def multiply_high(a: Any, b: Any) -> Any:
    """The upper half of a product."""
    if a.dtype.itemsize < 8:
        wide = a.astype(f"{a.dtype.kind}8") * b.astype(f"{a.dtype.kind}8")
        return (wide >> wide.dtype.type(8 * a.dtype.itemsize)).astype(a.dtype)
    return np.array([int(x) * int(y) >> 64 for x, y in zip(a, b, strict=True)], a.dtype)


def shift_left(a: Any, amount: Any) -> Any:
    """0 from as many places on as there are bits."""
    bits = 8 * a.dtype.itemsize
    return np.where(amount >= bits, a.dtype.type(0), a << np.minimum(amount, bits - 1).astype(a.dtype))


def shift_right(a: Any, amount: Any) -> Any:
    """0, or the sign, from as many places on as there are bits."""
    bits = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(amount, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(amount >= bits, a.dtype.type(0), shifted)


def float_extreme(larger: bool, nan_wins: bool) -> Callable[[Any, Any], Any]:
    """Minimum or maximum; -0 is less than +0."""
    choose = {(1, 0): np.fmax, (0, 0): np.fmin, (1, 1): np.maximum, (0, 1): np.minimum}[larger, nan_wins]

    def run(a: Any, b: Any) -> Any:
        bits = STORAGE[a.dtype.itemsize]
        signs = (a.view(bits) & b.view(bits)) if larger else (a.view(bits) | b.view(bits))
        return np.where((a == 0) & (b == 0), signs.view(a.dtype), choose(a, b))

    return run


def extract_field(a: Any, position: Any, length: Any) -> Any:
    """``length`` bits from ``position`` on, extended by their sign if the type has one."""
    bits = 8 * a.dtype.itemsize
    fields = []
    for value, p, n in zip(a.tolist(), (position & 255).tolist(), (length & 255).tolist(), strict=True):
        field = ((value % (1 << bits)) >> p) & ((1 << n) - 1)
        if a.dtype.kind == "i" and n and (value >> min(p + n - 1, bits - 1)) & 1:
            field |= -1 << min(n, max(bits - p, 0))
        fields.append(field % (1 << bits))
    return np.array(fields, STORAGE[a.dtype.itemsize]).view(a.dtype)


def funnel_shift_left(low: Any, high: Any, amount: Any) -> Any:
    """The upper 32 bits of ``high:low``, shifted left by the amount modulo 32."""
    both = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
    return ((both << (amount & np.uint32(31)).astype(np.uint64)) >> np.uint64(32)).astype(np.uint32)


def top_bits_reciprocal(x: Any) -> Any:
    """rcp.approx.ftz.f64: only the upper words of argument and result count."""
    high = np.uint64(0xFFFFFFFF00000000)
    return ((1 / (x.view(np.uint64) & high).view(np.float64)).view(np.uint64) & high).view(np.float64)


def approximate_reciprocal_root(x: Any) -> Any:
    """rsqrt.approx.ftz.f32: within the relative error that PTX allows, 2**-22.9, and not the nearest float32."""
    x = flush(x)
    exact = 1 / np.sqrt(x.astype(np.float64))
    rounded = exact.astype(np.float32)
    # Some hardware or other: a neighbour of the nearest, by the argument's bits.
    up = ((x.view(np.uint32) >> np.uint32(3)) ^ x.view(np.uint32)) & np.uint32(1)
    neighbour = np.nextafter(rounded, np.where(up == 1, np.float32(np.inf), np.float32(0)))
    return np.where(np.abs(neighbour / exact - 1) <= 2.0**-22.9, neighbour, rounded)


def comparison(name: str, kind: str) -> Callable[[Any, Any], Any]:
    """A comparison of ``setp``; one whose name ends in u is true of NaN."""
    if not is_float(kind):
        return COMPARE[name]
    read = widen_bfloat16 if kind == "bf16" else (lambda x: x)
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(read(a)) | np.isnan(read(b))) == (name == "nan")
    compare = COMPARE[name.removesuffix("u")]

    def run(a: Any, b: Any) -> Any:
        a, b = read(a), read(b)
        nan = np.isnan(a) | np.isnan(b)
        return (compare(a, b) | nan) if name.endswith("u") else (compare(a, b) & ~nan)

    return run


def conversion(to: str, source: str, rounding: str) -> Callable[[Any], Any]:
    """``cvt`` of one value.

    Raises:
        KeyError: A rounding that it does not know.
    """
    target = NUMPY[to]
    read = widen_bfloat16 if source == "bf16" else (lambda x: x)
    if is_float(to):
        # Others than to nearest are refused.
        {"": 0, "rn": 0}[rounding]
        if to == "bf16":
            return lambda x: round_to_bfloat16(read(x).astype(np.float32))
        return lambda x: read(x).astype(target)
    if not is_float(source):
        {"": 0}[rounding]
        return lambda x: x.astype(target)
    info, whole = np.iinfo(target), WHOLE[rounding]

    def to_integer(x: Any) -> Any:
        x = whole(read(x)).astype(np.float64)
        clamped = np.where((x > info.min) & (x < info.max), x, 0).astype(target)
        clamped = np.where(x <= info.min, info.min, np.where(x >= info.max, info.max, clamped))
        return np.where(np.isnan(x), info.min if target == np.int64 else 0, clamped).astype(target)

    return to_integer
