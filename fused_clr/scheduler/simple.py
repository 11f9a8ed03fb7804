"""`ConstantLR`, `LinearLR`, `ExponentialLR`, `PolynomialLR` and `CosineAnnealingLR`."""

from __future__ import annotations

from typing import Any, final

from torch.optim import Optimizer, lr_scheduler

from ..schedules import Constant, Cosine, ExponentialDecay, Linear, Polynomial, Schedule, sequence
from ..schedules.base import ScaledSchedule
from ..schedules.fields import checked_lr, checked_number
from ..schedules.sequence import ScheduleSequence
from .base import Argument
from .base_lr import BaseLRScheduler, check_count

# Torch's LRScheduler, too, has these in every state_dict.
FRAME = frozenset(("base_lrs", "last_epoch"))


@final
class ConstantLR(BaseLRScheduler):
    """A smaller learning rate for the first steps; `torch.optim.lr_scheduler.ConstantLR`'s arguments.

        lr = initial_lr * factor    before step total_iters
        lr = initial_lr             from it on

    See `FusedScheduler` for what all schedulers have in common. Torch's divides by ``factor`` at step ``total_iters``,
    which rounds, and raises an error for 0.

    Args:
        optimizer: A `FusedAdam`, `FusedAdamW` or `FusedSGD`.
        factor: In [0, 1].
        total_iters: Steps with the smaller learning rate, an integer >= 1.
        last_epoch: The last step when resuming, or -1.

    Raises:
        TypeError: ``optimizer`` is not a fused optimizer.
        ValueError: An argument is not allowed; the optimizer has not changed.
        KeyError: ``last_epoch`` is given and a group has no ``initial_lr``.

    Example:
        >>> import fused_clr, torch
        >>> optimizer = fused_clr.FusedAdam([torch.nn.Parameter(torch.ones(2))], lr=0.5)
        >>> scheduler = ConstantLR(optimizer, factor=0.5, total_iters=1)
        >>> scheduler.get_last_lr()
        [0.25]
        >>> optimizer.step(); scheduler.step(); scheduler.get_last_lr()
        [0.5]
    """

    TORCH = lr_scheduler.ConstantLR
    CLOSED_FORM = False
    NEEDED_KEYS = FRAME | {"factor", "total_iters"}

    factor: Argument[float] = Argument("What the first learning rates are multiplied by.")
    total_iters: Argument[int] = Argument("Steps with the smaller learning rate.")

    def __init__(
        self, optimizer: Optimizer, factor: float = 1.0 / 3, total_iters: int = 5, last_epoch: int = -1
    ) -> None:
        self._start(optimizer, last_epoch, factor=factor, total_iters=total_iters)

    @classmethod
    def build(cls, base_lr: float, *, factor: Any, total_iters: Any) -> Schedule:  # type: ignore[override]
        """See `BaseLRScheduler.build`."""
        first = Constant(_share("factor", factor))
        milestones = [check_count("total_iters", total_iters)]
        return sequence(first, Constant(1.0), milestones=milestones).scaled(base_lr)

    @classmethod
    def read(cls, schedule: Schedule | None) -> dict[str, Any] | None:
        """See `BaseLRScheduler.read`."""
        own = schedule.schedule if isinstance(schedule, ScaledSchedule) else None
        if not isinstance(schedule, ScaledSchedule) or not isinstance(own, ScheduleSequence):
            return None
        first, last = own.schedules[0], own.schedules[-1]
        if len(own.schedules) != 2 or not isinstance(first, Constant) or last != Constant(1.0):
            return None
        return {"base_lr": schedule.factor, "factor": first.value, "total_iters": own.milestones[0]}


