"""Every family of instructions computes what numpy, C or Python does, on ordinary and on extreme values."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from tests.ptx.assembled import run
from tests.ptx.dtypes import NUMPY, WARP

THREADS = 8 * WARP
REGISTERS = {1: "%h", 2: "%h", 4: "%r", 8: "%rd"}
LIBM = ctypes.CDLL("libm.so.6")
LIBM.fmaf.restype, LIBM.fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
LIBM.fma.restype, LIBM.fma.argtypes = ctypes.c_double, [ctypes.c_double] * 3


def values(kind: str, seed: int) -> Any:
    """Edges and random values of a type, in a random order."""
    rng = np.random.default_rng(seed)
    dtype = NUMPY[kind]
    if kind in ("f16", "f32", "f64", "bf16"):
        bits = rng.integers(0, 2**63, THREADS, np.uint64).astype(f"u{dtype.itemsize}").view(dtype)
        ordinary = rng.normal(size=THREADS)
        edges = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-40, 5e-324, 65504.0, 3e38, 0.5, 1.5, 2.5]
        edges += [2.0**31, -(2.0**63), 2.0**63, 1 + 2.0**-24, 1 + 2.0**-12, 1 + 2.0**-9]
        floats = np.where(rng.random(THREADS) < 0.6, ordinary, rng.choice(edges, THREADS))
        with np.errstate(over="ignore"):
            near = nearest_bfloat16(floats) if kind == "bf16" else floats.astype(dtype)
        return np.where(rng.random(THREADS) < 0.3, bits, near)
    size = 2 ** rng.integers(0, 8 * dtype.itemsize, THREADS, np.uint64)
    random = (rng.integers(0, 2**63, THREADS, np.uint64) % size).astype(dtype)
    either = np.where(rng.random(THREADS) < 0.5, random, np.zeros_like(random) - random)
    info = np.iinfo(dtype)
    extremes = np.array([0, 1, 2, 31, 32, 33, 64, info.max, info.min, info.max - 1], dtype)
    return np.where(rng.random(THREADS) < 0.7, either, rng.choice(extremes, THREADS))


class Case(NamedTuple):
    """An instruction of {d}, {a}, {b}, {c}, the types of d and of the sources, and what d should be."""

    text: str
    result: str
    sources: str
    oracle: Callable[..., Any]
    rtol: float = 0.0


def integers(function: Callable[..., int]) -> Callable[..., Any]:
    """An oracle of Python's integers."""
    return lambda *arrays: [function(*row) for row in zip(*[a.tolist() for a in arrays], strict=True)]


def floats(function: Callable[..., Any], dtype: Any) -> Callable[..., Any]:
    """An oracle of C's floats."""
    return lambda *arrays: np.array([function(*map(float, row)) for row in zip(*arrays, strict=True)], dtype)


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def signed(a: int) -> int:
    """The lower 32 bits as a signed integer."""
    return (a & 2**32 - 1 ^ 2**31) - 2**31


def nearest_bfloat16(x: Any) -> Any:
    bits = torch.from_numpy(x.copy()).bfloat16().view(torch.uint16).numpy()
    return np.where(np.isnan(x), np.uint16(0x7FFF), bits)


def widened(x: Any) -> Any:
    return torch.from_numpy(x.copy()).view(torch.bfloat16).float().numpy()


def saturated(rounded: Callable[[Any], Any], low: int, high: int) -> Callable[..., Any]:
    return lambda x: [0 if math.isnan(v) else int(min(max(v, low), high)) for v in rounded(x.astype(np.float64))]


def flushed(x: Any) -> Any:
    return torch.where(torch.from_numpy(x.copy()).abs() < 2.0**-126, 0.0, torch.from_numpy(x.copy()).abs()).numpy()


