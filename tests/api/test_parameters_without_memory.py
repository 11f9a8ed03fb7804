"""Parameters on meta and of lazy modules are left alone, as in torch, until they have memory and a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_clr import FusedAdam
from fused_clr.schedules import Cyclic

pytestmark = pytest.mark.usefixtures("backend")
MAKERS: tuple[Callable[..., Any], ...] = (FusedAdam, torch.optim.Adam)


def meta() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(3, device="meta"))


def with_gradient(count: int = 3) -> torch.nn.Parameter:
    param = torch.nn.Parameter(torch.linspace(1, 2, count))
    param.grad = torch.ones(count)
    return param


def test_a_parameter_on_meta_takes_no_step() -> None:
    pairs = []
    for make in MAKERS:
        param = with_gradient()
        optimizer = make([meta(), param], lr=0.1)
        for _ in range(3):
            optimizer.step()
        pairs.append((param, optimizer.state_dict()))
    (mine, saved), (theirs, expected) = pairs
    torch.testing.assert_close(mine, theirs)
    assert saved["param_groups"][0]["params"] == expected["param_groups"][0]["params"] == [0, 1]
    assert list(saved["state"]) == list(expected["state"]) == [1]


def test_an_optimizer_of_a_whole_model_on_meta() -> None:
    optimizer = FusedAdam([meta(), meta()], schedule=Cyclic(0.1, 0.2, step_size_up=4))
    optimizer.step()
    assert optimizer.status().schedule_step == 1
    optimizer.load_state_dict(optimizer.state_dict())
    assert "Parameter Group 0" in repr(optimizer)


def test_a_gradient_on_meta_is_refused_by_name() -> None:
    param = with_gradient()
    before = param.detach().clone()
    optimizer = FusedAdam([param, meta()], schedule=Cyclic(0.1, 0.2, step_size_up=4))
    optimizer.param_groups[0]["params"][1].grad = torch.zeros(3, device="meta")
    with pytest.raises(
        RuntimeError, match=r"param_groups\[0\]\['params'\]\[1\] has a gradient but no memory: it is on"
    ):
        optimizer.step()
    assert torch.equal(param, before)
    assert optimizer.status().schedule_step == 0


def test_lazy_parameters_are_stepped_once_they_have_a_shape() -> None:
    models = []
    for make in MAKERS:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.LazyLinear(4), torch.nn.Linear(4, 2))
        optimizer = make(model.parameters(), lr=0.1)
        optimizer.step()
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.ones(3, 5)).square().sum().backward()
            optimizer.step()
        models.append((model, optimizer))
    (ours, optimizer), (theirs, reference) = models
    for mine, torchs in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, torchs)
        assert optimizer.state[mine]["step"] == reference.state[torchs]["step"] == 4


def test_state_for_a_parameter_without_memory_is_refused() -> None:
    source = FusedAdam([with_gradient()], lr=0.1)
    source.step()
    optimizer = FusedAdam([meta()], lr=0.3)
    with pytest.raises(ValueError, match=r"state_dict\['state'\]\[0\] is the state of a parameter without memory"):
        optimizer.load_state_dict(source.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.3


@pytest.mark.parametrize("key", ["betas", "weight_decay"])
def test_a_tensor_hyperparameter_written_in_place_is_followed(key: str) -> None:
    results: list[Tensor] = []
    for make in MAKERS:
        torch.manual_seed(0)
        param, value = with_gradient(), torch.tensor(0.5)
        # Torch takes tensors for betas only beside a tensor lr.
        given = {"betas": (value, torch.tensor(0.99)), "weight_decay": value}[key]
        optimizer = make([param], lr=torch.tensor(0.1), foreach=False, **{key: given})
        for new in (0.5, 0.9, 0.1):
            value.fill_(new)
            for _ in range(2):
                param.grad = torch.randn(3)
                optimizer.step()
        results.append(param)
    torch.testing.assert_close(*results)


def test_a_parameter_that_occurs_twice_is_named() -> None:
    optimizer = FusedAdam([with_gradient()], lr=0.1)
    optimizer.step()
    optimizer.param_groups.extend(optimizer.param_groups)
    twice = r"param_groups\[1\]\['params'\]\[0\] and param_groups\[0\]\['params'\]\[0\] are one parameter"
    with pytest.raises(ValueError, match=twice):
        optimizer.step()
    del optimizer.param_groups[1]
    optimizer.step()
    optimizer.param_groups[0]["params"] *= 2
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['params'\]\[1\] and .* are one parameter"):
        optimizer.step()
