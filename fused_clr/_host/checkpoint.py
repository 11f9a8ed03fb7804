"""Checkpoints in torch's format: builds a state_dict, and checks a saved one. Changes no object."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import check_bool, check_integer, check_number, check_number_or_tensor
from .._device.moments import AVERAGE
from .._device.rules import UpdateRule
from .._device.sharding import is_dtensor
from .._device.tensors import has_memory
from .._warnings import warn
from ..schedules import Schedule
from .hyperparameters import (
    MAX_SCHEDULE_STEP,
    N_AVERAGED,
    check_count,
    check_has_decay_schedule,
    check_hyperparameter,
)
from .param_group import ParamGroup


class Readings(NamedTuple):
    """Values read from the devices for a checkpoint.

    Attributes:
        schedule_step: The schedule step.
        lr_and_momentum: Those of each group, as ``group["lr"]`` and the momentum key give them.
        update_steps: Number of updates of each parameter.
        average_counts: How often the parameters of each group were averaged; None without averaging.
    """

    schedule_step: int
    lr_and_momentum: Sequence[tuple[float, float]]
    update_steps: Mapping[Tensor, int]
    average_counts: Sequence[int] | None = None


def pack(
    groups: Sequence[ParamGroup], state: Mapping[Any, Any], readings: Readings, rule: UpdateRule, is_ahead: bool
) -> dict[str, Any]:
    """The state_dict of an optimizer, in torch's format.

    Args:
        groups: The param groups.
        state: ``optimizer.state``.
        readings: Values read from the devices.
        rule: The update rule.
        is_ahead: `optimizer.step` has advanced the schedule, and ``scheduler.step`` has not been called yet.

    Returns:
        ``state`` and ``param_groups``. ``step`` is a copy, on the CPU unless the group has ``fused`` or
        ``capturable``, as in torch; the other state tensors are not copied. A group also holds ``schedule``: plain
        values, with the fields of `Clock`; or None. With averaging it holds ``n_averaged``.
    """
    clock = {
        "step": readings.schedule_step,
        "is_ahead": is_ahead,
        "updates": max(readings.update_steps.values(), default=0) if rule.has_step else 0,
    }
    ids: dict[int, int] = {}
    on_device, averaged = set(), set()
    packed_groups = []
    for index, (group, (lr, momentum)) in enumerate(zip(groups, readings.lr_and_momentum, strict=True)):
        packed = {key: group.stored(key) for key in group if key != "params"}
        if readings.average_counts is not None:
            packed[N_AVERAGED] = readings.average_counts[index]
        if group.schedule is not None:
            packed["lr"] = lr
            if group.schedule.drives_momentum:
                packed[rule.momentum_key] = rule.with_momentum(packed[rule.momentum_key], momentum)
            own = {"momentum": rule.momentum_of(group.settings().values)}
            packed["schedule"] = group.schedule.to_dict() | clock | own
        if group.weight_decay_schedule is not None:
            packed["weight_decay"] = group.weight_decay_schedule.lr(max(readings.schedule_step - is_ahead, 0))
            packed["weight_decay_schedule"] = group.weight_decay_schedule.to_dict()
        for param in group.stored("params"):
            ids[id(param)] = len(ids)
            if group.stored("fused") or group.stored("capturable"):
                on_device.add(id(param))
            if packed.get(N_AVERAGED):
                averaged.add(id(param))
        packed["params"] = [ids[id(param)] for param in group.stored("params")]
        packed_groups.append(packed)

    packed_state: dict[Any, Any] = {}
    for key, entry in state.items():
        if id(key) not in ids:
            packed_state[key] = entry
        elif entry and not rule.has_step:
            # A state without an update is one that torch's optimizer would not have yet.
            if not (key in readings.update_steps and readings.update_steps[key] == 0):
                packed_state[ids[id(key)]] = dict(entry)
            elif id(key) in averaged and AVERAGE in entry:
                packed_state[ids[id(key)]] = {AVERAGE: entry[AVERAGE]}
        elif entry and "step" not in entry:
            packed_state[ids[id(key)]] = dict(entry)
        elif entry:
            packed_state[ids[id(key)]] = copied = dict(entry)
            if id(key) in on_device or key not in readings.update_steps:
                copied["step"] = entry["step"].clone()
            else:
                copied["step"] = torch.tensor(readings.update_steps[key], dtype=torch.float32, device="cpu")
    return {"state": packed_state, "param_groups": packed_groups}


class Loaded(NamedTuple):
    """A checked state_dict, ready to be loaded.

    Attributes:
        groups: The saved groups, without ``params`` and ``schedule``.
        entries: The saved state, by parameter.
        schedules: The saved schedule of each group; None for a group saved without one.
        other_state: The saved state that belongs to no parameter.
        schedule_step: The saved schedule step; None if no schedule was saved.
        is_ahead: See `pack`.
        average_counts: How often the parameters of each group were averaged; None if that was not saved.
    """

    groups: list[dict[str, Any]]
    entries: dict[Tensor, Mapping[str, Any]]
    other_state: dict[Any, Any]
    schedules: list[Schedule | None]
    schedule_step: int | None
    is_ahead: bool
    average_counts: Sequence[int] | None = None


def check(saved: Any, groups: Sequence[ParamGroup], rule: UpdateRule, has_averages: bool) -> Loaded:
    """Checks a state_dict of a fused optimizer or of the corresponding torch optimizer.

    Args:
        saved: The state_dict. Not changed.
        groups: The param groups that it will be loaded into. Not changed.
        rule: The update rule.
        has_averages: They are averaged. If not, what is saved of averages is kept as it is.

    Returns:
        The values to load.

    Raises:
        ValueError: It is corrupt, or belongs to other parameters.
    """
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= set(saved):
        raise ValueError("state_dict must be a dict with 'state' and 'param_groups'")
    saved_groups, entries = saved["param_groups"], saved["state"]
    if not isinstance(saved_groups, list) or not isinstance(entries, Mapping):
        raise ValueError("state_dict['param_groups'] must be a list and state_dict['state'] a dict")
    if len(saved_groups) != len(groups):
        raise ValueError(f"state_dict has {len(saved_groups)} param groups, the optimizer {len(groups)}")

    needed = {"params", "lr"} | rule.saved_keys
    checked: list[dict[str, Any]] = []
    schedules: list[Schedule | None] = []
    clocks: list[Clock] = []
    average_counts: list[int] = []
    by_param: dict[Tensor, Mapping[str, Any]] = {}
    for index, (own, group) in enumerate(zip(groups, saved_groups, strict=True)):
        name = f"state_dict['param_groups'][{index}]"
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), list):
            raise ValueError(f"{name} must be a dict with a list 'params'")
        if not set(group) >= needed:
            raise ValueError(f"{name} has no {sorted(needed - set(group))}")
        params = own.stored("params")
        if len(group["params"]) != len(params):
            raise ValueError(f"{name} has {len(group['params'])} parameters, the optimizer {len(params)}")
        values = {key: value for key, value in group.items() if key not in ("params", "schedule")}
        if has_averages:
            average_counts.append(check_count(f"{name}[{N_AVERAGED!r}]", values.pop(N_AVERAGED, 0)))
        if values.get("weight_decay_schedule") is not None:
            key = "weight_decay_schedule"
            values[key] = _decode(f"{name}[{key!r}]", values[key], own.weight_decay_schedule)
            check_has_decay_schedule(rule, values)
        checked.append({key: check_hyperparameter(key, deepcopy(value), new=False) for key, value in values.items()})
        schedule = None
        if group.get("schedule") is not None:
            schedule, clock = _check_schedule(f"{name}['schedule']", group["schedule"], own.schedule)
            clocks.append(clock)
            if schedule.drives_momentum:
                # What is saved there is the schedule's.
                cycled = checked[-1][rule.momentum_key]
                checked[-1][rule.momentum_key] = rule.with_momentum(cycled, clock.momentum)
        schedules.append(schedule)
        for key, param in zip(group["params"], params, strict=True):
            if entries.get(key):
                _check_entry(f"state_dict['state'][{key!r}]", entries[key], param, rule)
                by_param[param] = entries[key]
    ids = {key for group in saved_groups for key in group["params"]}
    other_state = {key: value for key, value in entries.items() if key not in ids}
    if not clocks:
        return Loaded(checked, by_param, other_state, schedules, None, False, average_counts)
    if len({clock._replace(momentum=0.0) for clock in clocks}) > 1:
        raise ValueError(
            f"state_dict['param_groups'] have schedules at different steps, {[clock.step for clock in clocks]}: an "
            "optimizer has one schedule step"
        )
    step, is_ahead = clocks[0].step, clocks[0].is_ahead
    pairs = list(zip(saved_groups, schedules, strict=True))
    if rule.has_step:
        updates = max((rule.saved_step(entry) for entry in by_param.values()), default=0)
        is_older, latest = clocks[0].updates != updates, step + updates - clocks[0].updates
        candidates = [number for number in (latest, latest - 1) if number >= 0]
    else:
        # Updates are not saved. Values of another step give it away.
        is_older, candidates = not all(_agrees(*pair, max(step - is_ahead, 0), rule, True) for pair in pairs), []
    if is_older:
        # Another optimizer trained on, and carried our schedules along as they were. Its scheduler may be one behind.
        agreeing = [number for number in candidates if all(_agrees(*pair, number, rule) for pair in pairs)]
        message = "state_dict has old schedules, since another optimizer continued the training: "
        if not agreeing:
            message += "they are not loaded, and the optimizer keeps its own; load the scheduler's state_dict"
            warn(message)
            return Loaded(checked, by_param, other_state, [None] * len(groups), None, False, average_counts)
        step, is_ahead = agreeing[0], False
        warn(f"{message}the schedule step is set to {step}, which agrees with its updates and lr")
    return Loaded(checked, by_param, other_state, schedules, step, is_ahead, average_counts)


class Clock(NamedTuple):
    """What `pack` saves with a schedule.

    Attributes:
        step: The schedule step.
        momentum: The group's own momentum, which holds where the schedule leaves the momentum alone.
        is_ahead: The optimizer has stepped and its scheduler has not.
        updates: Updates of the group's parameters.
    """

    step: int
    momentum: float
    is_ahead: bool
    updates: int


def _agrees(
    group: Mapping[str, Any], schedule: Schedule | None, step: int, rule: UpdateRule, if_unknown: bool = False
) -> bool:
    """Whether a saved group has the learning rate and momentum of ``schedule`` at ``step``.

    ``if_unknown`` is the answer where they have no values on the host.
    """
    if schedule is None:
        return True
    try:
        lr, momentum = schedule.lr_and_momentum(step)
    except Exception:
        # A `@triton.jit` scale_fn that calls Triton's functions has no values on the host.
        return if_unknown
    # torch's formula drifts, and a tensor lr is float32.
    tolerance = {"rel_tol": 1e-6, "abs_tol": 1e-12}
    same = math.isclose(float(group["lr"]), lr, **tolerance)
    return same and (math.isnan(momentum) or math.isclose(rule.momentum_of(group), momentum, **tolerance))


def _check_schedule(name: str, saved: Any, present: Schedule | None) -> tuple[Schedule, Clock]:
    """The saved schedule and its clock. A ``scale_fn`` is taken from the group's present schedule."""
    if not isinstance(saved, Mapping) or not set(Clock._fields) <= set(saved):
        raise ValueError(f"{name} is not a saved schedule, with {Clock._fields}, got {saved!r}")
    clock = Clock(
        check_count(f"{name}['step']", saved["step"]),
        check_number(f"{name}['momentum']", saved["momentum"], "a finite number >= 0", lambda x: 0 <= x < math.inf),
        check_bool(f"{name}['is_ahead']", saved["is_ahead"]),
        check_integer(f"{name}['updates']", saved["updates"], "an integer >= 0", lambda n: n >= 0),
    )
    values = {key: value for key, value in saved.items() if key not in Clock._fields}
    return _decode(name, values, present), clock


