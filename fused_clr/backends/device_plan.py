"""A plan's tables on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..kernels import layout
from ..plan import LaunchPlan
from .capture import relaxed_capture
from .step_launches import StepLaunches

# Tensor tables kept for captures to come: graphs that can be captured with no eager step between.
SPARE_TABLES = 4


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
        self.param_layouts = layouts(params)
        self.rows = rows
        self.buffers = buffers
        self.device = device
        self.addresses: list[int] | None = None
        self.launches: StepLaunches | None = None
        self.chunk_table = upload(plan.chunk_table, device)
        self.tensor_table = self.new_tensor_table()
        # For captures to come, during which nothing may be allocated.
        self.spare_tables: list[Tensor] = []
        self._spares_free: torch.cuda.Event | None = None

    def new_tensor_table(self) -> Tensor:
        """int64[num_tensors, TENSOR_COLUMNS] on the device, not yet filled."""
        return torch.empty(self.rows.shape, dtype=torch.int64, device=self.device)

    def stock_spare_tables(self) -> None:
        """Allocates what the next captures need."""
        while len(self.spare_tables) < SPARE_TABLES:
            self.spare_tables.append(self.new_tensor_table())
        # Whoever had this memory before may still be at work on this stream.
        self._spares_free = torch.cuda.Event()
        self._spares_free.record(torch.cuda.current_stream(self.device))

    def fill_captured_table(self, table: Tensor) -> None:
        """Copies the rows into a spare table while this thread captures; done when it returns.

        On a stream that is not captured: a copy node would read the host's memory again at every replay.
        """
        assert self._spares_free is not None
        with relaxed_capture(self.device):
            stream = torch.cuda.Stream(self.device)
            with torch.cuda.stream(stream):
                stream.wait_event(self._spares_free)
                table.copy_(torch.from_numpy(self.rows.copy()))
            stream.synchronize()

    def set_addresses(self, addresses: list[int]) -> None:
        """Writes the addresses of parameters, then gradients, into the rows; uploads nothing."""
        count = len(self.params)
        active = np.array(self.plan.active, np.intp)
        self.rows[active, layout.PARAM.value] = addresses[:count]
        self.rows[active, layout.GRAD.value] = addresses[count:]


def layouts(tensors: Sequence[Tensor]) -> list[Any]:
    """What an address says nothing about."""
    return [(tensor.dtype, tensor.stride()) for tensor in tensors]


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
