"""What makes a step skip, and what a skip leaves as it was."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.helpers.pairs import all_equal, copies, iterate, make_pair, step

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("found_inf", [2.0, torch.inf, torch.nan])
def test_found_inf_is_a_sum_over_devices(found_inf: float) -> None:
    pair = make_pair(True)
    list(iterate(pair, 2))
    before = copies(pair.params)
    pair.optimizer.found_inf = torch.tensor(found_inf)
    lr = pair.scheduler.get_last_lr()
    step(pair)
    assert pair.scheduler.get_last_lr() == lr
    assert all_equal(before, pair.params)
    assert int(pair.optimizer.live.skipped_steps) == 1


@pytest.mark.parametrize("nonfinite", [torch.inf, -torch.inf, torch.nan])
def test_an_unchecked_loss_scale_is_checked_by_the_norm(nonfinite: float) -> None:
    pair = make_pair(True, max_grad_norm=1.0)
    list(iterate(pair, 1))
    before = copies(pair.params)
    pair.optimizer.grad_scale = torch.tensor(8.0)
    pair.params[0].grad[0] = nonfinite
    pair.optimizer.step()
    assert int(pair.optimizer.live.skipped_steps) == 1
    assert all_equal(before, pair.params)


@pytest.mark.parametrize("skip_if_nonfinite", [False, True])
def test_skip_if_nonfinite(skip_if_nonfinite: bool) -> None:
    pair = make_pair(True, max_grad_norm=1.0, skip_if_nonfinite=skip_if_nonfinite)
    list(iterate(pair, 1))
    pair.params[2].grad[0, 0] = torch.nan
    step(pair)
    assert int(pair.optimizer.live.skipped_steps) == skip_if_nonfinite
    assert pair.params[0].isnan().any() == (not skip_if_nonfinite)
    # A tick by the scheduler alone is no step, and skips nothing.
    before = pair.optimizer.status().schedule_step
    pair.scheduler.step()
    assert pair.optimizer.status().schedule_step == before + 1
    assert int(pair.optimizer.live.applied_steps) + int(pair.optimizer.live.skipped_steps) == 2


def test_counters_are_live_and_survive_copies_and_groups() -> None:
    pair = make_pair(True)
    counter = pair.optimizer.live.applied_steps
    list(iterate(pair, 3))
    assert (counter.dtype, counter.shape, int(counter)) == (torch.int64, (), 3)
    pair.optimizer.found_inf = torch.ones(())
    pair.optimizer.step()
    assert int(copy.deepcopy(pair.optimizer).live.skipped_steps) == 1
    pair.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    assert (int(pair.optimizer.live.applied_steps), int(pair.optimizer.live.skipped_steps)) == (3, 1)
