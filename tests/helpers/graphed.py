"""A small model whose training step is captured, and the same training by torch's pair."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fused_clr import FusedAdam, GraphedStep
from fused_clr.schedules import Cyclic

CYCLE: dict[str, Any] = {"base_lr": 1e-3, "max_lr": 2e-2, "step_size_up": 5, "step_size_down": 3}


def make_model(seed: int = 0) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))


def batches(count: int, size: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, 4, generator=generator) for _ in range(count)]


def eager_torch(steps: int, sizes: Callable[[int], int] = lambda _: 5) -> tuple[torch.nn.Module, list[float]]:
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters())
    scheduler = torch.optim.lr_scheduler.CyclicLR(optimizer, **CYCLE)
    losses = []
    for index, batch in enumerate(batches(steps)):
        optimizer.zero_grad()
        loss = model(batch[: sizes(index)]).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return model, losses


def graphed_model(**options: Any) -> tuple[torch.nn.Module, FusedAdam, GraphedStep]:
    model = make_model()
    optimizer = FusedAdam(model.parameters(), schedule=Cyclic(**CYCLE))

    def step(batch: torch.Tensor) -> torch.Tensor:
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return model, optimizer, GraphedStep(step, optimizer, **options)


def assert_same_models(first: torch.nn.Module, second: torch.nn.Module) -> None:
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
