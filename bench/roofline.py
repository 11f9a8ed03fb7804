"""The least time a step can take on a GPU, from the bytes and operations of the compiled kernels. It needs no GPU.

python -m bench.roofline [--bandwidth 4.3e12] [--results bench/results/captured-cuda.json ...] [--out bench/results]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from bench.cases import CASES, Case
from bench.environment import runs_interpreted
from bench.peers import OURS
from bench.schema import Result, Row

# H200: a large copy through torch, bytes read and written counted, on a machine of this kind.
BANDWIDTH = 4.3e12
# H200 by its datasheet: 67 TFLOP/s of float32, where a fused multiply-add counts two, so half as many instructions.
INSTRUCTION_RATE = 33.5e12

TITLES = (
    "case",
    "tensors",
    "elements",
    "bytes / element",
    "operations / element",
    "instructions / element",
    "GB",
    "floor us",
    "issue us (at most)",
    "measured us (p50)",
    "floor / measured",
)


class Cost(NamedTuple):
    """Of one element: bytes loaded and stored, float32 operations, instructions at most."""

    moved: float
    operations: float
    instructions: float


class Floor(NamedTuple):
    """The least a step of a case takes.

    Attributes:
        case: The case.
        moved: Bytes loaded and stored.
        operations: Float32 operations; a fused multiply-add counts two.
        instructions: Of all threads, at most.
        us: Microseconds to move the bytes: no step is faster.
        issue_us: Microseconds in which all instructions can be issued; less than ``us`` where memory decides.
    """

    case: Case
    moved: float
    operations: float
    instructions: float
    us: float
    issue_us: float


def compiled_cost(dtype: torch.dtype) -> Cost:
    """Of an element of a parameter, with a gradient of its dtype, from compiled code."""
    from bench.instructions import element_cost

    name = str(dtype).removeprefix("torch.")
    cost = element_cost(name, name)
    return Cost(cost.moved, cost.operations, cost.instructions)


def floor_of(case: Case, cost_of: Callable[[torch.dtype], Cost], bandwidth: float, instruction_rate: float) -> Floor:
    """The floor of a case. Tables, and what a launch costs, are left out; clipping is one more read of the gradients.

    Args:
        case: The case.
        cost_of: The cost of an element of each dtype.
        bandwidth: Bytes per second, those read and those written counted.
        instruction_rate: Instructions per second, of all threads.
    """
    moved = operations = instructions = 0.0
    for dtype, count in case.elements().items():
        cost = cost_of(dtype)
        moved += count * (cost.moved + (dtype.itemsize if case.clips else 0))
        operations += count * cost.operations
        instructions += count * cost.instructions
    us, issue_us = moved / bandwidth * 1e6, instructions / instruction_rate * 1e6
    return Floor(case, moved, operations, instructions, us, issue_us)


def measured_rows(results: Iterable[Result]) -> list[Row]:
    """Our captured rows: device time, one per case; the last result wins."""
    rows: dict[str, Row] = {}
    for result in results:
        for row in result.rows:
            if row.mode == "captured" and row.peer == OURS.name and row.status == "measured":
                rows[row.case] = row
    return list(rows.values())


def copy_bandwidth_of(results: Iterable[Result]) -> float:
    """The copy bandwidth that the results were measured beside, the largest; BANDWIDTH if none says."""
    stated = [float(result.stamp["copy_tb_per_s"]) * 1e12 for result in results if "copy_tb_per_s" in result.stamp]
    return max(stated, default=BANDWIDTH)


def as_markdown(floors: Iterable[Floor], rows: Iterable[Row], bandwidth: float, instruction_rate: float) -> str:
    """The floors as a table, measured times beside them."""
    measured = {row.case: row.us_p50 for row in rows}
    lines = [
        "# Roofline",
        "",
        f"The floor of a step is its bytes at {bandwidth / 1e12:.2f} TB/s; beside it, the time to issue its "
        f"instructions at {instruction_rate / 1e12:.1f} T/s. All are counted in the code compiled for sm_90, of the "
        "path that whole, aligned chunks take. Instructions are an upper bound: calls of the rare slow paths of "
        "division and root count. Launches, tables and the short chunks at the ends of tensors are left out, so sets "
        "of tiny tensors have next to no floor. The extra read of clipping is counted by hand.",
        "",
        "| " + " | ".join(TITLES) + " |",
        "|---" * len(TITLES) + "|",
    ]
    for floor in floors:
        case, numel = floor.case, floor.case.numel
        cells = [case.name, f"{case.num_tensors:,}", f"{numel:,}", f"{floor.moved / numel:.1f}"]
        cells += [f"{floor.operations / numel:.1f}", f"{floor.instructions / numel:.1f}"]
        cells += [f"{floor.moved / 1e9:,.3f}", f"{floor.us:,.2f}", f"{floor.issue_us:,.2f}"]
        time = measured.get(case.name)
        cells += ["", ""] if time is None else [f"{time:,.1f}", f"{floor.us / time:.1%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Writes ``roofline.md`` and ``roofline.png``."""
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("--bandwidth", type=float, help="bytes per second (default: of the results, or 4.3e12)")
    parser.add_argument("--instruction-rate", type=float, default=INSTRUCTION_RATE, help="per second, of all threads")
    parser.add_argument(
        "--results", type=Path, nargs="*", default=[], help="files of `python -m bench --mode captured`"
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--no-plot", action="store_true")
    arguments = parser.parse_args()
    if runs_interpreted():
        print("the roofline reads compiled code, and TRITON_INTERPRET=1 compiles nothing: unset it", file=sys.stderr)
        return 2
    # 64 groups move the same bytes.
    cases = [case for case in CASES if case.num_groups == 1]
    results = [Result.read(path) for path in arguments.results]
    bandwidth = arguments.bandwidth or copy_bandwidth_of(results)
    floors = [floor_of(case, compiled_cost, bandwidth, arguments.instruction_rate) for case in cases]
    rows = measured_rows(results)
    table = as_markdown(floors, rows, bandwidth, arguments.instruction_rate)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "roofline.md").write_text(table)
    print(table)
    if not arguments.no_plot:
        try:
            from bench.plots import plot_roofline

            points = {floor.case.name: (floor.moved, floor.us) for floor in floors}
            plot_roofline(points, rows, bandwidth, arguments.out / "roofline.png")
        except ImportError as error:
            print(f"no plot: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
