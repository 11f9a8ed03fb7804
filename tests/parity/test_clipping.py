"""Clipping inside the step, against `torch.nn.utils.clip_grad_norm_`."""

from __future__ import annotations

import math

import pytest
import torch

from fused_clr._device.step_plan import LaunchConfig
from fused_clr._device.triton import TritonEngine
from tests.cases import OPTIMIZERS, OptimizerCase, by_rows, in_turn
from tests.helpers.pairs import assert_same_params, make_pair, record_step, set_gradients, step

pytestmark = pytest.mark.usefixtures("backend")

SHAPES = ((3,), (63,), (5, 5), (), (0,), (700,))


@by_rows("max_norm optimizer_case", in_turn([0.01, 5.0, 1e9, math.inf], list(OPTIMIZERS.values())))
def test_clipped_steps_equal_torch(
    optimizer_case: OptimizerCase, max_norm: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LaunchConfig(block_size=128, num_warps=4, lanes=4, programs_per_multiprocessor=2)
    monkeypatch.setattr(TritonEngine, "config", config)
    ours = make_pair(True, shapes=SHAPES, optimizer_case=optimizer_case, max_grad_norm=max_norm)
    theirs = make_pair(False, shapes=SHAPES, optimizer_case=optimizer_case)
    for number in range(15):
        for pair in (ours, theirs):
            set_gradients(pair.params, number, size=10.0 ** (number % 5 - 2))
        norm = torch.nn.utils.clip_grad_norm_(theirs.params, max_norm)
        step(ours)
        step(theirs)
        assert ours.optimizer.live.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
        assert_same_params(ours, theirs, 2e-5, 2e-6)
    assert ours.optimizer.live.grad_norm.dtype == torch.float64
    assert ours.optimizer.live.grad_norm.shape == ()


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


def test_stored_gradients_are_the_clipped_ones() -> None:
    ours, theirs = make_pair(True, max_grad_norm=0.5, write_back_grads=True, maximize=True), make_pair(False)
    for pair in (ours, theirs):
        set_gradients(pair.params, 1)
    # One whose layout is not its parameter's is stored too.
    ours.params[2].grad = ours.params[2].grad.t().contiguous().t()
    torch.nn.utils.clip_grad_norm_(theirs.params, 0.5)
    ours.optimizer.step()
    for mine, torchs in zip(ours.params, theirs.params, strict=True):
        torch.testing.assert_close(mine.grad, torchs.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_a_new_limit_holds_for_captures() -> None:
    pair = make_pair(True, max_grad_norm=2.0)
    set_gradients(pair.params, 1)
    graph = record_step(pair)
    pair.optimizer.max_grad_norm = 0.25
    graph.replay()
    history = pair.optimizer.history(2)
    assert history.clip_coefficient == pytest.approx([2.0, 0.25] / (history.grad_norm + 1e-6), rel=1e-12)
    assert pair.optimizer.max_grad_norm == 0.25
