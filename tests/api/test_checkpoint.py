"""Checkpoints, copies and pickles: ours and torch's, both ways, in place."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from fused_clr import CyclicLR, FusedAdam, FusedAdamW
from fused_clr._host.hyperparameters import OWN_KEYS
from fused_clr.schedules import Cyclic, Schedule, sequence
from tests.cases import (
    CYCLES,
    IN_TURN,
    OPTIMIZERS,
    OptimizerCase,
    ScheduleCase,
    by_optimizer,
    by_rows,
    covering,
    in_turn,
    momenta_of,
)
from tests.helpers.pairs import Pair, assert_same_params, make_both, make_pair, record_step, train


def round_trip(value: Any) -> Any:
    """Through a file, as plain values: what torch.load takes from strangers."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def saved(pair: Pair) -> tuple[dict[str, Any], dict[str, Any]]:
    return round_trip((pair.optimizer.state_dict(), pair.scheduler.state_dict()))


ROUTES = ["torch-to-ours", "ours-to-torch", "ours-to-ours"]
ORDERS = ["scheduler-first", "optimizer-first"]
# Every way to load meets every optimizer and order; cycles in turn.
MET = covering(ROUTES, list(OPTIMIZERS.values()), ORDERS)
ROWS = [(*row, cycle) for row, cycle in in_turn(MET, list(CYCLES.values()))]


@by_rows("route optimizer_case order schedule_case", ROWS)
def test_training_goes_on_as_if_nothing_had_happened(
    backend: str, route: str, optimizer_case: OptimizerCase, schedule_case: ScheduleCase, order: str
) -> None:
    from_ours, to_ours = (side == "ours" for side in route.split("-to-"))
    cases: dict[str, Any] = {"optimizer_case": optimizer_case, "schedule_case": schedule_case}
    options = optimizer_case.options(True)
    source = make_pair(from_ours, **cases, **options)
    train(source, 13)
    optimizer_state, scheduler_state = saved(source)
    target = make_pair(to_ours, seed=5, **cases, **options)
    with torch.no_grad():
        for param, other in zip(target.params, source.params, strict=True):
            param.copy_(other)
    loads = [
        lambda: target.optimizer.load_state_dict(optimizer_state),
        lambda: target.scheduler.load_state_dict(scheduler_state),
    ]
    for load in reversed(loads) if order == "scheduler-first" else loads:
        load()
    expected, actual = train(source, 8, seed=2), train(target, 8, seed=2)
    if from_ours == to_ours:
        assert actual == expected
        assert_same_params(source, target, rtol=0, atol=0)
    else:
        # The two pairs' learning rates differ in the last bit or two, their kernels in the order of float32 roundings.
        np.testing.assert_allclose(actual, expected, rtol=1e-14)
        assert_same_params(source, target, rtol=1e-5, atol=1e-6)
    assert target.scheduler.last_epoch == 21


@by_optimizer
def test_loading_keeps_addresses_and_leaves_the_dict_alone(backend: str, optimizer_case: OptimizerCase) -> None:
    source, target = (make_pair(True, seed=seed, optimizer_case=optimizer_case) for seed in (0, 5))
    train(source, 5)
    train(target, 3)
    states = saved(source)
    before = copy.deepcopy(states)
    addresses = {
        (i, key): value.data_ptr()
        for i, param in enumerate(target.params)
        for key, value in target.optimizer.state[param].items()
    }
    live = target.optimizer.live.lr.data_ptr()
    target.optimizer.load_state_dict(states[0])
    target.scheduler.load_state_dict(states[1])
    for (i, key), address in addresses.items():
        assert target.optimizer.state[target.params[i]][key].data_ptr() == address
    assert target.optimizer.live.lr.data_ptr() == live
    assert str(states) == str(before)
    assert target.scheduler.last_epoch == 5
    for name, value in source.optimizer.state[source.params[0]].items():
        assert torch.equal(target.optimizer.state[target.params[0]][name], value)


@by_rows("optimizer_case schedule_case", IN_TURN)
def test_a_schedule_given_to_the_optimizer_is_saved_with_it(
    backend: str, optimizer_case: OptimizerCase, schedule_case: ScheduleCase
) -> None:
    def make(group: int) -> tuple[torch.nn.Parameter, Any]:
        param = torch.nn.Parameter(torch.ones(4))
        return param, optimizer_case.ours([param], schedule=schedule_case.schedule(group))

    param, optimizer = make(0)
    for _ in range(7):
        param.grad = torch.ones(4)
        optimizer.step()
    _, other = make(1)
    other.load_state_dict(round_trip(optimizer.state_dict()))
    assert other.status().schedule_step == 7
    assert other.param_groups[0]["schedule"] == optimizer.param_groups[0]["schedule"]
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    twin = optimizer_case.torch_peer([torch.nn.Parameter(torch.ones(4))])
    twin.load_state_dict(optimizer.state_dict())
    assert twin.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


