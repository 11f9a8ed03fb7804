"""Random programs: captured loops with changes by the host in between equal the cpu backend's eager loops."""

from __future__ import annotations

import copy
import gc
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fused_clr import FusedAdam, GraphedStep
from fused_clr.schedules import Cyclic, Schedule

pytestmark = [
    pytest.mark.gpu,
    # Checkpoints are loaded into the optimizer that they are of.
    pytest.mark.filterwarnings("ignore:scale_fn .* cannot be saved"),
]

COUNT = int(os.environ.get("FUSED_CLR_PROGRAMS", "20"))


class Side:
    """A model, its optimizer and its scaler on one device; ``step`` is an eager step, or a call of a `GraphedStep`."""

    def __init__(self, device: str, rng: random.Random) -> None:
        torch.manual_seed(3)
        layers = torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
        self.device, self.model = device, torch.nn.Sequential(*layers).to(device)
        options: dict[str, Any] = {"max_grad_norm": rng.choice([None, None, 0.1, 1.0])}
        options |= {name: rng.random() < 0.3 for name in ("amsgrad", "write_back_grads")}
        groups = [{"params": list(layer.parameters())} for layer in (layers[0], layers[2])]
        self.optimizer = FusedAdam(groups, lr=1e-2, schedule=rng.choice(SCHEDULES), **options)
        growth: dict[str, Any] = {"init_scale": 256.0, "growth_interval": 3}
        self.scaler = torch.amp.GradScaler(device, **growth, enabled=rng.random() < 0.4)
        self.step: Callable[[torch.Tensor, int], None] = self.eager_step

    def accumulate_and_step(self, batch: torch.Tensor, micro_batches: int) -> None:
        for _ in range(micro_batches):
            self.scaler.scale(self.model(batch).square().mean() / micro_batches).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def eager_step(self, batch: torch.Tensor, micro_batches: int) -> None:
        self.optimizer.zero_grad()
        self.accumulate_and_step(batch.to(self.device), micro_batches)

    def step_on_another_stream(self, batch: torch.Tensor) -> None:
        if self.device == "cpu":
            return self.step(batch, 1)
        current, other = torch.cuda.current_stream(), torch.cuda.Stream()
        other.wait_stream(current)
        with torch.cuda.stream(other):
            self.step(batch.to(self.device), 1)
        return current.wait_stream(other)

    def write(self, group: int, key: str, value: float) -> None:
        if key != "lr" or self.optimizer.param_groups[group].schedule is None:
            self.optimizer.param_groups[group][key] = value

    def clip(self, max_grad_norm: float) -> None:
        if self.optimizer.max_grad_norm is not None:
            self.optimizer.max_grad_norm = max_grad_norm

    def load(self) -> None:
        self.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))

    def look(self) -> None:
        self.optimizer.status(wait=False)
        self.optimizer.history()
        _ = self.optimizer.param_groups[0]["lr"], self.optimizer.live.lr


def falling(cycle: float) -> float:
    return 1 / (1 + cycle)


SCHEDULES: list[Schedule | None] = [
    None,
    Cyclic(1e-3, 1e-2, 3),
    Cyclic(1e-3, 1e-2, 2.5, cycle_momentum=False, mode="exp_range", gamma=0.9),
    Cyclic(1e-3, 1e-2, 3, cycle_momentum=False, scale_fn=falling, total_steps=500),
    Cyclic(1e-3, 2e-2, 4, cycle_momentum=False, scale_fn=falling, total_steps=3000),
]
# By name: how often, and what both sides do.
OPERATIONS: dict[str, tuple[float, Callable[[Side, random.Random, torch.Tensor], Any]]] = {
    "step": (14, lambda side, rng, batch: side.step(batch, rng.choice([1, 1, 2]))),
    "step on another stream": (1, lambda side, rng, batch: side.step_on_another_stream(batch)),
    "eager step": (2, lambda side, rng, batch: side.eager_step(batch, 1)),
    "zero_grad": (1, lambda side, rng, batch: side.optimizer.zero_grad()),
    "lr": (2, lambda side, rng, batch: side.write(0, "lr", rng.choice([1e-3, 3e-2]))),
    "weight_decay": (1, lambda side, rng, batch: side.write(1, "weight_decay", rng.choice([0.0, 0.1]))),
    "schedule": (1, lambda side, rng, batch: side.optimizer.set_schedule(rng.choice(SCHEDULES))),
    "schedule step": (1, lambda side, rng, batch: side.optimizer.set_schedule_step(rng.randint(0, 9))),
    "max_grad_norm": (1, lambda side, rng, batch: side.clip(rng.choice([0.05, 2.0]))),
    "look": (3, lambda side, rng, batch: side.look()),
    "load": (1, lambda side, rng, batch: side.load()),
}


@pytest.mark.parametrize("seed", range(COUNT))
def test_a_program(seed: int) -> None:
    rng = random.Random(seed)
    build = rng.getrandbits(32)
    gpu, cpu = (Side(device, random.Random(build)) for device in ("cuda", "cpu"))
    graphed = GraphedStep(
        gpu.accumulate_and_step,
        gpu.optimizer,
        num_warmup_iters=rng.choice([1, 2, 3]),
        check=rng.choice(["first", "always", "never"]),
        max_graphs=rng.choice([1, 2, 8]),
        capture_error_mode=rng.choice(["global", "thread_local", "relaxed"]),
    )
    gpu.step = graphed
    names, weights = list(OPERATIONS), [weight for weight, _ in OPERATIONS.values()]
    program = []
    for _ in range(rng.randint(15, 30)):
        program.append(rng.choices(names, weights)[0])
        batch = torch.randn(rng.choice([2, 3, 5]), 6, generator=torch.Generator().manual_seed(rng.getrandbits(32)))
        if gpu.scaler.is_enabled() and rng.random() < 0.1:
            batch[0, 0] = torch.inf
        choices = rng.getrandbits(32)
        for side in (gpu, cpu):
            OPERATIONS[program[-1]][1](side, random.Random(choices), batch)
        if rng.random() < 0.05:
            graphed.release()
            gc.collect()
    status = [side.optimizer.status() for side in (gpu, cpu)]
    counts = [(each.schedule_step, each.applied_steps, each.skipped_steps) for each in status]
    assert counts[0] == counts[1], program
    for ours, theirs in zip(gpu.model.parameters(), cpu.model.parameters(), strict=True):
        # Two devices add up the same float32 gradients in another order, and Adam divides by their square root.
        torch.testing.assert_close(ours.detach().cpu(), theirs.detach(), rtol=2e-4, atol=2e-5)
        if ours.grad is None or theirs.grad is None:
            assert ours.grad is theirs.grad
    graphed.release()
