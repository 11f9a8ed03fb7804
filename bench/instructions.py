"""What a thread executes for a whole, aligned chunk, counted from the machine code of `bench.audit`."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

from bench.audit.checks import read
from bench.audit.machine_code import TOOLS, WIDE_BYTES
from bench.audit.variants import Kernels, Variant
from bench.stamp import ROOT

TARGET = "sm_90"
# Of float32 arithmetic: a fused multiply-add counts two.
OPERATIONS = {"FFMA": 2, "FADD": 1, "FMUL": 1, "MUFU": 1}


class ElementCost(NamedTuple):
    """What the update of one element takes.

    Attributes:
        loaded: Bytes of 128-bit loads.
        stored: Bytes of 128-bit stores.
        operations: Float32 operations.
        instructions: All instructions. An upper bound: the calls of the rare slow paths of division and root count.
    """

    loaded: float
    stored: float
    operations: float
    instructions: float

    @property
    def moved(self) -> float:
        """Bytes loaded and stored."""
        return self.loaded + self.stored


def count_opcodes(sass: str, source: str, call_line: int) -> Counter[str]:
    """Counts the instructions that are inlined from one call.

    Args:
        sass: A listing with the chain of inlining before each instruction (``nvdisasm -gi``).
        source: File name of the kernels' source.
        call_line: The line of the call in it.

    Returns:
        Instructions by opcode, without modifiers.
    """
    location = re.compile(rf'//## File ".*\b{re.escape(source)}", line {call_line}\b')
    instruction = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")
    counts: Counter[str] = Counter()
    inside = False
    chain_starts = True
    for line in sass.splitlines():
        if "//## File" in line:
            # An instruction without a chain of its own is of the chain before it.
            inside = bool(location.search(line)) or (inside and not chain_starts)
            chain_starts = False
        elif found := instruction.match(line):
            chain_starts = True
            counts[found[1]] += inside
    return +counts


def _disassemble(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(TOOLS / "nvdisasm"), "-c", "-gi", "-ndf", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@cache
def element_cost(param_dtype: str, grad_dtype: str) -> ElementCost:
    """Compiles the updaters of a dtype combination for sm_90, which needs no GPU, and counts.

    Args:
        param_dtype: "float32" or "bfloat16", or another key of the audit's DTYPES.
        grad_dtype: Likewise.
    """
    kernels = Kernels(ROOT / "kernels")
    variant = Variant(TARGET, "adam_kernel", False, param_dtype, grad_dtype, is_last=False)
    compiled = kernels.compile(variant)
    reading = read(kernels, variant, compiled)
    elements = variant.block_size / (variant.config.num_warps * 32)
    counts = count_opcodes(_disassemble(compiled.asm["cubin"]), "adam.py", kernels.aligned_call_line)
    if not counts:
        raise RuntimeError(f"no instruction from line {kernels.aligned_call_line} of adam.py in the code for {TARGET}")
    return ElementCost(
        loaded=reading.wide_loads * WIDE_BYTES / elements,
        stored=reading.wide_stores * WIDE_BYTES / elements,
        operations=sum(weight * counts[opcode] for opcode, weight in OPERATIONS.items()) / elements,
        instructions=sum(counts.values()) / elements,
    )
