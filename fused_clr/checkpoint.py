"""Checkpoints in torch's format: written so that `torch.optim.Adam` loads them, loaded in place."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .backends.engine import moment_names
from .hyperparameters import check_hyperparameter, check_schedule_step
from .schedules import Cyclic
from .sharding import is_dtensor, sharded_like

if TYPE_CHECKING:
    from .optim import FusedAdam

# What every version of torch's Adam saves of a group.
REQUIRED_KEYS = {"params", "lr", "betas", "eps", "weight_decay", "amsgrad"}


def function_name(function: Any) -> str:
    """What messages call a scale_fn."""
    return getattr(function, "__qualname__", None) or getattr(function, "__name__", None) or type(function).__name__


def warn_unsaved(function: Any) -> None:
    """Warns that a ``scale_fn`` is not in the checkpoint."""
    warnings.warn(
        f"scale_fn {function_name(function)!r} cannot be saved in a checkpoint; whoever loads it must give it again",
        stacklevel=4,
    )


def encode_schedule(schedule: Cyclic, step: int) -> dict[str, Any]:
    """A schedule and its step as plain values, which ``torch.load(weights_only=True)`` takes.

    A ``scale_fn`` leaves its name.
    """
    encoded = {field.name: getattr(schedule, field.name) for field in dataclasses.fields(schedule)} | {"step": step}
    if schedule.scale_fn is not None:
        warn_unsaved(schedule.scale_fn)
        encoded["scale_fn"] = function_name(schedule.scale_fn)
    return encoded


def decode_schedule(encoded: Any, present: Cyclic | None, name: str) -> tuple[Cyclic, int]:
    """The schedule and step that `encode_schedule` encoded, with the ``scale_fn`` of the one that is present.

    Raises:
        ValueError: It is none, or its ``scale_fn`` is missing.
    """
    known = {field.name for field in dataclasses.fields(Cyclic)} | {"step"}
    if not isinstance(encoded, Mapping) or set(encoded) != known:
        raise ValueError(f"{name}['schedule'] is not a saved schedule, got {encoded!r}")
    values = dict(encoded)
    step = check_schedule_step(f"{name}['schedule']['step']", values.pop("step"))
    if values["scale_fn"] is not None:
        if present is None or present.scale_fn is None:
            raise ValueError(
                f"{name}['schedule'] was saved with the scale_fn {values['scale_fn']!r}, which a checkpoint cannot "
                "hold: give the group a schedule with that scale_fn before loading"
            )
        values["scale_fn"] = present.scale_fn
    return Cyclic(**values), step


def optimizer_state_dict(optimizer: FusedAdam) -> dict[str, Any]:
    """`FusedAdam.state_dict`. Waits for the device.

    Args:
        optimizer: The optimizer.

    Returns:
        torch's dict. ``step`` is a copy, on the CPU unless the group says ``fused`` or ``capturable``, as in torch;
        the moments are the live tensors. A group also holds ``schedule``: plain values and the ``step``, or None.
    """
    for pre_hook in optimizer._optimizer_state_dict_pre_hooks.values():
        pre_hook(optimizer)
    schedule_step = optimizer.schedule_step
    ids: dict[int, int] = {}
    on_device = {}
    groups = []
    for group in optimizer.param_groups:
        packed = {key: value for key, value in group.items() if key != "params"}
        if group.schedule is not None:
            packed["schedule"] = encode_schedule(group.schedule, schedule_step)
        for param in group.stored("params"):
            ids[id(param)] = len(ids)
            on_device[id(param)] = bool(group.stored("fused") or group.stored("capturable"))
        packed["params"] = [ids[id(param)] for param in group.stored("params")]
        groups.append(packed)

    state: dict[Any, Any] = {}
    for key, entry in optimizer.state.items():
        if id(key) not in ids:
            state[key] = entry
        elif entry:
            state[ids[id(key)]] = copied = dict(entry)
            copied["step"] = entry["step"].clone() if on_device[id(key)] else entry["step"].detach().cpu().clone()
    state_dict = {"state": state, "param_groups": groups}
    for post_hook in optimizer._optimizer_state_dict_post_hooks.values():
        result = post_hook(optimizer, state_dict)
        state_dict = state_dict if result is None else result
    return state_dict


@torch.no_grad()
def load_optimizer_state_dict(optimizer: FusedAdam, state_dict: Any) -> None:
    """`FusedAdam.load_state_dict`. Everything is checked before anything is changed.

    Args:
        optimizer: The optimizer.
        state_dict: A checkpoint of `FusedAdam` or `torch.optim.Adam`. Not changed.

    Raises:
        ValueError: It is corrupt, or of other parameters.
    """
    loaded: Any = dict(state_dict) if isinstance(state_dict, Mapping) else state_dict
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        result = pre_hook(optimizer, loaded)
        loaded = loaded if result is None else result
    groups, entries, schedules = _checked_state_dict(optimizer, loaded)

    for group, saved, schedule in zip(optimizer.param_groups, groups, schedules, strict=True):
        if group.schedule is not None and group.schedule.cycle_momentum:
            # The saved beta1 is the schedule's doing; the group's own stays for when the schedule is taken away.
            saved = {**saved, "betas": (group.stored("betas")[0], saved["betas"][1])}
        for key, value in saved.items():
            own = key in ("params", "schedule") or (key == "decoupled_weight_decay" and group.stored(key))
            if not own:
                group.store(key, value)
        if schedule is not None:
            group.store("schedule", schedule[0])
    optimizer._engines.hyperparameters_changed = True
    for engine in optimizer._engines.ready():
        steps = engine.get_update_steps()
        for index, param in enumerate(record.param for record in engine.records):
            entry = entries.get(param)
            if entry is None and not optimizer.state.get(param):
                continue
            engine.prepare_state(index)
            state = optimizer.state[param]
            steps[index] = 0 if entry is None else int(entry["step"])
            for key in moment_names(amsgrad="max_exp_avg_sq" in state):
                # In place: a captured graph may read these tensors.
                if entry is not None and key in entry:
                    state[key].copy_(sharded_like(entry[key], param))
                else:
                    state[key].zero_()
        engine.set_update_steps(steps)
        engine.drop_plans()
    steps = [schedule[1] for schedule in schedules if schedule is not None]
    if steps:
        optimizer.set_schedule_step(steps[0])
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def _checked_state_dict(
    optimizer: FusedAdam, loaded: Any
) -> tuple[list[dict[str, Any]], dict[Tensor, Any], list[tuple[Cyclic, int] | None]]:
    """The saved groups, the saved state by parameter, and the saved schedules; or a ValueError."""
    if not isinstance(loaded, Mapping) or not {"state", "param_groups"} <= set(loaded):
        raise ValueError("state_dict must be a dict with 'state' and 'param_groups'")
    own_groups, groups, entries = optimizer.param_groups, loaded["param_groups"], loaded["state"]
    if not isinstance(groups, list) or not isinstance(entries, Mapping):
        raise ValueError("state_dict['param_groups'] must be a list and state_dict['state'] a dict")
    if len(groups) != len(own_groups):
        raise ValueError(f"state_dict has {len(groups)} param groups, the optimizer {len(own_groups)}")

    checked: list[dict[str, Any]] = []
    schedules: list[tuple[Cyclic, int] | None] = []
    by_param: dict[Tensor, Any] = {}
    for index, (own, saved) in enumerate(zip(own_groups, groups, strict=True)):
        name = f"state_dict['param_groups'][{index}]"
        if not isinstance(saved, Mapping) or not isinstance(saved.get("params"), list):
            raise ValueError(f"{name} must be a dict with a list 'params'")
        if not set(saved) >= REQUIRED_KEYS:
            raise ValueError(f"{name} has no {sorted(REQUIRED_KEYS - set(saved))}")
        if len(saved["params"]) != len(own.stored("params")):
            raise ValueError(f"{name} has {len(saved['params'])} parameters, the optimizer {len(own.stored('params'))}")
        checked.append({k: v if k == "schedule" else check_hyperparameter(k, v) for k, v in saved.items()})
        encoded = saved.get("schedule")
        schedules.append(None if encoded is None else decode_schedule(encoded, own.schedule, name))
        for key, param in zip(saved["params"], own.stored("params"), strict=True):
            if entries.get(key):
                _check_entry(f"state_dict['state'][{key!r}]", entries[key], param)
                by_param[param] = entries[key]
    return checked, by_param, schedules


def _check_entry(name: str, entry: Any, param: Tensor) -> None:
    if not isinstance(entry, Mapping) or not {"step", "exp_avg", "exp_avg_sq"} <= set(entry):
        raise ValueError(f"{name} must be a dict with 'step', 'exp_avg' and 'exp_avg_sq'")
    try:
        step = float(entry["step"])
    except (TypeError, ValueError, RuntimeError):
        step = -1.0
    if not (step >= 0 and step.is_integer()):
        raise ValueError(f"{name}['step'] must be an integer >= 0, got {entry['step']!r}")
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        value = entry.get(key)
        if value is None and key == "max_exp_avg_sq":
            continue
        if not isinstance(value, Tensor) or value.shape != param.shape:
            shape = tuple(value.shape) if isinstance(value, Tensor) else repr(value)
            raise ValueError(
                f"{name}[{key!r}] must be a tensor of the parameter's shape {tuple(param.shape)}, got {shape}"
            )
        if is_dtensor(value) and not is_dtensor(param):
            raise ValueError(f"{name}[{key!r}] is a DTensor and the parameter is none: give its full_tensor()")
