"""Captured training loops on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fused_clr import FusedAdam, GraphedStep
from fused_clr.schedules import Cyclic
from tests.helpers.on_gpu import CYCLE, PERIOD, batches, make_model, syncs_are_errors, torch_pair

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("mode", ["global", "thread_local", "relaxed"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.1], ids=["plain", "clipped"])
def test_a_graphed_step_equals_eager_torch(mode: Any, max_grad_norm: float | None) -> None:
    ours, theirs = make_model(), make_model()
    optimizer = FusedAdam(ours.parameters(), schedule=Cyclic(**CYCLE), max_grad_norm=max_grad_norm)
    torch_optimizer, torch_scheduler = torch_pair(list(theirs.parameters()))

    def step(batch: torch.Tensor) -> torch.Tensor:
        loss = ours(batch).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    graphed = GraphedStep(step, optimizer, capture_error_mode=mode, check="always")
    for batch in batches(3 * PERIOD + 4):
        loss = graphed(batch)
        torch_optimizer.zero_grad()
        torch_loss = theirs(batch).square().mean()
        torch_loss.backward()
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_grad_norm)
        torch_optimizer.step()
        torch_scheduler.step()
        torch.testing.assert_close(loss, torch_loss.detach(), rtol=1e-4, atol=1e-6)
    assert graphed.num_graphs == 1
    assert int(optimizer.live.applied_steps) == 3 * PERIOD + 4
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    graphed.release()


@pytest.mark.parametrize("max_grad_norm", [None, 0.1], ids=["plain", "clipped"])
def test_a_graphed_step_skips_overflows(max_grad_norm: float | None) -> None:
    model = make_model()
    optimizer = FusedAdam(model.parameters(), schedule=Cyclic(**CYCLE), max_grad_norm=max_grad_norm)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=4)

    def step(batch: torch.Tensor) -> None:
        with torch.autocast("cuda", torch.float16):
            loss = model(batch).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    graphed = GraphedStep(step, optimizer)
    for index, batch in enumerate(batches(40)):
        if index % 7 == 5:
            batch[0, 0] = torch.inf
        graphed(batch)
    expected = [index % 7 == 5 for index in range(40)]
    assert optimizer.history(40).skipped.tolist() == expected
    assert int(optimizer.live.skipped_steps) == sum(expected)
    assert optimizer.status().schedule_step == 40 - sum(expected)
    assert all(param.isfinite().all() for param in model.parameters())


def test_watching_does_not_sync() -> None:
    model = make_model()
    optimizer = FusedAdam(model.parameters(), schedule=Cyclic(**CYCLE), max_grad_norm=1.0)

    def step(batch: torch.Tensor) -> None:
        model(batch).square().mean().backward()
        optimizer.step()

    graphed = GraphedStep(step, optimizer)
    data = batches(60)
    for batch in data[:10]:
        graphed(batch)
    with syncs_are_errors():
        for batch in data[10:]:
            graphed(batch)
            optimizer.status(wait=False)
    torch.cuda.synchronize()
    optimizer.status(wait=False)
    status = optimizer.status(wait=False)
    assert status is not None
    assert 10 < status.applied_steps <= 60
