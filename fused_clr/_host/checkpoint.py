"""Checkpoints in torch's format: builds a state_dict, and checks a saved one. Changes no object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._device.rules import UpdateRule
from .._device.sharding import is_dtensor
from ..schedules import Schedule
from .hyperparameters import check_hyperparameter, check_schedule_step
from .param_group import ParamGroup


class Readings(NamedTuple):
    """Values read from the devices for a checkpoint.

    Attributes:
        schedule_step: The schedule step.
        lr_and_momentum: Those of each group, as ``group["lr"]`` and the momentum key give them.
        update_steps: Number of updates of each parameter.
    """

    schedule_step: int
    lr_and_momentum: Sequence[tuple[float, float]]
    update_steps: Mapping[Tensor, int]


def pack(
    groups: Sequence[ParamGroup], state: Mapping[Any, Any], readings: Readings, rule: UpdateRule
) -> dict[str, Any]:
    """The state_dict of an optimizer, in torch's format.

    Args:
        groups: The param groups.
        state: ``optimizer.state``.
        readings: Values read from the devices.
        rule: The update rule.

    Returns:
        ``state`` and ``param_groups``. ``step`` is a copy, on the CPU unless the group has ``fused`` or
        ``capturable``, as in torch; the other state tensors are not copied. A group also holds ``schedule``: plain
        values and the ``step``, or None.
    """
    ids: dict[int, int] = {}
    on_device = set()
    packed_groups = []
    for group, (lr, momentum) in zip(groups, readings.lr_and_momentum, strict=True):
        packed = {key: group.stored(key) for key in group if key != "params"}
        if group.schedule is not None:
            packed["lr"] = lr
            if group.schedule.drives_momentum:
                packed[rule.momentum_key] = rule.with_momentum(packed[rule.momentum_key], momentum)
            # The group's own momentum stays in force where the schedule leaves the momentum alone.
            clock = {"step": readings.schedule_step, "momentum": rule.momentum_of(group.settings().values)}
            packed["schedule"] = group.schedule.to_dict(stacklevel=4) | clock
        for param in group.stored("params"):
            ids[id(param)] = len(ids)
            if group.stored("fused") or group.stored("capturable"):
                on_device.add(id(param))
        packed["params"] = [ids[id(param)] for param in group.stored("params")]
        packed_groups.append(packed)

    packed_state: dict[Any, Any] = {}
    for key, entry in state.items():
        if id(key) not in ids:
            packed_state[key] = entry
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
        schedule_step: The saved schedule step; None if no schedule was saved.
    """

    groups: list[dict[str, Any]]
    entries: dict[Tensor, Mapping[str, Any]]
    schedules: list[Schedule | None]
    schedule_step: int | None


def check(saved: Any, groups: Sequence[ParamGroup], rule: UpdateRule) -> Loaded:
    """Checks a state_dict of a fused optimizer or of the corresponding torch optimizer.

    Args:
        saved: The state_dict. Not changed.
        groups: The param groups that it will be loaded into. Not changed.
        rule: The update rule.

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
    steps: list[int] = []
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
        checked.append({k: check_hyperparameter(k, v) for k, v in group.items() if k not in ("params", "schedule")})
        schedule = None
        if group.get("schedule") is not None:
            schedule, step, momentum = _check_schedule(f"{name}['schedule']", group["schedule"], own.schedule)
            steps.append(step)
            if schedule.drives_momentum:
                # What is saved there is the schedule's.
                cycled = checked[-1][rule.momentum_key]
                checked[-1][rule.momentum_key] = rule.with_momentum(cycled, momentum)
        schedules.append(schedule)
        for key, param in zip(group["params"], params, strict=True):
            if entries.get(key):
                _check_entry(f"state_dict['state'][{key!r}]", entries[key], param, rule)
                by_param[param] = entries[key]
    return Loaded(checked, by_param, schedules, steps[0] if steps else None)


def _check_schedule(name: str, saved: Any, present: Schedule | None) -> tuple[Schedule, int, float]:
    """The saved schedule and schedule step, and the group's own momentum.

    A ``scale_fn`` is taken from the group's present schedule.
    """
    if not isinstance(saved, Mapping) or not {"step", "momentum"} <= set(saved):
        raise ValueError(f"{name} is not a saved schedule, got {saved!r}")
    step = check_schedule_step(f"{name}['step']", saved["step"])
    values = {key: value for key, value in saved.items() if key not in ("step", "momentum")}
    try:
        return Schedule.from_dict(values, present), step, float(saved["momentum"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} is not a saved schedule: {error}") from error


def _check_entry(name: str, entry: Any, param: Tensor, rule: UpdateRule) -> None:
    required = rule.states[: rule.required_states]
    if not isinstance(entry, Mapping) or not {"step", *required} <= set(entry):
        raise ValueError(f"{name} must be a dict with 'step', {', '.join(map(repr, required))}")
    try:
        step = float(entry["step"])
    except (TypeError, ValueError, RuntimeError):
        step = -1.0
    if not (step >= 0 and step.is_integer()):
        raise ValueError(f"{name}['step'] must be an integer >= 0, got {entry['step']!r}")
    for key in rule.states:
        value = entry.get(key)
        if value is None and key not in required:
            continue
        if not isinstance(value, Tensor) or value.shape != param.shape:
            shape = tuple(value.shape) if isinstance(value, Tensor) else repr(value)
            raise ValueError(
                f"{name}[{key!r}] must be a tensor of the parameter's shape {tuple(param.shape)}, got {shape}"
            )
        if is_dtensor(value) and not is_dtensor(param):
            raise ValueError(f"{name}[{key!r}] is a DTensor and the parameter is not: give its full_tensor()")
