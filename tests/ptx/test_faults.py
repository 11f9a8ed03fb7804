"""Programs that do what they must not: each is reported by name. Their sound twins are not."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.assembled import kernel, run
from tests.ptx.faults import BarrierDivergence, DataRace, Deadlock, MemoryFault, PtxError, UnsupportedInstruction

OWN_WORD = "mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2;"
SHARED_WORD = "mov.b32 %r3, smem; shl.b32 %r4, %r1, 2; add.s32 %r5, %r3, %r4;"
SEEDS = range(3)


# -- memory ------------------------------------------------------------------------------------------------------------
FAULTS = {
    "after the end": ("ld.global.b32 %r3, [%rd1+256];", r"out of bounds: 4 bytes.*memory\[\+256 of 256 bytes\]"),
    "before the start": ("ld.global.b16 %h1, [%rd1+-2];", r"out of bounds: 2 bytes.*memory\[-2 of"),
    "across the end": ("st.global.v2.b64 [%rd1+248], {%rd1, %rd1};", "misaligned"),
    "a store": (f"{OWN_WORD} st.global.b32 [%rd3+160], %r1;", r"out of bounds.*st\.global.*warp 0 lane 24"),
    "an atomic": ("atom.global.gpu.relaxed.add.u32 %r3, [%rd1+256], 1;", "out of bounds.*atom"),
    "misaligned": ("ld.global.b32 %r3, [%rd1+2];", "misaligned: .*is no multiple of 4"),
    "a misaligned vector": ("ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%rd1+8];", "misaligned: .*is no multiple of 16"),
    "shared": ("mov.b32 %r3, smem; st.shared.b32 [%r3+64], %r1;", "out of bounds: 4 bytes at shared"),
    "never written": ("mov.b32 %r3, smem; ld.shared.b32 %r4, [%r3];", "uninitialised"),
}


@pytest.mark.parametrize(("body", "message"), FAULTS.values(), ids=FAULTS)
def test_memory_faults(body: str, message: str) -> None:
    with pytest.raises(MemoryFault, match=message):
        run(body, shared=64)


def test_lanes_that_do_not_take_part_touch_nothing() -> None:
    memory = run(f"setp.lt.u32 %p1, %r1, 20; {OWN_WORD} @%p1 st.global.b32 [%rd3], %r1;", np.full(20, -1, np.int32))
    assert np.array_equal(memory, np.arange(20))


# -- races -------------------------------------------------------------------------------------------------------------
SWAP = """
{word}
st.shared.b32 [%r5], %r1;
{barrier}
xor.b32 %r6, %r4, {distance};
add.s32 %r6, %r3, %r6;
ld.shared.b32 %r7, [%r6];
{own} st.global.b32 [%rd3], %r7;
"""


@pytest.mark.parametrize(
    ("barrier", "distance", "race"),
    [
        ("bar.sync 0;", 128, None),
        ("", 128, "write, then read.*same program|uninitialised"),
        ("bar.warp.sync -1;", 4, None),
        ("", 4, "write, then read.*same warp"),
        ("bar.warp.sync -1;", 128, "write, then read.*same program|uninitialised"),
        ("", 0, None),
    ],
)
def test_a_swap_through_shared_memory(barrier: str, distance: int, race: str | None) -> None:
    body = SWAP.format(word=SHARED_WORD, barrier=barrier, distance=distance, own=OWN_WORD)
    for seed in SEEDS:
        if race is None:
            memory = run(body, threads=64, shared=256, seed=seed)
            assert np.array_equal(memory, np.arange(64) ^ (distance // 4))
        else:
            with pytest.raises((DataRace, MemoryFault), match=race):
                run(body, threads=64, shared=256, seed=seed)


MESSAGE = """
setp.ne.u32 %p1, %r1, 0;
@%p1 bra $end;
setp.eq.u32 %p2, %r2, 1;
@%p2 bra $wait;
st.global.b32 [%rd1], 42;
{release} %r4, [%rd1+4], 1;
bra.uni $end;
$wait:
{acquire} %r5, [%rd1+4], 0;
setp.ne.b32 %p3, %r5, 1;
@%p3 bra $wait;
ld.global.b32 %r6, [%rd1];
st.global.b32 [%rd1+8], %r6;
$end:
"""


@pytest.mark.parametrize(
    ("release", "acquire", "sound"),
    [
        ("gpu.release", "gpu.acquire", True),
        ("gpu.acq_rel", "gpu.acq_rel", True),
        ("gpu.relaxed", "gpu.acquire", False),
        ("gpu.release", "gpu.relaxed", False),
        ("gpu.acquire", "gpu.release", False),
        ("cta.release", "cta.acquire", False),
    ],
)
def test_a_message_from_one_program_to_another(release: str, acquire: str, sound: bool) -> None:
    """One writes a word and raises a flag; the other waits for the flag and reads the word."""
    body = MESSAGE.format(release=f"atom.global.{release}.exch.b32", acquire=f"atom.global.{acquire}.or.b32")
    for seed in SEEDS:
        if sound:
            assert run(body, grid=2, seed=seed)[2] == 42
        else:
            with pytest.raises(DataRace, match="write, then (read|write).*other program.*at memory"):
                run(body, grid=2, seed=seed)


def test_different_values_from_lanes_of_one_instruction() -> None:
    with pytest.raises(DataRace, match="write and write.*same warp"):
        run("st.global.b32 [%rd1], %r1;")


def test_different_values_from_programs() -> None:
    with pytest.raises(DataRace, match=r"write, then write.*other program; 1 times, as at memory\[\+0\], program \d"):
        run("setp.ne.u32 %p1, %r1, 0; add.s32 %r3, %r2, 1; @!%p1 st.global.b32 [%rd1], %r3;", grid=2)


def test_a_read_before_a_write() -> None:
    body = f"{OWN_WORD} ld.global.b32 %r3, [%rd1]; setp.eq.u32 %p1, %r1, 63; @%p1 st.global.b32 [%rd1], %r1;"
    with pytest.raises(DataRace, match=r"(read, then write|write, then read).*same program"):
        run(body, threads=64)


def test_the_same_value_from_all_threads_is_no_race() -> None:
    assert run("st.global.b32 [%rd1], 7;", threads=64, grid=2)[0] == 7


def test_a_value_written_twice_still_races_with_its_reader() -> None:
    body = "setp.lt.u32 %p1, %r2, 2; @%p1 st.global.b32 [%rd1], 7; @!%p1 ld.global.b32 %r3, [%rd1];"
    for seed in range(8):
        with pytest.raises(DataRace, match=r"write, then read|read, then write"):
            run(body, grid=3, seed=seed)


# -- barriers and hangs ------------------------------------------------------------------------------------------------
def test_lanes_at_different_barriers() -> None:
    body = (
        "and.b32 %r3, %r1, 1; setp.eq.b32 %p1, %r3, 0; @%p1 bra $even; bar.sync 0; bra $end; $even: bar.sync 0; $end:"
    )
    with pytest.raises(BarrierDivergence, match="wait at different places.*bar.sync.*bar.sync"):
        run(body)


def test_a_warp_that_ends_before_a_barrier() -> None:
    with pytest.raises(BarrierDivergence, match="which others ended without.*is at 'bar.sync 0'"):
        run("setp.lt.u32 %p1, %r1, 32; @%p1 ret; bar.sync 0;", threads=64)


def test_warps_at_barriers_of_different_names() -> None:
    with pytest.raises(Deadlock, match="2 warps wait for a barrier"):
        run("shr.u32 %r3, %r1, 5; bar.sync %r3;", threads=64)


def test_a_wait_without_end() -> None:
    with pytest.raises(Deadlock, match=r"no end after .* is at"):
        run("$wait: ld.global.b32 %r3, [%rd1]; setp.eq.b32 %p1, %r3, 0; @%p1 bra $wait;", limit=2000)


def test_a_shuffle_from_a_lane_elsewhere() -> None:
    body = "setp.lt.u32 %p1, %r1, 16; @%p1 bra $end; shfl.sync.idx.b32 %r3, %r1, 3, 31, -1; $end:"
    with pytest.raises(PtxError, match="a lane that does not take part"):
        run(body)


# -- what is not known -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "instruction",
    [
        "tex.1d.v4.f32.s32 {%r1, %r2, %r3, %r4}, [%rd1, {%r5}];",
        "cp.async.ca.shared.global [%r1], [%rd1], 16;",
        "add.rz.f32 %f3, %f1, %f2;",
        "add.sat.s32 %r3, %r1, %r2;",
        "add.f16 %h3, %h1, %h2;",
        "div.approx.f32 %f3, %f1, %f2;",
        "sqrt.approx.f64 %fd3, %fd1;",
        "fma.rn.f16x2 %r1, %r2, %r3, %r4;",
        "mul.s32 %r1, %r2, %r3;",
        "mov.u32 %r3, %clock;",
        "add.s64 %rd3, %r1, %rd1;",
        "add.s32 %r3, %r1;",
        "ld.global.b32.foo %r1, [%rd1];",
        "ld.acquire.gpu.global.b32 %r1, [%rd1];",
        "fence.acq_rel.gpu;",
        "cvt.s32.f32 %r1, %f2;",
        "cvt.rz.f32.f64 %f1, %fd2;",
        "cvt.rni.sat.s32.f32 %r1, %f2;",
        "setp.foo.s32 %p1, %r1, %r2;",
        "bar.sync 0, 32;",
        "bra $nowhere;",
        ".surprise 7;",
    ],
)
def test_refused_when_decoded(instruction: str) -> None:
    with pytest.raises(UnsupportedInstruction, match="PTX line"):
        kernel(instruction)
