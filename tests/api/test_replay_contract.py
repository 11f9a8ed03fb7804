"""What replays assume of a captured step is checked, refused or refreshed; never silently wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fused_clr import testing
from tests.helpers.pairs import (
    Pair,
    all_equal,
    assert_same_params,
    copies,
    make_pair,
    record_step,
    rewrite_gradients,
    step,
)

pytestmark = pytest.mark.usefixtures("triton_backend")


def recorded_pair() -> tuple[Pair, testing.RecordedGraph]:
    """A pair with one recorded step."""
    pair = make_pair(True)
    rewrite_gradients(pair, 0)
    return pair, record_step(pair)


def test_check_replay_passes_while_nothing_moves() -> None:
    pair, graph = recorded_pair()
    for number in range(1, 4):
        rewrite_gradients(pair, number)
        pair.optimizer.check_replay()
        graph.replay()
    # The graph's own backward would write a gradient that is None now.
    pair.params[1].grad = None
    pair.optimizer.check_replay()
    assert [captured.fits for captured in pair.optimizer.captures] == [True]


def move_parameter(pair: Pair) -> None:
    pair.params[2].data = pair.params[2].data.clone()


def move_gradient(pair: Pair) -> None:
    pair.params[2].grad = torch.zeros_like(pair.params[2])


def replace_state(pair: Pair) -> None:
    state = pair.optimizer.state[pair.params[2]]
    state["exp_avg"] = state["exp_avg"].clone()


MOVES = {
    r"param_groups\[1\]\['params'\]\[0\] has moved": move_parameter,
    r"the gradient of param_groups\[1\]\['params'\]\[0\] has moved": move_gradient,
    r"state\['exp_avg'\] of param_groups\[1\]\['params'\]\[0\] has moved": replace_state,
}


@pytest.mark.parametrize(("message", "move"), MOVES.items(), ids=["parameter", "gradient", "state"])
def test_a_moved_tensor_is_named(message: str, move: Callable[[Pair], None]) -> None:
    pair, _ = recorded_pair()
    move(pair)
    with pytest.raises(RuntimeError, match=message):
        pair.optimizer.check_replay()


def test_other_gradients_are_refused() -> None:
    pair, _ = recorded_pair()
    pair.params[0].grad = None
    with pytest.raises(RuntimeError, match=r"\['params'\]\[0\] existed at capture and is None now"):
        pair.optimizer.check_replay(optimizer_only=True)
    pair.params[0].grad = torch.zeros(3).double().float()
    pair.params[0].data = pair.params[0].data.double()
    pair.params[0].grad = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"captured with shape \(3,\), strides \(1,\) and torch.float32"):
        pair.optimizer.check_replay(optimizer_only=True)


def test_a_gradient_that_appears_is_refused() -> None:
    pair = make_pair(True)
    rewrite_gradients(pair, 0, (0, 1, 2))
    with testing.record_launches():
        pair.optimizer.step()
    pair.params[3].requires_grad_(True)
    pair.params[3].grad = torch.ones(())
    with pytest.raises(RuntimeError, match=r"\['params'\]\[1\] did not exist at capture"):
        pair.optimizer.check_replay()


def test_a_parameter_without_its_gradient_is_refused_at_capture() -> None:
    pair = make_pair(True)
    rewrite_gradients(pair, 0)
    pair.optimizer.step()
    pair.params[1].grad = None
    before = copies(pair.params)
    with testing.record_launches() as graph, pytest.raises(RuntimeError, match=r"\['params'\]\[1\] has none"):
        pair.optimizer.step()
    assert len(graph) == 0
    assert all_equal(pair.params, before)
    assert pair.optimizer.captures == []


def test_nothing_captured_and_released_are_told() -> None:
    pair, _ = recorded_pair()
    (captured,) = pair.optimizer.captures
    captured.release()
    assert pair.optimizer.captures == []
    with pytest.raises(RuntimeError, match="was released"):
        pair.optimizer.check_replay(captured)
    with pytest.raises(RuntimeError, match="no captured step"):
        pair.optimizer.check_replay()


@pytest.mark.parametrize("change", ["add_param_group", "add_param_group-and-step", "amsgrad"])
def test_a_graph_that_no_longer_fits_says_so_and_does_nothing(change: str) -> None:
    pair, graph = recorded_pair()
    if change == "amsgrad":
        pair.optimizer.param_groups[0]["amsgrad"] = True
    else:
        pair.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.1})
    if change == "add_param_group-and-step":
        pair.optimizer.step()
    with pytest.raises(RuntimeError, match="capture the step again"):
        pair.optimizer.check_replay()
    before, schedule_step = copies(pair.params), pair.optimizer.status().schedule_step
    assert not pair.optimizer.status().stale_replay
    graph.replay()
    assert pair.optimizer.status().stale_replay
    assert all_equal(pair.params, before)
    assert pair.optimizer.status().schedule_step == schedule_step


@pytest.mark.parametrize("move", MOVES.values(), ids=["parameter", "gradient", "state"])
def test_a_graph_of_the_step_alone_takes_new_addresses_over(move: Callable[[Pair], None]) -> None:
    pair, graph = recorded_pair()
    twin = make_pair(False)
    rewrite_gradients(twin, 0)
    step(twin)
    for number in range(1, 12):
        rewrite_gradients(pair, number)
        rewrite_gradients(twin, number)
        if number % 3 == 0:
            old = [param.grad.clone() for param in pair.params]
            move(pair)
            for param, grad in zip(pair.params, old, strict=True):
                param.grad.copy_(grad)
        pair.optimizer.check_replay(optimizer_only=True)
        graph.replay()
        step(twin)
        assert_same_params(pair, twin, 1e-5, 1e-6)
