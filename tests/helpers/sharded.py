"""A small model sharded over two processes, and the same training by torch's pair in one."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import lr_scheduler

from fused_clr import CyclicLR
from tests.cases import ADAM, OptimizerCase
from tests.helpers.tolerances import AFTER_STEPS

CYCLE: dict[str, Any] = {"base_lr": 1e-3, "max_lr": 2e-2, "step_size_up": 4, "mode": "triangular2"}


STEPS = 10


class Model(torch.nn.Module):
    """Shards over two processes are uneven (7 rows), and one is empty (a single row)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(5, 7)
        self.last = torch.nn.Linear(7, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(inputs)))


def make_model() -> Model:
    torch.manual_seed(0)
    return Model()


def batches(steps: int, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 5, generator=generator) for _ in range(steps)]


def loss_of(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return (model(batch) - 3 * batch.sum(1, keepdim=True)).square().mean()


def own_half(batch: torch.Tensor) -> torch.Tensor:
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def torch_run(
    steps: int = STEPS, max_norm: float | None = None, optimizer_case: OptimizerCase = ADAM
) -> dict[str, torch.Tensor]:
    """Parameters and state after a training by torch's pair in one process."""
    model = make_model()
    optimizer = optimizer_case.torch_peer(model.parameters(), weight_decay=0.01)
    scheduler = lr_scheduler.CyclicLR(optimizer, **CYCLE)
    for batch in batches(steps):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        scheduler.step()
    return results_of(model, optimizer)


def results_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    results = {"lr": torch.tensor([float(group["lr"]) for group in optimizer.param_groups], dtype=torch.float64)}
    for name, param in model.named_parameters():
        results[name] = whole(param).clone()
        for key, value in optimizer.state[param].items():
            results[f"{name}.{key}"] = whole(value).clone()
    return results


def assert_same(results: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    tolerance = AFTER_STEPS[torch.float32]
    assert set(results) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(results[name], value, rtol=tolerance.rtol, atol=tolerance.atol, msg=name)


def sharded(
    max_grad_norm: float | None = None,
    mesh_shape: tuple[int, ...] = (2,),
    optimizer_case: OptimizerCase = ADAM,
    **arguments: Any,
) -> tuple[torch.nn.Module, Any, CyclicLR]:
    model = make_model()
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard")[-len(mesh_shape) :])
    for layer in (model.first, model.last):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = optimizer_case.ours(model.parameters(), weight_decay=0.01, max_grad_norm=max_grad_norm, **arguments)
    return model, optimizer, CyclicLR(optimizer, **CYCLE)


def train(model: torch.nn.Module, optimizer: Any, scheduler: Any, steps: int, skip: int = 0) -> None:
    for batch in batches(skip + steps)[skip:]:
        optimizer.zero_grad()
        loss_of(model, own_half(batch)).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
