"""`OneCycle`: torch's OneCycleLR as a schedule."""

from __future__ import annotations

import dataclasses
import math

from .._checks import check_bool
from .base import Schedule
from .fields import checked_number, set_counts, set_lrs, set_momenta, set_positive
from .parts import Part, Segment, Shape

SHAPES = {"cos": Shape.COSINE, "linear": Shape.LINEAR}


@dataclasses.dataclass(frozen=True)
class OneCycle(Schedule):
    """One rise to ``max_lr`` and one fall to almost nothing, with the momentum against it.

    The 1cycle policy of Smith & Topin 2018, "Super-Convergence" (arXiv:1708.07120, sec. 3), with the arguments of
    `torch.optim.lr_scheduler.OneCycleLR`:

        initial_lr = max_lr / div_factor            min_lr = initial_lr / final_div_factor
        rise       = pct_start * total_steps - 1    steps from initial_lr to max_lr
        fall       = total_steps - 1 - rise         steps from max_lr to min_lr

    With ``three_phase`` the fall has two phases: ``rise`` steps from ``max_lr`` to ``initial_lr``, and the remaining
    ones to ``min_lr``. The momentum falls from ``max_momentum`` to ``base_momentum`` while the learning rate rises,
    and rises again in the phase after. Past its end, at step ``total_steps - 1``, the schedule holds ``min_lr``, also
    in replays; torch's raises an error.

    Args:
        max_lr: Learning rate at the peak, >= 0.
        total_steps: Steps of the training, an integer.
        pct_start: Share of ``total_steps`` that rises, in (0, 1). No phase may be empty: ``pct_start * total_steps``
            must exceed 1, and ``2 * pct_start * total_steps`` be below ``total_steps + 1`` with ``three_phase``.
        anneal_strategy: "cos" or "linear": the shape of each phase.
        cycle_momentum: Cycle the momentum (Adam's beta1) against the learning rate.
        base_momentum: Momentum at the peak, in [0, 1).
        max_momentum: Momentum at the start and the end, in [0, 1).
        div_factor: ``max_lr`` over the initial learning rate, > 0.
        final_div_factor: The initial learning rate over the last, > 0.
        three_phase: Fall to the initial learning rate first, then to the last.

    Raises:
        ValueError: An argument is not allowed; the message names it.

    Example:
        >>> schedule = OneCycle(max_lr=1.0, total_steps=101, pct_start=51 / 101, anneal_strategy="linear")
        >>> schedule.lr(0), schedule.lr(50), schedule.momentum(0), schedule.momentum(50)
        (0.04, 1.0, 0.95, 0.85)
    """

    max_lr: float
    total_steps: int
    pct_start: float = 0.3
    anneal_strategy: str = "cos"
    cycle_momentum: bool = True
    base_momentum: float = 0.85
    max_momentum: float = 0.95
    div_factor: float = 25.0
    final_div_factor: float = 1e4
    three_phase: bool = False

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_lrs(self, "max_lr")
        set_positive(self, "div_factor", "final_div_factor")
        set_counts(self, "total_steps")
        set_momenta(self, "base_momentum", "max_momentum")
        for name in ("cycle_momentum", "three_phase"):
            set_field(self, name, check_bool(name, getattr(self, name)))
        if self.anneal_strategy not in tuple(SHAPES):
            raise ValueError(f"anneal_strategy must be one of {tuple(SHAPES)}, got {self.anneal_strategy!r}")
        pct_start = checked_number("pct_start", self.pct_start, "a number in (0, 1)", lambda x: 0 < x < 1)
        set_field(self, "pct_start", pct_start)
        if not all(steps > 0 for steps in self._phases()):
            allowed = ", and below (total_steps + 1) / 2 with three_phase=True" if self.three_phase else ""
            raise ValueError(
                f"pct_start * total_steps must be above 1{allowed}, got {self.pct_start} * {self.total_steps}: a phase "
                "would be empty"
            )
        for name, lr in zip(("div_factor", "final_div_factor"), self._low_lrs(), strict=True):
            if not math.isfinite(lr):
                raise ValueError(f"{name} must leave the learning rate finite, got {getattr(self, name)}")

    def _phases(self) -> list[float]:
        """Steps of each phase. Their sum is ``total_steps - 1`` exactly."""
        last = self.total_steps - 1
        rises = 2 if self.three_phase else 1
        # Subtracted twice, so that nothing is lost to rounding: it would move the end.
        final = last - rises * (self.pct_start * self.total_steps - 1)
        return [(last - final) / rises] * rises + [final]

    def _low_lrs(self) -> tuple[float, float]:
        """The first learning rate and the last."""
        initial_lr = self.max_lr / self.div_factor
        return initial_lr, initial_lr / self.final_div_factor

    @property
    def group_keys(self) -> dict[str, float]:
        """What torch's OneCycleLR writes to a param group, and reads there: its learning rates."""
        initial_lr, min_lr = self._low_lrs()
        return {"initial_lr": initial_lr, "max_lr": self.max_lr, "min_lr": min_lr}

    def parts(self) -> tuple[Part, ...]:
        """See `Schedule.parts`."""
        initial_lr, min_lr = self._low_lrs()
        lrs = [initial_lr, self.max_lr, *([initial_lr] if self.three_phase else []), min_lr]
        momenta = [self.max_momentum, self.base_momentum, self.max_momentum, self.max_momentum]
        segments = tuple(
            Segment(
                steps,
                SHAPES[self.anneal_strategy],
                (lrs[phase], lrs[phase + 1]),
                (momenta[phase], momenta[phase + 1]) if self.cycle_momentum else None,
            )
            for phase, steps in enumerate(self._phases())
        )
        return (Part(segments),)
