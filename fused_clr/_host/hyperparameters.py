"""Checks of options and hyperparameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .._device.settings import Options
from ..schedules import Schedule


def check_options(name: str, given: Mapping[str, Any]) -> Options:
    """Checks the options of an optimizer.

    Args:
        name: What took them.
        given: Options by name.

    Returns:
        The options, with plain numbers.

    Raises:
        TypeError: One is unknown.
        ValueError: One is not allowed; the message names it, its value and the allowed values.
    """
    unknown = set(given) - set(Options._fields)
    if unknown:
        raise TypeError(
            f"{name} got unexpected arguments {sorted(unknown)}; its own options are {', '.join(Options._fields)}"
        )
    options = Options(**given)
    limit = None if options.max_grad_norm is None else check_max_grad_norm(options.max_grad_norm)
    size: Any = options.history_size
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise ValueError(f"history_size must be an integer >= 0, got {size!r}")
    for name in ("skip_if_nonfinite", "write_back_grads", "advance_schedule_on_skip"):
        if not isinstance(getattr(options, name), bool):
            raise ValueError(f"{name} must be True or False, got {getattr(options, name)!r}")
    if options.skip_if_nonfinite and limit is None:
        raise ValueError(
            "skip_if_nonfinite=True needs max_grad_norm, which computes the norm; math.inf computes it without clipping"
        )
    return options._replace(max_grad_norm=limit)


def check_max_grad_norm(value: Any) -> float:
    """Checks a limit of the gradient norm.

    Raises:
        ValueError: It is not a number > 0.
    """
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not number > 0:
        raise ValueError(f"max_grad_norm must be a number > 0 (math.inf: only measure) or None, got {value!r}")
    return number


def _checked_number(name: str, value: Any, allowed: str, upper: float = math.inf) -> None:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name} must have 1 element if it is a tensor, got shape {tuple(value.shape)}")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be {allowed}, got {value!r}") from None
    # `not <=` refuses NaN too.
    if not 0.0 <= number < upper:
        raise ValueError(f"{name} must be {allowed}, got {value}")


def check_hyperparameter(name: str, value: Any) -> Any:
    """Checks a value for ``param_group[name]``.

    Args:
        name: Key of the param group.
        value: The new value.

    Returns:
        The value to store: ``value``, or for ``betas`` a tuple.

    Raises:
        ValueError: ``value`` is not allowed; the message names it and the allowed values.
        TypeError: ``schedule`` is neither a schedule nor None.
    """
    if name in ("lr", "eps", "weight_decay"):
        _checked_number(name, value, "a finite number >= 0")
    elif name == "betas":
        try:
            beta1, beta2 = value
        except (TypeError, ValueError):
            raise ValueError(f"betas must be a pair of numbers in [0, 1), got {value!r}") from None
        for index, beta in enumerate((beta1, beta2)):
            _checked_number(f"betas[{index}]", beta, "a number in [0, 1)", upper=1.0)
        return beta1, beta2
    elif name == "differentiable" and value:
        raise ValueError(
            "differentiable must be False: the fused step has no autograd formula, got differentiable=True"
        )
    elif name == "schedule" and not (value is None or isinstance(value, Schedule)):
        raise TypeError(f"schedule must be a value from fused_clr.schedules or None, got {type(value).__name__}")
    return value


def check_schedule_step(name: str, step: Any) -> int:
    """Checks a schedule step.

    Args:
        name: Its name in error messages.
        step: The value.

    Returns:
        int in [0, 2**53).

    Raises:
        ValueError: It is anything else.
    """
    if not isinstance(step, (int, float)) or isinstance(step, bool) or not 0 <= step < 2**53 or int(step) != step:
        raise ValueError(f"{name} must be an integer in [0, 2**53), got {step!r}")
    return int(step)
