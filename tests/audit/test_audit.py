"""The audit passes on the kernels as they are, and fails on the bugs it is there for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.audit import __main__ as command_line

ROOT = Path(__file__).parents[2]
ONE = r"^sm_90 step float32 last$"


def audit(match: str, kernels: Path = ROOT / "kernels") -> subprocess.CompletedProcess[str]:
    """In a process without the interpreter, which this one has switched on."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.audit", "--match", match, "--kernels", str(kernels), "--processes", "1"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def changed_kernels(folder: Path, old: str, new: str, file: str) -> Path:
    """A copy of the kernels with one change."""
    shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    source = (folder / "kernels" / file).read_text()
    assert source.count(old) == 1
    (folder / "kernels" / file).write_text(source.replace(old, new))
    return folder / "kernels"


def test_an_unchanged_kernel_passes() -> None:
    """One of the variants that ``make audit`` goes through, with 16 bytes loaded and 12 stored an element."""
    done = audit(ONE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 variants, 0 with problems" in done.stdout
    assert "16+12=28" in done.stdout


class Bug(NamedTuple):
    """A change to the kernels, and what the audit says of it."""

    file: str
    old: str
    new: str
    match: str
    found: str


BUGS = {
    f"no-barrier-{target}": Bug(
        "step.py", "            tl.debug_barrier()\n", "", rf"^{target} step float32 last$", "barrier"
    )
    for target in ("sm_90", "gfx942")
} | {
    "clock-read-after-the-retire": Bug(
        "step.py",
        "tl.store(control_ptr + SCHEDULE_STEP, step + 1)",
        "tl.store(control_ptr + SCHEDULE_STEP, tl.load(control_ptr + SCHEDULE_STEP, volatile=True) + 1)",
        ONE,
        "load",
    ),
    "norm-without-wide-loads": Bug(
        "norm.py",
        "tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)",
        "address.to(tl.pointer_type(DTYPE))",
        "^sm_90 norm float32$",
        "128-bit accesses",
    ),
    "mask-on-full-chunks": Bug(
        "step.py",
        "tl.arange(0, BLOCK_SIZE),\n            None,",
        "tl.arange(0, BLOCK_SIZE),\n            tl.arange(0, BLOCK_SIZE) < remaining,",
        ONE,
        "128-bit accesses",
    ),
}


BUGS |= {
    "ragged-chunks-in-one-part": Bug(
        "step.py",
        "        PART_SIZE: tl.constexpr = BLOCK_SIZE // 2\n        part_end = tl.minimum(remaining, BLOCK_SIZE)",
        "        PART_SIZE: tl.constexpr = BLOCK_SIZE\n        part_end = tl.minimum(remaining, BLOCK_SIZE)",
        ONE,
        "block barriers, not 3",
    ),
    "roots-with-branches": Bug(
        "adam.py",
        "ratio = quotient(exp_avg, square_root(normal) * bias_correction2_rsqrt + eps)",
        "ratio = tl.div_rn(exp_avg, tl.div_rn(tl.sqrt_rn(normal), bias_correction2_rsqrt) + eps)",
        ONE,
        "instructions an element, more than 42",
    ),
    "ragged-chunks-in-large-parts": Bug(
        "step.py",
        "        PART_SIZE: tl.constexpr = BLOCK_SIZE // 2\n        part_end = tl.minimum(remaining, BLOCK_SIZE)",
        "        PART_SIZE: tl.constexpr = BLOCK_SIZE * 2\n        part_end = tl.minimum(remaining, BLOCK_SIZE)",
        ONE,
        "programs fit on a multiprocessor, not 4",
    ),
}


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_a_bug_is_found(tmp_path: Path, bug: Bug) -> None:
    done = audit(bug.match, changed_kernels(tmp_path, bug.old, bug.new, bug.file))
    assert done.returncode == 1, done.stdout + done.stderr
    # In the row of the variant, below the names of the columns.
    assert bug.found in done.stdout.splitlines()[1]


def test_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process, which has it switched on."""
    monkeypatch.setattr(sys, "argv", ["tests.audit"])
    assert command_line.main() == 2
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err
