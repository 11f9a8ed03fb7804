"""Parameters, gradients and a model on a GPU, and torch's pair."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.cases import ADAM, OptimizerCase

CYCLE: dict[str, Any] = {"base_lr": 1e-4, "max_lr": 1e-2, "step_size_up": 7, "step_size_down": 4, "mode": "triangular2"}


PERIOD = 11


def scaled(count: int) -> int:
    """A number of repetitions; less where kernels run in the interpreter."""
    return max(count // 1000, 20) if "PRETENDED_GPU" in os.environ else count


two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


SHAPES = ((3,), (2048,), (65, 33), (4097,), ())


def make_params(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator("cuda").manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, device="cuda", dtype=dtype)) for s in SHAPES]


def set_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    """New values at the same addresses."""
    generator = torch.Generator("cuda").manual_seed(step)
    for param in params:
        gradient = torch.randn(param.shape, generator=generator, device="cuda", dtype=param.dtype)
        if param.grad is None:
            param.grad = gradient
        else:
            param.grad.copy_(gradient)


def torch_pair(
    params: list[torch.nn.Parameter], optimizer_case: OptimizerCase = ADAM
) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = optimizer_case.torch_peer(params, fused=True)
    return optimizer, torch.optim.lr_scheduler.CyclicLR(optimizer, **CYCLE)


@contextmanager
def syncs_are_errors() -> Iterator[None]:
    """In the body an operation that waits for the device raises an error."""
    with warnings.catch_warnings():
        # That the mode is a prototype.
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# -- captured training loops -------------------------------------------------------------------------------------------
def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 8)).cuda()


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(1)
    return [torch.randn(32, 16, generator=generator, device="cuda") for _ in range(count)]
