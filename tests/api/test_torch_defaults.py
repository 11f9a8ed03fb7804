"""`torch.set_default_device` and `torch.set_default_dtype` change nothing: every tensor names its own."""

from __future__ import annotations

import ast
import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import fused_clr
from fused_clr import CyclicLR, FusedAdam
from fused_clr.schedules import Cyclic
from fused_clr.testing import record_launches
from tests.cases import by_rows, in_turn

CYCLE = {"base_lr": 0.1, "max_lr": 0.5, "step_size_up": 3, "mode": "triangular2"}
# How it is set, to what, and to what afterwards.
DEFAULTS: dict[str, tuple[Callable[[Any], None], Any, Any]] = {
    "meta": (torch.set_default_device, "meta", None),
    "float64": (torch.set_default_dtype, torch.float64, torch.float32),
    "bfloat16": (torch.set_default_dtype, torch.bfloat16, torch.float32),
}
# Torch's functions that make tensors of the default dtype, or on the default device.
FACTORIES = {
    f"torch.{name}"
    for name in ("tensor", "as_tensor", "zeros", "ones", "empty", "full", "arange", "linspace", "eye", "randperm")
}


@contextmanager
def default(name: str) -> Iterator[None]:
    setter, value, usual = DEFAULTS[name]
    setter(value)
    try:
        yield
    finally:
        setter(usual)


def assert_same(first: Any, second: Any) -> None:
    """The same values and dtypes, in any nesting."""
    leaves, structure = pytree.tree_flatten(first)
    others, other_structure = pytree.tree_flatten(second)
    assert structure == other_structure
    for leaf, other in zip(leaves, others, strict=True):
        assert type(leaf) is type(other)
        if isinstance(leaf, torch.Tensor):
            torch.testing.assert_close(leaf, other, rtol=0, atol=0, equal_nan=True)
        else:
            assert leaf == other


def make(dtype: torch.dtype, **arguments: Any) -> tuple[torch.nn.Parameter, FusedAdam]:
    param = torch.nn.Parameter(torch.linspace(-1, 1, 7, dtype=dtype, device="cpu"))
    return param, FusedAdam([param], **arguments)


def steps(param: torch.nn.Parameter, optimizer: Any, count: int = 4) -> torch.Tensor:
    for number in range(count):
        param.grad = torch.linspace(-2, number, 7, dtype=param.dtype, device="cpu")
        optimizer.step()
    return param.detach().clone()


def plain(dtype: torch.dtype) -> Any:
    param, optimizer = make(dtype, lr=0.1, weight_decay=0.1, amsgrad=True)
    return steps(param, optimizer), [(str(value.dtype), value.clone()) for value in optimizer.state[param].values()]


def scheduled(dtype: torch.dtype) -> Any:
    param, optimizer = make(dtype, schedule=Cyclic(**CYCLE))
    optimizer.set_schedule_step(2)
    results = steps(param, optimizer), optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]
    optimizer.set_schedule(Cyclic(0.2, 0.3, 2, scale_fn=lambda x: 1 / (1 + x), total_steps=100))
    return results, steps(param, optimizer)


def clipped(dtype: torch.dtype) -> Any:
    param, optimizer = make(dtype, lr=0.1, max_grad_norm=0.5, write_back_grads=True)
    steps(param, optimizer)
    optimizer.max_grad_norm = 0.25
    return steps(param, optimizer), param.grad, str(optimizer.history()), str(optimizer.status()), optimizer.live


def scheduler(dtype: torch.dtype) -> Any:
    param, optimizer = make(dtype)
    driver = CyclicLR(optimizer, **CYCLE)
    lrs = []
    for _ in range(5):
        steps(param, optimizer, 1)
        driver.step()
        lrs.append(driver.get_last_lr())
    driver.step()
    return lrs, driver.state_dict(), param.detach()


def tensor_lr(dtype: torch.dtype) -> Any:
    lr = torch.tensor(0.25, dtype=torch.float32, device="cpu")
    param, optimizer = make(dtype, lr=lr)
    steps(param, optimizer)
    lr.fill_(0.5)
    return steps(param, optimizer)


def checkpoint(dtype: torch.dtype) -> Any:
    param, optimizer = make(dtype, schedule=Cyclic(**CYCLE))
    steps(param, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    other, loaded = make(dtype, schedule=Cyclic(**CYCLE))
    loaded.load_state_dict(saved)
    return saved, steps(other, loaded), loaded.state_dict()


def copied(dtype: torch.dtype) -> Any:
    param, optimizer = make(dtype, schedule=Cyclic(**CYCLE))
    steps(param, optimizer)
    results = []
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        results.append(steps(twin.param_groups[0]["params"][0], twin))
    return results


def recorded(dtype: torch.dtype) -> Any:
    param, optimizer = make(dtype, schedule=Cyclic(**CYCLE), max_grad_norm=1.0)
    steps(param, optimizer, 1)
    with record_launches() as graph:
        optimizer.step()
    for _ in range(3):
        graph.replay()
    optimizer.check_replay()
    return param.detach(), optimizer.state_dict(), str(optimizer.history())


def scaled(dtype: torch.dtype) -> Any:
    param, optimizer = make(dtype, lr=0.1)
    optimizer.grad_scale = torch.tensor(4.0, dtype=torch.float32, device="cpu")  # type: ignore[attr-defined]
    optimizer.found_inf = torch.tensor(0.0, dtype=torch.float32, device="cpu")  # type: ignore[attr-defined]
    return steps(param, optimizer)


def converted(dtype: torch.dtype) -> Any:
    param, optimizer = make(dtype)
    driver = CyclicLR(optimizer, **CYCLE)
    steps(param, optimizer, 1)
    driver.step()
    peer, peer_scheduler = fused_clr.unfuse(optimizer, driver)
    steps(param, peer, 1)
    peer_scheduler.step()
    ours, _ = fused_clr.fuse(peer, peer_scheduler)
    return steps(param, ours)


USES = {
    use.__name__: use
    for use in (plain, scheduled, clipped, scheduler, tensor_lr, checkpoint, copied, recorded, scaled, converted)
}


@by_rows("use dtype", in_turn(list(USES), [torch.float32, torch.bfloat16, torch.float64]))
def test_the_defaults_change_nothing(backend: str, use: str, dtype: torch.dtype) -> None:
    if use == "recorded" and backend == "cpu":
        pytest.skip("the cpu backend launches nothing")
    expected = USES[use](dtype)
    for name in DEFAULTS:
        with default(name):
            got = USES[use](dtype)
        assert_same(got, expected)


def factory_calls() -> Iterator[tuple[str, ast.Call]]:
    package = Path(fused_clr.__file__).parent
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in FACTORIES:
                yield f"{path.relative_to(package)}:{node.lineno}", node


def test_every_new_tensor_names_its_dtype_and_device() -> None:
    calls = list(factory_calls())
    assert len(calls) > 10
    for place, call in calls:
        missing = {"dtype", "device"} - {keyword.arg for keyword in call.keywords}
        assert not missing, f"{place} does not say its {' and '.join(sorted(missing))}"
