"""A plan's tables on the device, and how its kernels are compiled and launched."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from ..kernels.adam import GRAD, PARAM
from ..plan import LaunchPlan
from .launch import Launch

TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


class LaunchConfig(NamedTuple):
    """How kernels are compiled and how large their grid is.

    Attributes:
        block_size: Elements of a chunk; half of it for float64 parameters.
        num_warps: Warps of a program.
        lanes: Lanes of an evaluator; no more than a program's threads, or it would do its float64 work twice.
        programs_per_multiprocessor: Updaters each multiprocessor gets; each loops over its chunks, since a program per
            chunk would retire a million times at one address.
    """

    block_size: int = 2048
    num_warps: int = 8
    lanes: int = 256
    programs_per_multiprocessor: int = 8

    @property
    def options(self) -> dict[str, Any]:
        """Compile options. Contraction to FMA is stated, since Triton's default changes between versions."""
        return {"num_warps": self.num_warps, "enable_fp_fusion": True}


DEFAULT_CONFIG = LaunchConfig()


class DeviceTables(NamedTuple):
    """A plan's tables on the device: int64[num_tensors, TENSOR_COLUMNS] and int64[num_chunks]."""

    tensor_table: Tensor
    chunk_table: Tensor


class DevicePlan:
    """A `LaunchPlan` with its device tables, the addresses last uploaded to them, and its launches.

    Args:
        plan: The host tables.
        params: The parameters it updates, in the order of ``plan.active``.
        rows: int64[num_tensors, TENSOR_COLUMNS], the tensor table but for the addresses of parameters and gradients.
        buffers: By tensor index: where a gradient whose layout is not its parameter's is copied first.
        device: Where the tables go.
    """

    def __init__(
        self,
        plan: LaunchPlan,
        params: list[Tensor],
        rows: NDArray[np.int64],
        buffers: dict[int, Tensor],
        device: torch.device,
    ) -> None:
        self.plan = plan
        self.params = params
        self.rows = rows
        self.buffers = buffers
        self.device = device
        self.addresses: list[int] | None = None
        # What a launch needs besides addresses: the kernel with its arguments, and what it was compiled to.
        self.launches: list[tuple[Launch, Any]] = []
        self.tables = self.new_tables()
        # For the next capture, during which nothing may be allocated.
        self.spare_tables: DeviceTables | None = None

    def new_tables(self) -> DeviceTables:
        """Device tables of the plan: the chunk table filled, the tensor table not yet."""
        tensor_table = torch.empty(self.rows.shape, dtype=torch.int64, device=self.device)
        return DeviceTables(tensor_table, upload(self.plan.chunk_table, self.device))

    def set_addresses(self, addresses: list[int]) -> None:
        """Writes the addresses of parameters, then gradients, into the rows; uploads nothing."""
        count = len(self.params)
        active = np.array(self.plan.active, np.intp)
        self.rows[active, PARAM.value] = addresses[:count]
        self.rows[active, GRAD.value] = addresses[count:]


def upload(array: NDArray[Any], device: torch.device, out: Tensor | None = None) -> Tensor:
    """Copies a host array to a device without waiting for it.

    Args:
        array: The array; it may be rewritten at once.
        device: Where to.
        out: A tensor of its shape and dtype to fill; a new one if None.

    Returns:
        The device tensor.
    """
    host = torch.from_numpy(array.copy())
    if device.type == "cuda":
        # Torch's pinned allocator gives a block out again only when the copies from it are done.
        host = host.pin_memory()
    if out is None:
        return host.to(device, non_blocking=True)
    return out.copy_(host, non_blocking=True)
