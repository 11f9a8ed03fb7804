"""`CosineRestarts`: torch's CosineAnnealingWarmRestarts as a schedule."""

from __future__ import annotations

import dataclasses

from .base import Schedule
from .compiled import NEVER
from .fields import END_OF_STEPS, set_counts, set_lrs
from .parts import Part, Segment, Shape


@dataclasses.dataclass(frozen=True)
class CosineRestarts(Schedule):
    """A falling half wave of a cosine, again and again, each ``T_mult`` times as long as the one before.

    SGDR of Loshchilov & Hutter 2017 (arXiv:1608.03983, eq. 5), with the arguments of
    `torch.optim.lr_scheduler.CosineAnnealingWarmRestarts`:

        lr = eta_min + (max_lr - eta_min) * (1 + cos(pi * T_cur / T_i)) / 2

    where ``T_cur`` counts the steps since the last restart, and ``T_i`` is ``T_0 * T_mult**i`` after ``i`` restarts. It
    has no end.

    Args:
        max_lr: Learning rate after each restart, >= 0.
        T_0: Steps until the first restart, an integer.
        T_mult: Factor of the steps from one restart to the next, an integer.
        eta_min: Learning rate before each restart, >= 0.

    Raises:
        ValueError: An argument is not allowed; the message names it.

    Example:
        >>> schedule = CosineRestarts(1.0, T_0=2, T_mult=2)
        >>> [schedule.lr(step) for step in (0, 1, 2, 4, 6)]
        [1.0, 0.5, 1.0, 0.5, 1.0]
    """

    max_lr: float
    T_0: int
    T_mult: int = 1
    eta_min: float = 0.0

    def __post_init__(self) -> None:
        set_lrs(self, "max_lr", "eta_min")
        set_counts(self, "T_0", "T_mult")
        if sum(self._lengths()) >= NEVER:
            raise ValueError(
                "the wave of CosineRestarts in which schedule step 2**53 lies must end below step 2**62, got "
                f"T_0={self.T_0}, T_mult={self.T_mult}"
            )

    def _lengths(self) -> list[int]:
        """The steps of each wave until the end of all schedule steps; one wave if it repeats."""
        lengths = [self.T_0]
        while self.T_mult > 1 and sum(lengths) < END_OF_STEPS:
            lengths.append(lengths[-1] * self.T_mult)
        return lengths

    def parts(self) -> tuple[Part, ...]:
        """See `Schedule.parts`: one part, which repeats if ``T_mult`` is 1, and else has up to 53 segments."""
        lrs = (self.max_lr, self.eta_min)
        segments = tuple(Segment(steps, Shape.COSINE, lrs) for steps in self._lengths())
        return (Part(segments, repeats=self.T_mult == 1),)
