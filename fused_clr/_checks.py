"""Strict checks of arguments: what counts as a number, an integer and a boolean."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np


def plain_number(value: Any) -> int | float | None:
    """A real number as Python's int or float, which ``torch.load(weights_only=True)`` accepts.

    Args:
        value: Anything. Strings and booleans are no numbers, and arrays and tensors neither.

    Returns:
        The number; None if ``value`` is none.
    """
    if isinstance(value, (bool, np.bool_)):
        return None
    if isinstance(value, (int, np.integer)):
        return int(value)
    return float(value) if isinstance(value, (float, np.floating)) else None


def is_tensor(value: Any) -> bool:
    """Whether this is a torch tensor. Schedules need no torch, so it is not imported here."""
    torch: Any = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def check_number(name: str, value: Any, allowed: str, is_allowed: Callable[[float], bool] = math.isfinite) -> float:
    """Checks a number.

    Args:
        name: Its name in the message.
        value: int, float, a numpy integer or float.
        allowed: What is allowed, for the message.
        is_allowed: Tells it of a number, which may be inf or NaN.

    Returns:
        ``value`` as Python's int or float.

    Raises:
        ValueError: It is not allowed.
    """
    number = plain_number(value)
    if number is None or not _holds(number, is_allowed):
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return number


def check_number_or_tensor(name: str, value: Any, allowed: str, is_allowed: Callable[[float], bool]) -> Any:
    """Checks a number, as `check_number`, or a real tensor of 1 element, which is returned as it is."""
    if not is_tensor(value):
        return check_number(name, value, allowed, is_allowed)
    if value.numel() != 1:
        raise ValueError(f"{name} must have 1 element if it is a tensor, got shape {tuple(value.shape)}")
    # The number in a tensor of another kind is a bool or a complex number. This waits for the tensor's device.
    number = plain_number(value.item())
    if number is None or not _holds(number, is_allowed):
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return value


def check_integer(name: str, value: Any, allowed: str, is_allowed: Callable[[int], bool]) -> int:
    """Checks an integer, Python's or numpy's; see `check_number`. A float is refused, also 2.0."""
    number = plain_number(value)
    if not isinstance(number, int) or not is_allowed(number):
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return number


def check_bool(name: str, value: Any, or_none: bool = False) -> Any:
    """Checks a boolean, Python's or numpy's, or None with ``or_none``; see `check_number`."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if value is None and or_none:
        return None
    raise ValueError(f"{name} must be True{', False or None' if or_none else ' or False'}, got {value!r}")


def _holds(number: float, is_allowed: Callable[[float], bool]) -> bool:
    try:
        # Of a number as float64, which every number becomes.
        return is_allowed(float(number))
    except OverflowError:
        return False
