"""What the audit asks of a compiled variant."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from .assembly import UnreadableError
from .machine_code import WIDE_BYTES, Reading, read_amdgcn, read_cubin
from .retire import retire_problems
from .variants import DTYPES, TARGETS, Kernels, Variant

# An updater rounds its clip coefficient to float32, once per chunk.
COEFFICIENT_CONVERSIONS = 1


# Of a launch that retires: the one before the atomic, and those with which Triton hands its result to all threads.
RETIRE_BARRIERS = 3
# For an element of Adam without amsgrad, by dtype: with exact rounding, the look-up of the chunk included.
MAX_INSTRUCTIONS = {"float32": 42, "bfloat16": 48, "float16": 48}


class Result(NamedTuple):
    """A variant's reading and what is wrong with it.

    Attributes:
        variant: What was compiled.
        reading: None if it did not compile.
        loaded: Bytes loaded per element by 128-bit loads.
        stored: Bytes stored per element by 128-bit stores.
        problems: Sentences; none if all is well.
    """

    variant: Variant
    reading: Reading | None
    loaded: float
    stored: float
    problems: list[str]


def bytes_per_element(variant: Variant) -> tuple[int, int]:
    """Bytes that a kernel has to load and store per element in 128-bit accesses: each tensor once.

    Of a norm over all dtypes: of an element of each. Gradients narrower than their parameter are accessed by narrower
    words, as many elements at a time.
    """
    if variant.kernel == "norm_kernel":
        return sum(dtype.itemsize for dtype in DTYPES.values()) if variant.all_dtypes else 4, 0
    param, grad = (DTYPES[name].itemsize for name in (variant.param_dtype, variant.grad_dtype))
    # An average is read and written too, in the dtype of the arithmetic.
    others = variant.num_states * param + variant.averages * max(param, 4)
    grad = grad if grad >= param else 0
    return param + grad + others, param + others + grad * variant.write_back_grads


def min_programs(variant: Variant) -> int:
    """Programs of an update that must fit on a multiprocessor."""
    if TARGETS[variant.target].backend != "cuda":
        return 4
    # What evaluators of SGD with averages need would spill at 80 registers.
    if (variant.rule == "SGD" and variant.averages) or (variant.rule == "ADAM" and variant.param_dtype == "float64"):
        return 2
    return 4 - (variant.num_states > 2 or variant.averages or variant.write_back_grads)


def lean_problems(variant: Variant, reading: Reading, elements: float) -> list[str]:
    """Where an update needs more than it should.

    Args:
        variant: Of `step_kernel`.
        reading: What was compiled.
        elements: Of a whole chunk, for each thread.
    """
    problems = []
    if reading.blocks < min_programs(variant):
        problems.append(f"{reading.blocks} programs fit on a multiprocessor, not {min_programs(variant)}")
    barriers = RETIRE_BARRIERS * variant.is_last
    # Averages of 16-bit parameters are wider, and change their layout.
    is_converted = variant.averages and DTYPES[variant.param_dtype].itemsize < 4
    if reading.barriers > barriers and not is_converted:
        problems.append(f"{reading.barriers} block barriers, not {barriers}")
    plain = variant.rule == "ADAM" and variant.num_states == 2 and not (variant.averages or variant.write_back_grads)
    limit = MAX_INSTRUCTIONS.get(variant.param_dtype)
    if plain and limit and reading.instructions / elements > limit:
        problems.append(f"{reading.instructions / elements:.1f} instructions an element, more than {limit}")
    return problems


@cache
def published() -> dict[str, list[str]]:
    """The table of compiled code in docs/performance.md: variant to registers, programs, instructions, barriers."""
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()
    rows = re.findall(r"^\| `((?:sm_|gfx)[^`]+)` \|(.*)\|$", page, re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")][:4] for name, cells in rows}


def as_published(reading: Reading, elements: float) -> list[str]:
    """A reading as a row of that table."""
    instructions = f"{reading.instructions / elements:.1f}" if reading.instructions else ""
    return [str(reading.registers), str(reading.blocks), instructions, str(reading.barriers)]


def read(kernels: Kernels, variant: Variant, compiled: Any) -> Reading:
    """The reading of a compiled variant."""
    if TARGETS[variant.target].backend == "cuda":
        return read_cubin(compiled.asm["cubin"], variant.config.num_warps)
    return read_amdgcn(
        compiled.asm["amdgcn"], variant.config.num_warps, kernels.access_lines, kernels.aligned_call_line
    )


def audit(kernels: Kernels, variant: Variant) -> Result:
    """Compiles a variant and checks it."""
    try:
        compiled = kernels.compile(variant)
    # Whatever the compiler raises is a finding about this variant, and the others still want to be looked at.
    except Exception as error:
        return Result(variant, None, 0, 0, [f"does not compile: {type(error).__name__}: {str(error).strip()[-500:]}"])
    reading = read(kernels, variant, compiled)
    problems = [f"spills: {reading.spills}"] if reading.spills else []
    if variant.kernel == "reevaluate_kernel":
        return Result(variant, reading, 0, 0, problems)

    bytes_per_access = WIDE_BYTES * variant.config.num_warps * TARGETS[variant.target].warp_size / variant.block_size
    loaded, stored = reading.wide_loads * bytes_per_access, reading.wide_stores * bytes_per_access
    expected = bytes_per_element(variant)
    if variant.kernel == "step_kernel":
        threads = variant.config.num_warps * TARGETS[variant.target].warp_size
        elements = variant.block_size / threads
        problems += lean_problems(variant, reading, elements)
        row = as_published(reading, elements)
        if published().get(variant.name, row) != row:
            problems.append(f"docs/performance.md should say {' | '.join(row)}")
    is_norm, is_cuda = variant.kernel == "norm_kernel", TARGETS[variant.target].backend == "cuda"
    # AMD's accesses are found by their lines in step.py.
    if is_cuda or not is_norm:
        for verb, found, wanted in (("load", loaded, expected[0]), ("store", stored, expected[1])):
            if found != wanted:
                problems.append(f"128-bit accesses {verb} {found:g} bytes per element, not {wanted}")
    # A norm over several dtypes branches by a table that nobody here can follow, and retires as the others do.
    if variant.is_last and not variant.all_dtypes:
        try:
            dialect = "ptx" if is_cuda else "amdgcn"
            problems += retire_problems(compiled.asm[dialect], dialect)
        except UnreadableError as error:
            problems.append(f"the retire protocol cannot be read: {error}")
    elif not is_norm and reading.float64 > COEFFICIENT_CONVERSIONS and variant.param_dtype != "float64":
        # Updaters alone: what there is of float64 is done per element.
        problems.append(f"{reading.float64} float64 instructions in an updater of {variant.param_dtype}")
    return Result(variant, reading, loaded, stored, problems)