INTEGERS = {
    "add": Case("add.s32 {d}, {a}, {b};", "s32", "s32 s32", integers(lambda a, b: a + b)),
    "sub": Case("sub.s64 {d}, {a}, {b};", "s64", "s64 s64", integers(lambda a, b: a - b)),
    "mul.lo": Case("mul.lo.s64 {d}, {a}, {b};", "s64", "s64 s64", integers(lambda a, b: a * b)),
    "mul.hi": Case("mul.hi.u32 {d}, {a}, {b};", "u32", "u32 u32", integers(lambda a, b: a * b >> 32)),
    "mul.hi.64": Case("mul.hi.s64 {d}, {a}, {b};", "s64", "s64 s64", integers(lambda a, b: a * b >> 64)),
    "mul.wide": Case("mul.wide.s32 {d}, {a}, {b};", "s64", "s32 s32", integers(lambda a, b: a * b)),
    "mad.lo": Case("mad.lo.s32 {d}, {a}, {b}, {c};", "s32", "s32 s32 s32", integers(lambda a, b, c: a * b + c)),
    "mad.wide": Case("mad.wide.u32 {d}, {a}, {b}, {c};", "u64", "u32 u32 u64", integers(lambda a, b, c: a * b + c)),
    # A quotient by 0 is not specified.
    "div.signed": Case(
        "or.b64 {b}, {b}, 1; div.s64 {d}, {a}, {b};", "s64", "s64 s64", integers(lambda a, b: truncated(a, b | 1))
    ),
    "div.unsigned": Case(
        "or.b32 {b}, {b}, 1; div.u32 {d}, {a}, {b};", "u32", "u32 u32", integers(lambda a, b: a // (b | 1))
    ),
    "rem": Case(
        "or.b32 {b}, {b}, 1; rem.s32 {d}, {a}, {b};", "s32", "s32 s32",
        integers(lambda a, b: a - (b | 1) * truncated(a, b | 1)),
    ),
    "min": Case("min.s64 {d}, {a}, {b};", "s64", "s64 s64", integers(min)),
    "max": Case("max.u32 {d}, {a}, {b};", "u32", "u32 u32", integers(max)),
    "neg": Case("neg.s32 {d}, {a};", "s32", "s32", integers(lambda a: -a)),
    "abs": Case("abs.s32 {d}, {a};", "s32", "s32", integers(abs)),
    "and": Case("and.b64 {d}, {a}, {b};", "b64", "b64 b64", integers(lambda a, b: a & b)),
    "or": Case("or.b32 {d}, {a}, {b};", "b32", "b32 b32", integers(lambda a, b: a | b)),
    "xor": Case("xor.b64 {d}, {a}, {b};", "b64", "b64 b64", integers(lambda a, b: a ^ b)),
    "not": Case("not.b32 {d}, {a};", "b32", "b32", integers(lambda a: ~a)),
    "shl": Case("shl.b32 {d}, {a}, {b};", "b32", "b32 u32", integers(lambda a, b: a << b if b < 32 else 0)),
    "shr.signed": Case("shr.s64 {d}, {a}, {b};", "s64", "s64 u32", integers(lambda a, b: a >> min(b, 63))),
    "shr.unsigned": Case("shr.u32 {d}, {a}, {b};", "u32", "u32 u32", integers(lambda a, b: a >> min(b, 32))),
    "shf": Case(
        "shf.l.wrap.b32 {d}, {a}, {b}, {c};", "b32", "b32 b32 u32",
        integers(lambda a, b, c: ((b << 32 | a) << (c & 31)) >> 32),
    ),
    "bfe.unsigned": Case(
        "and.b32 {b}, {b}, 15; and.b32 {c}, {c}, 15; bfe.u32 {d}, {a}, {b}, {c};", "u32", "u32 u32 u32",
        integers(lambda a, b, c: a >> (b & 15) & (1 << (c & 15)) - 1),
    ),
    "bfe.signed": Case(
        "and.b32 {b}, {b}, 15; and.b32 {c}, {c}, 15; bfe.s32 {d}, {a}, {b}, {c};", "s32", "s32 u32 u32",
        integers(lambda a, b, c: signed(a << (32 - (b & 15) - (c & 15))) >> 32 - (c & 15) if c & 15 else 0),
    ),
    "popc": Case("popc.b64 {d}, {a};", "u32", "b64", integers(int.bit_count)),
    "clz": Case("clz.b64 {d}, {a};", "u32", "b64", integers(lambda a: 64 - a.bit_length())),
    "add.cc": Case(
        "mov.b64 {{%r5, %r6}}, {a}; mov.b64 {{%r7, %r8}}, {b}; add.cc.u32 %r5, %r5, %r7; addc.u32 %r6, %r6, %r8; "
        "mov.b64 {d}, {{%r5, %r6}};", "u64", "u64 u64", integers(lambda a, b: a + b),
    ),
    "sub.cc": Case(
        "mov.b64 {{%r5, %r6}}, {a}; mov.b64 {{%r7, %r8}}, {b}; sub.cc.u32 %r5, %r5, %r7; subc.u32 %r6, %r6, %r8; "
        "mov.b64 {d}, {{%r5, %r6}};", "u64", "u64 u64", integers(lambda a, b: a - b),
    ),
    "mad.cc": Case(
        "mov.b64 {{%r5, %r6}}, {c}; mad.lo.cc.u32 %r5, {a}, {b}, %r5; madc.hi.u32 %r6, {a}, {b}, %r6; "
        "mov.b64 {d}, {{%r5, %r6}};", "u64", "u32 u32 u64", integers(lambda a, b, c: a * b + c),
    ),
}  # fmt: skip
FLOATS = {
    "add": Case("add.f32 {d}, {a}, {b};", "f32", "f32 f32", np.add),
    "sub": Case("sub.f64 {d}, {a}, {b};", "f64", "f64 f64", np.subtract),
    "mul": Case("mul.rn.f64 {d}, {a}, {b};", "f64", "f64 f64", np.multiply),
    "fma.f32": Case("fma.rn.f32 {d}, {a}, {b}, {c};", "f32", "f32 f32 f32", floats(LIBM.fmaf, np.float32)),
    "fma.f64": Case("fma.rn.f64 {d}, {a}, {b}, {c};", "f64", "f64 f64 f64", floats(LIBM.fma, np.float64)),
    "div": Case("div.rn.f32 {d}, {a}, {b};", "f32", "f32 f32", np.divide),
    "sqrt": Case("sqrt.rn.f64 {d}, {a};", "f64", "f64", np.sqrt),
    "neg": Case("neg.f32 {d}, {a};", "f32", "f32", np.negative),
    "abs": Case("abs.f64 {d}, {a};", "f64", "f64", np.abs),
    "abs.ftz": Case("abs.ftz.f32 {d}, {a};", "f32", "f32", flushed),
    "min": Case("min.f32 {d}, {a}, {b};", "f32", "f32 f32", np.fmin),
    "max": Case("max.f64 {d}, {a}, {b};", "f64", "f64 f64", np.fmax),
    "max.NaN": Case("max.NaN.f32 {d}, {a}, {b};", "f32", "f32 f32", np.maximum),
    "rcp": Case("rcp.rn.f64 {d}, {a};", "f64", "f64", lambda a: 1 / a),
    # Of 20 bits of mantissa, in the argument and in the result.
    "rcp.approx": Case("rcp.approx.ftz.f64 {d}, {a};", "f64", "f64", lambda a: 1 / a, rtol=2.0**-18),
    "rsqrt.approx": Case(
        "rsqrt.approx.ftz.f32 {d}, {a};",
        "f32",
        "f32",
        lambda a: 1 / np.sqrt(np.where(np.abs(a) < 2.0**-126, 0, a.astype(np.float64))),
        rtol=2.0**-22.9,
    ),
}
CONVERSIONS = {
    "f32 to bf16": Case("cvt.rn.bf16.f32 {d}, {a};", "bf16", "f32", nearest_bfloat16),
    "bf16 to f32": Case("cvt.f32.bf16 {d}, {a};", "f32", "bf16", widened),
    "f32 to f16": Case("cvt.rn.f16.f32 {d}, {a};", "f16", "f32", lambda a: a.astype(np.float16)),
    "f16 to f32": Case("cvt.f32.f16 {d}, {a};", "f32", "f16", lambda a: a.astype(np.float32)),
    "f64 to f32": Case("cvt.rn.f32.f64 {d}, {a};", "f32", "f64", lambda a: a.astype(np.float32)),
    "s64 to f32": Case("cvt.rn.f32.s64 {d}, {a};", "f32", "s64", lambda a: a.astype(np.float32)),
    "u64 to f64": Case("cvt.rn.f64.u64 {d}, {a};", "f64", "u64", lambda a: a.astype(np.float64)),
    "f64 to s32": Case("cvt.rni.s32.f64 {d}, {a};", "s32", "f64", saturated(np.rint, -(2**31), 2**31 - 1)),
    "f32 to s32": Case("cvt.rzi.s32.f32 {d}, {a};", "s32", "f32", saturated(np.trunc, -(2**31), 2**31 - 1)),
    "f32 to u32": Case("cvt.rmi.u32.f32 {d}, {a};", "u32", "f32", saturated(np.floor, 0, 2**32 - 1)),
    "s32 to s64": Case("cvt.s64.s32 {d}, {a};", "s64", "s32", integers(lambda a: a)),
    "u32 to u64": Case("cvt.u64.u32 {d}, {a};", "u64", "u32", integers(lambda a: a)),
    "u64 to u32": Case("cvt.u32.u64 {d}, {a};", "u32", "u64", integers(lambda a: a)),
    "two to bf16": Case(
        "cvt.rn.bf16x2.f32 {d}, {a}, {b};", "b32", "f32 f32",
        lambda a, b: nearest_bfloat16(a).astype(np.uint32) << np.uint32(16) | nearest_bfloat16(b),
    ),
    "two to f16": Case(
        "cvt.rn.f16x2.f32 {d}, {a}, {b};", "b32", "f32 f32",
        lambda a, b: np.stack([b, a], axis=1).astype(np.float16).view(np.uint32)[:, 0],
    ),
    "parts": Case(
        "mov.b32 {{%h5, %h6}}, {a}; mov.b32 {d}, {{%h6, %h5}};", "b32", "b32",
        integers(lambda a: a >> 16 | a << 16),
    ),
}  # fmt: skip


def predicate(instruction: str, kinds: str, oracle: Callable[..., Any]) -> Case:
    return Case(f"{instruction} %p1, {{a}}, {{b}}; selp.b32 {{d}}, 1, 0, %p1;", "b32", kinds, oracle)


COMPARISONS = {
    f"{name}.{kind}": predicate(f"setp.{name}.{kind}", f"{kind} {kind}", compare)
    for name, compare in (
        ("eq", np.equal), ("ne", np.not_equal), ("lt", np.less), ("le", np.less_equal), ("gt", np.greater),
        ("ge", np.greater_equal),
    )
    for kind in ("s32", "u64")
} | {
    "lt.f32": predicate("setp.lt.f32", "f32 f32", np.less),
    "ltu.f64": predicate("setp.ltu.f64", "f64 f64", lambda a, b: ~(a >= b)),
    "ne.f64": predicate("setp.ne.f64", "f64 f64", lambda a, b: (a < b) | (a > b)),
    "equ.f64": predicate("setp.equ.f64", "f64 f64", lambda a, b: ~((a < b) | (a > b))),
    "eq.f16": predicate("setp.eq.f16", "f16 f16", np.equal),
    "nan.f64": predicate("setp.nan.f64", "f64 f64", lambda a, b: np.isnan(a) | np.isnan(b)),
    "num.f32": predicate("setp.num.f32", "f32 f32", lambda a, b: ~np.isnan(a) & ~np.isnan(b)),
    "pair": Case(
        "setp.eq.bf16x2 %p1|%p2, {a}, {b}; selp.b32 {d}, 1, 0, %p1; selp.b32 %r5, 2, 0, %p2; or.b32 {d}, {d}, %r5;",
        "b32", "b32 b32",
        lambda a, b: (widened(a.view(np.uint16)) == widened(b.view(np.uint16))).reshape(-1, 2) @ [1, 2],
    ),
    "predicates": Case(
        "setp.lt.s32 %p1, {a}, {b}; setp.gt.s32 %p2, {a}, 0; and.pred %p3, %p1, %p2; not.pred %p3, %p3; "
        "selp.b32 {d}, {a}, {b}, %p3;",
        "s32", "s32 s32", lambda a, b: np.where((a < b) & (a > 0), b, a),
    ),
    "guard": Case(
        "mov.b32 {d}, {b}; setp.lt.s32 %p1, {a}, {b}; @!%p1 add.s32 {d}, {a}, 1;", "s32", "s32 s32",
        integers(lambda a, b: b if a < b else a + 1),
    ),
}  # fmt: skip
CASES = {
    f"{family} {name}": case
    for family, cases in (("int", INTEGERS), ("float", FLOATS), ("cvt", CONVERSIONS), ("setp", COMPARISONS))
    for name, case in cases.items()
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values(case: Case) -> None:
    kinds = [*case.sources.split(), case.result]
    names = "abc"[: len(kinds) - 1] + "d"
    registers = {name: f"{REGISTERS[NUMPY[k].itemsize]}{10 + i if NUMPY[k].itemsize > 2 else i + 1}"
                 for i, (name, k) in enumerate(zip(names, kinds, strict=True))}  # fmt: skip
    sources = [values(kind, seed) for seed, kind in enumerate(kinds[:-1])]
    memory = np.zeros((THREADS, 32), np.uint8)
    body = "mul.wide.u32 %rd2, %r1, 32; add.s64 %rd2, %rd1, %rd2;\n"
    for i, (name, source) in enumerate(zip(names, sources, strict=False)):
        memory[:, 8 * i : 8 * i + source.itemsize] = source.view(np.uint8).reshape(THREADS, -1)
        body += f"ld.global.b{8 * source.itemsize} {registers[name]}, [%rd2+{8 * i}];\n"
    dtype = NUMPY[case.result]
    body += case.text.format(**registers) + f"\nst.global.b{8 * dtype.itemsize} [%rd2+24], {registers['d']};"
    run(body, memory, THREADS)
    actual = memory[:, 24 : 24 + dtype.itemsize].copy().view(dtype)[:, 0]
    with np.errstate(all="ignore"):
        expected = case.oracle(*sources)
    if isinstance(expected, list):
        expected = np.array([value % 2 ** (8 * dtype.itemsize) for value in expected], f"u{dtype.itemsize}").view(dtype)
    if case.result == "bf16":
        actual, expected = widened(actual), widened(expected)
    assert len(np.unique(expected)) > 1
    if case.rtol:
        normal = np.isfinite(expected) & (np.abs(sources[0]) > 1e-300) & (np.abs(expected) > 1e-300)
        np.testing.assert_allclose(actual[normal], expected[normal], rtol=case.rtol)
    else:
        np.testing.assert_array_equal(actual, expected.astype(dtype) if dtype.kind != "u" else expected)


# -- lanes, memory and control -----------------------------------------------------------------------------------------
OWN_WORD = "mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2;"


@pytest.mark.parametrize(
    ("mode", "other"), [("bfly", lambda lane: lane ^ 5), ("idx", lambda lane: np.full(WARP, 5))], ids=["bfly", "idx"]
)
def test_shuffles(mode: str, other: Callable[[Any], Any]) -> None:
    body = f"{OWN_WORD} mul.lo.s32 %r3, %r1, %r1; shfl.sync.{mode}.b32 %r4, %r3, 5, 31, -1; st.global.b32 [%rd3], %r4;"
    assert np.array_equal(run(body)[:WARP], other(np.arange(WARP)) ** 2)


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_matrices_through_shared_memory(transposed: bool) -> None:
    """Lane i holds two elements of row i // 4 of each 8 x 8 matrix: PTX's layout of a fragment."""
    trans = ".trans" if transposed else ""
    store = f"stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r5], {{%r6, %r7, %r8, %r9}};"
    load = f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r6, %r7, %r8, %r9}}, [%r5];"
    address = "mov.b32 %r4, smem; shl.b32 %r5, %r1, 4; add.s32 %r5, %r4, %r5;"
    vector = "mul.wide.u32 %rd2, %r1, 16; add.s64 %rd3, %rd1, %rd2;"
    given = np.random.default_rng(0).integers(0, 2**16, 256).astype(np.uint16)
    through_registers = f"{vector} ld.global.v4.b32 {{%r6, %r7, %r8, %r9}}, [%rd3]; {address} {store} bar.warp.sync -1;"
    rows = run(
        f"{through_registers} ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%r5]; "
        "st.global.v4.b32 [%rd3], {%r10, %r11, %r12, %r13};",
        given.copy().view(np.int32), shared=512,
    )  # fmt: skip
    # given[lane, matrix, pair] -> [matrix, row, column]
    matrices = given.reshape(8, 4, 4, 2).transpose(2, 0, 1, 3).reshape(4, 8, 8)
    expected = matrices.transpose(0, 2, 1) if transposed else matrices
    assert np.array_equal(rows.view(np.uint16).reshape(4, 8, 8), expected)
    back = f"{through_registers} {load} st.global.v4.b32 [%rd3], {{%r6, %r7, %r8, %r9}};"
    assert np.array_equal(run(back, given.copy().view(np.int32), shared=512).view(np.uint16), given)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("add", 1 + 2 * sum(range(WARP))), ("max", 31), ("min", 0), ("or", 31), ("and", 0), ("xor", 1)],
)
def test_atomics(name: str, expected: int) -> None:
    first = 1 if name in ("add", "xor") else 31 if name == "and" else 0
    memory = run(f"atom.global.gpu.relaxed.{name}.b32 %r3, [%rd1], %r1;".replace("add.b32", "add.u32"),
                 np.array([first, 0], np.int32), grid=2 if name != "xor" else 1)  # fmt: skip
    assert memory[0] == expected


