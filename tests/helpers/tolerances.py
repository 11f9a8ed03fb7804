"""Tolerances of comparisons with torch, each with its reason. None was fitted to what came out."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    rtol: float
    atol: float
    reason: str


# Of parameters and moments after up to 60 steps of at most lr = 0.02, on values of order 1.
AFTER_STEPS = {
    torch.float64: Tolerance(
        1e-11, 1e-12, "60 steps of a few 1.1e-16 roundings, times 1 / (1 - beta2) for the moments"
    ),
    torch.float32: Tolerance(2e-5, 2e-6, "60 steps of a few 6e-8 roundings; sqrt and division magnify small v"),
    torch.bfloat16: Tolerance(6e-2, 2e-2, "a rounding is 2**-9, and one moves later updates by a few"),
    torch.float16: Tolerance(8e-3, 3e-3, "a rounding is 2**-12, and one moves later updates by a few"),
}

# Of a learning rate or beta1 told by param_groups, against torch's formula.
SCHEDULED = Tolerance(1e-12, 0.0, "torch's 1 + step / period - cycle loses log2(cycles) bits; runs here are 60 steps")
