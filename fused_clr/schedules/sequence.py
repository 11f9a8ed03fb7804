"""`sequence`: schedules one after another."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from itertools import accumulate
from typing import Any, cast

from .._checks import check_integer
from .base import Schedule
from .parts import Part


@dataclasses.dataclass(frozen=True)
class ScheduleSequence(Schedule):
    """What `sequence` returns.

    Attributes:
        schedules: At least one.
        milestones: The step at which each schedule but the first begins.
    """

    schedules: tuple[Schedule, ...]
    milestones: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.schedules:
            raise ValueError("schedules must hold at least one schedule, got none")
        for index, schedule in enumerate(self.schedules):
            if not isinstance(schedule, Schedule):
                raise ValueError(f"schedules[{index}] must be a Schedule, got {schedule!r}")
        allowed = "strictly increasing integers > 0"
        try:
            milestones = tuple(check_integer("", milestone, "", lambda n: n > 0) for milestone in self.milestones)
        except (TypeError, ValueError):
            raise ValueError(f"milestones must be {allowed}, got {self.milestones!r}") from None
        if any(late <= early for early, late in zip((0, *milestones), milestones, strict=False)):
            raise ValueError(f"milestones must be {allowed}, got {milestones}")
        if len(milestones) != len(self.schedules) - 1:
            raise ValueError(f"milestones must be one fewer than the {len(self.schedules)} schedules, got {milestones}")
        object.__setattr__(self, "milestones", milestones)
        # Raises an error where a milestone is beyond the last step.
        _ = self.timeline

    def parts(self) -> tuple[Part, ...]:
        """See `Schedule.parts`: the parts of all schedules that start before the next milestone."""
        starts = (0, *self.milestones)
        ends: tuple[float, ...] = (*self.milestones, float("inf"))
        return tuple(
            part._replace(start=start + part.start)
            for schedule, start, end in zip(self.schedules, starts, ends, strict=True)
            for part in schedule.parts()
            if start + part.start < end
        )


def sequence(*schedules: Schedule, milestones: Iterable[int] | None = None) -> Schedule:
    """Schedules one after another, as `torch.optim.lr_scheduler.SequentialLR`.

    A schedule that ends before its milestone holds its last value until then. The last schedule holds its last value
    from its end on, also in replays. Where a schedule does not drive the momentum, the param group's momentum applies.

    Args:
        *schedules: At least one. Each begins with its own step 0; may be sequences themselves.
        milestones: The step at which each schedule but the first begins: strictly increasing, > 0, one fewer than
            the schedules. None: each begins where the one before ends.

    Raises:
        ValueError: An argument is not what is stated above; the message names it.

    Example:
        >>> from fused_clr.schedules import Cyclic
        >>> fast = Cyclic(0.1, 0.5, step_size_up=4, cycle_momentum=False)
        >>> slow = Cyclic(0.01, 0.05, step_size_up=40, cycle_momentum=False)
        >>> schedule = sequence(fast, slow, milestones=[16])
        >>> schedule.lr(4), schedule.lr(16), schedule.lr(56)
        (0.5, 0.01, 0.05)
    """
    if milestones is None:
        for index, schedule in enumerate(cast("tuple[Any, ...]", schedules[:-1])):
            if isinstance(schedule, Schedule) and schedule.end_step() == math.inf:
                raise ValueError(f"milestones must be given, since schedules[{index}] has no end: {schedule}")
        # Lazy: the constructor checks the schedules first.
        milestones = accumulate(int(schedule.end_step()) for schedule in schedules[:-1])
    # The constructor checks the milestones and makes them a tuple.
    return ScheduleSequence(schedules, cast("tuple[int, ...]", milestones))
