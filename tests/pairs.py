"""torch's pair and ours, made from the same seed and driven by the same gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.optim import lr_scheduler

from fused_clr import CyclicLR, FusedAdam

SHAPES = ((3,), (63,), (5, 5), ())


class Pair(NamedTuple):
    params: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    scheduler: lr_scheduler.LRScheduler


def make_pair(
    ours: bool,
    seed: int = 0,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    cyclic: dict[str, Any] | None = None,
    **adam: Any,
) -> Pair:
    """Two groups with bounds of their own; a short asymmetric cycle, triangular2, beta1 cycling."""
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.1}]
    optimizer = (FusedAdam if ours else torch.optim.Adam)(groups, **adam)
    arguments: dict[str, Any] = {
        "base_lr": [1e-4, 1e-3],
        "max_lr": [1e-2, 2e-2],
        "step_size_up": 7,
        "step_size_down": 4,
        "mode": "triangular2",
    } | (cyclic or {})
    scheduler = (CyclicLR if ours else lr_scheduler.CyclicLR)(optimizer, **arguments)
    return Pair(params, optimizer, scheduler)


def train(pair: Pair, steps: int, seed: int = 1) -> list[tuple[list[float], list[float]]]:
    """Takes steps; returns each step's learning rates and beta1s as the param groups tell them."""
    return list(iterate(pair, steps, seed))


def iterate(pair: Pair, steps: int, seed: int = 1) -> Iterator[tuple[list[float], list[float]]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in pair.params:
            param.grad = torch.randn(param.shape, generator=generator)
        pair.optimizer.step()
        groups = pair.optimizer.param_groups
        # A tensor lr is written in place by the next step.
        yield [float(group["lr"]) for group in groups], [group["betas"][0] for group in groups]
        pair.scheduler.step()


def assert_same_params(first: Pair, second: Pair, rtol: float, atol: float) -> None:
    for a, b in zip(first.params, second.params, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
