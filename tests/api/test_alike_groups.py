"""On the cpu backend, groups that have the same values share a call of torch's kernel, until one is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from fused_clr import FusedAdam
from fused_clr.schedules import Cyclic

GROUPS = 3
TENSOR_LR = torch.tensor(0.02)
# Group, what is written to it, and the calls of torch's kernel that a step then takes.
WRITES: list[tuple[int, dict[str, Any], int]] = [
    (0, {}, 1),
    (1, {"lr": 0.3}, 2),
    (2, {"lr": 0.3}, 2),
    (0, {"lr": 0.3}, 1),
    (0, {"weight_decay": 0.5}, 2),
    (1, {"eps": 1e-3}, 3),
    (2, {"weight_decay": 0.5}, 2),
    (1, {"weight_decay": 0.5, "eps": 1e-8}, 1),
    (1, {"betas": (0.8, 0.999)}, 2),
    (1, {"betas": (0.9, 0.99)}, 2),
    (1, {"betas": (0.9, 0.999)}, 1),
    (2, {"maximize": True}, 2),
    (2, {"maximize": False}, 1),
    (0, {"lr": TENSOR_LR}, 2),
    (1, {"lr": TENSOR_LR}, 2),
    (2, {"lr": TENSOR_LR}, 1),
    (2, {"lr": TENSOR_LR.clone()}, 2),
]


@pytest.fixture
def calls_of_a_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[FusedAdam], int]:
    monkeypatch.setenv("FUSED_CLR_BACKEND", "cpu")
    kernel = mock.Mock(wraps=torch._fused_adam_)
    monkeypatch.setattr(torch, "_fused_adam_", kernel)

    def step(optimizer: FusedAdam) -> int:
        kernel.reset_mock()
        optimizer.step()
        return kernel.call_count

    return step


def test_writes_part_groups_and_join_them_again(calls_of_a_step: Callable[[FusedAdam], int]) -> None:
    torch.manual_seed(0)
    values = [torch.randn(size) for size in (4, 70, 3)]
    params = [[torch.nn.Parameter(value.clone()) for value in values] for _ in range(2)]
    ours, theirs = (
        make([{"params": [param]} for param in own], lr=0.1)
        for make, own in zip((FusedAdam, torch.optim.Adam), params, strict=True)
    )
    for index, write, calls in WRITES:
        for optimizer in (ours, theirs):
            for key, value in write.items():
                optimizer.param_groups[index][key] = value
        for mine, torchs in zip(*params, strict=True):
            mine.grad = torch.randn(mine.shape)
            torchs.grad = mine.grad.clone()
        theirs.step()
        assert calls_of_a_step(ours) == calls, (index, write)
        for mine, torchs in zip(*params, strict=True):
            torch.testing.assert_close(mine, torchs, rtol=1e-5, atol=1e-6)


def test_a_tensor_lr_that_is_written_in_place_reaches_the_groups_that_share_it(
    calls_of_a_step: Callable[[FusedAdam], int],
) -> None:
    lr = torch.tensor(0.0)
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = FusedAdam([{"params": [param], "lr": lr} for param in params])
    for value in (0.0, 0.25, 0.0):
        lr.fill_(value)
        for param in params:
            param.grad = torch.ones(3)
        before = params[0].detach().clone()
        assert calls_of_a_step(optimizer) == 1
        assert torch.equal(params[0], params[1])
        assert (params[0] != before).all() == (value != 0)


def test_groups_are_alike_if_their_schedules_have_equal_values(calls_of_a_step: Callable[[FusedAdam], int]) -> None:
    def schedule(max_lr: float) -> Cyclic:
        return Cyclic(base_lr=0.01, max_lr=max_lr, step_size_up=3)

    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(GROUPS)]
    optimizer = FusedAdam([{"params": [param], "schedule": schedule(0.1)} for param in params], lr=0.1)

    def step() -> int:
        for param in params:
            param.grad = torch.ones(3)
        return calls_of_a_step(optimizer)

    assert step() == 1
    optimizer.param_groups[1]["schedule"] = schedule(0.3)
    for _ in range(4):
        assert step() == 2
    assert torch.equal(params[0], params[2])
    assert not torch.equal(params[0], params[1])
    lrs = [group["lr"] for group in optimizer.param_groups]
    assert lrs[0] == lrs[2] != lrs[1]
    assert optimizer.live.lr.tolist() == lrs
    assert optimizer.history(1).lr.shape == (1, GROUPS)
