"""Timelines: a schedule's parts, compiled, and the value of every step on the host."""

from __future__ import annotations

import math
import sys
from bisect import bisect_right
from collections.abc import Callable, Hashable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .compiled import COSINE, INVERSE_SQRT, LINEAR, NEVER, POLYNOMIAL, POWER, compile_part, none_or
from .parts import Part, Scaling, host_function, is_triton_function

# Cycles of a plain Python scale_fn that are tabulated when no total_steps is stated.
DEFAULT_TABLE_CYCLES = 1000


class Timeline:
    """The parts of a schedule, compiled.

    Args:
        parts: See `Schedule.parts`.

    Attributes:
        parts: The parts, in exact integers.
        bounds: ``bounds[part][segment]``.
        key: Everything that `locate` depends on, hashable. Schedules that differ only in their values may share it.
        drives_momentum: Whether a part has a momentum.
        falls: ``falls[part][segment]``: whether the segment ends a fall of the learning rate, and a cycle with it.

    Raises:
        ValueError: A part or segment is not what `Part` and `Segment` state.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        if not isinstance(parts, (tuple, list)) or not parts:
            raise ValueError(f"a schedule must have at least one part, got {none_or(parts)}")
        compiled = [compile_part(index, part) for index, part in enumerate(parts)]
        self.parts = tuple(part for part, _ in compiled)
        self.bounds = tuple(bounds for _, bounds in compiled)
        starts = [part.start for part in self.parts]
        if starts[0] != 0 or starts[-1] >= NEVER or any(late <= early for early, late in pairwise(starts)):
            raise ValueError(f"parts must start at 0, each after the one before and below 2**62, got starts {starts}")
        self.key: Hashable = tuple(part._replace(scaling=_key_of(part.scaling)) for part in self.parts)  # type: ignore[arg-type]
        self.drives_momentum = any(bounds[0].about_momentum is not None for bounds in self.bounds)
        self.falls = _ends_of_falls(parts)
        self._later_starts = tuple(starts[1:])
        self._scales = [_scale_of(part.scaling) for part in self.parts]

    def locate(self, step: int) -> tuple[int, int, float, float]:
        """Part, segment, height and scale at ``step``.

        Args:
            step: A Python int >= 0. Not checked.

        Returns:
            Index of the part; index of the segment in it; height, 0 at the segment's foot; scale.
        """
        index = bisect_right(self._later_starts, step) if self._later_starts else 0
        start, end, shift, period, boundaries, segments, _ = self.parts[index]
        step -= start
        if step < end:
            # Integers throughout: a float could not tell late steps apart.
            cycle, phase = divmod(step << shift, period)
        else:
            step, cycle, phase = end, 0, period
        segment = bisect_right(boundaries, phase)
        foot, length, shape, parameter = segments[segment]
        height = abs(phase - foot) / length
        if shape != LINEAR:
            height = _shaped(height, shape, parameter)
        scale_of = self._scales[index]
        return index, segment, height, 1.0 if scale_of is None else scale_of(step, cycle)

    def values(self, step: int) -> tuple[float, float]:
        """Learning rate and momentum at ``step``; the momentum is NaN where the part has none.

        Args:
            step: A Python int >= 0. Not checked.
        """
        part, segment, height, scale = self.locate(step)
        about_lr, lr_offset, lr_span, about_momentum, offset, span = self.bounds[part][segment]
        lr = about_lr + (lr_offset + lr_span * height) * scale
        if about_momentum is None or offset is None or span is None:
            return lr, math.nan
        return lr, about_momentum + (offset + span * height) * scale

    def ends_cycle(self, step: int) -> bool:
        """Whether ``step`` is the last one of a fall of the learning rate.

        Args:
            step: A Python int >= 0. Not checked.
        """
        index = bisect_right(self._later_starts, step) if self._later_starts else 0
        start, end, shift, period, boundaries, _, _ = self.parts[index]
        step -= start
        if step >= end:
            return False
        phase = (step << shift) % period
        segment = bisect_right(boundaries, phase)
        segment_end = boundaries[segment] if segment < len(boundaries) else period
        return self.falls[index][segment] and phase + (1 << shift) >= segment_end

    def tabulated_scale(self, index: int) -> NDArray[np.float64]:
        """The values of a part's plain Python ``scale_fn``, as the device reads them.

        Args:
            index: Of a part with such a function.

        Returns:
            float64[n]: entry i is ``scale_fn(i + 1)`` for cycle i, or ``scale_fn(i)`` for step i, as ``per`` says.

        Raises:
            ValueError: The number of steps is not known, or a value is not finite.
        """
        scaling = self.parts[index].scaling
        assert scaling is not None
        last = self._last_tabulated(index)
        if last is None:
            raise ValueError(
                "total_steps must be given (the number of steps of the training) to tabulate a Python scale_fn of the "
                "step (scale_mode='iterations'), got None; a @triton.jit scale_fn needs none"
            )
        arguments = range(last + 1) if scaling.per == "step" else range(1, self._cycle(index, last) + 2)
        function = host_function(scaling.scale_fn)
        return np.array([finite_scale(function(x), x) for x in arguments])

    def last_step(self) -> float:
        """The last schedule step at which all tabulated functions have a value; infinity where nothing runs out."""
        last_steps = [math.inf]
        for index, part in enumerate(self.parts):
            if is_tabulated(part.scaling):
                last = self._last_tabulated(index)
                if last is not None and last < self._reach(index):
                    last_steps.append(part.start + last)
        return min(last_steps)

    def _reach(self, index: int) -> int:
        """The last step of a part that differs from those after it, or that comes before the next part."""
        part = self.parts[index]
        if index < len(self._later_starts):
            return min(part.end, self._later_starts[index] - part.start - 1)
        return part.end

    def _last_tabulated(self, index: int) -> int | None:
        """The last step of a part that its table covers; None if that is not known."""
        part = self.parts[index]
        assert part.scaling is not None
        last = part.scaling.total_steps
        if last is None and part.scaling.per == "cycle":
            last = (DEFAULT_TABLE_CYCLES * part.period - 1) >> part.shift
        last = self._reach(index) if last is None else min(last, self._reach(index))
        return None if last == NEVER else last

    def _cycle(self, index: int, step: int) -> int:
        part = self.parts[index]
        return (step << part.shift) // part.period if step < part.end else 0


def _ends_of_falls(parts: Sequence[Part]) -> tuple[tuple[bool, ...], ...]:
    """For each segment of each part: whether its learning rate falls, and does not fall on in the next segment."""
    falls = []
    for index, part in enumerate(parts):
        followers = list(part.segments[1:])
        if part.repeats:
            followers.append(part.segments[0])
        elif index + 1 < len(parts):
            followers.append(parts[index + 1].segments[0])
        own = []
        for position, segment in enumerate(part.segments):
            first, last = segment.lr
            follower = followers[position].lr if position < len(followers) else (last, last)
            falls_on = follower[1] < follower[0] <= last
            own.append(bool(last < first and not falls_on))
        falls.append(tuple(own))
    return tuple(falls)


def finite_scale(value: Any, argument: int) -> float:
    """What a ``scale_fn`` returned for ``argument``, as a float.

    Raises:
        ValueError: It is not a finite number.
    """
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"scale_fn must return finite numbers, got {value!r} for {argument}")
    return number


def is_tabulated(scaling: Scaling | None) -> bool:
    """Whether the device reads the scale from a table: it comes from a plain Python function."""
    return scaling is not None and scaling.scale_fn is not None and not is_triton_function(scaling.scale_fn)


def _scale_of(scaling: Scaling | None) -> Callable[[int, int], float] | None:
    """The scale as a function of the step of the part and the cycle; None where it is 1."""
    if scaling is None:
        return None
    factor, per_step = float(scaling.factor), scaling.per == "step"
    if scaling.scale_fn is not None:
        function = host_function(scaling.scale_fn)

        def called(step: int, cycle: int) -> float:
            argument = step if per_step else cycle + 1
            return finite_scale(function(argument), argument)

        return called

    def power(step: int, cycle: int) -> float:
        try:
            return factor ** (step if per_step else cycle)
        except OverflowError:
            # A float can hold neither the result nor, with tiny steps, the cycle.
            return 0.0 if factor < 1.0 else sys.float_info.max

    return power


def _shaped(y: float, shape: int, parameter: float) -> float:
    """Height of a shape other than LINEAR, ``y`` of its length away from its foot."""
    if shape == COSINE:
        # Both are (1 - cos(pi y)) / 2. The first is exact near 0, the second in the middle.
        return math.sin(y * (math.pi / 2)) ** 2 if y < 0.25 else 0.5 + 0.5 * math.sin((y - 0.5) * math.pi)
    if shape == POWER:
        return float(y**parameter)
    if shape == POLYNOMIAL:
        # 1 - (1 - y)**parameter, likewise.
        return -math.expm1(parameter * math.log1p(-y)) if y < 1.0 else 1.0
    if shape == INVERSE_SQRT:
        return 1.0 / math.sqrt(1.0 + parameter * y)
    return math.expm1(parameter * y)


def _key_of(scaling: Scaling | None) -> Hashable:
    # By identity: a callable object need not be hashable.
    return None if scaling is None else (scaling.factor, scaling.per, id(scaling.scale_fn))
