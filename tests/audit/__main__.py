"""Compiles the kernels for every target and reads the machine code; exits with 1 if it is not what it should be.

python -m tests.audit [--match REGEX] [--kernels FOLDER] [--processes 2]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checks import Result
    from .variants import Kernels, Variant

ROOT = Path(__file__).parents[2]
COLUMNS = "{:56} {:>9} {:>6} {:>12} {:>7}  {}"


def main() -> int:
    """Runs the audit and prints a table."""
    parser = argparse.ArgumentParser(prog="python -m tests.audit", description=__doc__.splitlines()[0])
    parser.add_argument("--match", default="", help="audit only variants whose name holds this regular expression")
    parser.add_argument("--kernels", type=Path, default=ROOT / "kernels", help="folder of the kernels")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes", "y"):
        print("the audit reads compiled code, and TRITON_INTERPRET=1 compiles nothing: unset it", file=sys.stderr)
        return 2

    from .variants import all_variants

    variants = [variant for variant in all_variants() if re.search(arguments.match, variant.name)]
    if not variants:
        print(f"no variant matches {arguments.match!r}", file=sys.stderr)
        return 2
    print(COLUMNS.format("variant", "registers", "blocks", "bytes", "float64", "problems"))
    failures = 0
    with multiprocessing.get_context("fork").Pool(arguments.processes) as pool:
        tasks = [(arguments.kernels.resolve(), variant) for variant in variants]
        for result in pool.imap(_audit_in_worker, tasks):
            print(_as_row(result), flush=True)
            failures += bool(result.problems)
    print(f"{len(variants)} variants, {failures} with problems")
    print("blocks: programs per multiprocessor by registers; bytes: loaded + stored per element, in 128-bit accesses")
    return 1 if failures else 0


@cache
def _load_kernels(folder: Path) -> Kernels:
    from .variants import Kernels

    return Kernels(folder)


def _audit_in_worker(task: tuple[Path, Variant]) -> Result:
    from .checks import audit

    folder, variant = task
    return audit(_load_kernels(folder), variant)


def _as_row(result: Result) -> str:
    problems = "; ".join(result.problems) or "ok"
    if result.reading is None:
        return COLUMNS.format(result.variant.name, "", "", "", "", problems)
    reading = result.reading
    total = result.loaded + result.stored
    moved = f"{result.loaded:g}+{result.stored:g}={total:g}" if total else ""
    return COLUMNS.format(result.variant.name, reading.registers, reading.blocks, moved, reading.float64, problems)


if __name__ == "__main__":
    sys.exit(main())