def _decode(name: str, saved: Any, present: Schedule | None) -> Schedule:
    try:
        return Schedule.from_dict(saved, present)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} is not a saved schedule: {error}") from error


def _check_entry(name: str, entry: Any, param: Tensor, rule: UpdateRule) -> None:
    if not has_memory(param):
        raise ValueError(f"{name} is the state of a parameter without memory, on {param.device}: load it later")
    required = rule.states[: rule.required_states]
    needed = (["step"] if rule.has_step else []) + list(required)
    if not isinstance(entry, Mapping) or not set(needed) <= set(entry):
        raise ValueError(f"{name} must be a dict{' with ' if needed else ''}{', '.join(map(repr, needed))}")
    if rule.has_step:
        _check_step(f"{name}['step']", entry["step"])
    for key in (*rule.states, AVERAGE):
        value = entry.get(key)
        if value is None and key not in required:
            continue
        if not isinstance(value, Tensor) or value.shape != param.shape:
            shape = tuple(value.shape) if isinstance(value, Tensor) else repr(value)
            raise ValueError(
                f"{name}[{key!r}] must be a tensor of the parameter's shape {tuple(param.shape)}, got {shape}"
            )
        if value.layout != torch.strided or value.is_meta:
            raise ValueError(f"{name}[{key!r}] must be a dense tensor with data, got {value.layout} on {value.device}")
        if is_dtensor(value) and not is_dtensor(param):
            raise ValueError(f"{name}[{key!r}] is a DTensor and the parameter is not: give its full_tensor()")


def _check_step(name: str, step: Any) -> None:
    allowed = "an integer in [0, 2**53], or a float or tensor of one"
    if isinstance(step, Tensor) and step.is_meta:
        raise ValueError(f"{name} must be {allowed}, got {step!r}")
    check_number_or_tensor(name, step, allowed, lambda x: 0 <= x <= MAX_SCHEDULE_STEP and x.is_integer())
