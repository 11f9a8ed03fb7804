"""Decodes the instructions that compute: registers in, registers out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from . import arithmetic
from .dtypes import FULL, NUMPY, WARP, is_float
from .operands import Operands, Write

if TYPE_CHECKING:
    from .machine import Warp

# What an instruction does for the lanes of a mask; None is all of them.
Run = Callable[["Warp", Any], None]
# Type of the result, types of the sources, and the function of numpy vectors.
Signature = tuple[str, list[str], Callable[..., Any]]


# -- arithmetic --------------------------------------------------------------------------------------------------------
def _rounded(o: Operands, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Takes ``.rn`` and, of float32, ``.ftz``. Float64 has no ``.ftz``; arithmetic of 16 bits is refused."""
    o.take("rn")
    if kind in ("f16", "bf16"):
        raise o.refuse("arithmetic of this type")
    if kind == "f32" and o.take("ftz"):
        return lambda *arguments: arithmetic.flush(function(*map(arithmetic.flush, arguments)))
    return function


def _simple(function: Callable[..., Any], sources: int = 2) -> Callable[[Operands, str], Signature]:
    """The same numpy function for integers and floats."""

    def signature(o: Operands, kind: str) -> Signature:
        return kind, [kind] * sources, _rounded(o, kind, function) if is_float(kind) else function

    return signature


def _integers(function: Callable[..., Any], *sources: str) -> Callable[[Operands, str], Signature]:
    """Of integers; ``sources``: types of those after the first that are not the instruction's."""

    def signature(o: Operands, kind: str) -> Signature:
        if is_float(kind):
            raise o.refuse("not of integers")
        return kind, [kind, *(sources or [kind])], function

    return signature


def _floats(function: Callable[..., Any], sources: int) -> Callable[[Operands, str], Signature]:
    def signature(o: Operands, kind: str) -> Signature:
        if not is_float(kind):
            raise o.refuse("not of floats")
        return kind, [kind] * sources, _rounded(o, kind, function)

    return signature


def _extreme(larger: bool) -> Callable[[Operands, str], Signature]:
    def signature(o: Operands, kind: str) -> Signature:
        nan_wins = bool(o.take("NaN"))
        if is_float(kind):
            return kind, [kind] * 2, _rounded(o, kind, arithmetic.float_extreme(larger, nan_wins))
        return kind, [kind] * 2, np.maximum if larger else np.minimum

    return signature


def _multiply(o: Operands, kind: str) -> Signature:
    if is_float(kind):
        return kind, [kind] * 2, _rounded(o, kind, np.multiply)
    part = o.take("lo", "hi", "wide")
    if not part:
        raise o.refuse("neither lo, hi nor wide")
    if part == "wide":
        wide = f"{kind[0]}{2 * int(kind[1:])}"
        return wide, [kind] * 2, lambda a, b: a.astype(NUMPY[wide]) * b.astype(NUMPY[wide])
    return kind, [kind] * 2, np.multiply if part == "lo" else arithmetic.multiply_high


def _multiply_add(o: Operands, kind: str) -> Signature:
    result, _, multiply = _multiply(o, kind)
    return result, [kind, kind, result], lambda a, b, c: multiply(a, b) + c


def _divide(o: Operands, kind: str) -> Signature:
    if is_float(kind):
        return kind, [kind] * 2, _rounded(o, kind, np.divide)
    return kind, [kind] * 2, lambda a, b: arithmetic.divide_integers(a, b)[0]


def _reciprocal(o: Operands, kind: str) -> Signature:
    if kind == "f64" and o.take("approx") and o.take("ftz"):
        return kind, [kind], arithmetic.top_bits_reciprocal
    return kind, [kind], _rounded(o, kind, lambda x: x.dtype.type(1) / x)


def _reciprocal_root(o: Operands, kind: str) -> Signature:
    if kind != "f32" or not (o.take("approx") and o.take("ftz")):
        raise o.refuse("another root")
    return kind, [kind], arithmetic.approximate_reciprocal_root


def _shift(o: Operands, kind: str) -> Signature:
    if not (o.take("l") and o.take("wrap")):
        raise o.refuse("another direction or clamping")
    return kind, ["b32", "b32", "u32"], arithmetic.funnel_shift_left


def _count(function: Callable[[int, int], int]) -> Callable[[Operands, str], Signature]:
    def signature(o: Operands, kind: str) -> Signature:
        bits = int(kind[1:])
        return "u32", [kind], lambda a: np.array([function(int(x), bits) for x in a], np.uint32)

    return signature


SIGNATURES: dict[str, Callable[[Operands, str], Signature]] = {
    "add": _simple(np.add),
    "sub": _simple(np.subtract),
    "mul": _multiply,
    "mad": _multiply_add,
    "fma": _floats(arithmetic.fma, 3),
    "div": _divide,
    "rem": _integers(lambda a, b: arithmetic.divide_integers(a, b)[1]),
    "min": _extreme(False),
    "max": _extreme(True),
    "neg": _simple(np.negative, 1),
    "abs": _simple(np.abs, 1),
    "sqrt": _floats(np.sqrt, 1),
    "rcp": _reciprocal,
    "rsqrt": _reciprocal_root,
    "and": _integers(np.bitwise_and),
    "or": _integers(np.bitwise_or),
    "xor": _integers(np.bitwise_xor),
    "not": lambda o, kind: (kind, [kind], np.invert),
    "shl": _integers(arithmetic.shift_left, "u32"),
    "shr": _integers(arithmetic.shift_right, "u32"),
    "shf": _shift,
    "bfe": _integers(arithmetic.extract_field, "u32", "u32"),
    "popc": _count(lambda x, bits: x.bit_count()),
    "clz": _count(lambda x, bits: bits - x.bit_length()),
}


