"""`InverseSqrt`: linear warm-up, then in proportion to 1 / sqrt(step)."""

from __future__ import annotations

import dataclasses
import math

from .base import Schedule
from .fields import END_OF_STEPS, checked_number, set_counts
from .parts import Part, Segment, Shape


@dataclasses.dataclass(frozen=True)
class InverseSqrt(Schedule):
    """A linear warm-up from 0, then a fall with the inverse square root of the step.

    Vaswani et al. 2017, "Attention Is All You Need" (arXiv:1706.03762, eq. 3, whose peak is
    ``(d_model * warmup_steps)**-0.5``); transformers' ``get_inverse_sqrt_schedule``:

        lr = peak_lr * step / warmup_steps          up to step warmup_steps
        lr = peak_lr * sqrt(warmup_steps / step)    after it

    It has no end.

    Args:
        peak_lr: Learning rate at step ``warmup_steps``, >= 1e-299.
        warmup_steps: Steps of the warm-up, an integer.

    Raises:
        ValueError: An argument is not allowed; the message names it.

    Example:
        >>> schedule = InverseSqrt(peak_lr=1.0, warmup_steps=4)
        >>> schedule.lr(0), schedule.lr(2), schedule.lr(4), schedule.lr(16)
        (0.0, 0.5, 1.0, 0.5)
    """

    peak_lr: float
    warmup_steps: int

    def __post_init__(self) -> None:
        # The smallest one whose last learning rate is a normal float64.
        peak_lr = checked_number("peak_lr", self.peak_lr, "a finite number >= 1e-299", lambda x: x >= 1e-299)
        object.__setattr__(self, "peak_lr", peak_lr)
        set_counts(self, "warmup_steps")

    def parts(self) -> tuple[Part, ...]:
        """See `Schedule.parts`: the fall has no end."""
        last_lr = self.peak_lr * math.sqrt(self.warmup_steps / END_OF_STEPS)
        rise = Segment(self.warmup_steps, Shape.LINEAR, (0.0, self.peak_lr))
        fall = Segment(END_OF_STEPS - self.warmup_steps, Shape.INVERSE_SQRT, (self.peak_lr, last_lr))
        return (Part((rise, fall)),)
