"""Adam and AdamW as an update rule; the kernel's half is `kernels/adam.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import CpuUpdate, UpdateRule


def _columns(values: Mapping[str, Any]) -> tuple[float, ...]:
    beta2 = float(values["betas"][1])
    decay, decoupled = float(values["weight_decay"]), values["decoupled_weight_decay"]
    log2_beta2 = math.log2(beta2) if beta2 > 0 else -math.inf
    return beta2, log2_beta2, float(values["eps"]), 0.0 if decoupled else decay, decay if decoupled else 0.0


def _kernels() -> tuple[Any, Any]:
    from ...kernels.adam import adam_scalars, adam_update

    return adam_update, adam_scalars


def _cpu_update(values: Mapping[str, Any], maximize: bool) -> CpuUpdate:
    function: Any = torch._fused_adamw_ if values["decoupled_weight_decay"] else torch._fused_adam_
    numbers = {
        "beta2": float(values["betas"][1]),
        "weight_decay": float(values["weight_decay"]),
        "eps": float(values["eps"]),
        "amsgrad": bool(values["amsgrad"]),
        "maximize": maximize,
    }

    def update(
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[list[Tensor]],
        steps: list[Tensor],
        lr: float,
        momentum: float,
        grad_scale: Tensor | None,
    ) -> None:
        max_exp_avg_sqs = states[2] if len(states) == 3 else []
        averages = states[0], states[1], max_exp_avg_sqs
        function(params, grads, *averages, steps, lr=lr, beta1=momentum, grad_scale=grad_scale, **numbers)

    return update


ADAM = UpdateRule(
    states=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    num_states=lambda values: 3 if values["amsgrad"] else 2,
    required_states=2,
    saved_keys=frozenset({"betas", "eps", "weight_decay", "amsgrad"}),
    momentum_key="betas",
    momentum_index=0,
    default_momentum=0.9,
    columns=_columns,
    kernels=_kernels,
    cpu_update=_cpu_update,
)
