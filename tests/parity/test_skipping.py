"""Loss scales, overflows and skipped steps, against torch's pair with the same events."""

from __future__ import annotations

import pytest
import torch

from tests.cases import OPTIMIZERS, OptimizerCase, by_rows, covering
from tests.helpers.pairs import assert_same_params, gradients, make_pair, record_step, rewrite_gradients

pytestmark = pytest.mark.usefixtures("backend")


CYCLES = 33


def overflows(step: int) -> bool:
    return step % 5 == 3


# A skip advances the schedule or not, a limit of the norm or none, clipped gradients stored or not.
@by_rows(
    "optimizer_case advance_schedule_on_skip max_grad_norm write_back_grads",
    covering(list(OPTIMIZERS.values()), [False, True], [None, 1.5], [False, True]),
)
def test_three_cycles_with_a_gradscaler(
    optimizer_case: OptimizerCase, advance_schedule_on_skip: bool, max_grad_norm: float | None, write_back_grads: bool
) -> None:
    options = {
        "advance_schedule_on_skip": advance_schedule_on_skip,
        "max_grad_norm": max_grad_norm,
        "write_back_grads": write_back_grads,
    }
    ours = make_pair(True, optimizer_case=optimizer_case, **optimizer_case.settings, **options)
    theirs = make_pair(False, optimizer_case=optimizer_case, **optimizer_case.settings)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3) for _ in range(2)]
    skipped = 0
    for step in range(CYCLES):
        scaled = []
        for pair, scaler in zip((ours, theirs), scalers, strict=True):
            scale = scaler.scale(torch.ones(()))
            for param, gradient in zip(pair.params, gradients(pair.params, step), strict=True):
                param.grad = gradient * scale
            if overflows(step):
                pair.params[1].grad.view(-1)[-1] = torch.nan if step % 2 else -torch.inf
            scaled.append([param.grad.clone() for param in pair.params])
        scalers[0].step(ours.optimizer)
        scalers[0].update()
        scalers[1].unscale_(theirs.optimizer)
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(theirs.params, max_grad_norm)
        scalers[1].step(theirs.optimizer)
        scalers[1].update()
        ours.scheduler.step()
        if not overflows(step) or advance_schedule_on_skip:
            theirs.scheduler.step()
        skipped += overflows(step)
        assert scalers[0].get_scale() == scalers[1].get_scale()
        assert ours.scheduler.get_last_lr() == pytest.approx(theirs.scheduler.get_last_lr(), rel=1e-12)
        assert_same_params(ours, theirs, 1e-5, 1e-6)
        assert (int(ours.optimizer.live.applied_steps), int(ours.optimizer.live.skipped_steps)) == (
            step + 1 - skipped,
            skipped,
        )
        for param, torchs, before in zip(ours.params, theirs.params, scaled[0], strict=True):
            if overflows(step) or not write_back_grads:
                assert torch.equal(param.grad, before) or overflows(step)
            else:
                torch.testing.assert_close(param.grad, torchs.grad, rtol=1e-5, atol=1e-7)
    for mine, torchs in zip(ours.params, theirs.params, strict=True):
        if "step" in theirs.optimizer.state[torchs]:
            assert ours.optimizer.state[mine]["step"] == theirs.optimizer.state[torchs]["step"] == CYCLES - skipped


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("advance_schedule_on_skip", [False, True], ids=["stand-still", "advance"])
def test_replays_with_skips(advance_schedule_on_skip: bool) -> None:
    """One recorded step; what skips is a tensor that the host never looks at."""
    ours = make_pair(True, advance_schedule_on_skip=advance_schedule_on_skip, max_grad_norm=2.0)
    theirs = make_pair(False)
    found_inf = torch.zeros(())
    graph = None
    for step in range(CYCLES):
        for pair in (ours, theirs):
            rewrite_gradients(pair, step)
        found_inf.fill_(2.0 if overflows(step) else 0.0)
        if graph is None:
            ours.optimizer.found_inf = found_inf
            graph = record_step(ours)
        else:
            graph.replay()
            ours.scheduler.step()
        if not overflows(step):
            torch.nn.utils.clip_grad_norm_(theirs.params, 2.0)
            theirs.optimizer.step()
        if not overflows(step) or advance_schedule_on_skip:
            theirs.scheduler.step()
        assert ours.scheduler.get_last_lr() == pytest.approx(theirs.scheduler.get_last_lr(), rel=1e-12)
        assert_same_params(ours, theirs, 1e-5, 1e-6)
    assert graph is not None
    assert len(graph) == 2
    assert ours.optimizer.history(CYCLES).skipped.tolist() == [overflows(step) for step in range(CYCLES)]
