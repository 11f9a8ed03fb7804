"""The history and the status tell what the steps did, and `param_groups` agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fused_clr import FusedAdam, testing
from tests.helpers.pairs import iterate, make_pair

pytestmark = pytest.mark.usefixtures("backend")


def test_the_history_tells_what_was_applied() -> None:
    pair = make_pair(True, max_grad_norm=1.0, history_size=8)
    told = list(iterate(pair, 13))
    history = pair.optimizer.history()
    assert history.schedule_step.tolist() == list(range(5, 13))
    assert history.lr == pytest.approx(np.array([lrs for lrs, _ in told[5:]]), rel=1e-15)
    assert history.momentum == pytest.approx(np.array([momenta for _, momenta in told[5:]]), rel=1e-15)
    assert history.grad_norm[-1] == pair.optimizer.live.grad_norm.item()
    assert history.clip_coefficient == pytest.approx(np.minimum(1, 1 / (history.grad_norm + 1e-6)), rel=1e-12)
    assert not history.skipped.any()
    assert (history.grad_scale == 1).all()
    assert pair.optimizer.history(3).schedule_step.tolist() == [10, 11, 12]
    assert pair.optimizer.history(0).lr.shape == (0, 2)
    # Arrays of its own: later steps do not change what was read.
    before = history.lr.copy()
    list(iterate(pair, 3))
    assert np.array_equal(history.lr, before)


def test_a_short_history() -> None:
    pair = make_pair(True)
    assert pair.optimizer.history().schedule_step.tolist() == []
    list(iterate(pair, 2))
    pair.scheduler.step()
    assert pair.optimizer.history(5).schedule_step.tolist() == [0, 1]
    assert np.isnan(pair.optimizer.history().grad_norm).all()


def test_no_history() -> None:
    pair = make_pair(True, history_size=0)
    list(iterate(pair, 2))
    assert pair.optimizer.history().lr.shape == (0, 2)
    with pytest.raises(ValueError, match=r"n must be an integer in \[0, history_size = 0\], got 1"):
        pair.optimizer.history(1)


@pytest.mark.parametrize("n", [-1, 257, 2.5, "3"])
def test_bad_counts(n: Any) -> None:
    with pytest.raises(ValueError, match=r"n must be an integer in \[0, history_size = 256\]"):
        make_pair(True).optimizer.history(n)


def test_a_tensor_lr_is_told_as_it_was() -> None:
    lr = torch.tensor(0.25)
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = FusedAdam([param], lr=lr)
    param.grad = torch.ones(2)
    for value in (0.25, 0.5, 0.125):
        lr.fill_(value)
        optimizer.step()
    assert optimizer.history().lr[:, 0].tolist() == [0.25, 0.5, 0.125]


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_the_history_of_replays() -> None:
    pair = make_pair(True, history_size=40)
    expected = [lrs for lrs, _ in iterate(make_pair(False), 35)]
    for param in pair.params:
        param.grad = torch.ones_like(param)
    with testing.record_launches() as graph:
        pair.optimizer.step()
    for _ in range(34):
        graph.replay()
    history = pair.optimizer.history(35)
    assert history.lr == pytest.approx(np.array(expected), rel=1e-12)
    assert history.schedule_step.tolist() == list(range(35))


@pytest.mark.parametrize("wait", [True, False], ids=["wait", "no-wait"])
def test_the_status(wait: bool) -> None:
    pair = make_pair(True, max_grad_norm=1.0)
    list(iterate(pair, 4))
    pair.optimizer.found_inf = torch.ones(())
    pair.optimizer.step()
    status = pair.optimizer.status(wait=wait)
    assert status is not None
    assert (status.schedule_step, status.applied_steps, status.skipped_steps) == (4, 4, 1)
    assert status.lr.tolist() == pair.optimizer.live.lr.tolist()
    assert status.momentum.tolist() == pair.optimizer.live.momentum.tolist()
    assert status.grad_norm == pair.optimizer.live.grad_norm.item()
    assert not status.stale_replay
    pair.optimizer.found_inf = None
    pair.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    assert pair.optimizer.status(wait=wait).lr.shape == (3,)
    assert status.lr.shape == (2,)
