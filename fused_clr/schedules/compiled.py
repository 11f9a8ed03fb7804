"""Compiled parts: the timing of segments in exact integers, and the coefficients of their values."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from .parts import Part, Scaling, Segment, Shape

# The end of a part that repeats. Beyond any step, and an int64.
NEVER = 2**62
# Below this logarithm of the ratio of its ends, an exponential is a line: they differ by its square / 8 < 2**-54.
LINEAR_LOG_RATIO = 2**-26
MAX_LOG_RATIO = 700.0

# As int: comparisons of an IntFlag cost more than the rest of `Timeline.locate`.
LINEAR, COSINE, POLYNOMIAL, POWER = (int(s) for s in (Shape.LINEAR, Shape.COSINE, Shape.POLYNOMIAL, Shape.POWER))
SHAPES = (Shape.CONSTANT, *(Shape(1 << bit) for bit in range(5)))


class Bounds(NamedTuple):
    """How a segment turns its height into values: ``value = about + (offset + span * height) * scale``.

    The three values of the momentum are None in a part that does not set it.
    """

    about_lr: float
    lr_offset: float
    lr_span: float
    about_momentum: float | None
    momentum_offset: float | None
    momentum_span: float | None


class TimedSegment(NamedTuple):
    """The timing and shape of a segment. Positions are in units, from the start of the part's cycle.

    The height is measured from the segment's foot, the end that is nearer to what its part is scaled about: there
    it is 0, and the smaller value is not lost in the larger one.

    Attributes:
        foot: Position of the foot.
        length: In units.
        shape: A `Shape`, seen from the foot; never CONSTANT, which is LINEAR with a span of 0.
        parameter: Exponent of POLYNOMIAL and POWER; logarithm of the last over the first of EXPONENTIAL.
    """

    foot: int
    length: int
    shape: int
    parameter: float


class TimedPart(NamedTuple):
    """The timing of a part, and its scaling.

    Attributes:
        start: Schedule step.
        end: Step of the part from which it holds its last value; `NEVER` for one that repeats.
        shift: A step is ``2**shift`` units.
        period: Length of all segments, in units.
        boundaries: Positions of all segments but the first.
        segments: One or more.
        scaling: None where the scale is 1.
    """

    start: int
    end: int
    shift: int
    period: int
    boundaries: tuple[int, ...]
    segments: tuple[TimedSegment, ...]
    scaling: Scaling | None


def exact_units(sizes: Sequence[float]) -> tuple[tuple[int, ...], int]:
    """Step sizes as integers: float64 numbers are integers over a power of two, so that positions are exact.

    Where that would take too many bits, as for 2000 and 0.1, sizes are rounded to a power of two below 2**-60 of their
    sum. That changes no size by as much as torch's sum of them in float64.

    Args:
        sizes: Finite numbers of steps > 0.

    Returns:
        The sizes in units; the ``shift``, where a step is ``2**shift`` units.

    Raises:
        ValueError: Their sum is 2**62 or more, or one of them is nothing beside it.
    """
    ratios = [float(size).as_integer_ratio() for size in sizes]
    denominator = max(ratio[1] for ratio in ratios)
    units = tuple(numerator * (denominator // own) for numerator, own in ratios)
    excess = sum(units).bit_length() - 62
    if 0 < excess < denominator.bit_length():
        # One bit more, for the carry of rounding.
        excess = min(excess + 1, denominator.bit_length() - 1)
        units = tuple((unit + (1 << excess - 1)) >> excess for unit in units)
        denominator >>= excess
    if sum(units) >= 2**62 or not all(units):
        raise ValueError(
            "step sizes are too large or too far apart: as multiples of a power of two, their sum must stay below "
            f"2**62, got {list(sizes)}"
        )
    return units, denominator.bit_length() - 1


def compile_part(index: int, part: Part) -> tuple[TimedPart, tuple[Bounds, ...]]:
    """Compiles a part into its timing and the coefficients of its values.

    Args:
        index: Index of the part, for messages.
        part: The part.

    Returns:
        The timing; the coefficients of each segment.

    Raises:
        ValueError: The part, or a segment of it, is not what `Part` and `Segment` state.
    """
    name = f"parts[{index}]"
    scaling = part.scaling
    if not part.segments:
        raise ValueError(f"{name}.segments must hold at least one segment, got none")
    for position, segment in enumerate(part.segments):
        _check_segment(f"{name}.segments[{position}]", segment)
    if len({segment.momentum is None for segment in part.segments}) > 1:
        raise ValueError(f"{name}.segments must all have a momentum, or none of them")
    if scaling.per not in ("cycle", "step"):
        raise ValueError(f"{name}.scaling.per must be 'cycle' or 'step', got {scaling.per!r}")
    if not 0 <= scaling.factor < math.inf:
        raise ValueError(f"{name}.scaling.factor must be a finite number >= 0, got {scaling.factor}")

    lengths, shift = exact_units([segment.steps for segment in part.segments])
    positions = [0, *accumulate(lengths)]
    period = positions.pop()
    compiled = [
        _compile_segment(segment, scaling, position, length)
        for segment, position, length in zip(part.segments, positions, lengths, strict=True)
    ]
    return (
        TimedPart(
            start=operator.index(part.start),
            end=NEVER if part.repeats else -(-period >> shift),
            shift=shift,
            period=period,
            boundaries=tuple(positions[1:]),
            segments=tuple(segment for segment, _ in compiled),
            scaling=scaling if scaling.scale_fn is not None or scaling.factor != 1.0 else None,
        ),
        tuple(bounds for _, bounds in compiled),
    )


def _compile_segment(segment: Segment, scaling: Scaling, start: int, length: int) -> tuple[TimedSegment, Bounds]:
    about_lr, about_momentum = float(scaling.about_lr), float(scaling.about_momentum)
    ends = list(zip(segment.lr, segment.momentum or (0.0, 0.0), strict=True))
    distances = [(abs(lr - about_lr), abs(momentum - about_momentum)) for lr, momentum in ends]
    rises = distances[0] <= distances[1]
    (lr_foot, momentum_foot), (lr_head, momentum_head) = ends if rises else ends[::-1]
    shape, parameter, unit = int(segment.shape), 0.0, 1.0
    if shape in (POLYNOMIAL, POWER):
        parameter = float(segment.power)
        if not rises:
            # Seen from the other end, 1 - (1 - x)**power is x**power.
            shape = POLYNOMIAL + POWER - shape
    elif shape == Shape.EXPONENTIAL:
        parameter = math.log(lr_head / lr_foot)
        # The height of an exponential goes to this and not to 1, which saves the device a division.
        unit = math.expm1(parameter)
    if shape == Shape.CONSTANT or (shape == Shape.EXPONENTIAL and abs(parameter) < LINEAR_LOG_RATIO):
        shape, parameter, unit = LINEAR, 0.0, 1.0
    bounds = Bounds(about_lr, lr_foot - about_lr, (lr_head - lr_foot) / unit, None, None, None)
    if segment.momentum is not None:
        bounds = bounds._replace(
            about_momentum=about_momentum,
            momentum_offset=momentum_foot - about_momentum,
            momentum_span=(momentum_head - momentum_foot) / unit,
        )
    return TimedSegment(start if rises else start + length, length, shape, parameter), bounds


def _check_segment(name: str, segment: Segment) -> None:
    """Raises a ValueError where a segment is not what `Segment` states."""
    if not 0 < segment.steps < math.inf:
        raise ValueError(f"{name}.steps must be a finite number > 0, got {segment.steps}")
    if segment.shape not in SHAPES:
        raise ValueError(f"{name}.shape must be one Shape, got {segment.shape!r}")
    if not all(math.isfinite(lr) for lr in segment.lr):
        raise ValueError(f"{name}.lr must be two finite numbers, got {segment.lr}")
    if segment.momentum is not None and not all(0 <= momentum < 1 for momentum in segment.momentum):
        raise ValueError(f"{name}.momentum must be two numbers in [0, 1) or None, got {segment.momentum}")
    if not 0 < segment.power < math.inf:
        raise ValueError(f"{name}.power must be a finite number > 0, got {segment.power}")
    if segment.shape == Shape.CONSTANT:
        for values in (segment.lr, segment.momentum or (0.0, 0.0)):
            if values[0] != values[1]:
                raise ValueError(
                    f"{name} must have equal first and last values where its shape is CONSTANT, got {values}"
                )
    if segment.shape == Shape.EXPONENTIAL:
        if not all(lr > 0 for lr in segment.lr):
            raise ValueError(f"{name}.lr must be two numbers > 0 where the shape is EXPONENTIAL, got {segment.lr}")
        if abs(math.log(segment.lr[1]) - math.log(segment.lr[0])) > MAX_LOG_RATIO:
            raise ValueError(f"{name}.lr are too far apart for a shape that is EXPONENTIAL, got {segment.lr}")