def decode_arithmetic(o: Operands, *operands: str) -> Run:
    """Any of SIGNATURES."""
    result, kinds, function = SIGNATURES[o.instruction.opcode](o, o.take_type())
    if len(kinds) != len(operands) - 1:
        raise o.refuse(f"{len(operands)} operands")
    reads = [o.source(text, kind) for text, kind in zip(operands[1:], kinds, strict=True)]
    write = o.destination(operands[0], result)
    if len(reads) == 2:
        # The most frequent case, without a list.
        first, second = reads
        return lambda w, mask: write(w, function(first(w), second(w)), mask)
    return lambda w, mask: write(w, function(*[read(w) for read in reads]), mask)


def decode_carry_chain(o: Operands, *operands: str) -> Run:
    """add.cc, addc, sub.cc, subc, mad.lo.cc, madc.hi and their kin: unsigned, with a carry from one to the next."""
    opcode, sets_carry, kind = o.instruction.opcode, bool(o.take("cc")), o.take_type()
    high, reads_carry = o.take("lo", "hi") == "hi", opcode.endswith("c")
    if kind not in ("u32", "u64"):
        raise o.refuse("carry of this type")
    reads = [o.source(text, kind) for text in operands[1:]]
    write = o.destination(operands[0], kind)
    modulus = 2 ** int(kind[1:])

    def run(w: Warp, mask: Any) -> None:
        totals = []
        carries = w.carry.tolist() if reads_carry else [0] * WARP
        for carry, *values in zip(carries, *[read(w).tolist() for read in reads], strict=True):
            if opcode.startswith("sub"):
                totals.append(values[0] - values[1] - carry)
            elif opcode.startswith("add"):
                totals.append(values[0] + values[1] + carry)
            else:
                upper, lower = divmod(values[0] * values[1], modulus)
                totals.append((upper if high else lower) + values[2] + carry)
        write(w, np.array([total % modulus for total in totals], NUMPY[kind]), mask)
        if sets_carry:
            carry_out = [int(not 0 <= total < modulus) for total in totals]
            w.carry = np.where(FULL if mask is None else mask, carry_out, w.carry)

    return run


# -- moves, conversions and comparisons --------------------------------------------------------------------------------
def decode_move(o: Operands, target: str, source: str) -> Run:
    """mov, also between a register and the parts of it."""
    kind = o.take_type()
    if not target.startswith("{") and not source.startswith("{"):
        read, write = o.source(source, kind), o.destination(target, kind)
        return lambda w, mask: write(w, read(w), mask)
    parts = o.vector(target if target.startswith("{") else source)
    bits = 8 * NUMPY[kind].itemsize
    part, whole = f"u{bits // len(parts)}", f"u{bits}"
    if target.startswith("{"):
        read = o.source(source, whole)
        writes = [o.destination(name, part) for name in parts]

        def unpack(w: Warp, mask: Any) -> None:
            pieces = np.ascontiguousarray(read(w)).view(NUMPY[part]).reshape(WARP, -1)
            _write_columns(w, pieces, writes, mask)

        return unpack
    reads = [o.source(name, part) for name in parts]
    write = o.destination(target, whole)
    return lambda w, mask: write(w, np.stack([read(w) for read in reads], axis=1).view(NUMPY[whole])[:, 0], mask)


def _write_columns(w: Warp, columns: Any, writes: list[Write], mask: Any) -> None:
    for position, write in enumerate(writes):
        write(w, columns[:, position].copy(), mask)


def decode_conversion(o: Operands, target: str, *sources: str) -> Run:
    """cvt of one value, or of two into a pair of 16 bits."""
    kind, result = o.take_type(), o.take_type()
    rounding = o.take("rn", *arithmetic.WHOLE)
    if result in ("f16x2", "bf16x2"):
        half = arithmetic.conversion(result.removesuffix("x2"), kind, rounding)
        upper, lower = (o.source(source, kind) for source in sources)
        write = o.destination(target, "b32")
        return lambda w, mask: write(w, np.stack([half(lower(w)), half(upper(w))], axis=1).view(np.uint32)[:, 0], mask)
    (source,) = sources
    convert = arithmetic.conversion(result, kind, rounding)
    read, write = o.source(source, kind), o.destination(target, result)
    return lambda w, mask: write(w, convert(read(w)), mask)


def decode_comparison(o: Operands, target: str, first: str, second: str) -> Run:
    """setp, of pairs of 16 bits too; a second predicate is the negation or the other half."""
    kind, name = o.take_type(), o.modifiers.pop(0)
    writes = [o.destination(part, "pred") for part in target.split("|")]
    is_pair = kind.endswith("x2")
    compare = arithmetic.comparison(name, kind.removesuffix("x2"))
    if not is_pair:
        a, b = o.source(first, kind), o.source(second, kind)
        if len(writes) != 1:
            raise o.refuse("two predicates")
        (write,) = writes
        return lambda w, mask: write(w, compare(a(w), b(w)), mask)
    if len(writes) != 2:
        raise o.refuse("one predicate of two halves")
    a, b = o.source(first, "b32"), o.source(second, "b32")
    half = NUMPY[kind.removesuffix("x2")]
    return lambda w, mask: _write_columns(
        w, compare(*(read(w).view(half).reshape(WARP, 2) for read in (a, b))), writes, mask
    )


def decode_selection(o: Operands, target: str, first: str, second: str, predicate: str) -> Run:
    """selp."""
    kind = o.take_type()
    a, b, chosen = o.source(first, kind), o.source(second, kind), o.source(predicate, "pred")
    write = o.destination(target, kind)
    return lambda w, mask: write(w, np.where(chosen(w), a(w), b(w)), mask)
