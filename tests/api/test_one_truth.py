"""One truth for the schedule and its clock: copies, checkpoints and written steps agree, whatever their order."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fused_clr import CyclicLR, FusedAdam, fuse
from fused_clr.schedules import Cyclic
from tests.helpers.pairs import Pair, assert_same_params, make_both, make_pair, record_step, train


def load_own(pair: Pair) -> Pair:
    pair.optimizer.load_state_dict(pair.optimizer.state_dict())
    return pair


def load_both(pair: Pair) -> Pair:
    states = pair.optimizer.state_dict(), pair.scheduler.state_dict()
    pair.scheduler.load_state_dict(states[1])
    pair.optimizer.load_state_dict(states[0])
    return pair


def load_both_scheduler_last(pair: Pair) -> Pair:
    states = pair.optimizer.state_dict(), pair.scheduler.state_dict()
    pair.optimizer.load_state_dict(states[0])
    pair.scheduler.load_state_dict(states[1])
    return pair


def set_the_same_schedules(pair: Pair) -> Pair:
    pair.optimizer.set_schedule(pair.scheduler.schedules)
    return pair


def write_the_schedules(pair: Pair) -> Pair:
    for group in pair.optimizer.param_groups:
        group["schedule"] = copy.copy(group["schedule"])
    return pair


BETWEEN = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "load_state_dict": load_own,
    "load both": load_both,
    "load both, scheduler last": load_both_scheduler_last,
    "set_schedule": set_the_same_schedules,
    "group['schedule']": write_the_schedules,
}


@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
def test_between_the_two_steps_nothing_ticks_twice(backend: str, between: Callable[[Pair], Pair]) -> None:
    ours, theirs = make_both()
    for pair in (ours, theirs):
        train(pair, 3)
        pair.optimizer.step()
    ours = between(ours)
    for group, torchs in zip(ours.optimizer.param_groups, theirs.optimizer.param_groups, strict=True):
        assert group["lr"] == pytest.approx(torchs["lr"], rel=1e-12)
    assert ours.scheduler.last_epoch == theirs.scheduler.last_epoch == 3
    for pair in (ours, theirs):
        pair.scheduler.step()
        train(pair, 4, seed=3)
    assert ours.scheduler.last_epoch == theirs.scheduler.last_epoch == 8
    assert ours.scheduler.get_last_lr() == pytest.approx(theirs.scheduler.get_last_lr(), rel=1e-12)
    assert_same_params(ours, theirs, rtol=1e-5, atol=1e-6)


def test_removing_the_schedule_keeps_the_next_lr_in_both_ways(backend: str) -> None:
    for remove in (lambda o: o.set_schedule(None), lambda o: o.param_groups[0].update(schedule=None)):
        pair = make_pair(True)
        train(pair, 3)
        pair.optimizer.step()
        expected = pair.scheduler.schedules[0].lr(4)
        remove(pair.optimizer)
        assert pair.optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("steps", [0, 6, 11])
def test_a_checkpoint_that_torch_trained_on_does_not_bring_back_an_old_step(backend: str, steps: int) -> None:
    ours, theirs = make_both()
    train(ours, 5)
    theirs.optimizer.load_state_dict(ours.optimizer.state_dict())
    theirs.scheduler.load_state_dict(ours.scheduler.state_dict())
    if steps:
        train(theirs, steps)
    states = copy.deepcopy((theirs.optimizer.state_dict(), theirs.scheduler.state_dict()))
    for order in ((0, 1), (1, 0)):
        target = make_pair(True)
        loads = [
            lambda t=target: t.optimizer.load_state_dict(states[0]),
            lambda t=target: t.scheduler.load_state_dict(states[1]),
        ]
        for index in order:
            if index == 0 and steps:
                with pytest.warns(UserWarning, match=f"schedule step is set to {5 + steps}"):
                    loads[index]()
            else:
                loads[index]()
        assert target.scheduler.last_epoch == 5 + steps
        assert target.scheduler.get_last_lr() == pytest.approx(theirs.scheduler.get_last_lr(), rel=1e-9)


def test_old_schedules_that_nothing_explains_are_not_loaded(backend: str) -> None:
    ours, target = make_pair(True), make_pair(True)
    train(ours, 5)
    train(target, 2)
    state = copy.deepcopy(ours.optimizer.state_dict())
    for entry in state["state"].values():
        entry["step"] += 3
    for group in state["param_groups"]:
        group["lr"] = 0.123
    with pytest.warns(UserWarning, match="they are not loaded"):
        target.optimizer.load_state_dict(state)
    assert target.scheduler.last_epoch == 2


def test_old_schedules_that_the_host_cannot_evaluate_are_not_loaded(triton_backend: None) -> None:
    triton = pytest.importorskip("triton")
    tl = triton.language

    @triton.jit
    def waning(cycle):  # type: ignore[no-untyped-def]
        return tl.exp(-0.1 * cycle)

    def make() -> FusedAdam:
        param = torch.nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        return FusedAdam([param], schedule=Cyclic(0.1, 0.2, step_size_up=4, scale_fn=waning))

    optimizer = make()
    optimizer.step()
    with pytest.warns(UserWarning, match="cannot be saved"):
        state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["step"] += 3
    target = make()
    with pytest.warns(UserWarning, match="they are not loaded"):
        target.load_state_dict(state)
    assert target.status().schedule_step == 0


def test_fusing_a_pair_that_loaded_our_checkpoint(backend: str) -> None:
    ours, theirs = make_both()
    train(ours, 5)
    theirs.optimizer.load_state_dict(ours.optimizer.state_dict())
    theirs.scheduler.load_state_dict(ours.scheduler.state_dict())
    train(theirs, 3)
    _, scheduler = fuse(theirs.optimizer, theirs.scheduler)
    assert scheduler.last_epoch == 8


def test_groups_at_different_schedule_steps_are_refused(backend: str) -> None:
    pair = make_pair(True)
    state = pair.optimizer.state_dict()
    state["param_groups"][1]["schedule"]["step"] = 4
    with pytest.raises(ValueError, match=r"different steps, \[0, 4\]"):
        pair.optimizer.load_state_dict(state)


def test_the_scheduler_holds_no_copy(backend: str) -> None:
    pair = make_pair(True)
    pair.scheduler.max_lrs = [0.5, 0.25]
    assert [group["schedule"].max_lr for group in pair.optimizer.param_groups] == [0.5, 0.25]
    pair.optimizer.set_schedule(Cyclic(0.1, 0.7, 3))
    assert pair.scheduler.state_dict()["max_lrs"] == [0.7, 0.7]
    load_both(pair)
    assert pair.scheduler.max_lrs == [0.7, 0.7]


WRITES = {
    "assigned": lambda entry: entry.update(step=torch.tensor(40.0)),
    "fill_": lambda entry: entry["step"].fill_(40.0),
    "data.fill_": lambda entry: entry["step"].data.fill_(40.0),
    "data =": lambda entry: setattr(entry["step"], "data", torch.tensor(40.0)),
}
# Between steps. The triton backend does not notice data.fill_, since torch counts no version.
NOTICED = [name for name in WRITES if name != "data.fill_"]


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_step_written_into_a_copy_counts(backend: str, how: str, write: Callable[[Any], None]) -> None:
    pair = make_pair(True)
    train(pair, 2)
    twin = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    write(twin.optimizer.state[twin.params[0]])
    train(twin, 1)
    assert [twin.optimizer.state[param]["step"].item() for param in twin.params] == [41, 3, 3, 3]


@pytest.mark.parametrize("how", NOTICED)
def test_a_step_written_before_an_extra_scheduler_step_counts(backend: str, how: str) -> None:
    pair = make_pair(True)
    train(pair, 2)
    WRITES[how](pair.optimizer.state[pair.params[0]])
    pair.scheduler.step()
    assert pair.optimizer.state[pair.params[0]]["step"].item() == 40
    train(pair, 1)
    assert pair.optimizer.state[pair.params[0]]["step"].item() == 41


@pytest.mark.parametrize("how", NOTICED)
def test_a_step_written_before_the_first_step_counts(backend: str, how: str) -> None:
    source, target = make_pair(True), make_pair(True)
    train(source, 2)
    target.optimizer.load_state_dict(source.optimizer.state_dict())
    WRITES[how](target.optimizer.state[target.params[0]])
    train(target, 1)
    assert target.optimizer.state[target.params[0]]["step"].item() == 41


@pytest.mark.parametrize("how", NOTICED)
def test_a_step_written_between_steps_counts_as_in_torch(backend: str, how: str) -> None:
    pairs = make_both()
    for pair in pairs:
        train(pair, 2)
        # Another number in the bias corrections, once and once more.
        for _ in range(2):
            WRITES[how](pair.optimizer.state[pair.params[1]])
            train(pair, 2)
    assert_same_params(*pairs, rtol=1e-5, atol=1e-6)
    for pair in pairs:
        assert [pair.optimizer.state[param]["step"].item() for param in pair.params] == [6, 42, 6, 6]
        assert pair.optimizer.state_dict()["state"][1]["step"].item() == 42


@pytest.mark.parametrize("how", NOTICED)
def test_a_step_written_last_is_saved(backend: str, how: str) -> None:
    pair = make_pair(True)
    train(pair, 2)
    WRITES[how](pair.optimizer.state[pair.params[1]])
    assert pair.optimizer.state_dict()["state"][1]["step"].item() == 40
    assert copy.deepcopy(pair).optimizer.state_dict()["state"][1]["step"].item() == 40


@pytest.mark.parametrize("how", NOTICED)
def test_a_step_written_before_a_new_group_counts(backend: str, how: str) -> None:
    pair = make_pair(True)
    train(pair, 2)
    WRITES[how](pair.optimizer.state[pair.params[1]])
    pair.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    train(pair, 1)
    assert pair.optimizer.state[pair.params[1]]["step"].item() == 41


def test_data_written_in_place_is_noticed_by_the_cpu_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_CLR_BACKEND", "cpu")
    pair = make_pair(True)
    train(pair, 2)
    WRITES["data.fill_"](pair.optimizer.state[pair.params[1]])
    train(pair, 1)
    assert pair.optimizer.state_dict()["state"][1]["step"].item() == 41


def test_a_step_written_between_replays_counts_when_the_host_looks(triton_backend: None) -> None:
    pair = make_pair(True)
    train(pair, 2)
    graph = record_step(pair)
    for how in NOTICED:
        WRITES[how](pair.optimizer.state[pair.params[1]])
        pair.optimizer.check_replay()
        graph.replay()
        assert pair.optimizer.state[pair.params[1]]["step"].item() == 41


def reciprocal(x: float) -> float:
    return 1 / (1 + x)


@pytest.mark.parametrize("how", ["clipping", "found_inf", "replays"])
def test_an_eager_step_past_a_table_is_an_error(triton_backend: None, how: str) -> None:
    param = torch.nn.Parameter(torch.ones(2))
    schedule = Cyclic(0.1, 0.2, 3, scale_fn=reciprocal, scale_mode="iterations", total_steps=5)
    optimizer = FusedAdam([param], schedule=schedule, max_grad_norm=1.0 if how == "clipping" else None)
    param.grad = torch.ones(2)
    if how == "found_inf":
        optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())
    if how == "replays":
        graph = record_step(Pair([param], optimizer, CyclicLR.of_schedules(optimizer, [schedule], 0)))
        for _ in range(5):
            graph.replay()
    else:
        for _ in range(6):
            optimizer.step()
    with pytest.raises(RuntimeError, match="schedule step 6 .*total_steps"):
        optimizer.step()


def test_loading_copies_and_keeps_what_was_saved(backend: str) -> None:
    results = []
    for kind in (FusedAdam, torch.optim.Adam):
        source, target = (kind([torch.nn.Parameter(torch.ones(3))], lr=torch.tensor(0.1)) for _ in range(2))
        param = source.param_groups[0]["params"][0]
        param.grad = torch.ones(3)
        source.step()
        source.state[param]["note"] = torch.ones(2)
        source.state["global"] = 5
        saved = copy.deepcopy(source.state_dict())
        saved["state"][0]["max_exp_avg_sq"] = torch.ones(3)
        target.load_state_dict(saved)
        assert target.param_groups[0]["lr"] is not saved["param_groups"][0]["lr"]
        saved["param_groups"][0]["lr"].fill_(9.0)
        entry = target.state[target.param_groups[0]["params"][0]]
        results.append(
            (float(target.param_groups[0]["lr"]), set(entry), entry["note"].tolist(), target.state["global"])
        )
    assert results[0] == results[1]


def test_plain_dicts_among_the_groups_show_what_the_scheduler_says(backend: str) -> None:
    ours, theirs = make_both()
    for pair in (ours, theirs):
        train(pair, 5)
        pair.optimizer.step()
        # As Lightning's BaseFinetuning does. A cycled momentum in it is the schedule's, and no choice of the user.
        pair.optimizer.param_groups = [dict(group) for group in pair.optimizer.param_groups]
        pair.scheduler.step()
    assert [group["lr"] for group in ours.optimizer.param_groups] == pytest.approx(theirs.scheduler.get_last_lr())
    ours.optimizer.param_groups[1] = dict(ours.optimizer.param_groups[1])
    ours.optimizer.set_schedule(ours.scheduler.schedules)
    for pair in (ours, theirs):
        train(pair, 5)
    assert_same_params(ours, theirs, 1e-5, 1e-6)
