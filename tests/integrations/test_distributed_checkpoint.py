"""Checkpoints of sharded training: saved by some processes, loaded by others, whole or in pieces."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from fused_clr import CyclicLR, FusedAdam
from tests.cases import ADAM, SGD, OptimizerCase, by_rows
from tests.helpers.ranks import Ranks
from tests.helpers.sharded import (
    CYCLE,
    STEPS,
    Model,
    assert_same,
    batches,
    loss_of,
    make_model,
    results_of,
    sharded,
    torch_run,
    train,
    whole,
)


# -- distributed checkpoints ------------------------------------------------------------------------------------------
def checkpoint_of(model: torch.nn.Module, optimizer: Any, flatten: bool) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    return {"model": model_state, "optimizer": optimizer_state}


def load(model: torch.nn.Module, optimizer: Any, folder: str, flatten: bool, no_dist: bool) -> None:
    state = checkpoint_of(model, optimizer, flatten)
    dcp.load(state, checkpoint_id=folder, no_dist=no_dist)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(flatten_optimizer_state_dict=flatten),
    )


def run_save(folder: str, flatten: bool, optimizer_case: OptimizerCase) -> None:
    model, optimizer, scheduler = sharded(optimizer_case=optimizer_case)
    train(model, optimizer, scheduler, 6)
    dcp.save(checkpoint_of(model, optimizer, flatten), checkpoint_id=folder)


def run_load(folder: str, flatten: bool) -> dict[str, torch.Tensor]:
    model, optimizer, scheduler = sharded()
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    load(model, optimizer, folder, flatten, no_dist=False)
    assert scheduler.last_epoch == 6
    train(model, optimizer, scheduler, STEPS - 6, skip=6)
    return results_of(model, optimizer)


def one_process(optimizer_case: OptimizerCase = ADAM) -> tuple[Model, Any, CyclicLR]:
    model = make_model()
    optimizer = optimizer_case.ours(model.parameters(), weight_decay=0.01)
    return model, optimizer, CyclicLR(optimizer, **CYCLE)


def train_alone(model: torch.nn.Module, optimizer: Any, scheduler: Any, steps: int, skip: int = 0) -> None:
    for batch in batches(skip + steps)[skip:]:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        scheduler.step()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@by_rows("flatten optimizer_case", [(False, ADAM), (True, ADAM), (False, SGD)])
def test_a_checkpoint_of_two_processes_is_loaded_by_one(
    ranks: Ranks, backend: str, tmp_path: Path, flatten: bool, optimizer_case: OptimizerCase
) -> None:
    ranks.run(run_save, str(tmp_path), flatten, optimizer_case)
    model, optimizer, scheduler = one_process(optimizer_case)
    load(model, optimizer, str(tmp_path), flatten, no_dist=True)
    assert scheduler.last_epoch == 6
    train_alone(model, optimizer, scheduler, STEPS - 6, skip=6)
    assert_same(results_of(model, optimizer), torch_run(optimizer_case=optimizer_case))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flat"])
def test_a_checkpoint_of_one_process_is_loaded_by_two(
    ranks: Ranks, backend: str, tmp_path: Path, flatten: bool
) -> None:
    model, optimizer, scheduler = one_process()
    train_alone(model, optimizer, scheduler, 6)
    dcp.save(checkpoint_of(model, optimizer, flatten), checkpoint_id=str(tmp_path), no_dist=True)
    for results in ranks.run(run_load, str(tmp_path), flatten):
        assert_same(results, torch_run())


def run_full_state() -> dict[str, torch.Tensor]:
    """The state gathered whole, and dealt again to a new optimizer; half the way each."""
    model, optimizer, scheduler = sharded()
    train(model, optimizer, scheduler, 6)
    full = StateDictOptions(full_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=full)
    assert not any(isinstance(value, DTensor) for entry in state["state"].values() for value in entry.values())
    other = FusedAdam(model.parameters(), weight_decay=0.01)
    other_scheduler = CyclicLR(other, **CYCLE)
    set_optimizer_state_dict(model, other, copy.deepcopy(state), options=full)
    train(model, other, other_scheduler, STEPS - 6, skip=6)
    # A plain state_dict too, whose tensors are whole: each process takes its shard.
    third = FusedAdam(model.parameters(), weight_decay=0.01)
    names = [name for name, _ in model.named_parameters()]
    state["state"] = {index: state["state"][name] for index, name in enumerate(names)}
    state["param_groups"][0]["params"] = list(range(len(names)))
    third.load_state_dict(state)
    for index, param in enumerate(model.parameters()):
        torch.testing.assert_close(whole(third.state[param]["exp_avg"]), state["state"][index]["exp_avg"])
    return results_of(model, other)


def test_whole_state_dicts(ranks: Ranks, backend: str) -> None:
    for results in ranks.run(run_full_state):
        assert_same(results, torch_run())


def run_fresh_state() -> None:
    """Asking for the state of an optimizer that has taken no step neither ticks nor counts."""
    model, optimizer, scheduler = sharded()
    state = get_optimizer_state_dict(model, optimizer)
    assert {float(entry["step"]) for entry in state["state"].values()} == {0.0}
    assert optimizer.status().schedule_step == scheduler.last_epoch == 0
    assert all(param.grad is None for param in model.parameters())


def test_state_of_a_fresh_optimizer(ranks: Ranks, backend: str) -> None:
    ranks.run(run_fresh_state)
