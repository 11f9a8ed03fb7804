"""`CosineAnnealingWarmRestarts`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from torch.optim import Optimizer, lr_scheduler

from ..schedules import CosineRestarts, Schedule
from .base import Argument
from .base_lr import BaseLRScheduler


def position(arguments: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Torch's ``T_cur`` and ``T_i``: steps since the last restart, and from it to the next."""
    length, factor = arguments["T_0"], arguments["T_mult"]
    if factor == 1:
        return {"T_cur": step % length, "T_i": length}
    while step >= length:
        step, length = step - length, length * factor
    return {"T_cur": step, "T_i": length}


@final
class CosineAnnealingWarmRestarts(BaseLRScheduler):
    """A falling half wave of a cosine again and again; torch's arguments.

    SGDR of Loshchilov & Hutter 2017 (arXiv:1608.03983, eq. 5); see `fused_clr.schedules.CosineRestarts`:

        lr = eta_min + (initial_lr - eta_min) * (1 + cos(pi * T_cur / T_i)) / 2

    See `FusedScheduler` for what all schedulers have in common. It has no end. ``step(epoch)`` takes whole steps only;
    torch's takes fractions of an epoch: count ``T_0`` in optimizer steps instead. Torch's constructor sets ``T_cur``
    wrongly if ``last_epoch`` is more than one restart away.

    Args:
        optimizer: A `FusedAdam`, `FusedAdamW` or `FusedSGD`.
        T_0: Steps until the first restart, an integer >= 1.
        T_mult: Factor of the steps from one restart to the next, an integer >= 1.
        eta_min: Learning rate before each restart, >= 0.
        last_epoch: The last step when resuming, or -1.

    Raises:
        TypeError: ``optimizer`` is not a fused optimizer.
        ValueError: An argument is not allowed; the optimizer has not changed.
        KeyError: ``last_epoch`` is given and a group has no ``initial_lr``.

    Example:
        >>> import fused_clr, torch
        >>> optimizer = fused_clr.FusedAdam([torch.nn.Parameter(torch.ones(2))], lr=1.0)
        >>> scheduler = CosineAnnealingWarmRestarts(optimizer, T_0=2)
        >>> for _ in range(3):
        ...     optimizer.step(); scheduler.step(); print(scheduler.get_last_lr())
        [0.5]
        [1.0]
        [0.5]
    """

    TORCH = lr_scheduler.CosineAnnealingWarmRestarts
    CLOSED_FORM = True
    NEEDED_KEYS = frozenset(("base_lrs", "last_epoch", "T_0", "T_mult", "eta_min", "T_cur", "T_i"))
    POSITION = staticmethod(position)

    T_0: Argument[int] = Argument("Steps until the first restart.")
    T_mult: Argument[int] = Argument("Factor of the steps from one restart to the next.")
    eta_min: Argument[float] = Argument("Learning rate before each restart.")

    def __init__(
        self,
        optimizer: Optimizer,
        T_0: int,  # noqa: N803 - torch's name
        T_mult: int = 1,  # noqa: N803
        eta_min: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        self._start(optimizer, last_epoch, T_0=T_0, T_mult=T_mult, eta_min=eta_min)

    @property
    def T_cur(self) -> int:  # noqa: N802 - torch's name
        """Steps since the last restart."""
        value: int = position(self.arguments_of(self.schedules), self.last_epoch)["T_cur"]
        return value

    @property
    def T_i(self) -> int:  # noqa: N802
        """Steps from the last restart to the next."""
        value: int = position(self.arguments_of(self.schedules), self.last_epoch)["T_i"]
        return value

    @classmethod
    def build(cls, base_lr: float, *, T_0: Any, T_mult: Any, eta_min: Any) -> Schedule:  # type: ignore[override]  # noqa: N803
        """See `BaseLRScheduler.build`."""
        return CosineRestarts(base_lr, T_0, T_mult, eta_min)

    @classmethod
    def read(cls, schedule: Schedule | None) -> dict[str, Any] | None:
        """See `BaseLRScheduler.read`."""
        if not isinstance(schedule, CosineRestarts):
            return None
        waves = {"T_0": schedule.T_0, "T_mult": schedule.T_mult, "eta_min": schedule.eta_min}
        return {"base_lr": schedule.max_lr, **waves}
