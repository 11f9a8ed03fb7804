"""`warmup`: a linear warm-up before another schedule."""

from __future__ import annotations

import dataclasses
import math

from .base import Schedule
from .fields import checked_lr, set_counts
from .parts import Part, Segment, Shape


@dataclasses.dataclass(frozen=True)
class ScheduleWarmup(Schedule):
    """What `warmup` returns.

    Attributes:
        steps: Steps of the warm-up.
        then: The schedule after it.
        start_factor: The learning rate at step 0, over the first one of ``then``.
    """

    steps: int
    then: Schedule
    start_factor: float

    def __post_init__(self) -> None:
        set_counts(self, "steps")
        if not isinstance(self.then, Schedule):
            raise ValueError(f"then must be a Schedule, got {self.then!r}")
        object.__setattr__(self, "start_factor", checked_lr("start_factor", self.start_factor))
        if not self.then.lr(0) > 0:
            raise ValueError(f"then must begin with a learning rate > 0 to be warmed up to, got {self.then}")
        # Raises an error where the parts of `then` would begin beyond the last step.
        _ = self.timeline

    def parts(self) -> tuple[Part, ...]:
        """See `Schedule.parts`: a line, and the parts of ``then`` after it."""
        lr, momentum = self.then.lr_and_momentum(0)
        momenta = None if math.isnan(momentum) else (momentum, momentum)
        rise = Segment(self.steps, Shape.LINEAR, (self.start_factor * lr, lr), momenta)
        later = (part._replace(start=self.steps + part.start) for part in self.then.parts())
        return (Part((rise,)), *later)


def warmup(steps: int, then: Schedule, start_factor: float = 0.0) -> Schedule:
    """A linear warm-up over ``steps``, then another schedule from its step 0 on.

    The learning rate rises from ``start_factor * then.lr(0)`` to ``then.lr(0)``; the momentum is ``then.momentum(0)``.

    Args:
        steps: Steps of the warm-up, an integer >= 1.
        then: The schedule that begins at step ``steps``; its first learning rate must be > 0.
        start_factor: Learning rate at step 0 over the first one of ``then``, >= 0.

    Raises:
        ValueError: An argument is not allowed; the message names it.

    Example:
        >>> from fused_clr.schedules import Cosine
        >>> schedule = warmup(4, then=Cosine(1.0, 0.0, steps=100))
        >>> schedule.lr(0), schedule.lr(2), schedule.lr(4), schedule.lr(54)
        (0.0, 0.5, 1.0, 0.5)
    """
    return ScheduleWarmup(steps, then, start_factor)
