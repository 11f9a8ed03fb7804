"""A step follows tensors and lists that users replace in place, as torch does, or names what it cannot take."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_clr import FusedAdam, testing

pytestmark = pytest.mark.usefixtures("backend")


class Twins:
    """Ours and torch's optimizer over equal parameters and gradients."""

    def __init__(self, *shapes: tuple[int, ...], groups: int = 1) -> None:
        torch.manual_seed(0)
        values = [torch.randn(shape) for shape in shapes]
        self.params = [[torch.nn.Parameter(value.clone()) for value in values] for _ in range(2)]
        makers: tuple[Callable[..., Any], ...] = (FusedAdam, torch.optim.Adam)
        self.optimizers = [
            make([{"params": own[i::groups], "lr": 0.1 / (i + 1)} for i in range(groups)])
            for make, own in zip(makers, self.params, strict=True)
        ]

    def steps(self, count: int = 2) -> None:
        for _ in range(count):
            for mine, torchs in zip(*self.params, strict=True):
                gradient = torch.randn(mine.shape)
                for param in (mine, torchs):
                    param.grad = torch.empty_like(param).copy_(gradient)
            for optimizer in self.optimizers:
                optimizer.step()

    def each(self, change: Callable[[Any, list[Tensor]], None]) -> None:
        for optimizer, params in zip(self.optimizers, self.params, strict=True):
            change(optimizer, params)

    def assert_equal(self) -> None:
        for mine, torchs in zip(*self.params, strict=True):
            torch.testing.assert_close(mine, torchs, rtol=1e-5, atol=1e-6)


# -- state tensors -----------------------------------------------------------------------------------------------------
def move_through_data(optimizer: Any, params: list[Tensor]) -> None:
    for param in params:
        for key in ("exp_avg", "exp_avg_sq"):
            value = optimizer.state[param][key]
            old = value.data
            value.data = old.clone()
            # Whoever still writes here is seen.
            old.fill_(torch.nan)


def swap_tensors(optimizer: Any, params: list[Tensor]) -> None:
    for param in params:
        value = optimizer.state[param]["exp_avg"]
        torch.utils.swap_tensors(value, value.clone())


def share_memory(optimizer: Any, params: list[Tensor]) -> None:
    for param in params:
        optimizer.state[param]["exp_avg_sq"].share_memory_()


def transpose_through_data(optimizer: Any, params: list[Tensor]) -> None:
    for param in params:
        value = optimizer.state[param]["exp_avg"]
        if value.ndim == 2:
            value.data = value.data.t().contiguous().t()


def restride_in_place(optimizer: Any, params: list[Tensor]) -> None:
    # The same memory, shape and values at other strides.
    value = optimizer.state[params[-1]]["exp_avg_sq"]
    kept = value.clone()
    value.t_().reshape(-1)
    value.set_(value.untyped_storage(), 0, kept.shape, kept.t().contiguous().t().stride()).copy_(kept)


@pytest.mark.parametrize(
    "change", [move_through_data, swap_tensors, share_memory, transpose_through_data, restride_in_place]
)
def test_moments_that_moved_are_followed(change: Callable[[Any, list[Tensor]], None]) -> None:
    twins = Twins((5,), (70,), (3, 4))
    twins.steps()
    for _ in range(3):
        twins.each(change)
        twins.steps()
    twins.assert_equal()


@pytest.mark.parametrize(
    "reach",
    [
        lambda own: own.state[own.param_groups[0]["params"][0]]["exp_avg"],
        lambda own: own.state_dict()["state"][0]["exp_avg"],
        lambda own: next(iter(own.__getstate__()["state"].values()))["exp_avg"],
        lambda own: next(iter(copy.copy(own).state.values()))["exp_avg"],
    ],
    ids=["state", "state_dict", "getstate", "copy"],
)
def test_a_moment_is_followed_whatever_way_it_was_reached(reach: Callable[[Any], Tensor]) -> None:
    twins = Twins((3, 4))
    twins.steps()
    # None of the engine's own reads makes steps compare moments.
    (engine,) = twins.optimizers[0]._engines  # type: ignore[attr-defined]
    assert not engine.moments.handed_out
    values = [reach(optimizer) for optimizer in twins.optimizers]
    twins.steps()
    for value in values:
        value.data = value.data.t().contiguous().t()
    twins.steps()
    twins.assert_equal()


# -- parameters --------------------------------------------------------------------------------------------------------
def test_a_parameter_that_grew_or_shrank_with_the_same_strides_is_refused() -> None:
    for replaced in (lambda data: torch.cat([data, torch.zeros(40, 16)]), lambda data: data[:2]):
        twins = Twins((8, 16))
        twins.steps()
        optimizer, (param,) = twins.optimizers[0], twins.params[0]
        param.data = replaced(param.data)
        # The old gradient, then one of the new shape.
        with pytest.raises((RuntimeError, ValueError), match=r"param_groups\[0\]\['params'\]\[0\] must"):
            optimizer.step()
        param.grad = torch.ones_like(param)
        with pytest.raises(ValueError, match=r"state\['exp_avg'\] of param_groups\[0\].* must be a tensor of shape"):
            optimizer.step()
        optimizer.state.clear()
        before = param.detach().clone()
        optimizer.step()
        assert (param != before).all()


