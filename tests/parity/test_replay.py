"""One recorded step, replayed with no host code, follows torch's pair."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from fused_clr.schedules import Cyclic
from tests.cases import CYCLES, IN_TURN, SCHEDULES, OptimizerCase, ScheduleCase, by_optimizer, by_rows, momenta_of
from tests.helpers.emulated_graph import EmulatedGraph, capture
from tests.helpers.pairs import (
    Pair,
    all_equal,
    assert_same_params,
    copies,
    gradients,
    make_both,
    make_pair,
    record_step,
    rewrite_gradients,
    step,
)

PERIOD = 11
pytestmark = pytest.mark.usefixtures("triton_backend")


def assert_equal(ours: Pair, theirs: Pair) -> None:
    for mine, torchs in zip(ours.optimizer.param_groups, theirs.optimizer.param_groups, strict=True):
        assert mine["lr"] == pytest.approx(torchs["lr"], rel=1e-12)
        assert momenta_of(mine) == pytest.approx(momenta_of(torchs), rel=1e-12)
    assert_same_params(ours, theirs, 1e-5, 1e-6)
    for mine, torchs in zip(ours.params, theirs.params, strict=True):
        if "step" in theirs.optimizer.state.get(torchs, {}):
            assert ours.optimizer.state[mine]["step"] == theirs.optimizer.state[torchs]["step"]


@by_rows("optimizer_case schedule_case", IN_TURN)
def test_replays_follow_the_schedule(optimizer_case: OptimizerCase, schedule_case: ScheduleCase) -> None:
    ours, theirs = make_both(optimizer_case=optimizer_case, schedule_case=schedule_case)
    for pair in (ours, theirs):
        rewrite_gradients(pair, 0)
    graph = record_step(ours)
    step(theirs)
    assert len(graph) == 1
    # Two whole cycles of the schedules that repeat.
    steps = schedule_case.steps + 1
    for number in range(1, steps):
        for pair in (ours, theirs):
            rewrite_gradients(pair, number)
        graph.replay()
        # After a capture the device drives: this must not tick.
        ours.scheduler.step()
        step(theirs)
        assert_equal(ours, theirs)
    assert ours.scheduler.last_epoch == steps


@by_optimizer
def test_two_recorded_steps_in_turn(optimizer_case: OptimizerCase) -> None:
    ours, theirs = make_both(optimizer_case=optimizer_case)
    graphs, static = [], {}
    for subset in ((0, 2), (1, 2, 3)):
        for pair in (ours, theirs):
            rewrite_gradients(pair, 0, subset)
        graphs.append(record_step(ours))
        step(theirs)
        # A captured graph keeps its gradients alive; so does this.
        static[subset] = [param.grad for param in ours.params]
    for number in range(1, 2 * PERIOD):
        subset = list(static)[number % 2]
        rewrite_gradients(theirs, number, subset)
        for own, other in zip(static[subset], theirs.params, strict=True):
            if own is not None and other.grad is not None:
                own.copy_(other.grad)
        graphs[number % 2].replay()
        step(theirs)
        assert_equal(ours, theirs)


@by_optimizer
def test_eager_steps_between_replays(optimizer_case: OptimizerCase) -> None:
    ours, theirs = make_both(optimizer_case=optimizer_case)
    for pair in (ours, theirs):
        rewrite_gradients(pair, 0)
    graph = record_step(ours)
    static = [param.grad for param in ours.params]
    step(theirs)
    for number in range(1, 2 * PERIOD):
        rewrite_gradients(theirs, number)
        if number % 3:
            for own, other in zip(static, theirs.params, strict=True):
                own.copy_(other.grad)
            graph.replay()
        else:
            # Gradients elsewhere: an eager step must not disturb the recorded addresses.
            for own, other in zip(ours.params, theirs.params, strict=True):
                own.grad = other.grad.clone()
            step(ours)
        step(theirs)
        assert_equal(ours, theirs)


def test_one_launch_per_dtype() -> None:
    pair = make_pair(True)
    pair.params[3].data = pair.params[3].data.double()
    for param, gradient in zip(pair.params, gradients(pair.params, 0), strict=True):
        param.grad = gradient
    graph = record_step(pair)
    assert len(graph) == 2
    before = pair.optimizer.status().schedule_step
    graph.replay()
    assert pair.optimizer.status().schedule_step == before + 1


def test_a_parameter_that_becomes_float64_ends_earlier_captures() -> None:
    """Their evaluators write no float64 scalars, which the parameter's next update would read."""
    ours, theirs = make_both()
    for pair in (ours, theirs):
        rewrite_gradients(pair, 0)
    graph = record_step(ours)
    step(theirs)
    # Ours casts the moments by itself.
    moments = theirs.optimizer.state[theirs.params[3]]
    moments.update({key: moments[key].double() for key in ("exp_avg", "exp_avg_sq")})
    for pair in (ours, theirs):
        pair.params[3].data = pair.params[3].data.double()
        for number in range(1, 4):
            for param, gradient in zip(pair.params, gradients(pair.params, number), strict=True):
                param.grad = gradient
            step(pair)
    assert_same_params(ours, theirs, 1e-5, 1e-6)
    before = copies(ours.params)
    graph.replay()
    assert all_equal(ours.params, before)


