"""Checks of what schedulers are given: arguments, and the state_dicts of torch's schedulers and ours."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .._checks import check_bool, check_integer
from .._host.hyperparameters import MAX_SCHEDULE_STEP, check_count
from .._host.optimizer import FusedOptimizer
from .._host.param_group import ParamGroup
from ..schedules import Cosine, OneCycle, Schedule
from ..schedules.sequence import ScheduleSequence

# Allowed difference of a learning rate that torch computed from its schedule: torch's formulas drift.
DRIFT = 1e-6
# Likewise for a float32 tensor, which torch rounds once a step.
TENSOR_DRIFT = 2.0**-24


def check_optimizer(optimizer: Optimizer, kind: str, last_epoch: int) -> tuple[FusedOptimizer, int]:
    """Checks the arguments that all schedulers have.

    Returns:
        The optimizer; the schedule step to start with.

    Raises:
        TypeError: ``optimizer`` is not a fused optimizer.
        ValueError: ``last_epoch`` is not allowed.
        KeyError: ``last_epoch`` is given and a group has no ``initial_lr``.
    """
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(
            f"optimizer must be a FusedAdam, FusedAdamW or FusedSGD, got {type(optimizer).__name__}; "
            f"torch.optim.lr_scheduler.{kind} drives torch's optimizers"
        )
    last_epoch = check_last_epoch(last_epoch)
    if last_epoch != -1:
        for index, group in enumerate(optimizer.param_groups):
            needed_key(group, index, "initial_lr", last_epoch)
    return optimizer, last_epoch + 1


def needed_key(group: ParamGroup, index: int, key: str, last_epoch: int) -> Any:
    """The value of a key that torch's schedulers write to a group, and need when they are resumed.

    Raises:
        KeyError: The group does not have it.
    """
    if key not in group:
        raise KeyError(
            f"param_groups[{index}] has no {key!r}, which last_epoch={last_epoch} needs: load the optimizer's "
            "checkpoint first"
        )
    return group.stored(key)


def check_last_epoch(value: Any) -> int:
    """Checks a ``last_epoch``. Raises a ValueError if it is not allowed."""
    allowed = ">= -1, and an integer below 2**53"
    return check_integer("last_epoch", value, allowed, lambda n: -1 <= n < MAX_SCHEDULE_STEP)


def per_group(name: str, value: Any, num_groups: int) -> list[Any]:
    """One value per group, from one for all or a list."""
    if not isinstance(value, (list, tuple)):
        return [value] * num_groups
    if len(value) != num_groups:
        raise ValueError(f"{name} must have {num_groups} entries, one per param group, got {len(value)}: {value}")
    return list(value)


def common(kind: str, values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the schedules of all groups have in common: the first of some mappings that are equal.

    Raises:
        ValueError: They differ, which torch's class cannot express; the message names the value.
    """
    for index, own in enumerate(values):
        for key, first in values[0].items():
            if own[key] != first:
                raise ValueError(
                    f"param_groups[{index}] has {key}={own[key]!r} and param_groups[0] {first!r}: torch's "
                    f"{kind} has one for all groups"
                )
    return dict(values[0])


def pack_frame(
    base_lrs: Sequence[float], last_epoch: int, step_count: int, last_lrs: Sequence[float]
) -> dict[str, Any]:
    """The keys in a state_dict of all of torch's classes but SequentialLR; see `FusedScheduler.pack`."""
    return {
        "base_lrs": list(base_lrs),
        "last_epoch": last_epoch,
        "_step_count": step_count,
        "_is_initial": False,
        "_get_lr_called_within_step": False,
        "_last_lr": list(last_lrs),
    }


def check_frame(name: str, state: Any, kind: str, needed_keys: frozenset[str]) -> None:
    """Checks that a state_dict has the keys of torch's class, and the values of `pack_frame`.

    Raises:
        ValueError: A key is missing or a value not allowed; the message names it.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"{name} must be the state_dict of a {kind}, got {state!r}")
    missing = needed_keys - set(state)
    if missing:
        raise ValueError(f"{name} is not the state_dict of a {kind}: it has no {sorted(missing)}")
    allowed = "an integer >= -1"
    check_integer(f"{name}['last_epoch']", state["last_epoch"], allowed, lambda n: -1 <= n <= MAX_SCHEDULE_STEP)
    check_integer(f"{name}['_step_count']", state.get("_step_count", 0), "an integer >= 0", lambda n: n >= 0)
    if "schedule_step" in state:
        pair = state["schedule_step"]
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(f"{name}['schedule_step'] must be a pair, got {pair!r}")
        check_count(f"{name}['schedule_step'][0]", pair[0])
        check_bool(f"{name}['schedule_step'][1]", pair[1])


def is_close(value: Any, expected: float, scale: float, step: int) -> bool:
    """Whether a learning rate or momentum of torch's is the one of the schedule, but for drift.

    Args:
        value: Float, or a tensor of 1 element.
        expected: What the schedule says.
        scale: The largest value of the schedule: torch's formulas cancel near 0.
        step: The schedule step.
    """
    drift = DRIFT + (TENSOR_DRIFT * step if isinstance(value, Tensor) else 0.0)
    return math.isclose(float(value), expected, rel_tol=drift, abs_tol=drift * scale)


def turns_in_torch(schedule: Schedule, step: int) -> bool:
    """Whether a schedule is past its end, in a scheduler of torch that does not hold its last value there."""
    if isinstance(schedule, ScheduleSequence):
        index = bisect_right(schedule.milestones, step)
        return turns_in_torch(schedule.schedules[index], step - (0, *schedule.milestones)[index])
    return isinstance(schedule, (Cosine, OneCycle)) and step > schedule.end_step()


def check_last_lrs(kind: str, saved: Any, schedules: Sequence[Schedule], step: int) -> None:
    """Checks the learning rates that torch's class would continue from."""
    for index, schedule in enumerate(schedules):
        if turns_in_torch(schedule, step):
            raise ValueError(
                f"state_dict['last_epoch'] must not be past the end of the schedule, where torch's {kind} "
                f"does not hold its last learning rate as ours does, got {step}, after {schedule}"
            )
        lr = schedule.lr(step)
        try:
            agrees = saved is None or is_close(saved[index], lr, schedule.largest_lr, step)
        except (TypeError, ValueError, LookupError):
            agrees = False
        if not agrees:
            raise ValueError(
                f"state_dict['_last_lr'] must agree with its other values, which give {lr} for param_groups[{index}] "
                f"at step {step}, got {saved!r}: something else wrote the learning rate"
            )
