"""What users do around a captured step, compared with torch's eager pair."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from fused_clr import CyclicLR, FusedAdam
from tests.cases import OptimizerCase, by_optimizer
from tests.helpers.emulated_graph import EmulatedGraph, capture

pytestmark = pytest.mark.usefixtures("emulated_cuda")
CYCLE: dict[str, Any] = {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3}


class Twins:
    """A parameter that our optimizer updates and one that torch's does, with gradients that keep their memory."""

    def __init__(self, ours: Any = FusedAdam, theirs: Any = torch.optim.Adam, dtype: Any = None, **arguments: Any):
        self.params = [torch.nn.Parameter(torch.linspace(-1, 1, 9, dtype=dtype)) for _ in range(2)]
        for param in self.params:
            param.grad = torch.zeros_like(param)
        # A tensor lr is each optimizer's own.
        self.ours = ours([self.params[0]], **copy.deepcopy(arguments))
        self.theirs = theirs([self.params[1]], **copy.deepcopy(arguments))
        self._number = 0

    def set_gradients(self) -> None:
        self._number += 1
        gradient = torch.randn(9, generator=torch.Generator().manual_seed(self._number))
        for param in self.params:
            assert param.grad is not None
            param.grad.copy_(gradient)

    def eager(self) -> None:
        self.set_gradients()
        self.ours.step()
        self.theirs.step()

    def captured(self, *args: Any) -> EmulatedGraph:
        graph = EmulatedGraph()
        with capture(graph):
            self.ours.step(*args)
        return graph

    def replay(self, graph: EmulatedGraph) -> None:
        self.set_gradients()
        graph.replay()
        self.theirs.step()

    def assert_same(self) -> None:
        torch.testing.assert_close(*self.params, rtol=1e-5, atol=1e-6)


def write_lr(twins: Twins, lr: float) -> None:
    for optimizer in (twins.ours, twins.theirs):
        optimizer.param_groups[0]["lr"] = lr


def fill_lr(twins: Twins, lr: float) -> None:
    for optimizer in (twins.ours, twins.theirs):
        optimizer.param_groups[0]["lr"].fill_(lr)


@pytest.mark.parametrize(("lr", "write"), [(0.1, write_lr), (torch.tensor(0.1), fill_lr)], ids=["float", "tensor"])
def test_a_lr_written_between_replays(lr: Any, write: Callable[[Twins, float], None]) -> None:
    twins = Twins(lr=lr)
    twins.eager()
    graph = twins.captured()
    for number in range(8):
        write(twins, 0.02 * (number + 1))
        twins.replay(graph)
        twins.assert_same()


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
def test_a_stock_scheduler_drives_a_captured_step(lr: Any) -> None:
    twins = Twins(lr=lr)
    schedulers = [lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=12) for optimizer in (twins.ours, twins.theirs)]
    twins.eager()
    graph = twins.captured()
    for _ in range(10):
        for scheduler in schedulers:
            scheduler.step()
        twins.replay(graph)
        twins.assert_same()


@pytest.mark.parametrize("flags", [(False, False), (True, False), (False, True)], ids=str)
@by_optimizer
def test_a_captured_step_with_options(optimizer_case: OptimizerCase, flags: tuple[bool, bool]) -> None:
    options = {"weight_decay": 0.1} | optimizer_case.options(*flags)
    twins = Twins(optimizer_case.ours, optimizer_case.torch_peer, lr=0.05, **options)
    twins.eager()
    graph = twins.captured()
    for _ in range(8):
        twins.replay(graph)
        twins.assert_same()


def test_a_capture_after_resume_and_a_load_between_replays() -> None:
    first, twins = Twins(), Twins()
    scheduler, peer = CyclicLR(first.ours, **CYCLE), lr_scheduler.CyclicLR(first.theirs, **CYCLE)
    for _ in range(4):
        first.eager()
        scheduler.step()
        peer.step()
    saved = [copy.deepcopy(part.state_dict()) for part in (first.ours, first.theirs, scheduler, peer)]
    own = CyclicLR(twins.ours, **CYCLE), lr_scheduler.CyclicLR(twins.theirs, **CYCLE)

    def resume() -> None:
        twins.ours.load_state_dict(saved[0])
        twins.theirs.load_state_dict(copy.deepcopy(saved[1]))
        own[1].load_state_dict(copy.deepcopy(saved[3]))
        own[0].load_state_dict(saved[2])

    def replay(graph: EmulatedGraph, count: int) -> None:
        for _ in range(count):
            twins.replay(graph)
            for part in own:
                part.step()
            twins.assert_same()
        assert own[0].last_epoch == own[1].last_epoch
        assert own[0].get_last_lr() == pytest.approx(own[1].get_last_lr(), rel=1e-12)

    resume()
    twins.eager()
    for part in own:
        part.step()
    graph = twins.captured()
    replay(graph, 5)
    resume()
    twins.ours.check_replay()
    replay(graph, 5)


def test_a_checkpoint_after_replays_alone() -> None:
    twins, later = Twins(), Twins()
    scheduler, peer = CyclicLR(twins.ours, **CYCLE), lr_scheduler.CyclicLR(twins.theirs, **CYCLE)
    twins.eager()
    scheduler.step()
    peer.step()
    graph = twins.captured()
    for _ in range(6):
        twins.replay(graph)
        scheduler.step()
        peer.step()
    saved = twins.ours.state_dict()
    assert saved["state"][0]["step"] == 7
    # Torch's pair goes on from it.
    theirs = torch.optim.Adam([later.params[0]])
    next_scheduler = lr_scheduler.CyclicLR(theirs, **CYCLE)
    theirs.load_state_dict(saved)
    next_scheduler.load_state_dict(scheduler.state_dict())
    with torch.no_grad():
        later.params[0].copy_(twins.params[0])
    twins.set_gradients()
    later.params[0].grad = twins.params[1].grad
    for optimizer in (theirs, twins.theirs):
        optimizer.step()
    torch.testing.assert_close(later.params[0], twins.params[1], rtol=1e-5, atol=1e-6)


def test_an_empty_group_and_a_closure_in_a_captured_step() -> None:
    twins = Twins(lr=0.1)
    twins.ours.add_param_group({"params": []})
    twins.eager()
    calls: list[int] = []
    graph = twins.captured(lambda: calls.append(1))
    for _ in range(4):
        twins.replay(graph)
        twins.assert_same()
    # A replay runs no host code.
    assert calls == [1]


def test_the_step_past_256_through_a_bfloat16_resume() -> None:
    """The step stays float32, whatever the parameter: bfloat16 cannot count past 256."""
    twins, later = (Twins(dtype=torch.bfloat16, lr=1e-3) for _ in range(2))
    twins.eager()
    graph = twins.captured()
    for _ in range(299):
        graph.replay()
    saved = copy.deepcopy(twins.ours.state_dict())
    later.ours.load_state_dict(saved)
    assert later.ours.state[later.params[0]]["step"].dtype == torch.float32
    later.ours.step()
    again = later.captured()
    again.replay()
    assert later.ours.state_dict()["state"][0]["step"] == 302


def test_a_capture_is_released_twice() -> None:
    twins = Twins(lr=0.1)
    twins.eager()
    twins.captured()
    (captured,) = twins.ours.captures
    captured.release()
    captured.release()
    assert twins.ours.captures == []
    twins.eager()
    twins.assert_same()