def test_compare_and_swap_and_exchange() -> None:
    swap, exchange = "atom.global.gpu.relaxed.cas.b32", "atom.global.gpu.relaxed.exch.b32"
    body = f"{OWN_WORD} {swap} %r3, [%rd1+128], 0, 7; {exchange} %r4, [%rd3], %r3;"
    memory = run(body)
    assert sorted(memory[:WARP]) == [0, *[7] * (WARP - 1)]
    assert memory[32] == 7


def test_vectors_and_widths() -> None:
    body = f"{OWN_WORD} ld.global.v2.b16 {{%h1, %h2}}, [%rd3]; st.global.v2.b16 [%rd3], {{%h2, %h1}};"
    given = np.arange(128, dtype=np.uint16)
    swapped = given.reshape(-1, 2)[:WARP, ::-1]
    assert np.array_equal(run(body, given.copy()).reshape(-1, 2)[:WARP], swapped)


def test_lanes_leave_a_loop_one_by_one_and_meet_again() -> None:
    body = f"""
mov.b32 %r3, 0;
$loop:
add.s32 %r3, %r3, 3;
setp.lt.s32 %p1, %r3, %r1;
@%p1 bra $loop;
bar.sync 0;
{OWN_WORD} st.global.b32 [%rd3], %r3;
"""
    assert np.array_equal(run(body, threads=64), np.maximum(-(-np.arange(64) // 3), 1) * 3)


def test_a_branch_through_a_table() -> None:
    body = f"""
and.b32 %r3, %r1, 1;
$table: .branchtargets $even, $odd;
brx.idx %r3, $table;
$even: mov.b32 %r4, 10; bra.uni $end;
$odd: mov.b32 %r4, 20;
$end: {OWN_WORD} st.global.b32 [%rd3], %r4;
"""
    assert np.array_equal(run(body)[:WARP], np.tile([10, 20], 16))


def test_a_call_with_local_memory_and_constants() -> None:
    before = """.global .align 8 .b32 squares[3] = {100, 200, 300};
.func (.param .b32 result) f(.param .b32 x)
{
.local .align 8 .b8 stack[8];
.reg .b32 %r<5>;
.reg .b64 %rd<5>;
ld.param.b32 %r1, [x];
mov.b64 %rd1, stack;
cvta.local.u64 %rd2, %rd1;
st.b32 [%rd2+4], %r1;
ld.global.nc.b32 %r2, [squares+4];
ld.local.b32 %r3, [%rd1+4];
add.s32 %r3, %r3, %r2;
st.param.b32 [result], %r3;
ret;
}"""
    body = f"""
setp.lt.s32 %p1, %r1, 7;
mov.b32 %r5, 0;
@%p1 bra $end;
{{
.param .b32 x;
.param .b32 result;
st.param.b32 [x], %r1;
call.uni (result), f, (x);
ld.param.b32 %r5, [result];
}}
$end: {OWN_WORD} st.global.b32 [%rd3], %r5;
"""
    assert np.array_equal(run(body, before=before)[:WARP], np.where(np.arange(WARP) < 7, 0, 200 + np.arange(WARP)))
