"""Schedules of one segment: `Constant`, `Linear`, `Exponential`, `Polynomial`, `Cosine`."""

from __future__ import annotations

import dataclasses
import math

from .base import Schedule
from .compiled import MAX_LOG_RATIOS
from .fields import checked_lr, set_lrs, set_positive, set_steps
from .parts import Part, Segment, Shape


@dataclasses.dataclass(frozen=True, init=False)
class Constant(Schedule):
    """The same learning rate at every step, as `torch.optim.lr_scheduler.ConstantLR` after its ``total_iters``.

    Args:
        lr: The learning rate, >= 0.

    Raises:
        ValueError: ``lr`` is not allowed.

    Attributes:
        value: The learning rate. `Schedule.lr` is a function of the step.

    Example:
        >>> Constant(0.1).lr(0), Constant(0.1).lr(10**6)
        (0.1, 0.1)
    """

    value: float = dataclasses.field(init=False)

    def __init__(self, lr: float) -> None:
        object.__setattr__(self, "value", checked_lr("lr", lr))

    def parts(self) -> tuple[Part, ...]:
        """See `Schedule.parts`."""
        return _one_segment(1, Shape.CONSTANT, self.value, self.value)


@dataclasses.dataclass(frozen=True)
class Linear(Schedule):
    """A straight line, as `torch.optim.lr_scheduler.LinearLR`.

        lr = start_lr + (end_lr - start_lr) * step / steps

    Past its end it holds ``end_lr``, also in replays.

    Args:
        start_lr: Learning rate at step 0, >= 0.
        end_lr: Learning rate at step ``steps``, >= 0. It may be the larger one.
        steps: Number of steps, > 0. Need not be an integer.

    Raises:
        ValueError: An argument is not allowed; the message names it.

    Example:
        >>> schedule = Linear(0.0, 0.5, steps=4)
        >>> schedule.lr(0), schedule.lr(1), schedule.lr(4), schedule.lr(100)
        (0.0, 0.125, 0.5, 0.5)
    """

    start_lr: float
    end_lr: float
    steps: float

    def __post_init__(self) -> None:
        set_lrs(self, "start_lr", "end_lr")
        set_steps(self, "steps")

    def parts(self) -> tuple[Part, ...]:
        """See `Schedule.parts`."""
        return _one_segment(self.steps, Shape.LINEAR, self.start_lr, self.end_lr)


@dataclasses.dataclass(frozen=True)
class Exponential(Schedule):
    """The same factor at every step, as `torch.optim.lr_scheduler.ExponentialLR`, from one learning rate to another.

        lr = start_lr * (end_lr / start_lr)**(step / steps)

    Torch's ``gamma`` is ``(end_lr / start_lr)**(1 / steps)``. Past its end it holds ``end_lr``, also in replays.

    Args:
        start_lr: Learning rate at step 0, > 0.
        end_lr: Learning rate at step ``steps``, > 0, within a factor of ``exp(700)`` of ``start_lr``.
        steps: Number of steps, > 0. Need not be an integer.

    Raises:
        ValueError: An argument is not allowed; the message names it.

    Example:
        >>> schedule = Exponential(1.0, 0.25, steps=2)
        >>> schedule.lr(0), schedule.lr(1), schedule.lr(2)
        (1.0, 0.5, 0.25)
    """

    start_lr: float
    end_lr: float
    steps: float

    def __post_init__(self) -> None:
        set_positive(self, "start_lr", "end_lr")
        set_steps(self, "steps")
        if abs(math.log(self.end_lr) - math.log(self.start_lr)) > MAX_LOG_RATIOS[Shape.EXPONENTIAL]:
            raise ValueError(
                f"end_lr must be within a factor of exp(700) of start_lr={self.start_lr}, got {self.end_lr}"
            )

    def parts(self) -> tuple[Part, ...]:
        """See `Schedule.parts`."""
        return _one_segment(self.steps, Shape.EXPONENTIAL, self.start_lr, self.end_lr)


@dataclasses.dataclass(frozen=True)
class Polynomial(Schedule):
    """A power of the steps that remain, as `torch.optim.lr_scheduler.PolynomialLR`.

        lr = end_lr + (start_lr - end_lr) * (1 - step / steps)**power

    Past its end it holds ``end_lr``, also in replays.

    Args:
        start_lr: Learning rate at step 0, >= 0.
        end_lr: Learning rate at step ``steps``, >= 0; torch's is 0.
        steps: Number of steps, > 0. Need not be an integer.
        power: The exponent, > 0.

    Raises:
        ValueError: An argument is not allowed; the message names it.

    Example:
        >>> schedule = Polynomial(1.0, 0.0, steps=4, power=2.0)
        >>> schedule.lr(0), schedule.lr(2), schedule.lr(4)
        (1.0, 0.25, 0.0)
    """

    start_lr: float
    end_lr: float
    steps: float
    power: float = 1.0

    def __post_init__(self) -> None:
        set_lrs(self, "start_lr", "end_lr")
        set_steps(self, "steps")
        set_positive(self, "power")

    def parts(self) -> tuple[Part, ...]:
        """See `Schedule.parts`."""
        return _one_segment(self.steps, Shape.POLYNOMIAL, self.start_lr, self.end_lr, self.power)


@dataclasses.dataclass(frozen=True)
class Cosine(Schedule):
    """Half a wave of a cosine, as `torch.optim.lr_scheduler.CosineAnnealingLR`.

    Loshchilov & Hutter 2017, "SGDR" (arXiv:1608.03983, eq. 5), without restarts:

        lr = end_lr + (start_lr - end_lr) * (1 + cos(pi * step / steps)) / 2

    Past its end it holds ``end_lr``, also in replays; torch's rises again.

    Args:
        start_lr: Learning rate at step 0, >= 0.
        end_lr: Learning rate at step ``steps``, >= 0; torch's ``eta_min``.
        steps: Number of steps, > 0; torch's ``T_max``. Need not be an integer.

    Raises:
        ValueError: An argument is not allowed; the message names it.

    Example:
        >>> schedule = Cosine(1.0, 0.0, steps=4)
        >>> schedule.lr(0), schedule.lr(2), schedule.lr(4), schedule.lr(100)
        (1.0, 0.5, 0.0, 0.0)
    """

    start_lr: float
    end_lr: float
    steps: float

    def __post_init__(self) -> None:
        set_lrs(self, "start_lr", "end_lr")
        set_steps(self, "steps")

    def parts(self) -> tuple[Part, ...]:
        """See `Schedule.parts`."""
        return _one_segment(self.steps, Shape.COSINE, self.start_lr, self.end_lr)


def _one_segment(steps: float, shape: Shape, first: float, last: float, power: float = 1.0) -> tuple[Part, ...]:
    return (Part((Segment(steps, shape, (first, last), power=power),)),)
