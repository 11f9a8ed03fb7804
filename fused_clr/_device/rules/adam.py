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
    beta2, eps, weight_decay = float(values["betas"][1]), float(values["eps"]), float(values["weight_decay"])
    amsgrad = bool(values["amsgrad"])

    def update(
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[list[Tensor]],
        steps: list[Tensor],
        lr: float,
        momentum: float,
        grad_scale: Tensor | None,
    ) -> None:
        # All by name: no dict of arguments is made, which 64 groups would feel.
        function(
            params,
            grads,
            states[0],
            states[1],
            states[2] if amsgrad else [],
            steps,
            lr=lr,
            beta1=momentum,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=amsgrad,
            maximize=maximize,
            grad_scale=grad_scale,
        )

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