# -- set on the device -------------------------------------------------------------------------------------------------
NEW_SCHEDULES: dict[str, Any] = {name: SCHEDULES[name].schedule() for name in (*CYCLES, "one-cycle", "sequence")} | {
    "scale_fn": Cyclic(1e-3, 3e-2, 4, scale_fn=lambda x: 1 / (1 + x), total_steps=100, cycle_momentum=False),
    "none": None,
}


@pytest.mark.parametrize("schedule", NEW_SCHEDULES.values(), ids=NEW_SCHEDULES)
def test_replays_follow_a_new_schedule(schedule: Any) -> None:
    """Captured with one kind of schedule, replayed with another: no recompilation, and no host code in between."""
    pair = make_pair(True)
    rewrite_gradients(pair, 0)
    graph = record_step(pair)
    graph.replay()
    pair.optimizer.set_schedule(schedule)
    pair.optimizer.set_schedule_step(7)
    kept = [group["lr"] for group in pair.optimizer.param_groups]
    for number in range(8, 22):
        graph.replay()
        expected = [schedule.lr(number)] * 2 if schedule else kept
        assert [group["lr"] for group in pair.optimizer.param_groups] == pytest.approx(expected, rel=1e-12)
    assert not pair.optimizer.status().stale_replay


@by_optimizer
def test_replays_follow_changed_hyperparameters(optimizer_case: OptimizerCase) -> None:
    ours, theirs = make_both(optimizer_case=optimizer_case)
    for pair in (ours, theirs):
        rewrite_gradients(pair, 0)
    graph = record_step(ours)
    step(theirs)
    # The last step is one without a change.
    changes = [*optimizer_case.settings.items(), ("maximize", True)]
    for number in range(1, 4 * len(changes) + 6):
        for pair in (ours, theirs):
            rewrite_gradients(pair, number)
            if number % 4 == 0 and changes[number // 4 - 1 : number // 4]:
                group = pair.optimizer.param_groups[0]
                key, value = changes[number // 4 - 1]
                # The momentum is the schedule's.
                if key in ("betas", "momentum"):
                    value = (group[key][0], value[1]) if key == "betas" else group[key]
                group[key] = value
        graph.replay()
        step(theirs)
        assert_same_params(ours, theirs, 1e-5, 1e-6)


# -- what torch's pair does --------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("emulated_cuda")
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float-lr", "tensor-lr"])
def test_torchs_pair_freezes_where_ours_follows(tensor_lr: bool) -> None:
    """A captured torch step keeps beta1, and a float learning rate; the same loop captured with ours follows both."""
    torch_lr = torch.tensor(1e-3) if tensor_lr else 1e-3
    pairs = [make_pair(True), make_pair(False, fused=True, lr=torch_lr)]
    graphs, eager = [], make_pair(False, fused=True)
    for pair in (*pairs, eager):
        rewrite_gradients(pair, 0)
        step(pair)
    applied = [(float(group["lr"]), group["betas"][0]) for group in pairs[1].optimizer.param_groups]
    for pair in pairs:
        graphs.append(EmulatedGraph())
        with capture(graphs[-1]):
            pair.optimizer.step()
    frozen = make_pair(False, fused=True)
    for mine, torchs in zip(frozen.params, pairs[1].params, strict=True):
        mine.data.copy_(torchs)
    frozen.optimizer.load_state_dict(copy.deepcopy(pairs[1].optimizer.state_dict()))
    for number in range(1, 12):
        for pair, graph in zip(pairs, graphs, strict=True):
            rewrite_gradients(pair, number)
            graph.replay()
            pair.scheduler.step()
        rewrite_gradients(eager, number)
        step(eager)
        # What a captured torch step does: the numbers of the capture for ever.
        rewrite_gradients(frozen, number)
        for group, (lr, beta1) in zip(frozen.optimizer.param_groups, applied, strict=True):
            group["lr"], group["betas"] = lr, (beta1, 0.999)
        if not tensor_lr:
            frozen.optimizer.step()
            assert_same_params(pairs[1], frozen, 1e-6, 1e-7)
        assert_same_params(pairs[0], eager, 1e-5, 1e-6)
    differs = [not torch.allclose(a, b, rtol=1e-4) for a, b in zip(pairs[1].params, eager.params, strict=True)]
    assert all(differs)
