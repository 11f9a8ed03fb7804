"""Clipping inside the step, against `torch.nn.utils.clip_grad_norm_`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from fused_clr import FusedAdam, testing
from fused_clr.backends.step_launches import LaunchConfig
from fused_clr.backends.triton import TritonEngine

from .pairs import assert_same_params, make_pair

pytestmark = pytest.mark.usefixtures("backend")

SHAPES = ((3,), (63,), (5, 5), (), (0,), (700,))


def set_gradients(params: list[torch.nn.Parameter], step: int, size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = (torch.randn(param.shape, generator=generator) * size).to(param.dtype)


@pytest.mark.parametrize("max_norm", [0.01, 5.0, 1e9, math.inf])
def test_clipped_steps_equal_torch(max_norm: float, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LaunchConfig(block_size=64, num_warps=4, lanes=4, programs_per_multiprocessor=2)
    monkeypatch.setattr(TritonEngine, "config", config)
    ours, theirs = make_pair(True, shapes=SHAPES, max_grad_norm=max_norm), make_pair(False, shapes=SHAPES)
    for step in range(25):
        for pair in (ours, theirs):
            set_gradients(pair.params, step, size=10.0 ** (step % 5 - 2))
        norm = torch.nn.utils.clip_grad_norm_(theirs.params, max_norm)
        for pair in (ours, theirs):
            pair.optimizer.step()
            pair.scheduler.step()
        assert ours.optimizer.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
        assert_same_params(ours, theirs, 2e-5, 2e-6)
    assert ours.optimizer.grad_norm.dtype == torch.float64
    assert ours.optimizer.grad_norm.shape == ()


def test_one_norm_over_all_dtypes() -> None:
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
    params = [torch.nn.Parameter(torch.ones(200, dtype=dtype)) for dtype in dtypes]
    optimizer = FusedAdam([{"params": params[:2]}, {"params": params[2:]}], max_grad_norm=1.0)
    set_gradients(params, 0)
    optimizer.step()
    # In float64 from the very numbers that the gradients hold.
    exact = math.sqrt(sum(float(param.grad.to(torch.complex128).abs().square().sum()) for param in params))
    # torch's own norm of a 16-bit tensor is rounded to 16 bits before the norms are combined.
    low = pytest.approx(exact, rel=1e-3)
    assert optimizer.grad_norm.item() == low


def test_the_kernels_norm_is_exact_to_float32_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_CLR_BACKEND", "triton")
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    params = [torch.nn.Parameter(torch.ones(5000, dtype=dtype)) for dtype in dtypes]
    optimizer = FusedAdam(params, max_grad_norm=1.0)
    set_gradients(params, 0)
    with testing.record_launches() as graph:
        optimizer.step()
    exact = math.sqrt(sum(float(param.grad.double().square().sum()) for param in params))
    # Squares are rounded to float32, and at most a dozen of them are added before float64 takes over.
    assert optimizer.grad_norm.item() == pytest.approx(exact, rel=1e-7)
    # The norm's launch is one for all dtypes, the updates one each.
    assert len(graph) == 5
    bits = np.float64(optimizer.grad_norm.item()).tobytes()
    graph.replay()
    assert np.float64(optimizer.grad_norm.item()).tobytes() == bits


# The interpreter's numpy warns of 0 times inf.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("nonfinite", [torch.inf, torch.nan], ids=["inf", "nan"])
def test_nonfinite_norms_do_what_torch_does(nonfinite: float) -> None:
    ours, theirs = make_pair(True, max_grad_norm=1.0), make_pair(False)
    for pair in (ours, theirs):
        set_gradients(pair.params, 0)
        pair.params[1].grad[7] = nonfinite
    torch.nn.utils.clip_grad_norm_(theirs.params, 1.0)
    for pair in (ours, theirs):
        pair.optimizer.step()
    for mine, torchs in zip(ours.params, theirs.params, strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_no_gradients_have_norm_0() -> None:
    pair = make_pair(True, max_grad_norm=1.0)
    assert math.isnan(pair.optimizer.grad_norm)
    pair.optimizer.step()
    assert pair.optimizer.grad_norm.item() == 0.0
    assert int(pair.optimizer.applied_steps) == 1


def test_stored_gradients_are_the_clipped_ones() -> None:
    ours, theirs = make_pair(True, max_grad_norm=0.5, store_grads=True, maximize=True), make_pair(False)
    for pair in (ours, theirs):
        set_gradients(pair.params, 1)
    # One whose layout is not its parameter's is stored too.
    ours.params[2].grad = ours.params[2].grad.t().contiguous().t()
    torch.nn.utils.clip_grad_norm_(theirs.params, 0.5)
    ours.optimizer.step()
    for mine, torchs in zip(ours.params, theirs.params, strict=True):
        torch.testing.assert_close(mine.grad, torchs.grad, rtol=1e-6, atol=0)


def test_a_new_limit_holds_for_captured_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_CLR_BACKEND", "triton")
    pair = make_pair(True, max_grad_norm=2.0)
    set_gradients(pair.params, 1)
    with testing.record_launches() as graph:
        pair.optimizer.step()
    pair.optimizer.max_grad_norm = 0.25
    graph.replay()
    history = pair.optimizer.history(2)
    assert history.clip_coefficient == pytest.approx([2.0, 0.25] / (history.grad_norm + 1e-6), rel=1e-12)
    assert pair.optimizer.max_grad_norm == 0.25


def test_a_limit_cannot_appear_or_vanish() -> None:
    with pytest.raises(ValueError, match="max_grad_norm is None and cannot become 1.0"):
        make_pair(True).optimizer.max_grad_norm = 1.0
    optimizer = make_pair(True, max_grad_norm=1.0).optimizer
    with pytest.raises(ValueError, match="cannot become None"):
        optimizer.max_grad_norm = None
    with pytest.raises(ValueError, match="must be a number > 0"):
        optimizer.max_grad_norm = -1.0
    assert optimizer.max_grad_norm == 1.0


def test_several_devices_clip_and_skip_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two engines, as two devices would have, each with half of the parameters."""
    from fused_clr.backends import engine_set

    by_device = engine_set.records_by_device

    def split(optimizer: FusedAdam) -> dict[torch.device, list[Any]]:
        ((device, records),) = by_device(optimizer).items()
        return {device: records[::2], torch.device("cpu", 0): records[1::2]}

    monkeypatch.setattr(engine_set, "records_by_device", split)
    ours, theirs = make_pair(True, max_grad_norm=0.5, skip_nonfinite=True), make_pair(False)
    # Both names are one place, and only the check for moved parameters would tell them apart.
    monkeypatch.setattr(
        engine_set, "engine_class", lambda device, make=engine_set.engine_class: _on_cpu(make(torch.device("cpu")))
    )
    for step in range(12):
        for pair in (ours, theirs):
            set_gradients(pair.params, step)
        if step % 4 == 2:
            ours.params[0].grad[0] = torch.nan
            ours.optimizer.step()
            ours.scheduler.step()
            assert_same_params(ours, theirs, 1e-5, 1e-6)
            continue
        torch.nn.utils.clip_grad_norm_(theirs.params, 0.5)
        for pair in (ours, theirs):
            pair.optimizer.step()
            pair.scheduler.step()
        assert_same_params(ours, theirs, 1e-5, 1e-6)
    assert len(ours.optimizer._engines.ready()) == 2
    assert int(ours.optimizer.skipped_steps) == 3


def _on_cpu(engine: type) -> object:
    return lambda _, *rest: engine(torch.device("cpu"), *rest)
