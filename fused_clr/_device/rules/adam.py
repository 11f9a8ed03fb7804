"""Adam and AdamW as an update rule; the kernel's half is `kernels/adam.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import CpuUpdate, UpdateRule

# Below this learning rate, the decay over the learning rate may overflow.
TINY_LR = 1e-30


def largest_lr(values: Mapping[str, Any]) -> float:
    """The largest learning rate, which a group's weight decay is computed from; see `FusedAdamW`."""
    max_lr, schedule = values.get("weight_decay_max_lr"), values["schedule"]
    if max_lr is None:
        max_lr = values.get("initial_lr", values["lr"]) if schedule is None else schedule.largest_lr
    return float(max_lr)


def _decay_coefficients(values: Mapping[str, Any]) -> tuple[float, float, float]:
    """Coefficients of 1, lr and lr**2: what decoupled weight decay is multiplied by, see `FusedAdamW`."""
    mode = values.get("weight_decay_mode", "lr")
    if not values["decoupled_weight_decay"]:
        return 0.0, 0.0, 0.0
    if mode == "constant":
        return 1.0, 0.0, 0.0
    if mode == "lr":
        return 0.0, 1.0, 0.0
    max_lr = largest_lr(values)
    # A learning rate that is always 0 decays nothing.
    inverse = 1.0 / max_lr if max_lr else 0.0
    return (0.0, inverse, 0.0) if mode == "lr_ratio" else (0.0, 0.0, inverse)


def _columns(values: Mapping[str, Any]) -> tuple[float, ...]:
    beta2 = float(values["betas"][1])
    log2_beta2 = math.log2(beta2) if beta2 > 0 else -math.inf
    is_l2 = 0.0 if values["decoupled_weight_decay"] else 1.0
    return beta2, log2_beta2, float(values["eps"]), is_l2, *_decay_coefficients(values)


def _kernels() -> tuple[Any, Any]:
    from ...kernels.adam import adam_scalars, adam_update

    return adam_update, adam_scalars


def _cpu_update(values: Mapping[str, Any], maximize: bool) -> CpuUpdate:
    function: Any = torch._fused_adamw_ if values["decoupled_weight_decay"] else torch._fused_adam_
    beta2, eps = float(values["betas"][1]), float(values["eps"])
    amsgrad = bool(values["amsgrad"])
    constant, linear, square = _decay_coefficients(values)
    # Otherwise torch's kernel multiplies the weight decay by what it must.
    own_decay = (constant, linear, square) not in ((0.0, 0.0, 0.0), (0.0, 1.0, 0.0))

    def update(
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[list[Tensor]],
        steps: list[Tensor],
        lr: float,
        momentum: float,
        weight_decay: float,
        grad_scale: Tensor | None,
    ) -> None:
        if own_decay:
            decay = weight_decay * (constant + lr * (linear + lr * square))
            if abs(lr) > TINY_LR:
                # Torch's kernel multiplies by lr.
                weight_decay = decay / lr
            else:
                torch._foreach_mul_(list(params), 1.0 - decay)
                weight_decay = 0.0
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
    has_decay_schedule=True,
    saved_keys=frozenset({"betas", "eps", "weight_decay", "amsgrad"}),
    momentum_key="betas",
    momentum_index=0,
    usual_momenta=(0.9,),
    columns=_columns,
    kernels=_kernels,
    cpu_update=_cpu_update,
)
