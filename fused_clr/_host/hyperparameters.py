"""Checks of options and hyperparameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .._checks import check_bool, check_integer, check_number, check_number_or_tensor
from .._device.rules import UpdateRule
from .._device.settings import Options
from ..averaging import Averaging
from ..schedules import Schedule

# 64 bytes for each and every group on the device: 640 MB.
MAX_HISTORY_SIZE = 10_000_000
# The schedule step is an int64; its history and the host's closed form are exact up to 2**53.
MAX_SCHEDULE_STEP = 2**53

FLAGS = ("amsgrad", "maximize", "nesterov", "capturable", "decoupled_weight_decay")
# Keys of a param group that torch's optimizers do not have. ``schedule`` is one more, with rules of its own.
OWN_KEYS = ("weight_decay_mode", "weight_decay_max_lr", "weight_decay_schedule")
# How often the parameters of a group were averaged: a key of the group, so that distributed checkpoints have it.
N_AVERAGED = "n_averaged"
WEIGHT_DECAY_MODES = ("lr", "lr_ratio", "constant", "corrected")
FLAGS_OR_NONE = ("foreach", "fused")


def check_options(name: str, given: Mapping[str, Any]) -> Options:
    """Checks the options of an optimizer.

    Args:
        name: What took them.
        given: Options by name.

    Returns:
        The options, with plain numbers.

    Raises:
        TypeError: One is unknown, or ``averaging`` is not an `Averaging`.
        ValueError: One is not allowed; the message names it, its value and the allowed values.
    """
    unknown = set(given) - set(Options._fields)
    if unknown:
        raise TypeError(
            f"{name} got unexpected arguments {sorted(unknown)}; its own options are {', '.join(Options._fields)}"
        )
    options = Options(**given)
    limit = None if options.max_grad_norm is None else check_max_grad_norm(options.max_grad_norm)
    size = check_integer(
        "history_size",
        options.history_size,
        f"an integer in [0, {MAX_HISTORY_SIZE:,}]",
        lambda n: 0 <= n <= MAX_HISTORY_SIZE,
    )
    flags = {
        name: check_bool(name, getattr(options, name))
        for name in ("skip_if_nonfinite", "write_back_grads", "advance_schedule_on_skip")
    }
    if not (options.averaging is None or isinstance(options.averaging, Averaging)):
        raise TypeError(f"averaging must be a fused_clr.Averaging or None, got {type(options.averaging).__name__}")
    options = options._replace(max_grad_norm=limit, history_size=size, **flags)
    if options.skip_if_nonfinite and limit is None:
        raise ValueError(
            "skip_if_nonfinite=True needs max_grad_norm, which computes the norm; math.inf computes it without clipping"
        )
    return options


def check_max_grad_norm(value: Any) -> float:
    """Checks a limit of the gradient norm.

    Raises:
        ValueError: It is not a number > 0.
    """
    allowed = "a number > 0 (math.inf: only measure) or None"
    return float(check_number("max_grad_norm", value, allowed, lambda x: x > 0))


def check_hyperparameter(name: str, value: Any, new: bool = True) -> Any:
    """Checks a value for ``param_group[name]``.

    Args:
        name: Key of the param group.
        value: The new value.
        new: The group is being created. An ``lr`` that is written later may have any sign, as in torch: an annealing
            may end a little below 0.

    Returns:
        The value to store: plain numbers and booleans, tensors as they are, ``betas`` as a tuple.

    Raises:
        ValueError: ``value`` is not allowed; the message names it and the allowed values.
        TypeError: ``schedule`` is neither a schedule nor None.
    """
    if name == "lr" and not new:
        return check_number_or_tensor(name, value, "a finite number", math.isfinite)
    if name in ("lr", "eps", "weight_decay", "momentum"):
        return check_number_or_tensor(name, value, "a finite number >= 0", lambda x: 0 <= x < math.inf)
    if name == "dampening":
        return check_number_or_tensor(name, value, "a finite number", math.isfinite)
    if name == "betas":
        return _checked_betas(value)
    if name in FLAGS:
        return check_bool(name, value)
    if name in FLAGS_OR_NONE:
        return check_bool(name, value, or_none=True)
    if name == "differentiable" and check_bool(name, value):
        raise ValueError(
            "differentiable must be False: the fused step has no autograd formula, got differentiable=True"
        )
    if name in ("schedule", "weight_decay_schedule"):
        if not (value is None or isinstance(value, Schedule)):
            raise TypeError(f"{name} must be a value from fused_clr.schedules or None, got {type(value).__name__}")
        if name == "weight_decay_schedule" and value is not None:
            _check_decay_schedule(value)
    if name == "weight_decay_mode" and value not in WEIGHT_DECAY_MODES:
        raise ValueError(f"weight_decay_mode must be one of {', '.join(map(repr, WEIGHT_DECAY_MODES))}, got {value!r}")
    if name == "weight_decay_max_lr" and value is not None:
        return check_number(name, value, "a finite number >= 0 or None", lambda x: 0 <= x < math.inf)
    if name in Options._fields:
        raise ValueError(f"{name} applies to all groups: pass it to the optimizer, not in a param group")
    return value


def check_has_decay_schedule(rule: UpdateRule, values: Mapping[str, Any]) -> None:
    """Checks that the rule of a group with a ``weight_decay_schedule`` reads it.

    Raises:
        ValueError: It does not.
    """
    if values.get("weight_decay_schedule") is not None and not rule.has_decay_schedule:
        raise ValueError(
            "weight_decay_schedule must be None in this optimizer: only FusedAdamW takes one, got "
            f"{values['weight_decay_schedule']}"
        )


def _check_decay_schedule(schedule: Schedule) -> None:
    if schedule.drives_momentum:
        raise ValueError(f"weight_decay_schedule must not drive the momentum, got {schedule}")
    try:
        schedule.lr(0)
    except Exception as error:
        # A user's scale_fn may raise anything; one of Triton's functions has no value on the host.
        raise ValueError(f"weight_decay_schedule must have values on the host, got {schedule}: {error}") from error


def _checked_betas(value: Any) -> tuple[Any, Any]:
    # Not a set, which has no order, and not a string.
    if not isinstance(value, (Sequence, np.ndarray)) or isinstance(value, str) or len(value) != 2:
        raise ValueError(f"betas must be a pair of numbers in [0, 1), got {value!r}")
    allowed: tuple[str, Callable[[float], bool]] = "a number in [0, 1)", lambda x: 0 <= x < 1
    return (
        check_number_or_tensor("betas[0]", value[0], *allowed),
        check_number_or_tensor("betas[1]", value[1], *allowed),
    )


def check_count(name: str, step: Any) -> int:
    """Checks a schedule step, or how often a group was averaged.

    Args:
        name: Its name in error messages.
        step: The value.

    Returns:
        int in [0, 2**53].

    Raises:
        ValueError: It is anything else.
    """
    return check_integer(name, step, "an integer in [0, 2**53]", lambda n: 0 <= n <= MAX_SCHEDULE_STEP)
