"""Numbers at the edges of their dtypes, and values that torch's users write where they are read at every step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fused_clr import FusedAdam
from fused_clr.schedules import Cyclic
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


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("gradient", [0.0, 1.0, 1e25, -math.inf, math.nan], ids=str)
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_second_moments_at_the_edges(backend: str, gradient: float, amsgrad: bool) -> None:
    # Zero, subnormal, small, overflowed and lost; the root of the smallest normal float32 is far below eps.
    values = {
        "exp_avg": torch.tensor([0.0, 1e-21, 1e-18, -1e18, 1.0, 1.0, math.nan]),
        "exp_avg_sq": torch.tensor([0.0, 1e-41, 1e-35, 1e38, math.inf, math.nan, math.nan]),
    }
    values |= {"max_exp_avg_sq": values["exp_avg_sq"].clone()} if amsgrad else {}
    ours, theirs = (torch.nn.Parameter(torch.ones(7)) for _ in range(2))
    theirs_optimizer = torch.optim.Adam([theirs], 0.1, amsgrad=amsgrad, fused=True)
    optimizers = FusedAdam([ours], lr=0.1, amsgrad=amsgrad), theirs_optimizer
    for param, optimizer in zip((ours, theirs), optimizers, strict=True):
        optimizer.state[param] = {"step": torch.tensor(3.0)} | {key: value.clone() for key, value in values.items()}
        param.grad = torch.full((7,), gradient)
        optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7, equal_nan=True)
    for key, value in optimizers[1].state[theirs].items():
        # Torch's fused kernel on the CPU drops a NaN there, its other ones do not.
        if key != "max_exp_avg_sq" or not math.isnan(gradient):
            torch.testing.assert_close(optimizers[0].state[ours][key], value, rtol=1e-6, atol=1e-44, equal_nan=True)


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


@pytest.mark.parametrize("step", [3, 6, 6000, 6 * 10**15])
def test_a_growing_scale_is_never_nan(backend: str, step: int) -> None:
    schedule = Cyclic(0.25, 1.25, 3, mode="exp_range", gamma=1.5, cycle_momentum=False)
    optimizer = FusedAdam([torch.nn.Parameter(torch.ones(2))], schedule=schedule)
    optimizer.set_schedule_step(step)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(schedule.lr(step), rel=1e-12)
    assert not math.isnan(schedule.lr(step))


def test_a_scale_that_overflows_within_a_cycle_is_refused() -> None:
    # Torch raises an OverflowError at step 4.
    with pytest.raises(ValueError, match=r"gamma must be .*, got 1e\+100"):
        Cyclic(0.1, 0.2, 2000, mode="exp_range", gamma=1e100)
    # Other modes ignore it, as in torch.
    Cyclic(0.1, 0.2, 2000, gamma=1e100)


@pytest.mark.parametrize("lr", [-1e-20, -3.0, 0.0, torch.tensor(-0.5)], ids=str)
def test_any_finite_lr_is_written(backend: str, lr: Any) -> None:
    ours, theirs = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizers = FusedAdam([ours]), torch.optim.Adam([theirs], fused=True)
    for param, optimizer in zip((ours, theirs), optimizers, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        param.grad = torch.linspace(-1, 1, 3)
        optimizer.step()
        # And saved, and loaded.
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
    torch.testing.assert_close(ours, theirs)
    for bad in (math.nan, math.inf, "0.1", True, None):
        with pytest.raises(ValueError, match="lr must be a finite number, got"):
            optimizers[0].param_groups[0]["lr"] = bad


def test_torchs_annealing_to_a_negative_lr(backend: str) -> None:
    lrs = []
    for kind in (FusedAdam, torch.optim.Adam):
        optimizer = kind([torch.nn.Parameter(torch.ones(3))], lr=0.1)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4, eta_min=-1e-20)
        for _ in range(4):
            optimizer.step()
            scheduler.step()
        lrs.append(optimizer.param_groups[0]["lr"])
    assert lrs[0] == lrs[1] < 1e-15


def test_step_sizes_far_apart(backend: str) -> None:
    arguments = {"base_lr": 0.1, "max_lr": 0.5, "step_size_up": 2000, "step_size_down": 0.1, "cycle_momentum": False}
    ours, theirs = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizer = FusedAdam([ours], schedule=Cyclic(**arguments))
    peer = torch.optim.lr_scheduler.CyclicLR(torch.optim.Adam([theirs], lr=0.1), **arguments)
    for step in (0, 1, 1999, 2000, 2001, 4000, 4001, 20_000, 123_456):
        optimizer.set_schedule_step(step)
        peer.last_epoch, peer._get_lr_called_within_step = step, True
        # Torch rounds the sum of the step sizes, which the cycles multiply.
        assert optimizer.param_groups[0]["lr"] == pytest.approx(peer.get_lr()[0], rel=1e-9)
    with pytest.raises(ValueError, match="step_size_up=10{17} and step_size_down=0.001 must not be too large or"):
        Cyclic(0.1, 0.5, 1e17, 0.001)


def test_a_checkpoint_at_the_last_step(backend: str) -> None:
    optimizer = FusedAdam([torch.nn.Parameter(torch.ones(3))], schedule=Cyclic(0.1, 0.5, 3))
    optimizer.set_schedule_step(2**53 - 1)
    optimizer.step()
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["schedule"]["step"] == 2**53
    loaded = FusedAdam([torch.nn.Parameter(torch.ones(3))], schedule=Cyclic(0.1, 0.5, 3))
    loaded.load_state_dict(saved)
    assert loaded.status().schedule_step == 2**53
    assert loaded.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
