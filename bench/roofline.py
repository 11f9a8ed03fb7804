"""The least time a step can take on a GPU, from the bytes and operations of the compiled kernels. It needs no GPU.

python -m bench.roofline [--bandwidth 4.3e12] [--results bench/results/captured-cuda.json ...] [--out bench/results]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from bench.cases import CASES, Case
from bench.package_internals import compile_updater
from bench.report import as_table, read_rows

NVDISASM = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
# Of float32 arithmetic: a fused multiply-add counts two.
OPERATIONS = {"FFMA": 2, "FADD": 1, "FMUL": 1, "MUFU": 1}
# H200: a large copy through torch, bytes read and written counted, on a machine of this kind.
BANDWIDTH = 4.3e12
# H200 by its datasheet: 67 TFLOP/s of float32, where a fused multiply-add counts two, so half as many instructions.
INSTRUCTION_RATE = 33.5e12

TITLES = (
    "case", "tensors", "elements", "bytes / element", "operations / element", "instructions / element", "GB",
    "floor us", "issue us", "measured us (p50)", "floor / measured",
)  # fmt: skip


class Cost(NamedTuple):
    """Of an element or of a step: bytes loaded and stored, float32 operations, instructions at most."""

    moved: float
    operations: float
    instructions: float


def count_opcodes(sass: str) -> Counter[str]:
    """Counts the instructions from the first 128-bit load to the last 128-bit store: the path of whole, aligned chunks.

    Only this path has such accesses (`make audit`). Where a compiler says which call an instruction is inlined from
    (triton 3.9), that gives the same arithmetic, and up to 5 % more instructions: addresses, before the first load.

    Args:
        sass: A listing of the kernel.

    Returns:
        Instructions by opcode, without modifiers.
    """
    opcodes = re.findall(r"\s/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass)
    wide = [index for index, opcode in enumerate(opcodes) if re.match(r"(LDG|STG)\b.*\.128\b", opcode)]
    if not wide:
        return Counter()
    return Counter(opcode.split(".")[0] for opcode in opcodes[wide[0] : wide[-1] + 1])


@cache
def compiled_cost(dtype: torch.dtype) -> Cost:
    """Of an element of a parameter, with a gradient of its dtype, from compiled code."""
    updater = compile_updater(dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(updater.cubin)
        command = [str(NVDISASM), "-c", "-ndf", str(path)]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts = count_opcodes(sass)
    if not counts:
        raise RuntimeError(f"the kernel compiled for {dtype} has no 128-bit loads or stores")
    operations = sum(weight * counts[opcode] for opcode, weight in OPERATIONS.items())
    moved = updater.loaded + updater.stored
    return Cost(moved, operations / updater.elements, counts.total() / updater.elements)


def cost_of_step(case: Case, cost_of: Callable[[torch.dtype], Cost]) -> Cost:
    """The cost of a step, without tables and launches; clipping is one more read of the gradients.

    Args:
        case: The case.
        cost_of: The cost of an element of each dtype.
    """
    moved = operations = instructions = 0.0
    for dtype, count in case.elements().items():
        cost = cost_of(dtype)
        moved += count * (cost.moved + (dtype.itemsize if case.clips else 0))
        operations += count * cost.operations
        instructions += count * cost.instructions
    return Cost(moved, operations, instructions)


def as_markdown(costs: dict[Case, Cost], measured: dict[str, float], bandwidth: float, instruction_rate: float) -> str:
    """The floors as a table, measured times beside them.

    Args:
        costs: Of a step of each case.
        measured: Microseconds of our captured step, by case name.
        bandwidth: Bytes per second, those read and those written counted.
        instruction_rate: Instructions per second, of all threads.
    """
    head = (
        "# Roofline\n\n"
        f"The floor of a step is its bytes at {bandwidth / 1e12:.2f} TB/s; beside it, the time to issue its "
        f"instructions at {instruction_rate / 1e12:.1f} T/s. All are counted in the code compiled for sm_90, of the "
        "path that whole, aligned chunks take, from its first load to its last store. Launches, tables and the short "
        "chunks at the ends of tensors are left out, so sets of tiny tensors have next to no floor. The extra read of "
        "clipping is counted by hand.\n"
    )
    rows = []
    for case, cost in costs.items():
        numel = case.elements().total()
        floor, issue, time = cost.moved / bandwidth, cost.instructions / instruction_rate, measured.get(case.name)
        cells = [case.name, f"{case.num_tensors:,}", f"{numel:,}", *(f"{count / numel:.1f}" for count in cost)]
        cells += [f"{cost.moved / 1e9:,.3f}", f"{floor * 1e6:,.2f}", f"{issue * 1e6:,.2f}"]
        rows.append([*cells, *(["", ""] if time is None else [f"{time:,.1f}", f"{floor * 1e6 / time:.1%}"])])
    return "\n".join([head, *as_table(TITLES, rows)]) + "\n"


def main() -> int:
    """Writes ``roofline.md``."""
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("--bandwidth", type=float, help="bytes per second (default: of the results, or 4.3e12)")
    parser.add_argument("--instruction-rate", type=float, default=INSTRUCTION_RATE, help="per second, of all threads")
    parser.add_argument("--results", type=Path, nargs="*", default=[], help="JSON of `pytest bench --part captured`")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes", "y"):
        print("the roofline reads compiled code, and TRITON_INTERPRET=1 compiles nothing: unset it", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = [r for path in arguments.results for r in read_rows(path) if r["mode"] == "captured"]
    # The last result of a case wins.
    measured = {row["case"]: row["us_p50"] for row in rows if row["peer"] == "fused-clr"}
    copies = [row["copy_gb_per_s"] * 1e9 for row in rows if "copy_gb_per_s" in row]
    bandwidth = arguments.bandwidth or max(copies, default=BANDWIDTH)
    # 64 groups move the same bytes.
    costs = {case: cost_of_step(case, compiled_cost) for case in CASES if case.num_groups == 1}
    table = as_markdown(costs, measured, bandwidth, arguments.instruction_rate)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "roofline.md").write_text(table)
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
