"""Steps compare state tensors only while a user can reach them, by whatever way."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_clr import FusedAdam
from fused_clr._device import engines

pytestmark = pytest.mark.usefixtures("backend")

TAKE_BACK_AFTER = 3


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "TAKE_BACK_AFTER", TAKE_BACK_AFTER)


def stepped(steps: int = 2, optimizer: Any = None) -> Any:
    if optimizer is None:
        torch.manual_seed(0)
        optimizer = FusedAdam([torch.nn.Parameter(torch.randn(shape)) for shape in ((5,), (3, 4))], lr=0.1)
    for _ in range(steps):
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.randn(param.shape)
        optimizer.step()
    return optimizer


def is_handed_out(optimizer: Any) -> bool:
    (engine,) = optimizer._engines
    return bool(engine.moments.handed_out)


def moment(optimizer: Any) -> Tensor:
    value: Tensor = optimizer.state[optimizer.param_groups[0]["params"][1]]["exp_avg"]
    return value


# What to keep, and how to get at the moment from it; None where there is no way to it.
KEPT: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Any], Tensor] | None]] = {
    "a tensor": (moment, lambda kept, _: kept),
    "the state": (lambda own: own.state, lambda kept, param: kept[param]["exp_avg"]),
    "its items": (lambda own: own.state.items(), lambda kept, param: dict(kept)[param]["exp_avg"]),
    "an entry": (lambda own: list(own.state.values())[1], lambda kept, _: kept["exp_avg"]),
    "an iterator": (lambda own: iter(list(own.state.values())[1].values()), lambda kept, _: list(kept)[1]),
    "a state_dict": (lambda own: own.state_dict(), lambda kept, _: kept["state"][1]["exp_avg"]),
    "a view": (lambda own: moment(own)[0], lambda kept, _: kept._base),
    "a weak reference": (lambda own: weakref.ref(moment(own)), lambda kept, _: kept()),
    "a shallow copy": (copy.copy, lambda kept, _: moment(kept)),
    "an array": (lambda own: moment(own).numpy(), None),
    "an alias": (lambda own: moment(own).data, None),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_moment_that_can_be_reached_is_followed(name: str) -> None:
    keep, reach = KEPT[name]
    optimizer, other = stepped(), stepped()
    kept = keep(optimizer)
    gc.collect()
    for own in (optimizer, other):
        torch.manual_seed(1)
        stepped(2 * TAKE_BACK_AFTER + 1, own)
    assert is_handed_out(optimizer)
    if reach is not None:
        value = reach(kept, optimizer.param_groups[0]["params"][1])
        value.data = value.data.t().contiguous().t()
        del value
    for own in (optimizer, other):
        torch.manual_seed(2)
        stepped(3, own)
    for mine, expected in zip(optimizer.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("read", [moment, lambda own: own.state_dict(), copy.deepcopy], ids=["state", "dict", "copy"])
def test_steps_stop_looking_some_steps_after_the_last_reference(read: Callable[[Any], Any]) -> None:
    optimizer = stepped()
    assert not is_handed_out(optimizer)
    for _ in range(2):
        read(optimizer)
        assert is_handed_out(optimizer)
        gc.collect()
        stepped(TAKE_BACK_AFTER - 1, optimizer)
        assert is_handed_out(optimizer)
        stepped(1, optimizer)
        assert not is_handed_out(optimizer)


def test_who_reads_often_keeps_the_state() -> None:
    optimizer = stepped()
    (engine,) = optimizer._engines
    (plan,) = engine._plans.plans()
    for _ in range(TAKE_BACK_AFTER):
        moment(optimizer)
        stepped(2, optimizer)
    assert is_handed_out(optimizer)
    assert engine._plans.plans() == [plan]
