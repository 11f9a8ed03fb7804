"""`ExponentialDecay`: the same factor at every step, without an end."""

from __future__ import annotations

import dataclasses

from .base import Schedule
from .fields import set_lrs
from .parts import Part, Scaling, Segment, Shape


@dataclasses.dataclass(frozen=True)
class ExponentialDecay(Schedule):
    """A learning rate that is multiplied by the same factor at every step, as `torch.optim.lr_scheduler.ExponentialLR`.

        lr = start_lr * gamma**step

    It has no end. `Exponential` is the same curve from one learning rate to another, where it ends.

    Args:
        start_lr: Learning rate at step 0, >= 0.
        gamma: The factor, >= 0. Above 1 the learning rate grows without bound.

    Raises:
        ValueError: An argument is not allowed; the message names it.

    Example:
        >>> schedule = ExponentialDecay(1.0, gamma=0.5)
        >>> schedule.lr(0), schedule.lr(1), schedule.lr(10)
        (1.0, 0.5, 0.0009765625)
    """

    start_lr: float
    gamma: float

    def __post_init__(self) -> None:
        # Gamma has the bounds of a learning rate.
        set_lrs(self, "start_lr", "gamma")

    def parts(self) -> tuple[Part, ...]:
        """See `Schedule.parts`: one value, which is scaled at every step."""
        held = Segment(1, Shape.CONSTANT, (self.start_lr, self.start_lr))
        return (Part((held,), repeats=True, scaling=Scaling(factor=self.gamma, per="step")),)