def test_a_parameter_in_another_dense_layout_beside_its_old_gradient() -> None:
    twins = Twins((4, 4))
    twins.steps()
    twins.each(lambda _, params: setattr(params[0], "data", params[0].data.t().contiguous().t()))
    for optimizer in twins.optimizers:
        optimizer.step()
    twins.assert_equal()
    # A view of the same memory: its strides alone are others.
    twins.each(lambda _, params: setattr(params[0], "data", params[0].data.t()))
    for optimizer in twins.optimizers:
        optimizer.step()
    twins.assert_equal()


def test_a_parameter_that_became_channels_last() -> None:
    twins = Twins((2, 3, 4, 5))
    twins.steps()

    def change(_: Any, params: list[Tensor]) -> None:
        params[0].data = params[0].data.to(memory_format=torch.channels_last)
        params[0].grad.fill_(0.5)

    twins.each(change)
    for optimizer in twins.optimizers:
        optimizer.step()
    twins.steps()
    twins.assert_equal()


def test_a_parameter_that_became_a_view_with_gaps_is_named() -> None:
    twins = Twins((6,), (4,))
    twins.steps()
    optimizer, params = twins.optimizers[0], twins.params[0]
    before = params[0].detach().clone()
    params[1].data = torch.ones(8)[::2]
    params[1].grad = torch.ones(4)
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['params'\]\[1\] must fill its storage without gaps"):
        optimizer.step()
    assert torch.equal(params[0], before)


# -- lists -------------------------------------------------------------------------------------------------------------
def drop(optimizer: Any, _: Any) -> None:
    del optimizer.param_groups[1]


def reverse(optimizer: Any, _: Any) -> None:
    optimizer.param_groups.reverse()


def copy_group(optimizer: Any, _: Any) -> None:
    optimizer.param_groups[0] = dict(optimizer.param_groups[0]) | {"lr": 0.3}


def new_list(optimizer: Any, _: Any) -> None:
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups[::-1]]


def pop_and_append(optimizer: Any, _: Any) -> None:
    optimizer.param_groups.append(optimizer.param_groups.pop(0))


def swap_params(optimizer: Any, _: Any) -> None:
    first, second = (group["params"] for group in optimizer.param_groups)
    first[0], second[0] = second[0], first[0]


def new_param_list(optimizer: Any, _: Any) -> None:
    first, second = optimizer.param_groups
    first["params"] = [*first["params"], *second["params"]]
    second["params"] = []
    first["params"].reverse()


def move_param(optimizer: Any, _: Any) -> None:
    first, second = (group["params"] for group in optimizer.param_groups)
    second += [first.pop()]
    second.insert(0, second.pop(1))


def replace_param(optimizer: Any, params: list[Tensor]) -> None:
    # A new one of equal value in the place of the first.
    params[0] = torch.nn.Parameter(params[0].detach().clone())
    optimizer.param_groups[0]["params"][0] = params[0]


@pytest.mark.parametrize(
    "edit",
    [drop, reverse, copy_group, new_list, pop_and_append, swap_params, new_param_list, move_param, replace_param],
    ids=lambda f: f.__name__,
)
def test_lists_edited_in_place_are_followed(edit: Callable[[Any, Any], None]) -> None:
    twins = Twins((5,), (70,), (3,), (2, 2), groups=2)
    twins.steps()
    twins.each(edit)
    twins.steps(3)
    twins.assert_equal()
    ours, theirs = twins.optimizers
    assert [len(g["params"]) for g in ours.state_dict()["param_groups"]] == [
        len(g["params"]) for g in theirs.param_groups
    ]


def test_a_group_without_a_key_is_named() -> None:
    twins = Twins((5,))
    twins.steps()
    optimizer = twins.optimizers[0]
    optimizer.param_groups[0] = {"params": twins.params[0], "lr": 0.1}
    with pytest.raises(ValueError, match=r"param_groups\[0\] has no \['amsgrad', 'betas'"):
        optimizer.step()


def test_check_replay_names_edited_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_CLR_BACKEND", "triton")
    for edit in (drop, reverse, copy_group, swap_params):
        twins = Twins((5,), (70,), groups=2)
        twins.steps()
        optimizer = twins.optimizers[0]
        with testing.record_launches():
            optimizer.step()
        edit(optimizer, twins.params[0])
        with pytest.raises(RuntimeError, match="no longer fits its optimizer: parameters, groups"):
            optimizer.check_replay()


def test_check_replay_names_a_gradient_with_a_conj_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_CLR_BACKEND", "triton")
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = FusedAdam([param])
    param.grad = torch.ones(3, dtype=torch.complex64)
    optimizer.step()
    with testing.record_launches():
        optimizer.step()
    optimizer.check_replay()
    param.grad = param.grad.conj()
    with pytest.raises(RuntimeError, match="the conj bit of the gradient of .* was set"):
        optimizer.check_replay(optimizer_only=True)
