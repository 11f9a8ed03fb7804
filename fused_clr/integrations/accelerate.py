"""accelerate: `report_skips`, which makes ``accelerator.optimizer_step_was_skipped`` right."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor

from .._host.optimizer import FusedOptimizer


# accelerate has no types.
class ReportingOptimizer(AcceleratedOptimizer):  # type: ignore[misc]
    """accelerate's wrapper of a fused optimizer, which asks the optimizer whether the last step was skipped."""

    _skipped_before: Tensor | None = None

    def step(self, closure: Any = None) -> None:
        """Takes a step, unless gradients are being accumulated."""
        if self._may_skip and self.gradient_state.sync_gradients:
            # On the device, without waiting.
            self._skipped_before = self.optimizer.live.skipped_steps.clone()
        super().step(closure)

    @property
    def _may_skip(self) -> bool:
        return self.scaler is not None or bool(self.optimizer._engines.options.skip_if_nonfinite)

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last step was skipped. Waits for the device, unless no step can be."""
        if not self._may_skip or self._skipped_before is None:
            return False
        return bool(self.optimizer.live.skipped_steps != self._skipped_before)


def report_skips(accelerator: Accelerator) -> None:
    """Makes ``accelerator.optimizer_step_was_skipped`` right for the fused optimizers that were prepared.

    With a fused optimizer, torch's or ours, GradScaler calls the optimizer's step also on an overflow, and the kernel
    skips the update. accelerate then says that nothing was skipped, and steps the scheduler. Our schedule does not
    advance, unless several processes have batches of their own: accelerate then steps the scheduler once for each
    process. Call this there, and where your code reads ``optimizer_step_was_skipped``.

    A read waits for the device once where a GradScaler or ``skip_if_nonfinite`` may skip steps; otherwise it does not.

    Args:
        accelerator: After its ``prepare()``.

    Raises:
        RuntimeError: No fused optimizer was prepared.

    Example:
        >>> model, optimizer, loader = accelerator.prepare(model, optimizer, loader)  # doctest: +SKIP
        >>> report_skips(accelerator)  # doctest: +SKIP
    """
    found = [wrapper for wrapper in accelerator._optimizers if isinstance(wrapper.optimizer, FusedOptimizer)]
    if not found:
        raise RuntimeError("report_skips() found no fused optimizer: call it after accelerator.prepare(optimizer)")
    for wrapper in found:
        wrapper.__class__ = ReportingOptimizer
