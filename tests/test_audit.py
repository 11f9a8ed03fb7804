"""The audit passes on the kernels as they are, and fails on the bugs it is there for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ONE = r"^sm_90 adam float32 last$"


def audit(match: str, kernels: Path = ROOT / "kernels") -> subprocess.CompletedProcess[str]:
    """In a process without the interpreter, which this one has switched on."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.audit", "--match", match, "--kernels", str(kernels), "--processes", "1"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def changed_kernels(folder: Path, old: str, new: str, file: str = "adam.py") -> Path:
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


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_retire_without_its_barrier_is_found(tmp_path: Path, target: str) -> None:
    kernels = changed_kernels(tmp_path, "            tl.debug_barrier()\n", "")
    done = audit(rf"^{target} adam float32 last$", kernels)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "barrier" in done.stdout.splitlines()[1]


def test_a_clock_read_after_the_retire_is_found(tmp_path: Path) -> None:
    kernels = changed_kernels(
        tmp_path,
        "tl.store(clock_ptr + SCHEDULE_STEP, step + 1)",
        "tl.store(clock_ptr + SCHEDULE_STEP, tl.load(clock_ptr + SCHEDULE_STEP, volatile=True) + 1)",
    )
    done = audit(ONE, kernels)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "load" in done.stdout.splitlines()[1]


def test_a_norm_without_its_wide_loads_is_found(tmp_path: Path) -> None:
    kernels = changed_kernels(
        tmp_path,
        "tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)",
        "address.to(tl.pointer_type(DTYPE))",
        "norm.py",
    )
    done = audit("^sm_90 norm float32$", kernels)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "128-bit accesses" in done.stdout


def test_a_mask_on_full_chunks_is_found(tmp_path: Path) -> None:
    kernels = changed_kernels(
        tmp_path,
        "            ALIGNED=True,\n            MASKED=False,",
        "            ALIGNED=True,\n            MASKED=True,",
    )
    done = audit(ONE, kernels)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "128-bit accesses" in done.stdout


def test_the_interpreter_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.audit"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1" in done.stderr
