"""Reads the schedules of torch's schedulers, and makes torch's schedulers of schedules: for `fuse` and `unfuse`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim import lr_scheduler

from ..schedules import Cyclic, Schedule
from ..schedules.base import function_name
from ..schedules.parts import host_function, is_triton_function
from ..schedules.sequence import ScheduleSequence
from .base import FusedScheduler
from .checks import check_frame, turns_in_torch
from .cyclic import CyclicLR, recover_step_sizes
from .one_cycle import OneCycleLR
from .sequential import KINDS, SequentialLR, check_epoch, kind_of


def class_name(value: object) -> str:
    """The class of a value, with its module, for messages."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def kind_of_torchs(name: str, scheduler: lr_scheduler.LRScheduler) -> type[FusedScheduler]:
    """Our class for a scheduler of torch.

    Raises:
        TypeError: There is none.
    """
    kind = next((kind for kind in KINDS.values() if type(scheduler) is kind.TORCH), None)
    if kind is None:
        raise TypeError(
            f"{name} must be one of torch's {', '.join(KINDS)}, from torch.optim.lr_scheduler, got "
            f"{class_name(scheduler)}"
        )
    return kind


def read_schedules(
    name: str, scheduler: Any, groups: Sequence[dict[str, Any]], total_steps: int | None = None
) -> list[Any]:
    """The schedules of a scheduler of torch, one per group."""
    kind = kind_of_torchs(name, scheduler)
    if kind is SequentialLR:
        columns = []
        for index, own in enumerate(scheduler._schedulers):
            own_name = f"{name}._schedulers[{index}]"
            own_kind = kind_of_torchs(own_name, own)
            check_epoch(own_name, own.last_epoch, own_kind, scheduler._milestones, index, scheduler.last_epoch)
            columns.append(read_schedules(own_name, own, groups))
        schedules = [ScheduleSequence(own, scheduler._milestones) for own in zip(*columns, strict=True)]
        _check_sequences(name, schedules)
        return schedules
    if len(scheduler.base_lrs) != len(groups):
        raise ValueError(
            f"{name} drives {len(scheduler.base_lrs)} param groups, and the optimizer has {len(groups)}: one added "
            "after the scheduler was created cannot be converted"
        )
    if getattr(scheduler, "cycle_momentum", False):
        cycled = "betas" if scheduler.use_beta1 else "momentum"
        if cycled not in groups[0]:
            raise ValueError(f"{name} cycles {cycled!r}, which its optimizer does not have")
    if kind is CyclicLR:
        return _read_cyclic(scheduler, total_steps)
    state = scheduler.state_dict()
    check_frame(f"{name}.state_dict()", state, kind.__name__, kind.NEEDED_KEYS)
    return kind.unpack(f"{name}.state_dict()", state, groups, [None] * len(groups))


def _read_cyclic(scheduler: lr_scheduler.CyclicLR, total_steps: int | None) -> list[Cyclic]:
    up, down = recover_step_sizes(scheduler.total_size, scheduler.step_ratio)
    schedules = []
    for index in range(len(scheduler.base_lrs)):
        momenta = {}
        if scheduler.cycle_momentum:
            momenta = {
                "base_momentum": scheduler.base_momentums[index],
                "max_momentum": scheduler.max_momentums[index],
            }
        schedules.append(
            Cyclic(
                float(scheduler.base_lrs[index]),
                float(scheduler.max_lrs[index]),
                up,
                down,
                scheduler.mode,
                scheduler.gamma,
                scheduler._scale_fn_custom,
                scheduler.scale_mode,
                scheduler.cycle_momentum,
                **momenta,
                total_steps=total_steps,
            )
        )
    return schedules


def _check_sequences(name: str, schedules: Sequence[ScheduleSequence]) -> None:
    """Checks that ours and torch's SequentialLR do the same, also later.

    Raises:
        ValueError: They do not.
    """
    if any(kind is SequentialLR for kind, _ in SequentialLR.columns_of(schedules)[1:]):
        raise ValueError(f"{name} has a SequentialLR after a milestone, where torch's raises an error")
    for schedule in schedules:
        if len({own.drives_momentum for own in schedule.schedules}) > 1:
            raise ValueError(
                f"{name} drives the momentum in only some of its schedulers, which cannot be converted: in the others "
                f"torch's uses the last momentum, and ours the group's own, in {schedule}"
            )
        if len([own for own in schedule.schedules if OneCycleLR.recognises(own)]) > 1:
            raise ValueError(f"{name} has more than one OneCycleLR: torch's share one max_lr, in {schedule}")


def kind_of_ours(schedules: Sequence[Schedule | None], step: int) -> type[FusedScheduler]:
    """The scheduler class for the groups' schedules.

    Raises:
        ValueError: Torch has no scheduler that continues from them.
    """
    for index, schedule in enumerate(schedules):
        if schedule is None or kind_of([schedule]) is None:
            what = "no schedule" if schedule is None else f"the schedule {schedule}"
            raise ValueError(
                f"param_groups[{index}] has {what}, which cannot be converted: torch has {', '.join(KINDS)}, one for "
                "all groups"
            )
        if turns_in_torch(schedule, step):
            raise ValueError(
                f"schedule step {step} cannot be converted: it is past the end of {schedule}, where torch's scheduler "
                "does not hold its last learning rate, as this one does"
            )
    kind = kind_of(schedules)
    if kind is None:
        raise ValueError(
            f"param_groups have the schedules {schedules}, which cannot be converted: torch has one scheduler for all "
            "groups"
        )
    return kind


def make_torchs(
    kind: type[FusedScheduler], plain: torch.optim.Optimizer, schedules: Sequence[Any], step: int = 0
) -> lr_scheduler.LRScheduler:
    """A new scheduler of torch's class, without its state. Changes the learning rates of ``plain``."""
    arguments: dict[str, Any] = kind.arguments_of(schedules)
    if kind is SequentialLR:
        _check_sequences("the sequence", schedules)
        arguments["schedulers"] = [make_torchs(own, plain, column) for own, column in kind.columns_of(schedules)]
    if kind is CyclicLR:
        arguments |= {"scale_fn": _host_scale_fn(schedules[0], step), "last_epoch": step - 1}
    try:
        scheduler: lr_scheduler.LRScheduler = kind.TORCH(plain, **arguments)
    except OverflowError as error:
        raise ValueError(
            f"schedule step {step} cannot be converted: torch's CyclicLR overflows there, in mode {arguments['mode']!r}"
        ) from error
    return scheduler


def torchs_keys(packed: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """What is in a packed state_dict and torch's own has too."""
    state = {key: packed[key] for key in own if key in packed}
    if "_schedulers" in state:
        pairs = zip(packed["_schedulers"], own["_schedulers"], strict=True)
        state["_schedulers"] = [torchs_keys(*pair) for pair in pairs]
    return state


def _host_scale_fn(schedule: Cyclic, step: int) -> Any:
    """The ``scale_fn`` of a schedule, as torch's CyclicLR can call it; None if it has none."""
    if schedule.scale_fn is None or not is_triton_function(schedule.scale_fn):
        return schedule.scale_fn
    try:
        schedule.lr(step)
    # Triton's functions raise what they like outside of a kernel.
    except Exception as error:
        raise ValueError(
            f"scale_fn {function_name(schedule.scale_fn)!r} calls Triton functions, which the host cannot "
            "call: it cannot be converted"
        ) from error
    return host_function(schedule.scale_fn)
