"""What only a GPU can show. Skipped without one; `bench/on_gpu.sh` runs it where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fused_clr import CyclicLR, FusedAdam
from fused_clr.schedules import Cyclic

pytestmark = pytest.mark.gpu

CYCLE: dict[str, Any] = {"base_lr": 1e-4, "max_lr": 1e-2, "step_size_up": 7, "step_size_down": 4, "mode": "triangular2"}
PERIOD = 11
SHAPES = ((3,), (2048,), (65, 33), (4097,), ())


def make_params(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator("cuda").manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, device="cuda", dtype=dtype)) for s in SHAPES]


def set_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    """New values at the same addresses."""
    generator = torch.Generator("cuda").manual_seed(step)
    for param in params:
        gradient = torch.randn(param.shape, generator=generator, device="cuda", dtype=param.dtype)
        if param.grad is None:
            param.grad = gradient
        else:
            param.grad.copy_(gradient)


def torch_pair(params: list[torch.nn.Parameter]) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.Adam(params, fused=True)
    return optimizer, torch.optim.lr_scheduler.CyclicLR(optimizer, **CYCLE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_eager_steps_equal_torch(dtype: torch.dtype) -> None:
    ours, theirs = make_params(dtype), make_params(dtype)
    optimizer = FusedAdam(ours)
    scheduler = CyclicLR(optimizer, **CYCLE)
    torch_optimizer, torch_scheduler = torch_pair(theirs)
    for step in range(3 * PERIOD):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        torch_optimizer.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(torch_optimizer.param_groups[0]["lr"], rel=1e-12)
        scheduler.step()
        torch_scheduler.step()
    # float64: both round in the last bits; else one rounding of the parameter's dtype per step, of steps of at most lr.
    rtol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("mode", ["global", "thread_local", "relaxed"])
def test_a_captured_step_follows_the_schedule(mode: str) -> None:
    ours, theirs = make_params(torch.float32), make_params(torch.float32)
    optimizer = FusedAdam(ours, schedule=Cyclic(**CYCLE))
    torch_optimizer, torch_scheduler = torch_pair(theirs)
    for params in (ours, theirs):
        set_gradients(params, 0)
    optimizer.step()
    torch_optimizer.step()
    torch_scheduler.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode=mode):
        optimizer.step()
    for step in range(1, 3 * PERIOD):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        graph.replay()
        torch_optimizer.step()
        torch_scheduler.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(torch_optimizer.param_groups[0]["lr"], rel=1e-12)
        assert optimizer.param_groups[0]["betas"][0] == pytest.approx(torch_optimizer.param_groups[0]["betas"][0])
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_steps_do_not_sync() -> None:
    params = make_params(torch.float32)
    optimizer = FusedAdam(params)
    scheduler = CyclicLR(optimizer, **CYCLE)
    set_gradients(params, 0)
    optimizer.step()
    scheduler.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            optimizer.zero_grad()
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.step()
            scheduler.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.schedule_step == 21


def test_many_replays_drift_nowhere() -> None:
    params = make_params(torch.float32)
    schedule = Cyclic(**CYCLE)
    optimizer = FusedAdam(params, schedule=schedule)
    set_gradients(params, 0)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    before = torch.cuda.memory_allocated()
    for _ in range(100_000):
        graph.replay()
    assert optimizer.schedule_step == 100_001
    assert optimizer.param_groups[0]["lr"] == pytest.approx(schedule.lr(100_001), rel=1e-14)
    assert optimizer.state[params[0]]["step"].item() == 100_001
    assert torch.cuda.memory_allocated() == before


def test_a_tensor_of_more_than_2_to_the_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    param = torch.nn.Parameter(torch.zeros(2**31 + 5000, dtype=torch.bfloat16, device="cuda"))
    param.grad = torch.ones_like(param)
    FusedAdam([param], lr=0.5).step()
    assert param.min().item() == param.max().item() == -0.5
