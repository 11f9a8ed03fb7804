"""Numbers at the edges of their dtypes, and values that torch's users write where they are read at every step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fused_clr import FusedAdam
from tests.helpers.pairs import copies

FLOAT16_TINY = 2.0**-24


@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_huge_gradient_freezes_nothing(backend: str, amsgrad: bool) -> None:
    # Its square overflows in float32, and 1 - beta2 times its square does not.
    gradients = [torch.tensor([3e19, -3e19, 1.0]), *(torch.randn(3) for _ in range(5))]
    ours, theirs = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    theirs_optimizer = torch.optim.Adam([theirs], 0.1, amsgrad=amsgrad, fused=True)
    optimizers = FusedAdam([ours], lr=0.1, amsgrad=amsgrad), theirs_optimizer
    for gradient in gradients:
        for param, optimizer in zip((ours, theirs), optimizers, strict=True):
            param.grad = gradient.clone()
            optimizer.step()
        # A few float32 roundings a step.
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
        for key, value in optimizers[1].state[theirs].items():
            torch.testing.assert_close(optimizers[0].state[ours][key], value, rtol=1e-6, atol=0)
    assert torch.isfinite(optimizers[0].state[ours]["exp_avg_sq"]).all()


def scaled_step(optimizer: Any, params: list[torch.nn.Parameter], gradient: torch.Tensor, scale: float) -> None:
    """A step under GradScaler, whose gradients are multiplied by a scale."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(torch.ones(()))
    for param in params:
        param.grad = (gradient * scale).to(param.dtype)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_low_precision_gradients_are_unscaled_in_float32(backend: str, dtype: torch.dtype) -> None:
    start = torch.linspace(-1, 1, 64)
    ours, theirs = (torch.nn.Parameter(start.to(dtype)) for _ in range(2))
    # Below what float16 can hold, as gradients; above it, times the scale.
    gradient = torch.linspace(0.1, 0.4, 64) * FLOAT16_TINY
    options = {"lr": 0.1, "eps": 1e-9, "betas": (0.5, 0.5)}
    for param, optimizer in (
        (ours, FusedAdam([ours], **options)),
        (theirs, torch.optim.Adam([theirs], fused=True, **options)),
    ):
        for _ in range(3):
            scaled_step(optimizer, [param], gradient, 2.0**16)
    assert not torch.equal(theirs, start.to(dtype))
    # The same roundings, but for one of each dtype.
    torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.parametrize("write_back", [False, True], ids=["", "write-back"])
@pytest.mark.parametrize("layout", ["same", "transposed"])
def test_the_norm_of_scaled_float16_gradients(backend: str, layout: str, write_back: bool) -> None:
    # The scaled gradients are finite in float16, their norm is not.
    start = torch.linspace(-1, 1, 64).reshape(8, 8)
    param = torch.nn.Parameter(start.half())
    optimizer = FusedAdam([param], lr=0.1, max_grad_norm=1.0, eps=1e-3, write_back_grads=write_back)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    scaler.scale(torch.ones(()))
    gradient = torch.full((8, 8), 2.0**14 * 3).half()
    param.grad = gradient.t() if layout == "transposed" else gradient
    scaler.step(optimizer)
    status = optimizer.status()
    assert (status.applied_steps, status.skipped_steps) == (1, 0)
    assert status.grad_norm == pytest.approx(24.0, rel=1e-6)
    # The first step is the learning rate long, whatever the gradient.
    torch.testing.assert_close(param, (start - 0.1).half(), rtol=0, atol=3e-3)
    expected = torch.full((8, 8), 3.0 / 24.0).half() if write_back else gradient
    torch.testing.assert_close(param.grad, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("gradient", [2.0**-20, 2.0**-30])
def test_float16_gradients_of_float32_parameters(backend: str, gradient: float) -> None:
    # As `param.grad_dtype` allows: they are unscaled in float32 too.
    param = torch.nn.Parameter(torch.zeros(16))
    param.grad_dtype = torch.float16
    optimizer = FusedAdam([param], lr=1.0, eps=1e-12)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(torch.ones(()))
    param.grad = torch.full((16,), gradient * 2.0**16).half()
    scaler.step(optimizer)
    torch.testing.assert_close(optimizer.state[param]["exp_avg"], torch.full((16,), 0.1 * gradient), rtol=1e-6, atol=0)
    assert copies([param])[0].abs().max() > 0.9
