"""`Decay`: a fall to the last learning rate, as at the end of a training."""

from __future__ import annotations

import dataclasses

from .base import Schedule
from .fields import set_lrs, set_momenta, set_steps
from .parts import Part, Segment, Shape

DECAYS = {"1-sqrt": Shape.POWER, "linear": Shape.LINEAR, "cosine": Shape.COSINE}


def check_decay(name: str, value: object) -> None:
    """Checks the name of a shape of decay.

    Raises:
        ValueError: It is unknown.
    """
    if value not in tuple(DECAYS):
        raise ValueError(f"{name} must be one of {tuple(DECAYS)}, got {value!r}")


@dataclasses.dataclass(frozen=True)
class Decay(Schedule):
    """The decay of `WarmupStableDecay` alone, from any learning rate.

        lr = final_lr + (start_lr - final_lr) * remaining    x = step / steps

    where ``remaining`` is ``1 - sqrt(x)`` (Hägele et al. 2024, arXiv:2405.18392, sec. 3), ``1 - x`` (linear) or
    ``(1 + cos(pi x)) / 2`` (cosine). Past its end it holds ``final_lr``, also in replays.

    Args:
        start_lr: Learning rate at step 0, >= 0.
        steps: Steps of the decay, > 0. Need not be an integer.
        shape: "1-sqrt", "linear" or "cosine".
        final_lr: Learning rate at the end, >= 0.
        held_momentum: Momentum during and after the decay, in [0, 1); None leaves it to the param group.

    Raises:
        ValueError: An argument is not allowed; the message names it.

    Example:
        >>> schedule = Decay(1.0, steps=16)
        >>> [schedule.lr(step) for step in (0, 4, 16, 100)]
        [1.0, 0.5, 0.0, 0.0]
    """

    start_lr: float
    steps: float
    shape: str = "1-sqrt"
    final_lr: float = 0.0
    held_momentum: float | None = None

    def __post_init__(self) -> None:
        set_lrs(self, "start_lr", "final_lr")
        set_steps(self, "steps")
        check_decay("shape", self.shape)
        if self.held_momentum is not None:
            set_momenta(self, "held_momentum")

    def parts(self) -> tuple[Part, ...]:
        """See `Schedule.parts`."""
        momentum = None if self.held_momentum is None else (self.held_momentum, self.held_momentum)
        return (Part((Segment(self.steps, DECAYS[self.shape], (self.start_lr, self.final_lr), momentum, power=0.5),)),)
