"""Numbers are numbers, booleans booleans and integers integers, Python's or numpy's; all are stored as Python's."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import pytest
import torch

from fused_clr import FusedAdam, FusedAdamW, GraphedStep, unfuse
from fused_clr.schedules import Cyclic


def make(**arguments: Any) -> FusedAdam:
    return FusedAdam([torch.nn.Parameter(torch.ones(2))], **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"lr": "1e-3"},
        {"lr": True},
        {"lr": np.bool_(True)},
        {"lr": 1j},
        {"lr": torch.tensor(True)},
        {"lr": 10**400},
        {"eps": "1e-8"},
        {"weight_decay": False},
        {"betas": {0.9, 0.99}},
        {"betas": "09"},
        {"maximize": "no"},
        {"decoupled_weight_decay": "no"},
        {"amsgrad": "false"},
        {"amsgrad": 1},
        {"capturable": 0},
        {"fused": "yes"},
        {"foreach": 1},
        {"differentiable": "no"},
        {"max_grad_norm": "1.0"},
        {"max_grad_norm": True},
        {"skip_if_nonfinite": 1, "max_grad_norm": 1.0},
        {"history_size": True},
        {"history_size": 1.0},
        {"history_size": 10**13},
    ],
    ids=str,
)
def test_optimizer(arguments: dict[str, Any]) -> None:
    name, value = next(iter(arguments.items()))
    with pytest.raises(ValueError, match=f"{name} must be .*, got {re.escape(repr(value))}"):
        make(**arguments)


@pytest.mark.parametrize("betas", [("0.9", 0.99), (True, 0.99)], ids=str)
def test_betas(betas: Any) -> None:
    with pytest.raises(ValueError, match=rf"betas\[0\] must be .*, got {betas[0]!r}"):
        make(betas=betas)


@pytest.mark.parametrize(
    "arguments",
    [
        {"base_lr": "0.1"},
        {"max_lr": True},
        {"gamma": "1"},
        {"base_momentum": "0.8"},
        {"step_size_up": "5"},
        {"step_size_down": True},
        {"cycle_momentum": "no"},
        {"cycle_momentum": 1},
        {"total_steps": True},
        {"total_steps": "a"},
        {"total_steps": float("nan")},
        {"total_steps": float("inf")},
        {"total_steps": 3.0},
    ],
    ids=str,
)
def test_schedule(arguments: dict[str, Any]) -> None:
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=f"{name} must be .*, got {value!r}"):
        Cyclic(**{"base_lr": 0.1, "max_lr": 0.2} | arguments)


@pytest.mark.parametrize("step", [1.5, "3", None, [1, 2], True, np.array([np.nan]), 2**70, 2**62, np.array([2**62])])
def test_steps_of_a_schedule(step: Any) -> None:
    with pytest.raises(ValueError, match=r"step must be (an integer or an array of integers|< 2\*\*62), got "):
        Cyclic(0.1, 0.2).lr(step)


def test_numpy_numbers_are_stored_as_pythons(backend: str) -> None:
    schedule = Cyclic(np.float32(0.25), np.float64(0.5), np.int64(4), cycle_momentum=np.bool_(False))
    optimizer = make(
        lr=np.float64(0.5),
        betas=np.array([0.5, 0.75]),
        eps=np.float32(0.5),
        weight_decay=np.int64(0),
        amsgrad=np.bool_(True),
        max_grad_norm=np.float32(2.0),
        history_size=np.int32(8),
        schedule=schedule,
    )
    optimizer.set_schedule_step(np.int64(3))
    optimizer.param_groups[0]["eps"] = np.float64(0.25)
    assert len(optimizer.history(np.int64(4)).lr) == 0
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    (saved,) = torch.load(file, weights_only=True)["param_groups"]
    assert saved["betas"] == (0.5, 0.75)
    assert saved["schedule"]["step"] == 3
    assert saved["eps"] == 0.25
    assert type(optimizer.max_grad_norm) is float


@pytest.mark.parametrize("n", [True, 1.0, "1", -1, 257])
def test_history(backend: str, n: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"n must be an integer in [0, history_size = 256], got {n!r}")):
        make().history(n)


@pytest.mark.parametrize("value", ["no", 1, None, 0.0], ids=str)
def test_flags_of_methods(backend: str, value: Any) -> None:
    optimizer = make()
    for name, call in (
        ("wait", optimizer.status),
        ("optimizer_only", lambda optimizer_only: optimizer.check_replay(optimizer_only=optimizer_only)),
        ("drop_clipping", lambda drop_clipping: unfuse(optimizer, drop_clipping=drop_clipping)),
    ):
        with pytest.raises(ValueError, match=f"{name} must be True or False, got {value!r}"):
            call(**{name: value})
    assert optimizer.status(np.bool_(True)).schedule_step == 0


@pytest.mark.parametrize("name", ["num_warmup_iters", "max_graphs"])
def test_counts_of_a_graphed_step(name: str) -> None:
    GraphedStep(print, make(), **{name: np.int64(2)})
    for value in (True, 1.0, "1", 0):
        with pytest.raises(ValueError, match=f"{name} must be an integer >= 1, got {value!r}"):
            GraphedStep(print, make(), **{name: value})


@pytest.mark.parametrize("value", [True, False])
def test_adamw_always_decouples(value: bool) -> None:
    param = torch.nn.Parameter(torch.ones(2))
    for kind in (FusedAdamW, torch.optim.AdamW):
        with pytest.raises(TypeError, match="unexpected .*argument.* .*'decoupled_weight_decay'"):
            kind([param], decoupled_weight_decay=value)


def test_options_in_a_group() -> None:
    with pytest.raises(ValueError, match="max_grad_norm applies to all groups"):
        make().param_groups[0]["max_grad_norm"] = 1.0
