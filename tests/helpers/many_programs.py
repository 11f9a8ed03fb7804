"""A small optimizer in many programs, and all the memory that its launches write."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_clr import FusedAdam, FusedAdamW
from fused_clr._device.triton import TritonEngine
from fused_clr.kernels import layout
from fused_clr.schedules import Cyclic


def make_optimizer(**options: Any) -> FusedAdam:
    """Two groups, four odd tensors, float32 and float64: two launches a step, the last with three evaluators."""
    generator = torch.Generator().manual_seed(5)
    shapes = ((BLOCK_SIZE - 1,), (5 * BLOCK_SIZE + 1,), (BLOCK_SIZE,), (2, 40))
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    params[2].data = params[2].data.double()
    groups = [{"params": params[:2]}, {"params": params[2:], "betas": (0.9, 0.99), "weight_decay": 0.1}]
    return FusedAdamW(groups, schedule=SCHEDULE, **options)


def set_gradients(optimizer: FusedAdam, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params_of(optimizer):
        param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)


def params_of(optimizer: FusedAdam) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def engine_of(optimizer: FusedAdam) -> TritonEngine:
    (engine,) = optimizer._ready()
    assert isinstance(engine, TritonEngine)
    return engine


def clock_of(optimizer: FusedAdam) -> dict[str, int]:
    words = engine_of(optimizer).state.memory.control.tolist()
    names = ("SCHEDULE_STEP", "SLOT", "DONE", "GENERATION", "OVERRUN", "STALE")
    return {name: words[getattr(layout, name).value] for name in names}


def device_memory(optimizer: FusedAdam, telemetry: bool = True) -> Iterator[Tensor]:
    """Everything a launch may write; without telemetry, what training depends on."""
    memory = engine_of(optimizer).state.memory
    yield from (memory.live, memory.scalars, memory.scalars_float64, memory.update_steps, memory.step_mirror)
    yield memory.control[: layout.APPLIED_STEPS.value]
    if telemetry:
        yield from (memory.words, memory.history)
    for param in params_of(optimizer):
        yield param.detach()
        yield from (value for value in optimizer.state.get(param, {}).values())


def copies(tensors: Iterator[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def same_bits(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(a.numpy().tobytes() == b.numpy().tobytes() for a, b in pairs)


BLOCK_SIZE = 64


SCHEDULE = Cyclic(1e-3, 1e-2, 3, 2.5, mode="triangular2")
