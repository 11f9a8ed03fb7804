"""`SequentialLR`, and all scheduler classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

from torch.optim import Optimizer, lr_scheduler

from ..schedules import Constant, Schedule, sequence
from ..schedules.sequence import ScheduleSequence
from .base import FusedScheduler
from .checks import check_frame, check_optimizer, common
from .cosine_restarts import CosineAnnealingWarmRestarts
from .cyclic import CyclicLR
from .one_cycle import OneCycleLR
from .simple import ConstantLR, CosineAnnealingLR, ExponentialLR, LinearLR, PolynomialLR


@final
class SequentialLR(FusedScheduler):
    """Schedulers one after another; `torch.optim.lr_scheduler.SequentialLR`'s arguments.

    Each scheduler begins with its own step 0 at its milestone. See `FusedScheduler` for what all schedulers have in
    common. The schedulers that were given no longer drive the optimizer: this one does.

    Different from torch's:

    - Milestones must be strictly increasing and > 0; torch's does not check them.
    - A scheduler may itself be a `SequentialLR` everywhere; torch's raises an error at its milestone.
    - ``last_epoch`` resumes in the middle; torch's begins again with the first scheduler.
    - Where a scheduler does not set the momentum, the group's momentum applies; torch's keeps the last one that a
      `OneCycleLR` or `CyclicLR` in the sequence wrote.
    - Each scheduler keeps its own base learning rate. In torch, a `OneCycleLR` in the sequence changes the
      ``initial_lr`` that the first scheduler begins with, and two of them share the ``max_lr`` of the second.

    Args:
        optimizer: A `FusedAdam`, `FusedAdamW` or `FusedSGD`.
        schedulers: Schedulers of this package, created for ``optimizer``.
        milestones: The step at which each scheduler but the first begins: integers.
        last_epoch: The last step when resuming, or -1.

    Raises:
        TypeError: ``optimizer`` is not a fused optimizer, or an entry of ``schedulers`` not a scheduler of fused_clr.
        ValueError: An argument is not allowed; the optimizer has not changed.

    Example:
        >>> import fused_clr, torch
        >>> optimizer = fused_clr.FusedAdam([torch.nn.Parameter(torch.ones(2))], lr=1.0)
        >>> warm_up = LinearLR(optimizer, start_factor=0.5, total_iters=2)
        >>> scheduler = SequentialLR(optimizer, [warm_up, CosineAnnealingLR(optimizer, T_max=2)], milestones=[2])
        >>> for _ in range(3):
        ...     optimizer.step(); scheduler.step(); print(scheduler.get_last_lr())
        [0.75]
        [1.0]
        [0.5]
    """

    TORCH = lr_scheduler.SequentialLR
    CLOSED_FORM = False
    NEEDED_KEYS = frozenset(("last_epoch", "_milestones", "_schedulers"))

    def __init__(
        self,
        optimizer: Optimizer,
        schedulers: Sequence[FusedScheduler],
        milestones: Sequence[int],
        last_epoch: int = -1,
    ) -> None:
        fused, step = check_optimizer(optimizer, "SequentialLR", last_epoch)
        if not isinstance(schedulers, (list, tuple)) or not schedulers:
            raise ValueError(f"schedulers must be a list of at least one scheduler, got {schedulers!r}")
        num_groups = len(fused.param_groups)
        for index, scheduler in enumerate(schedulers):
            if not isinstance(scheduler, FusedScheduler):
                kind = type(scheduler)
                raise TypeError(
                    f"schedulers[{index}] must be a scheduler of fused_clr, got {kind.__module__}.{kind.__qualname__}; "
                    f"there are {', '.join(KINDS)}"
                )
            if scheduler.optimizer is not optimizer:
                raise ValueError(f"schedulers[{index}] must drive this optimizer, got the scheduler of another one")
            if scheduler._num_groups != num_groups:
                raise ValueError(
                    f"schedulers[{index}] drives {scheduler._num_groups} param groups, and the optimizer has "
                    f"{num_groups}: create it after the last group was added"
                )
        columns = [scheduler.schedules if scheduler._drives else scheduler._latest for scheduler in schedulers]
        if not isinstance(milestones, (list, tuple)):
            raise ValueError(f"milestones must be a list of integers, got {milestones!r}")
        self._attach(fused, [sequence(*own, milestones=milestones) for own in zip(*columns, strict=True)], step)

    # -- what `FusedScheduler` asks ------------------------------------------------------------------------------------
    @classmethod
    def recognises(cls, schedule: Schedule | None) -> bool:
        """See `FusedScheduler.recognises`."""
        return isinstance(schedule, ScheduleSequence) and all(kind_of([own]) for own in schedule.schedules)

    @classmethod
    def arguments_of(cls, schedules: Sequence[ScheduleSequence]) -> dict[str, Any]:
        """See `FusedScheduler.arguments_of`: without the schedulers, which `columns_of` tells."""
        fields = common(cls.__name__, [{"milestones": own.milestones} for own in schedules])
        return {"milestones": list(fields["milestones"])}

    @classmethod
    def columns_of(cls, schedules: Sequence[ScheduleSequence]) -> list[tuple[type[FusedScheduler], list[Schedule]]]:
        """The class and the schedules of each scheduler in the sequence.

        Raises:
            ValueError: The groups have different ones.
        """
        common(cls.__name__, [{"len(schedulers)": len(own.schedules)} for own in schedules])
        columns = []
        for index, column in enumerate(zip(*(own.schedules for own in schedules), strict=True)):
            kind = kind_of(column)
            if kind is None:
                raise ValueError(
                    f"schedulers[{index}] must be of one class in all groups, got {column}: torch's SequentialLR has "
                    "one for all groups"
                )
            columns.append((kind, list(column)))
        return columns

    @classmethod
    def pack(
        cls,
        schedules: Sequence[ScheduleSequence],
        last_epoch: int,
        step_count: int,
        last_lrs: Sequence[float],
        use_beta1: bool,
    ) -> dict[str, Any]:
        """See `FusedScheduler.pack`."""
        milestones = cls.arguments_of(schedules)["milestones"]
        epochs = _epochs(milestones, last_epoch)
        # Torch reads no last learning rates of a scheduler that is over or has not begun.
        states = [
            kind.pack(column, epoch, 1 + max(epoch, 0), last_lrs, use_beta1)
            for (kind, column), epoch in zip(cls.columns_of(schedules), epochs, strict=True)
        ]
        return {
            "_milestones": milestones,
            "last_epoch": last_epoch,
            "_last_lr": list(last_lrs),
            "_schedulers": states,
        }

    @classmethod
    def unpack(
        cls,
        name: str,
        state: Mapping[str, Any],
        groups: Sequence[dict[str, Any]],
        present: Sequence[ScheduleSequence],
    ) -> list[Any]:
        """See `FusedScheduler.unpack`."""
        columns, saved = cls.columns_of(present), state["_schedulers"]
        if not isinstance(saved, (list, tuple)) or len(saved) != len(columns):
            raise ValueError(
                f"{name}['_schedulers'] must have {len(columns)} entries, one per scheduler, got {saved!r}"
            )
        try:
            milestones = ScheduleSequence((Constant(0.0),) * len(columns), state["_milestones"]).milestones
        except ValueError as error:
            raise ValueError(f"{name}['_milestones'] are not allowed: {error}") from None
        loaded = []
        for index, ((kind, column), own) in enumerate(zip(columns, saved, strict=True)):
            own_name = f"{name}['_schedulers'][{index}]"
            check_frame(own_name, own, kind.__name__, kind.NEEDED_KEYS)
            check_epoch(own_name, own["last_epoch"], kind, milestones, index, state["last_epoch"])
            loaded.append(kind.unpack(own_name, own, groups, column))
        return [ScheduleSequence(own, milestones) for own in zip(*loaded, strict=True)]


def check_epoch(
    name: str, epoch: int, kind: type[FusedScheduler], milestones: Sequence[int], index: int, last_epoch: int
) -> None:
    """Checks the ``last_epoch`` of a scheduler in a sequence, which follows from that of the sequence.

    Raises:
        ValueError: It is another one.
    """
    expected = _epochs(milestones, last_epoch)[index]
    # Torch's does not set that of a sequence that has not begun.
    if epoch != expected and (kind is not SequentialLR or expected >= 0):
        raise ValueError(
            f"{name}['last_epoch'] must be {expected} at the sequence's last_epoch={last_epoch}, got {epoch!r}"
        )


def _epochs(milestones: Sequence[int], last_epoch: int) -> list[int]:
    """Each scheduler's own ``last_epoch``: -1 before it begins; it stays when the next one begins."""
    starts, ends = (0, *milestones), (*milestones, last_epoch + 1)
    spans = zip(starts, ends, strict=True)
    return [-1 if last_epoch < start else min(last_epoch, end - 1) - start for start, end in spans]


# Every scheduler class, by its name and torch's.
KINDS: dict[str, type[FusedScheduler]] = {
    kind.__name__: kind
    for kind in (
        CyclicLR,
        OneCycleLR,
        CosineAnnealingWarmRestarts,
        CosineAnnealingLR,
        LinearLR,
        ExponentialLR,
        PolynomialLR,
        ConstantLR,
        SequentialLR,
    )
}


def kind_of(schedules: Sequence[Schedule | None]) -> type[FusedScheduler] | None:
    """The class that makes schedules of this form; None if there is none."""
    return next((kind for kind in KINDS.values() if all(map(kind.recognises, schedules))), None)
