"""Torch's database of optimizer tests, with entries for our classes: what it declares for Adam runs against ours."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.optim import optimizer as torch_optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.testing._internal.common_optimizers import (
    OptimizerInfo,
    OptimizerInput,
    _get_optim_inputs_including_global_cliquey_kwargs,
    optim_db,
)

from tests.cases import OPTIMIZERS, OptimizerCase, by_optimizer
from tests.helpers.tolerances import AFTER_STEPS

TORCH = {info.optim_cls: info for info in optim_db}


def entry_like(ours: type[Any], theirs: type[torch.optim.Optimizer]) -> OptimizerInfo:
    """An entry of the database for a class of ours: all that torch's declares, but for ``differentiable``."""
    info = TORCH[theirs]
    return OptimizerInfo(
        ours,
        optim_inputs_func=info.optim_inputs_func,
        scheduler_inputs=info.scheduler_inputs,
        supported_impls=tuple(name for name in info.supported_impls if name != "differentiable"),
        not_og_supported_flags=info.not_og_supported_flags,
        supports_sparse=info.supports_sparse,
        has_capturable_arg=info.has_capturable_arg,
        supports_complex=info.supports_complex,
        supports_param_groups=info.supports_param_groups,
        optim_error_inputs_func=info.optim_error_inputs_func,
        supports_fused_on=info.supports_fused_on,
    )


DATABASE = {name: entry_like(case.ours, case.torch_peer) for name, case in OPTIMIZERS.items()}


def inputs_of(case: OptimizerCase) -> list[OptimizerInput]:
    """Every configuration that the database declares for the entry, with its global flag off and on in turn."""
    inputs = _get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float32, DATABASE[case.name])
    assert len(inputs) >= 10
    assert [own.kwargs["fused"] for own in inputs] == [False, True] * (len(inputs) // 2)
    return [inputs[index + index // 2 % 2] for index in range(0, len(inputs), 2)]


def make(kind: Any, arguments: dict[str, Any], seed: int = 0) -> tuple[Any, list[torch.nn.Parameter]]:
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 5), (7,), ())]
    return kind(params, **copy.deepcopy(arguments)), params


def for_torch(arguments: dict[str, Any]) -> dict[str, Any]:
    """What torch takes of a configuration on the CPU: no capturable step, and with tensors one loop alone."""
    kept = {key: value for key, value in arguments.items() if key != "capturable"}
    values = [arguments.get("lr"), *arguments.get("betas", ())]
    if any(isinstance(value, torch.Tensor) for value in values):
        kept["foreach"] = False
    return kept


def backward(params: list[torch.nn.Parameter]) -> torch.Tensor:
    loss = sum((param - 1).square().sum() for param in params)
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    return loss


