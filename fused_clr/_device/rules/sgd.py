"""SGD as an update rule; the kernel's half is `kernels/sgd.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..tensors import is_low_precision
from .base import CpuUpdate, UpdateRule


def _drives_momentum(values: Mapping[str, Any]) -> bool:
    schedule = values.get("schedule")
    return schedule is not None and schedule.drives_momentum


def _num_states(values: Mapping[str, Any]) -> int:
    return int(_drives_momentum(values) or float(values["momentum"]) != 0)


def _dampening(values: Mapping[str, Any]) -> float:
    """The dampening, checked.

    Raises:
        ValueError: There is dampening, and the schedule's momentum is 0 somewhere. The first update after such steps
            would not dampen, in torch: it is not the first one that is counted here.
    """
    dampening = float(values["dampening"])
    if dampening != 0 and _drives_momentum(values):
        schedule, own = values["schedule"], (values["momentum"],)
        momenta = [m for part in schedule.parts() for segment in part.segments for m in segment.momentum or own]
        if not all(map(float, momenta)):
            raise ValueError(
                f"dampening must be 0 where a schedule sets the momentum to 0, got {dampening}, {schedule}"
            )
    return dampening


def _columns(values: Mapping[str, Any]) -> tuple[float, ...]:
    return 1.0 - _dampening(values), float(values["nesterov"])


def _kernels() -> tuple[Any, Any]:
    from ...kernels.sgd import sgd_scalars, sgd_update

    return sgd_update, sgd_scalars


def _cpu_update(values: Mapping[str, Any], maximize: bool) -> CpuUpdate:
    function: Any = torch._fused_sgd_
    nesterov, dampening = bool(values["nesterov"]), _dampening(values)

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
        # Torch's kernel leaves the buffers alone without momentum.
        buffers: Sequence[Tensor] = states[0] if states and momentum != 0 else []
        is_narrow = is_low_precision(params[0].dtype)
        if is_narrow:
            # In 16 bits, torch 2.13's kernel stores wrong values.
            stored = [*params, *buffers, *([] if grad_scale is None else grads)]
            params, grads, buffers = ([tensor.float() for tensor in own] for own in (params, grads, buffers))
        parts: list[tuple[Any, ...]] = [(False, params, grads, buffers)]
        if dampening != 0 and buffers:
            # The first update of a tensor does not dampen. Without dampening, a buffer of zeros does the same.
            is_first = [int(step) == 1 for step in steps]
            rows = list(zip(is_first, params, grads, buffers, strict=True))
            chosen = {first: [row[1:] for row in rows if row[0] == first] for first in is_first}
            parts = [(first, *zip(*own, strict=True)) for first, own in chosen.items()]
        for first, own_params, own_grads, own_buffers in parts:
            function(
                own_params,
                own_grads,
                own_buffers,
                weight_decay=weight_decay,
                momentum=momentum,
                lr=lr,
                dampening=dampening,
                nesterov=nesterov,
                maximize=maximize,
                is_first_step=first,
                grad_scale=grad_scale,
            )
        if is_narrow:
            wide = [*params, *buffers, *([] if grad_scale is None else grads)]
            torch._foreach_copy_(stored, wide)

    return update


SGD = UpdateRule(
    states=("momentum_buffer",),
    num_states=_num_states,
    has_step=False,
    saved_keys=frozenset({"momentum", "dampening", "weight_decay", "nesterov"}),
    momentum_key="momentum",
    usual_momenta=(0.0, 0.9),
    columns=_columns,
    kernels=_kernels,
    cpu_update=_cpu_update,
)
