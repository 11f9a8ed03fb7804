"""`WarmupStableDecay`: linear warm-up, a constant, and a decay."""

from __future__ import annotations

import dataclasses

from .base import Schedule
from .decay import DECAYS, check_decay
from .fields import set_lrs, set_steps
from .parts import Part, Segment, Shape


@dataclasses.dataclass(frozen=True)
class WarmupStableDecay(Schedule):
    """A linear warm-up from 0, a constant learning rate, and a decay: WSD, or the trapezoidal schedule.

    Hu et al. 2024, "MiniCPM" (arXiv:2404.06395, sec. 4.2); the "1-sqrt" decay is of Hägele et al. 2024, "Scaling Laws
    and Compute-Optimal Training Beyond Fixed Training Durations" (arXiv:2405.18392, sec. 3); transformers'
    ``get_wsd_schedule``:

        lr = peak_lr * step / warmup_steps                  in the warm-up
        lr = peak_lr                                        while stable
        lr = final_lr + (peak_lr - final_lr) * remaining    in the decay, x = its steps done / decay_steps

    where ``remaining`` is ``1 - sqrt(x)``, ``1 - x`` (linear) or ``(1 + cos(pi x)) / 2`` (cosine). Past its end it
    holds ``final_lr``, also in replays.

    Args:
        peak_lr: Learning rate of the stable phase, >= 0.
        warmup_steps: Steps of the warm-up, > 0. Need not be an integer, as the next two.
        stable_steps: Steps of the stable phase, > 0.
        decay_steps: Steps of the decay, > 0.
        decay: "1-sqrt", "linear" or "cosine".
        final_lr: Learning rate at the end, >= 0.

    Raises:
        ValueError: An argument is not allowed; the message names it.

    Example:
        >>> schedule = WarmupStableDecay(1.0, warmup_steps=4, stable_steps=10, decay_steps=16)
        >>> [schedule.lr(step) for step in (0, 2, 4, 14, 18, 30)]
        [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]
    """

    peak_lr: float
    warmup_steps: float
    stable_steps: float
    decay_steps: float
    decay: str = "1-sqrt"
    final_lr: float = 0.0

    def __post_init__(self) -> None:
        set_lrs(self, "peak_lr", "final_lr")
        set_steps(self, "warmup_steps", "stable_steps", "decay_steps")
        check_decay("decay", self.decay)

    def parts(self) -> tuple[Part, ...]:
        """See `Schedule.parts`."""
        return (
            Part(
                (
                    Segment(self.warmup_steps, Shape.LINEAR, (0.0, self.peak_lr)),
                    Segment(self.stable_steps, Shape.CONSTANT, (self.peak_lr, self.peak_lr)),
                    Segment(self.decay_steps, DECAYS[self.decay], (self.peak_lr, self.final_lr), power=0.5),
                )
            ),
        )