def steps(optimizer: Any, params: list[torch.nn.Parameter], count: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


def assert_close(first: Any, second: Any) -> None:
    tolerance = AFTER_STEPS[torch.float32]
    torch.testing.assert_close(first, second, rtol=tolerance.rtol, atol=tolerance.atol)


@by_optimizer
def test_declared_inputs_agree(backend: str, optimizer_case: OptimizerCase) -> None:
    ours, theirs = optimizer_case.ours, optimizer_case.torch_peer
    for declared in inputs_of(optimizer_case):
        optimizer, params = make(ours, declared.kwargs)
        twin, twins = make(theirs, for_torch(declared.kwargs))
        steps(optimizer, params, 5)
        steps(twin, twins, 5)
        for param, other in zip(params, twins, strict=True):
            assert_close(param, other)
            assert set(optimizer.state[param]) == set(twin.state[other])
            for key, value in twin.state[other].items():
                assert_close(optimizer.state[param][key], value)


@by_optimizer
def test_declared_error_inputs_raise(optimizer_case: OptimizerCase) -> None:
    cases = DATABASE[optimizer_case.name].optim_error_inputs_func(device="cpu", dtype=torch.float32)
    assert cases
    for case in cases:
        arguments: dict[str, Any] = dict(case.optimizer_error_input.kwargs)
        params = case.optimizer_error_input.params
        if params is None:
            params = [torch.nn.Parameter(torch.ones(2))]
        hyperparameters = [arguments.get("lr"), *arguments.get("betas", ())]
        tensors = [value for value in hyperparameters if isinstance(value, torch.Tensor)]
        if tensors and all(tensor.numel() == 1 for tensor in tensors):
            # Combinations that one of torch's implementations lacks; ours takes any.
            optimizer_case.ours(params, **arguments)
            continue
        # Duplicate parameters and sets, which torch warns of and ours then refuses.
        with pytest.raises((ValueError, TypeError, RuntimeError, UserWarning, FutureWarning)):
            optimizer_case.ours(params, **arguments)


@by_optimizer
def test_declared_schedulers_drive_a_group_as_they_drive_torchs(backend: str, optimizer_case: OptimizerCase) -> None:
    ours, theirs = optimizer_case.ours, optimizer_case.torch_peer
    constructors = DATABASE[optimizer_case.name].scheduler_inputs
    assert constructors
    for makers in constructors:
        runs = []
        for kind in (theirs, ours):
            optimizer, params = make(kind, {"lr": 0.1})
            schedulers = [maker(optimizer) for maker in makers]
            lrs, losses = [], []
            for _ in range(12):
                optimizer.zero_grad()
                losses.append(backward(params).item())
                optimizer.step()
                for scheduler in schedulers:
                    scheduler.step(*([losses[-1]] if isinstance(scheduler, ReduceLROnPlateau) else []))
                lrs.append(optimizer.param_groups[0]["lr"])
            runs.append((lrs, losses))
        assert runs[1][0] == runs[0][0]
        assert runs[1][1] == pytest.approx(runs[0][1], rel=1e-5)
        assert runs[1][1][-1] < runs[1][1][0]


@by_optimizer
def test_complex_parameters_are_pairs_of_reals(backend: str, optimizer_case: OptimizerCase) -> None:
    ours = optimizer_case.ours
    for declared in inputs_of(optimizer_case):
        generator = torch.Generator().manual_seed(0)
        numbers = torch.nn.Parameter(torch.randn(5, dtype=torch.complex64, generator=generator))
        pairs = torch.nn.Parameter(torch.view_as_real(numbers.detach()).clone())
        optimizers = [ours([param], **copy.deepcopy(declared.kwargs)) for param in (numbers, pairs)]
        for _ in range(3):
            numbers.grad = torch.randn(5, dtype=torch.complex64, generator=generator)
            pairs.grad = torch.view_as_real(numbers.grad).clone()
            for optimizer in optimizers:
                optimizer.step()
        torch.testing.assert_close(torch.view_as_real(numbers.detach()), pairs.detach(), rtol=0, atol=0)


@by_optimizer
def test_a_step_without_gradients_changes_nothing(backend: str, optimizer_case: OptimizerCase) -> None:
    for declared in inputs_of(optimizer_case):
        optimizer, params = make(optimizer_case.ours, declared.kwargs)
        before = [param.detach().clone() for param in params]
        optimizer.step()
        assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))
        assert optimizer.state_dict()["state"] == {}


@by_optimizer
def test_a_step_with_gradients_of_zero_moves_nothing_but_decayed_weights(
    backend: str, optimizer_case: OptimizerCase
) -> None:
    for declared in inputs_of(optimizer_case):
        optimizer, params = make(optimizer_case.ours, declared.kwargs)
        before = [param.detach().clone() for param in params]
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
        decays = optimizer.param_groups[0]["weight_decay"] != 0
        assert all(torch.equal(param, old) != decays for param, old in zip(params, before, strict=True))
        assert all(optimizer.state[param].get("step", 1) == 1 for param in params)


