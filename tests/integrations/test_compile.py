"""torch.compile around the model, the whole step, and what reads the schedule: right, and compiled once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.optim import lr_scheduler

from fused_clr import CyclicLR, FusedAdam, schedules
from tests.helpers.tolerances import AFTER_STEPS

CYCLE: dict[str, Any] = {"base_lr": 1e-3, "max_lr": 1e-2, "step_size_up": 4}
# Traces and differentiates as the default does, and compiles no C++, which takes a minute.
BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make_model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def run(make: Callable[..., Any], scheduler_class: Any, wrap: Callable[[Any], Any], steps: int = 12) -> Any:
    """Trains with ``wrap`` around the whole step; gives learning rates and parameters."""
    model = make_model()
    optimizer = make(model.parameters(), lr=1e-3)
    scheduler = scheduler_class(optimizer, **CYCLE)

    def step(batch: torch.Tensor) -> None:
        # A loss that is kept is an input of the code after the break, and the compiler asks for its .grad.
        model(batch).square().mean().backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    wrapped = wrap(step)
    generator = torch.Generator().manual_seed(1)
    lrs = []
    for _ in range(steps):
        wrapped(torch.randn(3, 4, generator=generator))
        lrs.append(scheduler.get_last_lr()[0])
    return lrs, list(model.parameters())


def breaks_by(name: str) -> int:
    return sum(count for reason, count in counters["graph_break"].items() if name in reason)


def test_a_compiled_step_equals_torchs_eager_one(backend: str) -> None:
    wanted_lrs, wanted = run(torch.optim.Adam, lr_scheduler.CyclicLR, lambda step: step)
    lrs, params = run(FusedAdam, CyclicLR, lambda step: torch.compile(step, backend=BACKEND))
    assert lrs == pytest.approx(wanted_lrs)
    tolerance = AFTER_STEPS[torch.float32]
    torch.testing.assert_close(params, wanted, rtol=tolerance.rtol, atol=tolerance.atol)


def test_a_step_is_one_graph_break_and_compiles_nothing_anew(backend: str) -> None:
    run(FusedAdam, CyclicLR, lambda step: torch.compile(step, backend=BACKEND), steps=2)
    graphs, frames = counters["stats"]["unique_graphs"], dict(counters["frames"])
    assert breaks_by("FusedOptimizer.step") == 1
    assert breaks_by("FusedScheduler.step") == 1
    # What torch breaks at by itself: backward, zero_grad.
    assert sum(counters["graph_break"].values()) == 4
    torch._dynamo.reset()
    counters.clear()
    run(FusedAdam, CyclicLR, lambda step: torch.compile(step, backend=BACKEND), steps=12)
    assert (counters["stats"]["unique_graphs"], dict(counters["frames"])) == (graphs, frames)


def test_a_compiled_update_alone(backend: str) -> None:
    """Without a scheduler object nothing else is left to break at."""
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = FusedAdam([param], schedule=schedules.Cyclic(**CYCLE))
    before: list[int] = []

    @torch.compile(backend=BACKEND)
    def update(scale: torch.Tensor) -> torch.Tensor:
        scaled = scale * 2
        optimizer.step()
        return scaled + 1

    for step in range(10):
        param.grad = torch.ones(3)
        assert float(update(torch.tensor(float(step)))) == 2 * step + 1
        before.append(sum(counters["graph_break"].values()))
        assert optimizer.status().schedule_step == step + 1
    assert before == [1] * 10
    assert counters["stats"]["unique_graphs"] == 2


def test_compiled_code_that_reads_the_schedule_reads_it_live(backend: str) -> None:
    param = torch.nn.Parameter(torch.ones(3))
    schedule = schedules.Cyclic(**CYCLE)
    optimizer = FusedAdam([param], schedule=schedule)

    @torch.compile(backend=BACKEND)
    def read(scale: torch.Tensor) -> tuple[torch.Tensor, Any]:
        return optimizer.live.lr * scale, optimizer.param_groups[0]["lr"]

    graphs = []
    for step in range(8):
        live, stored = read(torch.tensor(2.0, dtype=torch.float64))
        assert float(live[0]) / 2 == stored == schedule.lr(step)
        graphs.append(counters["stats"]["unique_graphs"])
        param.grad = torch.ones(3)
        optimizer.step()
    assert graphs[1:] == [graphs[0]] * 7


def test_a_compiled_model(backend: str) -> None:
    results = []
    for wrap in (lambda model: model, lambda model: torch.compile(model, backend=BACKEND)):
        model = make_model()
        optimizer = FusedAdam(model.parameters(), schedule=schedules.Cyclic(**CYCLE))
        called = wrap(model)
        for _ in range(5):
            optimizer.zero_grad()
            called(torch.ones(3, 4)).square().mean().backward()
            optimizer.step()
        results.append(list(model.parameters()))
    tolerance = AFTER_STEPS[torch.float32]
    torch.testing.assert_close(*results, rtol=tolerance.rtol, atol=tolerance.atol)
    assert sum(counters["graph_break"].values()) == 0


def test_an_optimizer_made_in_a_compiled_function(backend: str) -> None:
    def train(make: Any, param: torch.nn.Parameter) -> torch.Tensor:
        optimizer = make([param], lr=0.1)
        for _ in range(3):
            param.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return param.sum()

    mine, theirs = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    total = torch.compile(train, backend="eager")(FusedAdam, mine)
    torch.testing.assert_close(total, train(torch.optim.Adam, theirs))
    torch.testing.assert_close(mine, theirs)