@by_rows("optimizer_case schedule_case", IN_TURN)
def test_state_dict_has_torchs_keys(backend: str, optimizer_case: OptimizerCase, schedule_case: ScheduleCase) -> None:
    ours, theirs = make_both(optimizer_case=optimizer_case, schedule_case=schedule_case)
    train(ours, 2)
    train(theirs, 2)
    state, torch_state = ours.optimizer.state_dict(), theirs.optimizer.state_dict()
    assert state["state"].keys() == torch_state["state"].keys()
    for key, entry in torch_state["state"].items():
        assert state["state"][key].keys() == entry.keys()
    for group, torch_group in zip(state["param_groups"], torch_state["param_groups"], strict=True):
        assert set(group) - {"schedule", *OWN_KEYS} == set(torch_group) - set(OWN_KEYS)
        assert type(group["lr"]) is float
        assert momenta_of(group) == pytest.approx(momenta_of(torch_group), rel=1e-14)
    assert set(theirs.scheduler.state_dict()) <= set(ours.scheduler.state_dict())
    unscheduled, torch_unscheduled = (
        kind([torch.nn.Parameter(torch.ones(1))]).state_dict()["param_groups"][0]
        for kind in (optimizer_case.ours, optimizer_case.torch_peer)
    )
    assert set(unscheduled) - {"schedule", *OWN_KEYS} == set(torch_unscheduled)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@by_optimizer
def test_copies_go_on_alone(backend: str, optimizer_case: OptimizerCase, how: str) -> None:
    pair = make_pair(True, optimizer_case=optimizer_case)
    train(pair, 13)
    twin = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert train(pair, 5, seed=2) == train(twin, 5, seed=2)
    assert_same_params(pair, twin, rtol=0, atol=0)
    train(twin, 3)
    assert pair.scheduler.last_epoch == 18
    assert twin.scheduler.last_epoch == 21
    assert pair.optimizer.state[pair.params[0]].get("step", 18) == 18


def test_a_parameter_without_saved_state_starts_anew(backend: str) -> None:
    source, target = make_pair(True), make_pair(True)
    source.params[0].grad = torch.ones(3)
    source.optimizer.step()
    train(target, 4)
    target.optimizer.load_state_dict(source.optimizer.state_dict())
    assert target.params[1] not in target.optimizer.state
    train(target, 1)
    assert target.optimizer.state[target.params[1]]["step"].item() == 1


def test_in_a_captured_loop_it_starts_anew_in_place(triton_backend: None) -> None:
    target = make_pair(True)
    empty = make_pair(True).optimizer.state_dict()
    train(target, 4)
    record_step(target)
    state = target.optimizer.state[target.params[1]]
    exp_avg = state["exp_avg"]
    target.optimizer.load_state_dict(empty)
    assert target.optimizer.state[target.params[1]]["exp_avg"] is exp_avg
    assert exp_avg.abs().sum() == 0
    assert state["step"].item() == 0


def test_adamw_stays_decoupled(backend: str) -> None:
    source = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    state = source.state_dict()
    state["param_groups"][0].pop("decoupled_weight_decay")
    target = FusedAdamW([torch.nn.Parameter(torch.ones(2))])
    target.load_state_dict(state)
    assert target.param_groups[0]["decoupled_weight_decay"] is True


def scale(x: float) -> float:
    return 1 / x


class HalvingScale:
    def __init__(self, base: float) -> None:
        self.base = base

    def __call__(self, x: float) -> float:
        return self.base ** (x - 1)


def test_a_scale_fn_that_cannot_be_saved_is_named(backend: str) -> None:
    pair = make_pair(True, cyclic={"scale_fn": scale})
    with pytest.warns(UserWarning, match="scale_fn 'scale'"):
        scheduler_state = pair.scheduler.state_dict()
    with pytest.warns(UserWarning, match="scale_fn 'scale'"):
        optimizer_state = round_trip(pair.optimizer.state_dict())
    without = make_pair(True)
    with pytest.raises(ValueError, match="scale_fn 'scale'"):
        without.scheduler.load_state_dict(scheduler_state)
    with pytest.raises(ValueError, match="scale_fn 'scale'"):
        without.optimizer.load_state_dict(optimizer_state)
    again = make_pair(True, cyclic={"scale_fn": scale})
    again.optimizer.load_state_dict(optimizer_state)
    again.scheduler.load_state_dict(scheduler_state)
    assert again.optimizer.param_groups[0]["schedule"].scale_fn is scale