@by_optimizer
def test_state_dicts_resume_and_older_ones_load(backend: str, optimizer_case: OptimizerCase) -> None:
    """Torch's tests of state dicts: deterministic, loaded weights-only, without newer flags, with a plain step."""
    kind = optimizer_case.ours
    for declared in inputs_of(optimizer_case):
        optimizer, params = make(kind, declared.kwargs)
        steps(optimizer, params, 3)
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
        older = copy.deepcopy(saved)
        for group in older["param_groups"]:
            for flag in DATABASE[optimizer_case.name].not_og_supported_flags:
                group.pop(flag, None)
        for entry in older["state"].values():
            entry |= {"step": entry["step"].item()} if "step" in entry else {}
        values = [param.detach().clone() for param in params]
        steps(optimizer, params, 3, seed=2)
        for state in (saved, older):
            other, others = make(kind, declared.kwargs, seed=5)
            with torch.no_grad():
                for param, value in zip(others, values, strict=True):
                    param.copy_(value)
            other.load_state_dict(state)
            steps(other, others, 3, seed=2)
            for param, value in zip(others, params, strict=True):
                assert torch.equal(param, value)


@by_optimizer
def test_copies_pickles_and_text(backend: str, optimizer_case: OptimizerCase) -> None:
    for declared in inputs_of(optimizer_case):
        optimizer, params = make(optimizer_case.ours, declared.kwargs)
        steps(optimizer, params, 2)
        assert type(optimizer).__name__ in repr(optimizer)
        for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            assert {key for key in vars(other) if not key.startswith("_")} == {
                key for key in vars(optimizer) if not key.startswith("_")
            }
            others = other.param_groups[0]["params"]
            steps(other, others, 2, seed=3)
            for param, twin in zip(params, others, strict=True):
                assert not torch.equal(param, twin)
            assert optimizer.status().applied_steps == 2 != other.status().applied_steps


@pytest.fixture
def calls() -> Iterator[list[str]]:
    """Hooks of all optimizers, taken away at the end."""
    found: list[str] = []
    handles = [
        torch_optimizer.register_optimizer_step_pre_hook(lambda *_: found.append("global before")),
        torch_optimizer.register_optimizer_step_post_hook(lambda *_: found.append("global after")),
    ]
    yield found
    for handle in handles:
        handle.remove()


@by_optimizer
def test_hooks_run_in_torchs_order(backend: str, optimizer_case: OptimizerCase, calls: list[str]) -> None:
    orders = []
    for kind in (optimizer_case.ours, optimizer_case.torch_peer):
        optimizer, params = make(kind, {})
        optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
        optimizer.register_step_post_hook(lambda *_: calls.append("after"))
        optimizer.register_state_dict_pre_hook(lambda *_: calls.append("before saving"))
        optimizer.register_state_dict_post_hook(lambda *_: calls.append("after saving"))
        optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("before loading"))
        optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("after loading"))
        steps(optimizer, params, 1)
        optimizer.load_state_dict(optimizer.state_dict())
        orders.append(calls.copy())
        calls.clear()
    assert orders[0] == orders[1]
    assert len(orders[0]) == 8


@by_optimizer
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_tensor_lr_is_a_number(backend: str, optimizer_case: OptimizerCase, shape: tuple[int, ...]) -> None:
    results = []
    for lr in (0.01, torch.full(shape, 0.01, dtype=torch.float64)):
        optimizer, params = make(optimizer_case.ours, {"lr": lr})
        steps(optimizer, params, 3)
        results.append(params)
    for param, other in zip(*results, strict=True):
        assert torch.equal(param, other)


@by_optimizer
def test_what_differs_from_torchs_entry_is_refused_by_name(optimizer_case: OptimizerCase) -> None:
    with pytest.raises(ValueError, match="differentiable must be False"):
        optimizer_case.ours([torch.nn.Parameter(torch.ones(2))], differentiable=True)
