"""Checks of a schedule's fields, which replace each by a plain number."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .._checks import check_integer, check_number_or_tensor
from .compiled import exact_units

# Optimizers refuse schedule steps from here on: float64 could not tell them apart.
END_OF_STEPS = 2**53


def checked_number(name: str, value: Any, allowed: str, is_allowed: Callable[[float], bool]) -> float:
    """A finite number, as a float; also in a tensor of 1 element, as a tensor ``lr`` gives torch's schedulers.

    Raises:
        ValueError: It is not allowed.
    """
    return float(check_number_or_tensor(name, value, allowed, lambda x: math.isfinite(x) and is_allowed(x)))


def checked_lr(name: str, value: Any) -> float:
    """A learning rate: finite and >= 0."""
    return checked_number(name, value, "a finite number >= 0", lambda x: x >= 0)


def set_lrs(schedule: Any, *names: str) -> None:
    """Checks learning rates: finite and >= 0."""
    for name in names:
        _set(schedule, name, checked_lr(name, getattr(schedule, name)))


def set_positive(schedule: Any, *names: str) -> None:
    """Checks numbers that are finite and > 0."""
    for name in names:
        _set(schedule, name, checked_number(name, getattr(schedule, name), "a finite number > 0", lambda x: x > 0))


def set_momenta(schedule: Any, *names: str) -> None:
    """Checks momenta: in [0, 1)."""
    for name in names:
        _set(schedule, name, checked_number(name, getattr(schedule, name), "a number in [0, 1)", lambda x: 0 <= x < 1))


def set_steps(schedule: Any, *names: str) -> None:
    """Checks the numbers of steps of one part, which need not be integers: > 0. Whole numbers become ints."""
    given = {}
    for name in names:
        steps = checked_number(name, getattr(schedule, name), "a finite number of steps > 0", lambda x: x > 0)
        given[name] = int(steps) if steps.is_integer() else steps
        _set(schedule, name, given[name])
    try:
        exact_units(tuple(given.values()))
    except ValueError:
        raise ValueError(
            f"{' and '.join(f'{name}={steps}' for name, steps in given.items())} must not be too large or too far "
            "apart: as multiples of a power of two, their sum must stay below 2**62"
        ) from None


def set_counts(schedule: Any, *names: str) -> None:
    """Checks numbers of steps that are integers: from 1 to 2**53 - 1, the last schedule step."""
    for name in names:
        value = getattr(schedule, name)
        _set(schedule, name, check_integer(name, value, "an integer in [1, 2**53)", lambda n: 1 <= n < END_OF_STEPS))


def _set(schedule: Any, name: str, value: Any) -> None:
    # Schedules are frozen dataclasses.
    object.__setattr__(schedule, name, value)
