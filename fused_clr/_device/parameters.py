"""The parameters of one device: the tensors that steps write, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from .settings import TensorRecord
from .sharding import is_dtensor, local_gradient, local_tensor, norm_shares, sum_over
from .tensors import check_gradient, check_parameter, total_norm

read_grad = attrgetter("grad")


class ParametersMovedError(Exception):
    """A parameter has another device or became float64, or its shard another shape: new engines are needed."""


class Parameters:
    """The parameters of one device, in the order of ``optimizer.param_groups``.

    Attributes:
        tensors: What a step writes: of a sharded parameter, the shard in this process.
        is_sharded: Whether one is a DTensor.
        measured: Indices of the gradients whose norm the engine computes: those of the first `NormShare`.

    Args:
        device: Where they are.
        records: The parameters.
    """

    def __init__(self, device: torch.device, records: Sequence[TensorRecord]) -> None:
        self.device = device
        self.records = list(records)
        self.tensors = [local_tensor(record.param) for record in records]
        self.is_sharded = any(is_dtensor(record.param) for record in records)
        self._norm_shares = norm_shares([record.param for record in records])
        self.measured = self._norm_shares[0].indices if self._norm_shares else []

    def __len__(self) -> int:
        return len(self.records)

    def grads(self) -> list[Tensor | None]:
        """The gradients, one entry per parameter; of a sharded one, the shard in this process."""
        if not self.is_sharded:
            return list(map(read_grad, self.tensors))
        grads = [record.param.grad for record in self.records]
        return [g if g is None else local_gradient(r.param, g) for r, g in zip(self.records, grads, strict=True)]

    def shards_replaced(self) -> bool:
        """Reads the shards again, since FSDP2 may replace them between steps.

        Returns:
            Whether any was replaced.

        Raises:
            ParametersMovedError: One has another shape.
        """
        if not self.is_sharded:
            return False
        present = [local_tensor(record.param) for record in self.records]
        if all(now is then for now, then in zip(present, self.tensors, strict=True)):
            return False
        if any(now.shape != then.shape for now, then in zip(present, self.tensors, strict=True)):
            raise ParametersMovedError
        self.tensors = present
        return True

    def check(self, grads: Sequence[Tensor | None], writes_grads: bool) -> None:
        """Checks that the parameters can still be stepped, and that the gradients can update them.

        Args:
            grads: One entry per parameter; None where it has none.
            writes_grads: The step writes into the gradients.

        Raises:
            ParametersMovedError: A parameter is on another device.
            ValueError: One has a dtype or layout that is not supported; the message names it.
            RuntimeError: A gradient cannot update its parameter; the message names it.
        """
        if any(record.param.device != self.device for record in self.records):
            raise ParametersMovedError
        for record, param, grad in zip(self.records, self.tensors, grads, strict=True):
            if grad is not None:
                check_parameter(record.name, param)
                check_gradient(record.name, param, grad, writes_grads)

    def names(self, indices: Sequence[int]) -> str:
        """The names of these parameters, for messages."""
        return ", ".join(self.records[index].name for index in indices)

    def add_other_shares(self, measured_sum: Tensor, grad_scale: Tensor | None) -> Tensor:
        """The sum of squares over all gradients, and all processes that hold shards of them.

        Args:
            measured_sum: float64[]. The sum over the gradients ``measured`` in this process.
            grad_scale: Loss scale that gradients are divided by.

        Returns:
            float64[].
        """
        if not self._norm_shares:
            return measured_sum
        total = sum_over(self._norm_shares[0].process_groups, measured_sum)
        grads = self.grads() if len(self._norm_shares) > 1 else []
        for share in self._norm_shares[1:]:
            present = [grad for grad in (grads[index] for index in share.indices) if grad is not None]
            norm = total_norm(present).to(self.device, torch.float64)
            if grad_scale is not None:
                norm = norm / grad_scale.to(self.device)
            total = total + sum_over(share.process_groups, norm.square())
        return total
