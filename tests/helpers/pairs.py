"""torch's pair and ours, made from the same seed and driven by the same gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from fused_clr import testing
from tests.cases import ADAM, TRIANGULAR2, OptimizerCase, ScheduleCase, momenta_of

SHAPES = ((3,), (63,), (5, 5), ())
# The indices of the parameters of those shapes.
ALL = (0, 1, 2, 3)


class Pair(NamedTuple):
    params: list[torch.nn.Parameter]
    optimizer: Any
    scheduler: Any


def make_pair(
    ours: bool,
    seed: int = 0,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    optimizer_case: OptimizerCase = ADAM,
    schedule_case: ScheduleCase = TRIANGULAR2,
    cyclic: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Pair:
    """Two groups with bounds of their own; by default a short asymmetric cycle, triangular2, beta1 cycling.

    ``cyclic`` changes arguments of the scheduler; ``options`` are the optimizer's.
    """
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.1}]
    optimizer = (optimizer_case.ours if ours else optimizer_case.torch_peer)(groups, **options)
    arguments = schedule_case.arguments | (cyclic or {})
    scheduler = (schedule_case.ours if ours else schedule_case.torch_peer)(optimizer, **arguments)
    return Pair(params, optimizer, scheduler)


def make_both(**arguments: Any) -> tuple[Pair, Pair]:
    """Ours and torch's, alike."""
    return make_pair(True, **arguments), make_pair(False, **arguments)


def gradients(params: Sequence[torch.Tensor], seed: int, size: float = 1.0) -> list[torch.Tensor]:
    """Normal values of the parameters' shapes and dtypes, drawn in float32."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(param.shape, generator=generator) * size).to(param.dtype) for param in params]


def set_gradients(params: Sequence[torch.Tensor], seed: int, size: float = 1.0) -> None:
    """New gradients, at new addresses."""
    for param, gradient in zip(params, gradients(params, seed, size), strict=True):
        param.grad = gradient


def rewrite_gradients(pair: Pair, seed: int, active: tuple[int, ...] = ALL) -> None:
    """New values at the same addresses, and none for the parameters that are not ``active``."""
    for index, (param, gradient) in enumerate(zip(pair.params, gradients(pair.params, seed), strict=True)):
        # What is to be left alone says so: a capture refuses a parameter that wants a gradient and has none.
        param.requires_grad_(index in active)
        if index not in active:
            param.grad = None
        elif param.grad is None:
            param.grad = gradient
        else:
            param.grad.copy_(gradient)


def step(pair: Pair) -> None:
    pair.optimizer.step()
    pair.scheduler.step()


def record_step(pair: Pair) -> testing.RecordedGraph:
    """Records one step of the optimizer."""
    with testing.record_launches() as graph:
        pair.optimizer.step()
    pair.scheduler.step()
    return graph


def train(pair: Pair, steps: int, seed: int = 1) -> list[tuple[list[float], list[float]]]:
    """Takes steps; returns each step's learning rates and momenta as the param groups tell them."""
    return list(iterate(pair, steps, seed))


def iterate(pair: Pair, steps: int, seed: int = 1) -> Iterator[tuple[list[float], list[float]]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in pair.params:
            param.grad = torch.randn(param.shape, generator=generator)
        pair.optimizer.step()
        groups = pair.optimizer.param_groups
        # A tensor lr is written in place by the next step.
        yield [float(group["lr"]) for group in groups], [momenta_of(group)[0] for group in groups]
        pair.scheduler.step()


def copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def all_equal(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def assert_same_params(first: Pair, second: Pair, rtol: float, atol: float) -> None:
    for a, b in zip(first.params, second.params, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
