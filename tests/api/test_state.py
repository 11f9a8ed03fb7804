"""State, parameters and gradients that change between steps, as torch's optimizers allow."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch

from fused_clr import FusedAdam
from tests.cases import OptimizerCase, by_optimizer
from tests.helpers.pairs import all_equal, copies, make_pair, train


@pytest.mark.parametrize("how", ["in-place", "replaced"])
def test_a_step_written_by_the_user_is_taken_over(backend: str, how: str) -> None:
    results = []
    for kind in (FusedAdam, torch.optim.Adam):
        param = torch.nn.Parameter(torch.ones(3))
        optimizer = kind([param], lr=0.1)
        for i in range(4):
            param.grad = torch.full((3,), 0.5 + i)
            optimizer.step()
            if i == 1 and how == "in-place":
                optimizer.state[param]["step"].fill_(40.0)
            elif i == 1:
                optimizer.state[param]["step"] = torch.tensor(40.0)
        results.append(param)
        assert optimizer.state[param]["step"].item() == 42
    torch.testing.assert_close(*results)


def test_cleared_and_replaced_state(backend: str) -> None:
    results = []
    for kind in (FusedAdam, torch.optim.Adam):
        param = torch.nn.Parameter(torch.ones(3))
        optimizer = kind([param], lr=0.1)
        for i in range(9):
            param.grad = torch.full((3,), 0.5 + i)
            optimizer.step()
            if i == 1:
                optimizer.state.clear()
            if i == 3:
                optimizer.state[param] = {
                    "step": torch.tensor(9.0),
                    "exp_avg": torch.ones(3),
                    "exp_avg_sq": torch.ones(3),
                }
            if i == 5:
                optimizer.state[param]["exp_avg"] = torch.full((3,), 2.0)
            if i == 7:
                del optimizer.state[param]
        results.append((param, optimizer.state[param]["step"]))
    torch.testing.assert_close(*results)


@by_optimizer
def test_moved_gradients_and_parameters_are_followed(backend: str, optimizer_case: OptimizerCase) -> None:
    results = []
    for kind in (optimizer_case.ours, optimizer_case.torch_peer):
        param = torch.nn.Parameter(torch.ones(40, 50))
        optimizer = kind([param], lr=0.1)
        for i in range(8):
            gradient = torch.full((40, 50), 0.5) * (i + 1)
            if i == 3:
                param.grad.data = gradient
            elif i == 4:
                param.data = param.data.clone()
                param.grad = gradient
            elif i == 5:
                param.data = param.data.t().contiguous().t()
                param.grad = gradient
            else:
                param.grad = gradient
            optimizer.step()
        results.append(param.detach())
    torch.testing.assert_close(*results)


def test_a_model_may_be_cast_between_steps(backend: str) -> None:
    results = []
    for kind in (FusedAdam, torch.optim.Adam):
        param = torch.nn.Parameter(torch.ones(40))
        optimizer = kind([param], lr=0.1)
        # Back to float32 at the end, where a plan of the first steps would find freed moments.
        for number, dtype in enumerate([torch.float32, torch.float32, torch.float64, torch.float64, torch.float32]):
            if dtype != param.dtype:
                param.grad = None
                param.data = param.data.to(dtype)
                if kind is torch.optim.Adam:
                    for key in ("exp_avg", "exp_avg_sq"):
                        optimizer.state[param][key] = optimizer.state[param][key].to(dtype)
            param.grad = torch.linspace(-1, 1, 40, dtype=dtype) * (number + 1)
            optimizer.step()
            assert optimizer.state[param]["exp_avg"].dtype == dtype
        results.append(param.detach())
    torch.testing.assert_close(*results)


def test_groups_and_parameters_may_be_added_to_the_list(backend: str) -> None:
    first, second = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = FusedAdam([first], lr=0.1)
    first.grad = torch.ones(2)
    optimizer.step()
    optimizer.param_groups[0]["params"].append(second)
    second.grad = torch.ones(2)
    optimizer.step()
    assert (optimizer.state[first]["step"].item(), optimizer.state[second]["step"].item()) == (2, 1)
    assert (second < 1).all()


def test_no_gradient_is_kept_alive(backend: str) -> None:
    param = torch.nn.Parameter(torch.ones(5))
    optimizer = FusedAdam([param])
    param.grad = torch.ones(5)
    optimizer.step()
    gradient = weakref.ref(param.grad)
    optimizer.zero_grad()
    assert gradient() is None


def test_a_deepcopied_model_and_optimizer_hold_no_addresses(triton_backend: None) -> None:
    pair = make_pair(True)
    train(pair, 3)
    twin = copy.deepcopy(pair)
    before = copies(pair.params)
    train(twin, 2)
    assert all_equal(pair.params, before)
