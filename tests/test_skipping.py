"""Loss scales, overflows and skipped steps, on both backends, against torch's pair with the same events."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fused_clr import FusedAdam, testing

from .pairs import assert_same_params, iterate, make_pair

CYCLES = 33
pytestmark = pytest.mark.usefixtures("backend")


def gradients(step: int, shapes: list[torch.Size]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def overflows(step: int) -> bool:
    return step % 5 == 3


@pytest.mark.parametrize("advance_on_skip", [False, True], ids=["stand-still", "advance"])
@pytest.mark.parametrize("max_grad_norm", [None, 1.5], ids=["plain", "clipped"])
@pytest.mark.parametrize("store_grads", [False, True], ids=["keep-grads", "store-grads"])
def test_three_cycles_with_a_gradscaler(advance_on_skip: bool, max_grad_norm: float | None, store_grads: bool) -> None:
    ours = make_pair(
        True, advance_on_skip=advance_on_skip, max_grad_norm=max_grad_norm, store_grads=store_grads, eps=1e-6
    )
    theirs = make_pair(False, eps=1e-6)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3) for _ in range(2)]
    skipped = 0
    for step in range(CYCLES):
        scaled = []
        for pair, scaler in zip((ours, theirs), scalers, strict=True):
            scale = scaler.scale(torch.ones(()))
            for param, gradient in zip(pair.params, gradients(step, [p.shape for p in pair.params]), strict=True):
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
        if not overflows(step) or advance_on_skip:
            theirs.scheduler.step()
        skipped += overflows(step)
        assert scalers[0].get_scale() == scalers[1].get_scale()
        assert ours.scheduler.get_last_lr() == pytest.approx(theirs.scheduler.get_last_lr(), rel=1e-12)
        assert_same_params(ours, theirs, 1e-5, 1e-6)
        assert (int(ours.optimizer.applied_steps), int(ours.optimizer.skipped_steps)) == (step + 1 - skipped, skipped)
        for param, torchs, before in zip(ours.params, theirs.params, scaled[0], strict=True):
            if overflows(step) or not store_grads:
                assert torch.equal(param.grad, before) or overflows(step)
            else:
                torch.testing.assert_close(param.grad, torchs.grad, rtol=1e-5, atol=1e-7)
    for mine, torchs in zip(ours.params, theirs.params, strict=True):
        assert ours.optimizer.state[mine]["step"] == theirs.optimizer.state[torchs]["step"] == CYCLES - skipped


@pytest.mark.parametrize("found_inf", [2.0, torch.inf, torch.nan])
def test_found_inf_is_a_sum_over_devices(found_inf: float) -> None:
    pair = make_pair(True)
    list(iterate(pair, 2))
    before = [param.detach().clone() for param in pair.params]
    pair.optimizer.found_inf = torch.tensor(found_inf)
    lr = pair.scheduler.get_last_lr()
    pair.optimizer.step()
    pair.scheduler.step()
    assert pair.scheduler.get_last_lr() == lr
    assert all(torch.equal(a, b) for a, b in zip(before, pair.params, strict=True))
    assert int(pair.optimizer.skipped_steps) == 1


@pytest.mark.parametrize("nonfinite", [torch.inf, -torch.inf, torch.nan])
def test_an_unchecked_loss_scale_is_checked_by_the_norm(nonfinite: float) -> None:
    pair = make_pair(True, max_grad_norm=1.0)
    list(iterate(pair, 1))
    before = [param.detach().clone() for param in pair.params]
    pair.optimizer.grad_scale = torch.tensor(8.0)
    pair.params[0].grad[0] = nonfinite
    pair.optimizer.step()
    assert int(pair.optimizer.skipped_steps) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, pair.params, strict=True))


@pytest.mark.parametrize("skip_nonfinite", [False, True])
def test_skip_nonfinite(skip_nonfinite: bool) -> None:
    pair = make_pair(True, max_grad_norm=1.0, skip_nonfinite=skip_nonfinite)
    list(iterate(pair, 1))
    pair.params[2].grad[0, 0] = torch.nan
    pair.optimizer.step()
    pair.scheduler.step()
    assert int(pair.optimizer.skipped_steps) == skip_nonfinite
    assert pair.params[0].isnan().any() == (not skip_nonfinite)
    # A tick by the scheduler alone is no step, and skips nothing.
    step = pair.optimizer.schedule_step
    pair.scheduler.step()
    assert pair.optimizer.schedule_step == step + 1
    assert int(pair.optimizer.applied_steps) + int(pair.optimizer.skipped_steps) == 2


def test_counters_are_live_and_survive_copies_and_groups() -> None:
    import copy

    pair = make_pair(True)
    counter = pair.optimizer.applied_steps
    list(iterate(pair, 3))
    assert (counter.dtype, counter.shape, int(counter)) == (torch.int64, (), 3)
    pair.optimizer.found_inf = torch.ones(())
    pair.optimizer.step()
    assert int(copy.deepcopy(pair.optimizer).skipped_steps) == 1
    pair.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    assert (int(pair.optimizer.applied_steps), int(pair.optimizer.skipped_steps)) == (3, 1)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("advance_on_skip", [False, True], ids=["stand-still", "advance"])
def test_replays_with_skips(advance_on_skip: bool) -> None:
    """One recorded step; what skips is a tensor that the host never looks at."""
    ours = make_pair(True, advance_on_skip=advance_on_skip, max_grad_norm=2.0)
    theirs = make_pair(False)
    found_inf = torch.zeros(())
    graph = None
    for step in range(CYCLES):
        for pair in (ours, theirs):
            for param, gradient in zip(pair.params, gradients(step, [p.shape for p in pair.params]), strict=True):
                param.grad = gradient if param.grad is None else param.grad.copy_(gradient)
        found_inf.fill_(2.0 if overflows(step) else 0.0)
        if graph is None:
            ours.optimizer.found_inf = found_inf
            with testing.record_launches() as graph:
                ours.optimizer.step()
        else:
            graph.replay()
        if not overflows(step):
            torch.nn.utils.clip_grad_norm_(theirs.params, 2.0)
            theirs.optimizer.step()
        if not overflows(step) or advance_on_skip:
            theirs.scheduler.step()
        ours.scheduler.step()
        assert ours.scheduler.get_last_lr() == pytest.approx(theirs.scheduler.get_last_lr(), rel=1e-12)
        assert_same_params(ours, theirs, 1e-5, 1e-6)
    assert graph is not None
    assert len(graph) == 2
    assert ours.optimizer.history(CYCLES).skipped.tolist() == [overflows(step) for step in range(CYCLES)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": 0.0}, "max_grad_norm must be a number > 0 .*, got 0.0"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm must be a number > 0 .*, got nan"),
        ({"max_grad_norm": "1"}, None),
        ({"max_grad_norm": "one"}, "max_grad_norm must be a number > 0 .*, got 'one'"),
        ({"skip_nonfinite": True}, "skip_nonfinite=True needs max_grad_norm"),
        ({"store_grads": "yes"}, "store_grads must be True or False, got 'yes'"),
        ({"history_size": -1}, "history_size must be an integer >= 0, got -1"),
        ({"history_size": 2.5}, "history_size must be an integer >= 0, got 2.5"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str | None) -> None:
    params = [torch.nn.Parameter(torch.ones(2))]
    if message is None:
        assert FusedAdam(params, **options).max_grad_norm == 1.0
        return
    with pytest.raises(ValueError, match=message):
        FusedAdam(params, **options)


def test_options_are_no_groups() -> None:
    param = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="max_grad_norm holds for all groups"):
        FusedAdam([{"params": [param], "max_grad_norm": 1.0}])