@final
class LinearLR(BaseLRScheduler):
    """A straight line between two shares of the learning rate; `torch.optim.lr_scheduler.LinearLR`'s arguments.

        lr = initial_lr * (start_factor + (end_factor - start_factor) * min(step / total_iters, 1))

    See `FusedScheduler` for what all schedulers have in common. Torch's multiplies the learning rate of the step
    before, which drifts.

    Args:
        optimizer: A `FusedAdam`, `FusedAdamW` or `FusedSGD`.
        start_factor: In (0, 1].
        end_factor: In [0, 1].
        total_iters: Steps of the line, an integer >= 1.
        last_epoch: The last step when resuming, or -1.

    Raises:
        TypeError: ``optimizer`` is not a fused optimizer.
        ValueError: An argument is not allowed; the optimizer has not changed.
        KeyError: ``last_epoch`` is given and a group has no ``initial_lr``.

    Example:
        >>> import fused_clr, torch
        >>> optimizer = fused_clr.FusedAdam([torch.nn.Parameter(torch.ones(2))], lr=1.0)
        >>> scheduler = LinearLR(optimizer, start_factor=0.5, total_iters=2)
        >>> optimizer.step(); scheduler.step(); scheduler.get_last_lr()
        [0.75]
    """

    TORCH = lr_scheduler.LinearLR
    CLOSED_FORM = False
    NEEDED_KEYS = FRAME | {"start_factor", "end_factor", "total_iters"}

    start_factor: Argument[float] = Argument("Share of the learning rate at step 0.")
    end_factor: Argument[float] = Argument("Share of the learning rate from step ``total_iters`` on.")
    total_iters: Argument[int] = Argument("Steps of the line.")

    def __init__(
        self,
        optimizer: Optimizer,
        start_factor: float = 1.0 / 3,
        end_factor: float = 1.0,
        total_iters: int = 5,
        last_epoch: int = -1,
    ) -> None:
        self._start(optimizer, last_epoch, start_factor=start_factor, end_factor=end_factor, total_iters=total_iters)

    @classmethod
    def build(  # type: ignore[override]
        cls, base_lr: float, *, start_factor: Any, end_factor: Any, total_iters: Any
    ) -> Schedule:
        """See `BaseLRScheduler.build`."""
        start = checked_number("start_factor", start_factor, "a number in (0, 1]", lambda x: 0 < x <= 1)
        end = _share("end_factor", end_factor)
        return Linear(start, end, check_count("total_iters", total_iters)).scaled(base_lr)

    @classmethod
    def read(cls, schedule: Schedule | None) -> dict[str, Any] | None:
        """See `BaseLRScheduler.read`."""
        own = schedule.schedule if isinstance(schedule, ScaledSchedule) else None
        # A line that the user made may have other factors and lengths.
        if not isinstance(schedule, ScaledSchedule) or not isinstance(own, Linear) or not isinstance(own.steps, int):
            return None
        if not (0 < own.start_lr <= 1 and own.end_lr <= 1):
            return None
        factors = {"start_factor": own.start_lr, "end_factor": own.end_lr, "total_iters": own.steps}
        return {"base_lr": schedule.factor, **factors}


@final
class ExponentialLR(BaseLRScheduler):
    """The same factor at every step; `torch.optim.lr_scheduler.ExponentialLR`'s arguments.

        lr = initial_lr * gamma**step

    See `FusedScheduler` for what all schedulers have in common. It has no end. Torch's multiplies the learning rate of
    the step before, which drifts.

    Args:
        optimizer: A `FusedAdam`, `FusedAdamW` or `FusedSGD`.
        gamma: The factor, >= 0.
        last_epoch: The last step when resuming, or -1.

    Raises:
        TypeError: ``optimizer`` is not a fused optimizer.
        ValueError: An argument is not allowed; the optimizer has not changed.
        KeyError: ``last_epoch`` is given and a group has no ``initial_lr``.

    Example:
        >>> import fused_clr, torch
        >>> optimizer = fused_clr.FusedAdam([torch.nn.Parameter(torch.ones(2))], lr=1.0)
        >>> scheduler = ExponentialLR(optimizer, gamma=0.5)
        >>> optimizer.step(); scheduler.step(); scheduler.get_last_lr()
        [0.5]
    """

    TORCH = lr_scheduler.ExponentialLR
    CLOSED_FORM = False
    NEEDED_KEYS = FRAME | {"gamma"}

    gamma: Argument[float] = Argument("The factor.")

    def __init__(self, optimizer: Optimizer, gamma: float, last_epoch: int = -1) -> None:
        self._start(optimizer, last_epoch, gamma=gamma)

    @classmethod
    def build(cls, base_lr: float, *, gamma: Any) -> Schedule:  # type: ignore[override]
        """See `BaseLRScheduler.build`."""
        return ExponentialDecay(base_lr, gamma)

    @classmethod
    def read(cls, schedule: Schedule | None) -> dict[str, Any] | None:
        """See `BaseLRScheduler.read`."""
        if not isinstance(schedule, ExponentialDecay):
            return None
        return {"base_lr": schedule.start_lr, "gamma": schedule.gamma}