def test_a_callable_objects_attributes_are_saved_as_in_torch(backend: str) -> None:
    pairs = [make_pair(ours, cyclic={"scale_fn": HalvingScale(0.7)}) for ours in (True, False)]
    for pair in pairs:
        state = pair.scheduler.state_dict()
        assert state["_scale_fn_custom"] == {"base": 0.7}
        target = make_pair(True, cyclic={"scale_fn": HalvingScale(0.5)})
        target.scheduler.load_state_dict({**state, "last_epoch": 15})
        assert target.optimizer.param_groups[0]["schedule"].scale_fn.base == 0.7
        # Second cycle of 11 steps, 4 up of 7.
        assert target.scheduler.get_last_lr()[0] == pytest.approx(1e-4 + (1e-2 - 1e-4) * 4 / 7 * 0.7, rel=1e-12)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("state"), "'state'"),
        (lambda s: s.pop("param_groups"), "'param_groups'"),
        (lambda s: s["param_groups"].pop(), "1 param groups, the optimizer 2"),
        (lambda s: s["param_groups"][0]["params"].pop(), "has 1 parameters, the optimizer 2"),
        (lambda s: s["state"][1].pop("exp_avg"), "'exp_avg'"),
        (lambda s: s["state"][1].update(exp_avg_sq=torch.ones(7)), r"\(63,\), got \(7,\)"),
        (lambda s: s["state"][1].update(exp_avg_sq=None), "exp_avg_sq"),
        (lambda s: s["state"][1].update(step=torch.tensor(-1.0)), "'step'"),
        (lambda s: s["state"][1].update(step=torch.tensor(float("nan"))), "'step'"),
        (lambda s: s["state"][1].update(step="five"), "'step'"),
        (lambda s: s["param_groups"][1].update(lr=float("nan")), "lr must be"),
        (lambda s: s["param_groups"][1].update(betas=(0.9, 1.5)), r"betas\[1\] must be"),
        (lambda s: s["param_groups"][1].pop("betas"), "'betas'"),
        (lambda s: s["param_groups"][1].update(schedule="triangular"), "not a saved schedule"),
        (lambda s: s["param_groups"][1]["schedule"].update(step=-3), "step"),
    ],
)
def test_a_corrupt_checkpoint_changes_nothing(backend: str, damage: Any, message: str) -> None:
    source, target = make_pair(True), make_pair(True, seed=5)
    train(source, 5)
    train(target, 3)
    state = round_trip(source.optimizer.state_dict())
    damage(state)
    before = copy.deepcopy(target.optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        target.optimizer.load_state_dict(state)
    assert str(target.optimizer.state_dict()) == str(before)
    assert target.scheduler.last_epoch == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_lrs": [1e-4]}, "base_lrs"),
        ({"max_lrs": None}, "max_lr"),
        ({"mode": "square"}, "mode"),
        ({"last_epoch": -7}, "last_epoch"),
        ({"step_sizes": (-3, 2)}, "step_sizes"),
        ({"base_momentums": [0.8, 1.2]}, "base_momentum"),
    ],
)
def test_a_corrupt_scheduler_state_changes_nothing(backend: str, change: dict[str, Any], message: str) -> None:
    pair = make_pair(True)
    train(pair, 3)
    state = pair.scheduler.state_dict()
    before = copy.deepcopy(state)
    with pytest.raises(ValueError, match=message):
        pair.scheduler.load_state_dict({**state, **change})
    assert pair.scheduler.state_dict() == before


def test_torchs_rounded_step_ratio_gives_back_whole_steps() -> None:
    parameters = [torch.nn.Parameter(torch.ones(1))]
    theirs = torch.optim.lr_scheduler.CyclicLR(torch.optim.Adam(parameters), 0.1, 1, 2000, 3137)
    ours = CyclicLR(FusedAdam(parameters), 0.1, 1, 5)
    ours.load_state_dict(theirs.state_dict())
    assert (ours.schedules[0].step_size_up, ours.schedules[0].step_size_down) == (2000, 3137)


def test_the_groups_own_momentum_survives_where_the_schedule_leaves_it_alone(backend: str) -> None:
    half = sequence(Cyclic(0.01, 0.05, 4), Cyclic(0.1, 0.5, 4, cycle_momentum=False), milestones=[4])

    def make(betas: tuple[float, float], schedule: Schedule | None) -> FusedAdam:
        param = torch.nn.Parameter(torch.ones(2))
        param.grad = torch.ones(2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return FusedAdam([param], betas=betas, schedule=schedule)

    straight = make((0.7, 0.99), half)
    for _ in range(2):
        straight.step()
    saved = copy.deepcopy(straight.state_dict())
    for resumed in (make((0.9, 0.99), None), make((0.5, 0.99), half)):
        resumed.load_state_dict(saved)
        assert resumed.param_groups[0]["betas"] == straight.param_groups[0]["betas"]
        for _ in range(3):
            resumed.step()
        assert resumed.param_groups[0]["betas"] == (0.7, 0.99)
