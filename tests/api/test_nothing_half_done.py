"""An error leaves the optimizer as it was, able to step; what torch's optimizers can do, ours can."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import pickle
import re
import weakref
from itertools import product
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from fused_clr import CyclicLR, FusedAdam
from fused_clr.schedules import Cyclic
from fused_clr.testing import record_launches
from tests.helpers.pairs import make_pair, train


def stepped(**arguments: Any) -> tuple[torch.nn.Parameter, FusedAdam]:
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = FusedAdam([param], lr=0.1, **arguments)
    optimizer.step()
    return param, optimizer


def raises(x: float) -> float:
    raise ZeroDivisionError


SCALES = {"raises": raises, "nan": lambda x: float("nan"), "text": lambda x: "1", "none": lambda x: None}


@pytest.mark.parametrize("scale_fn", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("how", ["set_schedule", "group", "scheduler", "add_param_group", "constructor"])
def test_a_schedule_that_cannot_be_evaluated_is_not_stored(backend: str, how: str, scale_fn: Any) -> None:
    _, optimizer = stepped()
    arguments: Any = (0.1, 0.2, 4), {"scale_fn": scale_fn}
    before = str(optimizer.state_dict())
    with pytest.raises((ZeroDivisionError, ValueError)):
        schedule = Cyclic(*arguments[0], **arguments[1])
        if how == "set_schedule":
            optimizer.set_schedule(schedule)
        elif how == "group":
            optimizer.param_groups[0]["schedule"] = schedule
        elif how == "scheduler":
            CyclicLR(optimizer, *arguments[0], **arguments[1])
        elif how == "add_param_group":
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "schedule": schedule})
        else:
            FusedAdam([torch.nn.Parameter(torch.ones(1))], schedule=schedule)
    assert str(optimizer.state_dict()) == before
    optimizer.step()


def test_a_table_without_an_end_is_refused_when_it_is_given(triton_backend: None) -> None:
    _, optimizer = stepped()
    with pytest.raises(ValueError, match="total_steps must be given"):
        optimizer.set_schedule(Cyclic(0.1, 0.2, scale_fn=lambda x: 1.0, scale_mode="iterations"))
    optimizer.step()


def test_cycle_momentum_is_a_boolean() -> None:
    with pytest.raises(ValueError, match="cycle_momentum must be True or False, got 'no'"):
        Cyclic(0.1, 0.2, cycle_momentum="no")  # type: ignore[arg-type]


def test_a_scale_fn_that_raises_late_ends_the_training_where_it_has_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_CLR_BACKEND", "cpu")
    table = [1.0, 0.5, 0.25]
    schedule = Cyclic(0.1, 0.2, 4, scale_fn=lambda x: table[x], scale_mode="iterations")
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = FusedAdam([param], schedule=schedule)
    for _ in range(3):
        optimizer.step()
    before = param.detach().clone()
    for _ in range(2):
        with pytest.raises(IndexError):
            optimizer.step()
    assert torch.equal(param, before)
    assert optimizer.state[param]["step"].item() == optimizer.status().schedule_step == 3
    with pytest.warns(UserWarning, match="cannot be saved"):
        optimizer.state_dict()
    table.append(0.125)
    optimizer.step()
    assert optimizer.status().schedule_step == 4


def test_numbers_as_text_and_flags_as_numbers_do_not_half_a_step(backend: str) -> None:
    with pytest.raises(ValueError, match="amsgrad must be True or False, got 1"):
        stepped(amsgrad=1)
    param, optimizer = stepped()
    for key, value in (("eps", "1e-8"), ("amsgrad", 1)):
        with pytest.raises(ValueError, match=f"{key} must be"):
            optimizer.param_groups[0][key] = value
    optimizer.step()
    assert optimizer.state[param]["step"].item() == 2


@pytest.mark.parametrize("moment", ["sparse", "meta"])
def test_a_moment_without_dense_data_loads_nothing(backend: str, moment: str) -> None:
    pair = make_pair(True)
    train(pair, 2)
    state = copy.deepcopy(pair.optimizer.state_dict())
    value = state["state"][1]["exp_avg_sq"]
    state["state"][1]["exp_avg_sq"] = value.to_sparse() if moment == "sparse" else value.to("meta")
    state["param_groups"][0]["eps"] = 1e-3
    train(pair, 1)
    before = str(pair.optimizer.state_dict())
    with pytest.raises(ValueError, match="exp_avg_sq"):
        pair.optimizer.load_state_dict(state)
    assert str(pair.optimizer.state_dict()) == before


@pytest.mark.parametrize("last_epoch", [1.5, float("nan"), 2**60, "3", None, True, [1]], ids=str)
def test_a_bad_last_epoch_attaches_nothing(backend: str, last_epoch: Any) -> None:
    _, optimizer = stepped()
    optimizer.param_groups[0]["initial_lr"] = 0.1
    before = str(optimizer.state_dict()), str(optimizer), optimizer.status()
    with pytest.raises(ValueError, match=f"last_epoch must be .*, got {re.escape(repr(last_epoch))}"):
        CyclicLR(optimizer, 0.1, 0.2, last_epoch=last_epoch)
    assert str((str(optimizer.state_dict()), str(optimizer), optimizer.status())) == str(before)


@pytest.mark.parametrize("epoch", [-1, "3", 1.5, float("nan"), True, 2**60], ids=str)
def test_a_bad_epoch_moves_nothing(backend: str, epoch: Any) -> None:
    pair = make_pair(True)
    before = pair.scheduler.state_dict()
    with pytest.raises(ValueError, match=re.escape(f"epoch must be an integer in [0, 2**53], got {epoch!r}")):
        pair.scheduler.step(epoch)
    assert pair.scheduler.state_dict() == before


def test_state_is_a_dict_like_torchs(backend: str) -> None:
    param, optimizer = stepped()
    for copied in (optimizer.state.copy(), copy.copy(optimizer.state), optimizer.state | {}, {} | optimizer.state):
        assert copied[param]["exp_avg"] is optimizer.state[param]["exp_avg"]
    optimizer.state["ema"] = torch.ones(2)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.state["ema"].tolist() == [1, 1]
        twin.step()


@pytest.mark.parametrize("key", ["lr", "eps", "weight_decay", "betas", "params"])
def test_a_key_that_steps_need_cannot_be_removed(backend: str, key: str) -> None:
    pair = make_pair(True)
    for optimizer in (stepped()[1], pair.optimizer):
        group = optimizer.param_groups[0]
        for remove in (group.pop, group.__delitem__):
            with pytest.raises(KeyError, match=key):
                remove(key)
        optimizer.step()


def step_and_tell(optimizer: Any, queue: Any) -> None:
    optimizer.step()
    queue.put([float(entry["step"]) for entry in optimizer.state.values()])


def test_an_optimizer_goes_to_a_spawned_process() -> None:
    _, optimizer = stepped()
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=step_and_tell, args=(optimizer, queue))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    # As with torch's, a gradient does not travel: the step updates nothing.
    assert queue.get() == [1.0]


# What a loop does with an optimizer before it drops it. Each is given a scheduler too.
def loads(optimizer: Any, scheduler: Any) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    scheduler.load_state_dict(scheduler.state_dict())
    optimizer.step()


def records(optimizer: Any, scheduler: Any) -> None:
    with record_launches() as graph:
        optimizer.step()
    graph.replay()
    optimizer.captures[0].release()


def keeps_a_record(optimizer: Any, scheduler: Any) -> None:
    with record_launches():
        optimizer.step()


def raises_in_a_step(optimizer: Any, scheduler: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)


USES: dict[str, Any] = {
    "nothing": lambda optimizer, scheduler: None,
    "steps": lambda optimizer, scheduler: (optimizer.step(), scheduler.step(), optimizer.step(lambda: None)),
    "loads": loads,
    "copies": lambda optimizer, scheduler: (copy.deepcopy(optimizer).step(), pickle.loads(pickle.dumps(optimizer))),
    "reads": lambda optimizer, scheduler: (repr(optimizer), optimizer.param_groups[0]["lr"], scheduler.get_last_lr()),
    "adds-group": lambda optimizer, scheduler: optimizer.add_param_group(
        {"params": [torch.nn.Parameter(torch.ones(2))]}
    ),
    "replaces-state": lambda optimizer, scheduler: setattr(optimizer, "state", dict(optimizer.state)),
    "error": raises_in_a_step,
}
OUR_USES: dict[str, Any] = {
    "telemetry": lambda optimizer, scheduler: (optimizer.status(), optimizer.history(), optimizer.live),
    "schedule": lambda optimizer, scheduler: (optimizer.set_schedule(None), optimizer.set_schedule_step(3)),
    "records": records,
    "keeps-a-record": keeps_a_record,
}


def living() -> list[str]:
    """The tensors and objects of ours that the garbage collector knows."""
    kinds = (type(thing) for thing in gc.get_objects())
    return [str(kind) for kind in kinds if issubclass(kind, torch.Tensor) or "fused_clr" in str(kind.__module__)]


@pytest.mark.parametrize(
    ("kind", "use"),
    [*product([torch.optim.Adam], USES), *product([FusedAdam], USES | OUR_USES)],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_dropped_optimizers_are_freed_without_the_garbage_collector(backend: str, kind: Any, use: str) -> None:
    if use in ("records", "keeps-a-record") and backend == "cpu":
        pytest.skip("the cpu backend launches nothing")

    def train_and_drop() -> list[Any]:
        param = torch.nn.Parameter(torch.ones(5))
        optimizer = kind([param], lr=0.1, **({"max_grad_norm": 1.0} if kind is FusedAdam else {}))
        scheduler = (CyclicLR if kind is FusedAdam else lr_scheduler.CyclicLR)(optimizer, 0.1, 0.2)
        param.grad = torch.ones(5)
        optimizer.step()
        moments = [weakref.ref(value) for value in optimizer.state[param].values()]
        (USES | OUR_USES)[use](optimizer, scheduler)
        return [*map(weakref.ref, (param, optimizer, scheduler)), *moments]

    # What is made once and kept, such as compiled code.
    train_and_drop()
    gc.disable()
    # Hides all that there is now.
    gc.freeze()
    try:
        references = [reference for _ in range(3) for reference in train_and_drop()]
        assert not any(reference() is not None for reference in references)
        assert living() == []
    finally:
        gc.unfreeze()
        gc.enable()


def test_dropped_schedulers_leave_no_cycle(backend: str) -> None:
    """As torch's own tests ask of its schedulers."""
    _, optimizer = stepped()
    scheduler = CyclicLR(optimizer, 0.1, 0.2)
    optimizer.step()
    scheduler.step()
    del scheduler
    assert not gc.get_referrers(optimizer)


def test_loading_replaces_whole_groups(backend: str) -> None:
    lrs = []
    for kind in (FusedAdam, torch.optim.Adam):
        optimizer = kind([torch.nn.Parameter(torch.ones(1))], lr=1e-3)
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.param_groups[0]["lr"] = 1e-7
        optimizer.param_groups[0]["note"] = 1
        lr_scheduler.ExponentialLR(optimizer, 1.5)
        optimizer.load_state_dict(saved)
        assert "note" not in optimizer.param_groups[0]
        lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
        lrs.append(optimizer.param_groups[0]["lr"])
    assert lrs[0] == lrs[1] == 1e-3


def test_an_empty_saved_state_leaves_none(backend: str) -> None:
    param, optimizer = stepped()
    optimizer.load_state_dict(FusedAdam([torch.nn.Parameter(torch.ones(3))]).state_dict())
    assert not optimizer.state.get(param)
    assert optimizer.state_dict()["state"] == {}
    optimizer.step()
    assert optimizer.state[param]["step"].item() == 1
