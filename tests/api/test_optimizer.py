"""What users of torch.optim expect of an optimizer, and the host path."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from fused_clr import FusedAdam, testing
from fused_clr._device import launch
from fused_clr.schedules import Cyclic
from tests.cases import OptimizerCase, by_optimizer
from tests.helpers.pairs import make_pair, train


class CountOperators(TorchDispatchMode):
    """Remembers the torch operators called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


def stub_launches(monkeypatch: pytest.MonkeyPatch) -> list[launch.Launch]:
    """Replaces the launch itself, whose interpreter copies its arguments with torch operators."""
    launches: list[launch.Launch] = []
    monkeypatch.setattr(launch, "run", lambda one, **replaced: launches.append(one))
    return launches


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0, "write_back_grads": True}], ids=["plain", "clipped"])
def test_in_steady_state_a_step_calls_no_operator(
    options: dict[str, Any], triton_backend: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make_pair(True, **options)
    train(pair, 2)
    launches = stub_launches(monkeypatch)
    with CountOperators() as operators:
        for _ in range(3):
            pair.optimizer.step()
            pair.scheduler.step()
    assert operators.calls == []
    assert len(launches) == 3 * (1 + len(options) // 2)
    # The counter does count: moved gradients are uploaded.
    pair.params[0].grad = torch.ones(3)
    with CountOperators() as operators:
        pair.optimizer.step()
    assert operators.calls


def test_one_launch_per_step_however_many_groups(triton_backend: None) -> None:
    params = [torch.nn.Parameter(torch.ones(5)) for _ in range(10)]
    optimizer = FusedAdam([{"params": [p], "schedule": Cyclic(1e-3, 10.0**-i, 3 + i)} for i, p in enumerate(params)])
    for param in params:
        param.grad = torch.ones(5)
    optimizer.step()
    with testing.record_launches() as graph:
        optimizer.step()
    assert len(graph) == 1


@by_optimizer
def test_hooks_run_as_in_torch(backend: str, optimizer_case: OptimizerCase) -> None:
    def three() -> float:
        return 3.0

    def seven() -> float:
        return 7.0

    calls: list[list[Any]] = []
    for kind in (optimizer_case.ours, optimizer_case.torch_peer):
        seen: list[Any] = []
        optimizer = kind([torch.nn.Parameter(torch.ones(2))])

        def record(name: str, own: Any = optimizer, seen: list[Any] = seen) -> Any:
            return lambda o, args, kwargs: seen.append((name, o is own, args[0] is own, args[1:], dict(kwargs)))

        optimizer.register_step_pre_hook(record("pre"))
        optimizer.register_step_post_hook(record("post"))
        handles = [
            register_optimizer_step_pre_hook(record("global pre")),
            register_optimizer_step_post_hook(record("global post")),
        ]
        optimizer.step()
        # As they were passed: by position, by name, and None itself.
        assert [optimizer.step(three), optimizer.step(closure=three)] == [3.0, 3.0]
        assert [optimizer.step(None), optimizer.step(closure=None)] == [None, None]
        for handle in handles:
            handle.remove()
        optimizer.step()
        optimizer.register_step_pre_hook(lambda o, a, k: ((o, seven), {}))
        assert optimizer.step(closure=three) == 7.0
        for arguments, keywords in (((three, 1), {}), ((), {"loss": three}), ((three,), {"closure": three})):
            with pytest.raises(TypeError, match="argument"):
                kind([torch.nn.Parameter(torch.ones(2))]).step(*arguments, **keywords)
        calls.append(seen)
    assert inspect.signature(optimizer_case.ours.step) == inspect.signature(FusedAdam._step)
    assert list(inspect.signature(optimizer_case.ours.step).parameters) == ["self", "closure"]
    assert calls[0] == calls[1]
    optimizer = optimizer_case.ours([torch.nn.Parameter(torch.ones(2))])
    optimizer.register_step_pre_hook(lambda o, a, k: 3)
    with pytest.raises(RuntimeError, match="pre-hook must return None"):
        optimizer.step()


def test_the_profiler_sees_the_step(backend: str) -> None:
    optimizer = FusedAdam([torch.nn.Parameter(torch.ones(2))])
    # Torch 2.11 warns where events of several cycles might be wanted.
    with torch.profiler.profile(acc_events=True) as profile:
        optimizer.step()
    assert "Optimizer.step#FusedAdam.step" in {event.key for event in profile.key_averages()}


def test_state_dict_hooks_run(backend: str) -> None:
    optimizer = FusedAdam([torch.nn.Parameter(torch.ones(2))])
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("pre-save"))
    optimizer.register_state_dict_post_hook(lambda o, s: {**s, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, s: {k: v for k, v in s.items() if k != "extra"})
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("post-load"))
    state = optimizer.state_dict()
    assert state["extra"] == 1
    optimizer.load_state_dict(state)
    assert seen == ["pre-save", "post-load"]


def test_closures_see_gradients_enabled(backend: str) -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = FusedAdam([param], lr=0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 3.0
        assert not torch.is_grad_enabled()
    assert param.max() < 1


def test_the_default_dtype_does_not_leak_into_tables(backend: str) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        param = torch.nn.Parameter(torch.ones(3, dtype=torch.float32))
        optimizer = FusedAdam([param], schedule=Cyclic(1e-3, 1e-2, 7))
        for _ in range(3):
            param.grad = torch.ones(3, dtype=torch.float32)
            optimizer.step()
        assert optimizer.live.lr.dtype == torch.float64
        assert optimizer.state[param]["step"].dtype == torch.float32
        assert optimizer.param_groups[0]["lr"] == pytest.approx(Cyclic(1e-3, 1e-2, 7).lr(3), rel=1e-15)
    finally:
        torch.set_default_dtype(torch.float32)


@by_optimizer
def test_a_tensor_lr_is_read_at_every_step(backend: str, optimizer_case: OptimizerCase) -> None:
    results = []
    for kind in (optimizer_case.ours, optimizer_case.torch_peer):
        param, lr = torch.nn.Parameter(torch.ones(3)), torch.tensor(0.1)
        optimizer = kind([param], lr=lr)
        for i in range(6):
            lr.fill_(0.1 / (i + 1))
            param.grad = param.detach().clone()
            optimizer.step()
        results.append(param)
    torch.testing.assert_close(*results)


def test_a_step_without_gradients_ticks_the_schedule_alone(backend: str) -> None:
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = FusedAdam([param], schedule=Cyclic(1e-3, 1e-2, 7))
    for _ in range(3):
        optimizer.step()
    assert optimizer.status().schedule_step == 3
    assert not optimizer.state
    assert torch.equal(param.detach(), torch.ones(2))


@pytest.mark.parametrize("overflow", [0.0, 1.0, 2.0, float("nan")])
def test_grad_scaler_inputs(backend: str, overflow: float) -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = FusedAdam([param], schedule=Cyclic(1e-3, 1e-2, 7))
    twin_param = torch.nn.Parameter(torch.ones(3))
    twin = torch.optim.Adam([twin_param], lr=1e-3)
    for scale in (1.0, 8.0):
        param.grad, twin_param.grad = torch.full((3,), 2.0) * scale, torch.full((3,), 2.0)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor([scale]), torch.tensor([overflow])
        optimizer.step()
        if overflow == 0:
            twin.param_groups[0]["lr"] = Cyclic(1e-3, 1e-2, 7).lr(optimizer.status().schedule_step - 1)
            twin.param_groups[0]["betas"] = (
                Cyclic(1e-3, 1e-2, 7).momentum(optimizer.status().schedule_step - 1),
                0.999,
            )
            twin.step()
    torch.testing.assert_close(param, twin_param)
    assert optimizer.status().schedule_step == (2 if overflow == 0 else 0)


def test_real_grad_scaler(backend: str) -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = FusedAdam([param], schedule=Cyclic(1e-3, 1e-2, 7))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for value in (1.0, float("inf"), 2.0):
        optimizer.zero_grad()
        scaler.scale((param * value).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.status().schedule_step == 2
    assert optimizer.state[param]["step"].item() == 2
    assert torch.isfinite(param).all()


@by_optimizer
def test_accepted_arguments_have_no_effect(backend: str, optimizer_case: OptimizerCase) -> None:
    results = []
    for arguments in ({}, {"foreach": True}, {"fused": True}, {"capturable": True}, {"foreach": False}):
        if not arguments.keys() <= inspect.signature(optimizer_case.torch_peer).parameters.keys():
            continue
        param = torch.nn.Parameter(torch.ones(3))
        optimizer = optimizer_case.ours([param], lr=0.1, **arguments)
        param.grad = torch.ones(3)
        optimizer.step()
        assert optimizer.param_groups[0]["foreach"] is arguments.get("foreach")
        results.append(param.detach())
    assert all(torch.equal(results[0], other) for other in results)
