"""What is measured: parameter sets, and the optimizers that step them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.optim import lr_scheduler

import fused_clr

CYCLE = {"base_lr": 2.5e-4, "max_lr": 1e-3, "step_size_up": 2000, "mode": "triangular2"}


class Case(NamedTuple):
    """A set of parameters, all of one shape, spread evenly over param groups."""

    name: str
    num_tensors: int
    numel: int
    num_groups: int = 1


CASES = (
    Case("4 x 4", 4, 4),
    Case("148 x 16", 148, 16),
    Case("148 x 16 in 64 groups", 148, 16, 64),
    Case("1,000 x 16", 1000, 16),
    Case("4 x 4M", 4, 4 << 20),
)


class Peer(NamedTuple):
    """A pair of optimizer and scheduler. ``remark`` says what it computes differently, if anything."""

    name: str
    optimizer: Callable[..., torch.optim.Optimizer]
    scheduler: Callable[..., lr_scheduler.LRScheduler]
    arguments: dict[str, Any]
    remark: str = ""


PEERS = (
    Peer("torch Adam(fused=True) + CyclicLR", torch.optim.Adam, lr_scheduler.CyclicLR, {"fused": True}),
    Peer("torch Adam(foreach=True) + CyclicLR", torch.optim.Adam, lr_scheduler.CyclicLR, {"foreach": True}),
    Peer("fused-clr", fused_clr.FusedAdam, fused_clr.CyclicLR, {}),
)
REFERENCE = PEERS[0].name


def make_step(case: Case, peer: Peer, device: torch.device) -> Callable[[], None]:
    """A function that takes one step: optimizer and scheduler, gradients given."""
    params = [torch.nn.Parameter(torch.randn(case.numel, device=device)) for _ in range(case.num_tensors)]
    for param in params:
        param.grad = torch.randn_like(param)
    groups = [{"params": params[i :: case.num_groups]} for i in range(case.num_groups)]
    optimizer = peer.optimizer(groups, lr=1e-3, **peer.arguments)
    scheduler = peer.scheduler(optimizer, **CYCLE)

    def step() -> None:
        optimizer.step()
        scheduler.step()

    return step
