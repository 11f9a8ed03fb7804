"""Parameters that are DTensors (FSDP2's `fully_shard`, tensor parallelism): their shards in this process."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor


class NormShare(NamedTuple):
    """Gradients whose squares are summed over the same processes.

    Attributes:
        indices: Their indices.
        process_groups: Groups of processes that hold the other shards; empty if each process holds them whole.
    """

    indices: list[int]
    process_groups: list[Any]


def is_dtensor(tensor: object) -> bool:
    """Whether ``tensor`` is a DTensor."""
    # Importing the module takes long. If nothing has imported it, there are no DTensors.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of ``tensor`` in this process: a DTensor's shard, or any other tensor itself. Shares its memory."""
    if not is_dtensor(tensor):
        return tensor
    local = cast("Any", tensor)._local_tensor
    # A collective may not have finished yet.
    return cast("Tensor", local.wait() if hasattr(local, "trigger_wait") else local)


def local_gradient(param: Tensor, grad: Tensor) -> Tensor:
    """The part of ``grad`` that updates the shard of ``param`` in this process."""
    if not (is_dtensor(param) and is_dtensor(grad)):
        return grad
    layouts: Any = param, grad
    if layouts[0].placements != layouts[1].placements:
        grad = layouts[1].redistribute(placements=layouts[0].placements)
    return local_tensor(grad)


def sharded_like(value: Tensor, param: Tensor) -> Tensor:
    """Shards a tensor that every process has whole as ``param`` is sharded. Needs no communication."""
    if not is_dtensor(param) or is_dtensor(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    spec: Any = param
    return distribute_tensor(value.to(param.device), spec.device_mesh, spec.placements, src_data_rank=None)


def placement_of(tensor: Tensor) -> Any:
    """Mesh and placements of a DTensor; None for any other tensor."""
    spec: Any = tensor
    return (spec.device_mesh, spec.placements) if is_dtensor(tensor) else None


def norm_shares(params: Sequence[Tensor]) -> list[NormShare]:
    """Sorts parameters by the processes that hold their shards. The same in every process."""
    shares: dict[Any, NormShare] = {}
    for index, param in enumerate(params):
        key: Any = None
        groups: list[Any] = []
        if is_dtensor(param):
            spec: Any = param
            dimensions = tuple(i for i, placement in enumerate(spec.placements) if not placement.is_replicate())
            key = spec.device_mesh, dimensions
            groups = [spec.device_mesh.get_group(dimension) for dimension in dimensions]
        shares.setdefault(key, NormShare([], groups)).indices.append(index)
    return list(shares.values())


def sum_over(processes: Sequence[Any], value: Tensor) -> Tensor:
    """The sum of a 0-dim tensor over the processes of groups, in place."""
    for group in processes:
        torch.distributed.all_reduce(value, group=group)
    return value
