"""One recorded step, replayed with no host code, follows torch's pair."""

from __future__ import annotations

import pytest
import torch

from fused_clr import testing

from .pairs import Pair, make_pair

PERIOD = 11
pytestmark = pytest.mark.usefixtures("triton_backend")


def set_gradients(pair: Pair, step: int, active: tuple[int, ...]) -> None:
    """New values at the same addresses, and none for the others."""
    generator = torch.Generator().manual_seed(step)
    for index, param in enumerate(pair.params):
        gradient = torch.randn(param.shape, generator=generator)
        # What is to be left alone says so: a capture refuses a parameter that wants a gradient and has none.
        param.requires_grad_(index in active)
        if index not in active:
            param.grad = None
        elif param.grad is None:
            param.grad = gradient
        else:
            param.grad.copy_(gradient)


def assert_equal(ours: Pair, theirs: Pair) -> None:
    for mine, torchs in zip(ours.optimizer.param_groups, theirs.optimizer.param_groups, strict=True):
        assert mine["lr"] == pytest.approx(torchs["lr"], rel=1e-12)
        assert mine["betas"] == pytest.approx(torchs["betas"], rel=1e-12)
    for mine, torchs in zip(ours.params, theirs.params, strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-5, atol=1e-6)
        if torchs in theirs.optimizer.state:
            assert ours.optimizer.state[mine]["step"] == theirs.optimizer.state[torchs]["step"]


def test_three_cycles_of_replays() -> None:
    ours, theirs = make_pair(True), make_pair(False)
    everything = (0, 1, 2, 3)
    for pair in (ours, theirs):
        set_gradients(pair, 0, everything)
    with testing.record_launches() as graph:
        ours.optimizer.step()
    ours.scheduler.step()
    theirs.optimizer.step()
    theirs.scheduler.step()
    assert len(graph) == 1
    for step in range(1, 3 * PERIOD + 1):
        for pair in (ours, theirs):
            set_gradients(pair, step, everything)
        graph.replay()
        # After a capture the device drives: this must not tick.
        ours.scheduler.step()
        theirs.optimizer.step()
        theirs.scheduler.step()
        assert_equal(ours, theirs)
    assert ours.scheduler.last_epoch == 3 * PERIOD + 1


def test_two_recorded_steps_in_turn() -> None:
    ours, theirs = make_pair(True), make_pair(False)
    graphs = []
    gradients = {}
    for subset in ((0, 2), (1, 2, 3)):
        for pair in (ours, theirs):
            set_gradients(pair, 0, subset)
        with testing.record_launches() as graph:
            ours.optimizer.step()
        ours.scheduler.step()
        theirs.optimizer.step()
        theirs.scheduler.step()
        graphs.append(graph)
        # A captured graph keeps its gradients alive; so does this.
        gradients[subset] = [param.grad for param in ours.params]
    for step in range(1, 2 * PERIOD):
        subset = list(gradients)[step % 2]
        set_gradients(theirs, step, subset)
        for own, other in zip(gradients[subset], theirs.params, strict=True):
            if own is not None and other.grad is not None:
                own.copy_(other.grad)
        graphs[step % 2].replay()
        theirs.optimizer.step()
        theirs.scheduler.step()
        assert_equal(ours, theirs)


def test_eager_steps_between_replays() -> None:
    ours, theirs = make_pair(True), make_pair(False)
    everything = (0, 1, 2, 3)
    for pair in (ours, theirs):
        set_gradients(pair, 0, everything)
    with testing.record_launches() as graph:
        ours.optimizer.step()
    ours.scheduler.step()
    captured = [param.grad for param in ours.params]
    theirs.optimizer.step()
    theirs.scheduler.step()
    for step in range(1, 2 * PERIOD):
        set_gradients(theirs, step, everything)
        if step % 3:
            for own, other in zip(captured, theirs.params, strict=True):
                own.copy_(other.grad)
            graph.replay()
        else:
            # Gradients elsewhere: an eager step must not disturb the recorded addresses.
            for own, other in zip(ours.params, theirs.params, strict=True):
                own.grad = other.grad.clone()
            ours.optimizer.step()
            ours.scheduler.step()
        theirs.optimizer.step()
        theirs.scheduler.step()
        assert_equal(ours, theirs)


def test_an_old_graph_does_nothing_after_add_param_group() -> None:
    pair = make_pair(True)
    set_gradients(pair, 0, (0, 1, 2, 3))
    with testing.record_launches() as graph:
        pair.optimizer.step()
    pair.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.1})
    pair.optimizer.step()
    before = [param.detach().clone() for param in pair.params]
    step = pair.optimizer.schedule_step
    graph.replay()
    assert all(torch.equal(param, old) for param, old in zip(pair.params, before, strict=True))
    assert pair.optimizer.schedule_step == step


def test_one_launch_per_dtype() -> None:
    pair = make_pair(True)
    pair.params[3].data = pair.params[3].data.double()
    set_gradients(pair, 0, (0, 1, 2))
    pair.params[3].grad = torch.ones((), dtype=torch.float64)
    with testing.record_launches() as graph:
        pair.optimizer.step()
    assert len(graph) == 2
    before = pair.optimizer.schedule_step
    graph.replay()
    assert pair.optimizer.schedule_step == before + 1
