"""Every warning points at the user's own line, however it came about."""

from __future__ import annotations

import ast
import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import fused_clr
from fused_clr import CyclicLR, FusedAdam, FusedAdamW
from fused_clr.schedules import Cyclic
from tests.helpers.pairs import make_pair, train

CYCLES = Cyclic(1e-3, 1e-2)


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(2))]


def halving(x: float) -> float:
    return 0.5**x


SCALED = Cyclic(0.1, 0.2, 4, scale_fn=halving)
OWN_BETA = {"betas": (0.95, 0.99)}


def unscheduled() -> FusedAdam:
    return FusedAdam(parameters(), **OWN_BETA)


def scaled() -> Any:
    optimizer = FusedAdam(parameters())
    return optimizer, CyclicLR(optimizer, 0.1, 0.2, 4, scale_fn=halving)


def trained_on_by_torch() -> tuple[Any, Any]:
    ours, theirs = make_pair(True), make_pair(False)
    train(ours, 2)
    theirs.optimizer.load_state_dict(ours.optimizer.state_dict())
    theirs.scheduler.load_state_dict(ours.scheduler.state_dict())
    train(theirs, 2)
    return make_pair(True).optimizer, theirs.optimizer.state_dict()


def load_what_torch_trained() -> None:
    optimizer, state = trained_on_by_torch()
    optimizer.load_state_dict(state)


def load_what_nothing_explains() -> None:
    optimizer, state = trained_on_by_torch()
    state = copy.deepcopy(state)
    state["param_groups"][0]["lr"] = 0.123
    optimizer.load_state_dict(state)


def write_a_schedule() -> None:
    optimizer = unscheduled()
    optimizer.param_groups[0]["schedule"] = CYCLES


def update_a_schedule() -> None:
    optimizer = unscheduled()
    optimizer.param_groups[0].update(schedule=CYCLES)


def step_with_an_epoch() -> None:
    scheduler = make_pair(True).scheduler
    scheduler.step(3)


def step_once_an_epoch() -> None:
    pair = make_pair(True)
    for _ in range(9):
        pair.optimizer.step()
    pair.scheduler.step()


def save_a_model() -> None:
    layer = torch.nn.Linear(2, 1)
    get_optimizer_state_dict(layer, FusedAdam(layer.parameters(), schedule=SCALED))


WAYS: dict[str, Callable[[], Any]] = {
    "constructor": lambda: FusedAdam(parameters(), schedule=CYCLES, **OWN_BETA),
    "AdamW": lambda: FusedAdamW(parameters(), schedule=CYCLES, **OWN_BETA),
    "group": lambda: FusedAdam([{"params": parameters(), "schedule": CYCLES}], **OWN_BETA),
    "add_param_group": lambda: unscheduled().add_param_group({"params": parameters(), "schedule": CYCLES}),
    "set_schedule": lambda: unscheduled().set_schedule(CYCLES),
    "group['schedule']": write_a_schedule,
    "group.update": update_a_schedule,
    "CyclicLR": lambda: CyclicLR(unscheduled(), 1e-3, 1e-2),
    "to_dict": SCALED.to_dict,
    "optimizer.state_dict": lambda: scaled()[0].state_dict(),
    "scheduler.state_dict": lambda: scaled()[1].state_dict(),
    "get_optimizer_state_dict": save_a_model,
    "trained on by torch": load_what_torch_trained,
    "nothing explains": load_what_nothing_explains,
    "epoch": step_with_an_epoch,
    "once an epoch": step_once_an_epoch,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_line_is_the_users(backend: str, way: Callable[[], Any]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        way()
    assert caught
    for warning in caught:
        assert warning.filename == __file__, warning.message


def calls_of_warn() -> Iterator[str]:
    for path in sorted(Path(fused_clr.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("warnings.warn"):
                yield path.name


def test_nothing_warns_in_another_way() -> None:
    assert list(calls_of_warn()) == ["_warnings.py"]
