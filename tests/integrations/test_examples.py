"""Every example runs, logs what it says, and resumes bit for bit, also after it was killed."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import random
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import fused_clr
from fused_clr import GraphedStep, schedules

pytestmark = pytest.mark.filterwarnings("default")

ROOT = Path(__file__).parents[2]
EXAMPLES = {"accelerate_loop", "actor_critic", "captured", "fsdp", "lightning_fit", "plain", "trainer"}


def start(name: str, *arguments: Any, launcher: tuple[str, ...] = (), **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, *launcher, str(ROOT / "examples" / f"{name}.py"), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True, env=environment, cwd=ROOT)


def output_of(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return output


def run_here(name: str, *arguments: Any) -> str:
    """What an example prints; in this process, which has imported the framework already."""
    printed = io.StringIO()
    with mock.patch.object(sys, "argv", [name, *map(str, arguments)]), contextlib.redirect_stdout(printed):
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    return printed.getvalue()


def test_no_example_is_left_out() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == EXAMPLES


@pytest.mark.parametrize(
    ("name", "option"), [*((name, "--steps") for name in sorted(EXAMPLES)), ("plain", "--save-every")]
)
@pytest.mark.parametrize("number", ["0", "-5", "ten"])
def test_numbers_that_mean_nothing_are_named(
    name: str, option: str, number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        run_here(name, option, number)
    assert leaving.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert option in message
    assert number in message


def weights(folder: Path) -> list[torch.Tensor]:
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    state = checkpoint["optimizer"]["state"]
    return [*checkpoint["model"].values(), *(state[index][key] for index in state for key in ("exp_avg", "exp_avg_sq"))]


def assert_same_weights(first: Path, second: Path) -> None:
    for a, b in zip(weights(first), weights(second), strict=True):
        assert torch.equal(a, b)


def test_plain_goes_on_where_a_finished_run_ended(tmp_path: Path) -> None:
    run_here("plain", "--steps", 100, "--folder", tmp_path / "straight")
    run_here("plain", "--steps", 50, "--folder", tmp_path / "halves")
    assert run_here("plain", "--steps", 100, "--folder", tmp_path / "halves").startswith("resumed at step 50")
    assert_same_weights(tmp_path / "halves", tmp_path / "straight")
    # Nothing is left to do: it says where it is, not where it was asked to go.
    assert "\nstep 100, " in run_here("plain", "--steps", 50, "--folder", tmp_path / "halves")


def test_plain_resumes_bit_for_bit_in_a_new_process_when_it_was_killed(tmp_path: Path) -> None:
    long = ("--steps", 1500, "--save-every", 7)
    folder = tmp_path / "killed"
    run_here("plain", *long, "--folder", tmp_path / "straight")
    process = start("plain", *long, "--folder", folder)
    deadline = time.monotonic() + 60
    while not (folder / "checkpoint.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(random.Random(0).uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    resumed = output_of(start("plain", *long, "--folder", folder))
    first = int(re.match(r"resumed at step (\d+)", resumed)[1])  # type: ignore[index]
    assert 0 < first < 1500
    assert_same_weights(folder, tmp_path / "straight")


def test_plain_logs_the_learning_rate_to_tensorboard_and_csv(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_here("plain", "--steps", 60, "--folder", tmp_path)
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
    """That they resume, `test_huggingface.py` and `test_lightning.py` show."""
    assert run_here(name, "--steps", 25, "--folder", tmp_path).endswith("step 25, lr 0.00775\n")
    assert any(path.name in ("last.ckpt", "checkpoint-20") for path in tmp_path.iterdir())


def test_captured() -> None:
    """Without CUDA there is no graph."""
    assert "step 20, 0 graph" in run_here("captured", "--steps", 20)


def test_accelerate_loop() -> None:
    assert run_here("accelerate_loop", "--steps", 25).startswith("step 20, loss ")


@pytest.mark.usefixtures("emulated_cuda")
def test_actor_critic_captured_is_torchs() -> None:
    """Two optimizers and two target networks in one graph, against torch's pairs in the same update, run eagerly."""
    module = runpy.run_path(str(ROOT / "examples" / "actor_critic.py"))

    def run(kind: str) -> tuple[Any, list[float]]:
        torch.manual_seed(0)
        update = module["Update"]()
        optimizers = [update.critic_optimizer, update.actor_optimizer]
        graphed = update
        if kind == "ours":
            graphed = GraphedStep(update, optimizers, num_warmup_iters=1)
        else:
            pairs = [torch_pair(optimizer) for optimizer in optimizers]
            update.critic_optimizer, update.actor_optimizer = (SteppedTogether(*pair) for pair in pairs)
        generator = torch.Generator().manual_seed(1)
        losses = [float(graphed(*module["transitions"](8, generator))[0]) for _ in range(8)]
        if kind == "ours":
            assert graphed.num_graphs == 1
        return update, losses

    (ours, losses), (theirs, wanted) = run("ours"), run("torch")
    assert losses == pytest.approx(wanted, rel=1e-5)
    for name in ("actor", "critic", "target_actor", "target_critic"):
        for a, b in zip(getattr(ours, name).parameters(), getattr(theirs, name).parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
    assert "step 5, critic loss " in run_here("actor_critic", "--steps", 5)


def torch_pair(optimizer: fused_clr.FusedAdam) -> tuple[Any, ...]:
    schedule: Any = optimizer.param_groups[0]["schedule"]
    peer = torch.optim.Adam(optimizer.param_groups[0]["params"])
    arguments = {"base_lr": schedule.base_lr, "max_lr": schedule.max_lr, "step_size_up": schedule.step_size_up}
    return peer, torch.optim.lr_scheduler.CyclicLR(peer, **arguments), optimizer.max_grad_norm


class SteppedTogether:
    """Torch's optimizer and scheduler, and clipping, in one call."""

    def __init__(self, optimizer: Any, scheduler: Any, max_norm: float | None) -> None:
        self.optimizer, self.scheduler, self.max_norm = optimizer, scheduler, max_norm
        self.zero_grad = optimizer.zero_grad

    def step(self) -> None:
        if self.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], self.max_norm)
        self.optimizer.step()
        self.scheduler.step()


def test_fsdp_resumes_with_another_number_of_processes(tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    first = output_of(start("fsdp", "--steps", 20, "--folder", tmp_path, launcher=torchrun))
    assert first.startswith("step 20, lr 0.01, gradient norm ")
    # What torchrun sets for a single process.
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    second = output_of(start("fsdp", "--steps", 30, "--folder", tmp_path, **alone))
    assert second.startswith("step 30, lr 0.0055")
