"""Readers of SASS and AMDGCN: registers, spills, the width of memory accesses, float64 arithmetic."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Container
from pathlib import Path
from typing import NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# Of an NVIDIA multiprocessor, sm_80 to sm_100: registers, threads, and what a warp's registers are rounded up to.
REGISTERS = 65536
THREADS = 2048
REGISTER_UNIT = 256
# Of an AMD compute unit, gfx9.
SIMDS = 4

WIDE_BYTES = 16


class Reading(NamedTuple):
    """What a kernel's machine code says about it.

    Attributes:
        registers: Of a thread.
        blocks: Programs that fit on a multiprocessor, going by registers and threads.
        spills: Bytes of local memory of a thread, and instructions that access it, as text; empty if there are none.
        wide_loads: 128-bit loads a thread does in the path of whole, aligned chunks.
        wide_stores: Likewise.
        float64: Float64 arithmetic instructions; conversions are none.
        barriers: Block barriers in the code, those of the retire protocol among them.
        instructions: That a thread issues for a whole, aligned chunk, its look-up included; 0 if that is not known.
    """

    registers: int
    blocks: int
    spills: str
    wide_loads: int
    wide_stores: int
    float64: int
    barriers: int
    instructions: int


def _run(tool: str, *arguments: str | Path) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def count_instructions(sass: str) -> int:
    """Instructions on the shortest way through the loop over chunks, from its first 128-bit load back to that.

    Only the way of whole, aligned chunks has such accesses. Slow paths are calls, which no other way makes.
    """
    rows: list[tuple[str, str, str]] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(rows)
        elif row := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)", line):
            rows.append((row[1] or "", row[2], row[3]))
    following: list[list[int]] = []
    for index, (guard, opcode, operands) in enumerate(rows):
        target = re.search(r"`\((\.L_x_\d+)\)", operands)
        jumps = opcode.startswith(("BRA", "CALL"))
        is_conditional = bool(guard) or bool(re.match(r"\s*!?U?P\d", operands))
        ends = (jumps or opcode.startswith(("EXIT", "RET"))) and not is_conditional
        following.append([labels[target[1]]] if jumps and target else [])
        following[-1] += [] if ends or index + 1 == len(rows) else [index + 1]

    def distance(start: int, end: int) -> int:
        reached, pending = {start: 0}, [start]
        for index in pending:
            for after in following[index]:
                if after == end:
                    return reached[index] + 1
                if after not in reached:
                    reached[after] = reached[index] + 1
                    pending.append(after)
        return 0

    wide = [index for index, row in enumerate(rows) if re.match(r"(LDG|STG)\b.*\.128\b", row[1])]
    if not wide:
        return 0
    way, back = distance(wide[0], wide[-1]), distance(wide[-1], wide[0])
    return way + back if way and back else 0


def read_cubin(cubin: bytes, num_warps: int) -> Reading:
    """Reads NVIDIA machine code. All 128-bit accesses count: nothing but the chunk path may have any."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        # Without data flow, which takes as long as the rest.
        usage, sass = _run("cuobjdump", "-res-usage", path), _run("nvdisasm", "-c", "-ndf", path)
    counts = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass)
    local = sum(opcode.startswith(("LDL", "STL")) for opcode in opcodes)
    has_local = counts["STACK"] or counts["LOCAL"] or local
    warp_registers = -(-counts["REG"] * 32 // REGISTER_UNIT) * REGISTER_UNIT
    return Reading(
        registers=counts["REG"],
        blocks=min(REGISTERS // warp_registers, THREADS // 32) // num_warps,
        spills=f"STACK:{counts['STACK']} LOCAL:{counts['LOCAL']}, {local} LDL/STL" if has_local else "",
        wide_loads=sum(bool(re.fullmatch(r"LDG\b.*\.128\b.*", opcode)) for opcode in opcodes),
        wide_stores=sum(bool(re.fullmatch(r"STG\b.*\.128\b.*", opcode)) for opcode in opcodes),
        # Comparisons and minima too; F2F, I2F and F2I convert.
        float64=sum(bool(re.match(r"D(ADD|MUL|FMA|SETP|MNMX|SET)\b|MUFU\.\w+64H", opcode)) for opcode in opcodes),
        barriers=sum(opcode.startswith("BAR.SYNC") for opcode in opcodes),
        instructions=count_instructions(sass),
    )


def read_amdgcn(text: str, num_warps: int, access_lines: Container[int], call_line: int) -> Reading:
    """Reads AMD machine code.

    LLVM merges neighbouring loads here, unaligned ones and those of table rows too. So an access counts by its source:
    on one of ``access_lines``, inlined from ``call_line``.

    Args:
        text: A listing with line information.
        num_warps: Wavefronts of a program.
        access_lines: Lines that load and store the elements of a chunk.
        call_line: Line of the call that handles whole, aligned chunks.
    """
    figures = {
        name: int(found[1])
        for name, pattern in {
            "registers": r"\.vgpr_count:\s*(\d+)",
            "vector spills": r"\.vgpr_spill_count:\s*(\d+)",
            "scalar spills": r"\.sgpr_spill_count:\s*(\d+)",
            "scratch bytes": r"\.private_segment_fixed_size:\s*(\d+)",
            "waves": r"; Occupancy:\s*(\d+)",
        }.items()
        if (found := re.search(pattern, text))
    }
    wide = {"load": 0, "store": 0}
    float64 = 0
    in_chunk_path = False
    for line in text.splitlines():
        if location := re.match(r"\s*\.loc\s+\d+\s+(\d+)[^;]*;?(.*)", line):
            callers = {int(number) for number in re.findall(r"@\[ \S+?:(\d+):", location[2])}
            in_chunk_path = int(location[1]) in access_lines and call_line in callers
        elif access := re.match(r"\s+(?:global|flat|buffer)_(load|store)_dwordx4\b", line):
            wide[access[1]] += in_chunk_path
        elif re.match(r"\s+v_(?!cvt|mov|accvgpr)\w+_f64", line):
            float64 += 1
    kinds_of_spill = ("vector spills", "scalar spills", "scratch bytes")
    return Reading(
        registers=figures["registers"],
        blocks=figures["waves"] * SIMDS // num_warps,
        spills=", ".join(f"{figures[name]} {name}" for name in kinds_of_spill if figures[name]),
        wide_loads=wide["load"],
        wide_stores=wide["store"],
        float64=float64,
        barriers=len(re.findall(r"^\s+s_barrier\b", text, re.MULTILINE)),
        instructions=0,
    )
