"""The norm inside the step: over all dtypes and devices, exact to the sums that its kernel makes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from fused_clr import FusedAdam, testing
from tests.helpers.pairs import assert_same_params, make_pair, set_gradients, step

pytestmark = pytest.mark.usefixtures("backend")


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
    assert optimizer.live.grad_norm.item() == low


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_the_kernels_norm_is_exact_to_float32_sums() -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    params = [torch.nn.Parameter(torch.ones(5000, dtype=dtype)) for dtype in dtypes]
    optimizer = FusedAdam(params, max_grad_norm=1.0)
    set_gradients(params, 0)
    with testing.record_launches() as graph:
        optimizer.step()
    exact = math.sqrt(sum(float(param.grad.double().square().sum()) for param in params))
    # Squares are rounded to float32, and at most a dozen of them are added before float64 takes over.
    assert optimizer.live.grad_norm.item() == pytest.approx(exact, rel=1e-7)
    # The norm's launch is one for all dtypes, the updates one each.
    assert len(graph) == 5
    bits = np.float64(optimizer.live.grad_norm.item()).tobytes()
    graph.replay()
    assert np.float64(optimizer.live.grad_norm.item()).tobytes() == bits


def test_no_gradients_have_norm_0() -> None:
    pair = make_pair(True, max_grad_norm=1.0)
    assert math.isnan(pair.optimizer.live.grad_norm)
    pair.optimizer.step()
    assert pair.optimizer.live.grad_norm.item() == 0.0
    assert int(pair.optimizer.live.applied_steps) == 1


def test_several_devices_clip_and_skip_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two engines, as two devices would have, each with half of the parameters."""
    from fused_clr._device import engines

    by_device = FusedAdam._records

    def split(optimizer: FusedAdam) -> dict[torch.device, list[Any]]:
        ((device, records),) = by_device(optimizer).items()
        return {device: records[::2], torch.device("cpu", 0): records[1::2]}

    monkeypatch.setattr(FusedAdam, "_records", split)
    ours, theirs = make_pair(True, max_grad_norm=0.5, skip_if_nonfinite=True), make_pair(False)
    # Both names are one place, and only the check for moved parameters would tell them apart.
    monkeypatch.setattr(
        engines, "engine_class", lambda device, make=engines.engine_class: _on_cpu(make(torch.device("cpu")))
    )
    for number in range(12):
        for pair in (ours, theirs):
            set_gradients(pair.params, number)
        if number % 4 == 2:
            ours.params[0].grad[0] = torch.nan
        else:
            torch.nn.utils.clip_grad_norm_(theirs.params, 0.5)
            step(theirs)
        step(ours)
        assert_same_params(ours, theirs, 1e-5, 1e-6)
    assert len(list(ours.optimizer._ready())) == 2
    assert int(ours.optimizer.live.skipped_steps) == 3


def _on_cpu(engine: type) -> object:
    return lambda setup: engine(setup._replace(device=torch.device("cpu")))
