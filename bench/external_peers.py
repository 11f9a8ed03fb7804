"""Optimizers of other packages, where they are installed. Each remark says what is computed differently."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch.optim.lr_scheduler import CyclicLR

from bench.peers import CYCLE, FROZEN, FROZEN_BETA1, NO_MOMENTUM, Peer, Request, Stepper, with_clipping

BETAS = (0.9, 0.999)
FLOAT32_MOMENTS = "one step count per group; float32 moments for bf16 parameters"


def _pair(request: Request, optimizer: torch.optim.Optimizer, lr_is_tensor: bool = False, **cycle: Any) -> Stepper:
    scheduler = CyclicLR(optimizer, **CYCLE, **cycle)
    frozen = request.captured and not lr_is_tensor
    return Stepper(with_clipping(request, optimizer.step), None if frozen else scheduler.step, keeps=scheduler)


def _optimi(request: Request) -> Stepper:
    optimizer = import_module("optimi").Adam(request.groups, lr=1e-3, betas=BETAS, eps=1e-8, kahan_sum=False)
    return _pair(request, optimizer, cycle_momentum=False)


def _apex(request: Request) -> Stepper:
    fused_adam = import_module("apex.optimizers").FusedAdam
    optimizer = fused_adam(request.groups, lr=1e-3, adam_w_mode=False, capturable=request.captured)
    return _pair(request, optimizer, lr_is_tensor=request.captured)


def _transformer_engine(request: Request) -> Stepper:
    fused_adam = import_module("transformer_engine.pytorch.optimizers").FusedAdam
    optimizer = fused_adam(request.groups, lr=1e-3, adam_w_mode=False, capturable=request.captured)
    return _pair(request, optimizer, lr_is_tensor=request.captured)


def _bitsandbytes(request: Request) -> Stepper:
    return _pair(request, import_module("bitsandbytes").optim.Adam32bit(request.groups, lr=1e-3))


def _heavyball(request: Request) -> Stepper:
    # It takes the gradients away unless told otherwise.
    arguments = {"betas": BETAS, "eps": 1e-8, "consume_grad": False}
    return _pair(request, import_module("heavyball").AdamW(request.groups, lr=1e-3, **arguments))


EXTERNAL_PEERS = (
    Peer(
        "torch-optimi",
        _optimi,
        remark=f"{NO_MOMENTUM}; one step count per group; no Kahan sum",
        captured_remark="lr, beta1 and the step count are frozen in the graph",
        requires="optimi",
    ),
    Peer("apex", _apex, remark=FLOAT32_MOMENTS, captured_remark=FROZEN_BETA1, requires="apex"),
    Peer(
        "TransformerEngine",
        _transformer_engine,
        remark=FLOAT32_MOMENTS,
        captured_remark=FROZEN_BETA1,
        requires="transformer_engine",
    ),
    Peer(
        "bitsandbytes",
        _bitsandbytes,
        remark="32-bit moments; one launch per tensor",
        captured_remark=f"{FROZEN}, and so is the step count",
        requires="bitsandbytes",
    ),
    Peer(
        "heavyball",
        _heavyball,
        remark="eps is a lower bound of the root, not added to it; stochastic rounding for bf16; compiled",
        captured_remark=FROZEN,
        requires="heavyball",
        compiles=True,
    ),
)