@final
class PolynomialLR(BaseLRScheduler):
    """A power of the steps that remain; `torch.optim.lr_scheduler.PolynomialLR`'s arguments.

        lr = initial_lr * (1 - min(step / total_iters, 1))**power

    See `FusedScheduler` for what all schedulers have in common. Torch's multiplies the learning rate of the step
    before, which drifts.

    Args:
        optimizer: A `FusedAdam`, `FusedAdamW` or `FusedSGD`.
        total_iters: Steps until 0, an integer >= 1.
        power: The exponent, > 0.
        last_epoch: The last step when resuming, or -1.

    Raises:
        TypeError: ``optimizer`` is not a fused optimizer.
        ValueError: An argument is not allowed; the optimizer has not changed.
        KeyError: ``last_epoch`` is given and a group has no ``initial_lr``.

    Example:
        >>> import fused_clr, torch
        >>> optimizer = fused_clr.FusedAdam([torch.nn.Parameter(torch.ones(2))], lr=1.0)
        >>> scheduler = PolynomialLR(optimizer, total_iters=2, power=2.0)
        >>> optimizer.step(); scheduler.step(); scheduler.get_last_lr()
        [0.25]
    """

    TORCH = lr_scheduler.PolynomialLR
    CLOSED_FORM = False
    NEEDED_KEYS = FRAME | {"total_iters", "power"}

    total_iters: Argument[int] = Argument("Steps until 0.")
    power: Argument[float] = Argument("The exponent.")

    def __init__(self, optimizer: Optimizer, total_iters: int = 5, power: float = 1.0, last_epoch: int = -1) -> None:
        self._start(optimizer, last_epoch, total_iters=total_iters, power=power)

    @classmethod
    def build(cls, base_lr: float, *, total_iters: Any, power: Any) -> Schedule:  # type: ignore[override]
        """See `BaseLRScheduler.build`."""
        return Polynomial(base_lr, 0.0, check_count("total_iters", total_iters), power)

    @classmethod
    def read(cls, schedule: Schedule | None) -> dict[str, Any] | None:
        """See `BaseLRScheduler.read`."""
        if not isinstance(schedule, Polynomial) or schedule.end_lr != 0 or not isinstance(schedule.steps, int):
            return None
        return {"base_lr": schedule.start_lr, "total_iters": schedule.steps, "power": schedule.power}


@final
class CosineAnnealingLR(BaseLRScheduler):
    """Half a wave of a cosine; `torch.optim.lr_scheduler.CosineAnnealingLR`'s arguments.

    Loshchilov & Hutter 2017, "SGDR" (arXiv:1608.03983, eq. 5), without restarts:

        lr = eta_min + (initial_lr - eta_min) * (1 + cos(pi * step / T_max)) / 2

    See `FusedScheduler` for what all schedulers have in common. Past step ``T_max`` it holds ``eta_min``, also in
    replays; torch's rises again. Torch's scales the learning rate of the step before, which drifts.

    Args:
        optimizer: A `FusedAdam`, `FusedAdamW` or `FusedSGD`.
        T_max: Steps until ``eta_min``, > 0. Need not be an integer.
        eta_min: The last learning rate, >= 0.
        last_epoch: The last step when resuming, or -1.

    Raises:
        TypeError: ``optimizer`` is not a fused optimizer.
        ValueError: An argument is not allowed; the optimizer has not changed.
        KeyError: ``last_epoch`` is given and a group has no ``initial_lr``.

    Example:
        >>> import fused_clr, torch
        >>> optimizer = fused_clr.FusedAdam([torch.nn.Parameter(torch.ones(2))], lr=1.0)
        >>> scheduler = CosineAnnealingLR(optimizer, T_max=2)
        >>> optimizer.step(); scheduler.step(); scheduler.get_last_lr()
        [0.5]
    """

    TORCH = lr_scheduler.CosineAnnealingLR
    CLOSED_FORM = False
    NEEDED_KEYS = FRAME | {"T_max", "eta_min"}

    T_max: Argument[float] = Argument("Steps until ``eta_min``.")
    eta_min: Argument[float] = Argument("The last learning rate.")

    def __init__(self, optimizer: Optimizer, T_max: float, eta_min: float = 0.0, last_epoch: int = -1) -> None:  # noqa: N803 - torch's name
        self._start(optimizer, last_epoch, T_max=T_max, eta_min=eta_min)

    @classmethod
    def build(cls, base_lr: float, *, T_max: Any, eta_min: Any) -> Schedule:  # type: ignore[override]  # noqa: N803
        """See `BaseLRScheduler.build`."""
        steps = checked_number("T_max", T_max, "a finite number of steps > 0", lambda x: x > 0)
        return Cosine(base_lr, checked_lr("eta_min", eta_min), steps)

    @classmethod
    def read(cls, schedule: Schedule | None) -> dict[str, Any] | None:
        """See `BaseLRScheduler.read`."""
        if not isinstance(schedule, Cosine):
            return None
        return {"base_lr": schedule.start_lr, "T_max": schedule.steps, "eta_min": schedule.end_lr}


def _share(name: str, value: Any) -> float:
    return checked_number(name, value, "a number in [0, 1]", lambda x: 0 <= x <= 1)
