"""Every example runs, logs what it says, and resumes bit for bit, also after it was killed."""

from __future__ import annotations

import csv
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_clr import schedules

ROOT = Path(__file__).parents[1]
EXAMPLES = {"plain", "captured", "trainer", "lightning_fit", "fsdp"}


def start(name: str, *arguments: Any, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [sys.executable, *launcher, str(ROOT / "examples" / f"{name}.py"), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True, env=environment, cwd=ROOT)


def run(name: str, *arguments: Any, launcher: tuple[str, ...] = ()) -> str:
    process = start(name, *arguments, launcher=launcher)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return output


def test_no_example_is_left_out() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == EXAMPLES


def weights(folder: Path) -> list[torch.Tensor]:
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    state = checkpoint["optimizer"]["state"]
    return [*checkpoint["model"].values(), *(state[index][key] for index in state for key in ("exp_avg", "exp_avg_sq"))]


def test_plain_resumes_bit_for_bit_in_a_new_process(tmp_path: Path) -> None:
    run("plain", "--steps", 100, "--folder", tmp_path / "straight")
    run("plain", "--steps", 50, "--folder", tmp_path / "halves")
    output = run("plain", "--steps", 100, "--folder", tmp_path / "halves")
    assert output.startswith("resumed at step 50")
    for a, b in zip(weights(tmp_path / "halves"), weights(tmp_path / "straight"), strict=True):
        assert torch.equal(a, b)


def test_plain_resumes_bit_for_bit_when_it_was_killed(tmp_path: Path) -> None:
    long = ("--steps", 1500, "--save-every", 7)
    run("plain", *long, "--folder", tmp_path / "straight")
    folder = tmp_path / "killed"
    process = start("plain", *long, "--folder", folder)
    deadline = time.monotonic() + 60
    while not (folder / "checkpoint.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(random.Random(0).uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    resumed = run("plain", *long, "--folder", folder)
    first = int(re.match(r"resumed at step (\d+)", resumed)[1])  # type: ignore[index]
    assert 0 < first < 1500
    for a, b in zip(weights(folder), weights(tmp_path / "straight"), strict=True):
        assert torch.equal(a, b)


def test_plain_logs_the_learning_rate_to_tensorboard_and_csv(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run("plain", "--steps", 60, "--folder", tmp_path)
    schedule = schedules.Cyclic(2.5e-4, 1e-2, 40, mode="triangular2")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    logged = events.Scalars("lr/0")
    assert len(logged) == 60
    for event in logged:
        assert event.value == pytest.approx(schedule.lr(event.step), rel=1e-6)
    assert {"momentum/0", "grad_norm", "applied_steps", "skipped_steps"} <= set(events.Tags()["scalars"])
    with open(tmp_path / "lr.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["schedule_step"]) for row in rows] == list(range(60))
    assert [float(row["lr/0"]) for row in rows] == [schedule.lr(step) for step in range(60)]


@pytest.mark.parametrize("name", ["trainer", "lightning_fit"])
def test_frameworks(tmp_path: Path, name: str) -> None:
    """That they resume, `tests/test_huggingface.py` and `tests/test_lightning.py` show."""
    assert run(name, "--steps", 25, "--folder", tmp_path).endswith("step 25, lr 0.00775\n")
    assert any(path.name in ("last.ckpt", "checkpoint-20") for path in tmp_path.iterdir())


def test_captured() -> None:
    """Without CUDA there is no graph."""
    assert "step 20, 0 graph" in run("captured", "--steps", 20)


def test_fsdp_resumes_with_another_number_of_processes(tmp_path: Path) -> None:
    def launcher(processes: int) -> tuple[str, ...]:
        return "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"

    first = run("fsdp", "--steps", 20, "--folder", tmp_path, launcher=launcher(2))
    assert first.startswith("step 20, lr 0.01, gradient norm ")
    assert run("fsdp", "--steps", 30, "--folder", tmp_path, launcher=launcher(1)).startswith("step 30, lr 0.0055")
