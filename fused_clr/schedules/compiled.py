"""Compiled parts: the timing of segments in exact integers, and the coefficients of their values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from .._checks import check_bool, check_integer, check_number
from .parts import Part, Scaling, Segment, Shape

# The end of a part that repeats. Beyond any step, and an int64.
NEVER = 2**62
# Below this logarithm of the ratio of its ends, a curve is a line: they differ by less than its square / 2 < 2**-52.
LINEAR_LOG_RATIO = 2**-26
# What keeps the ratio itself finite, or for INVERSE_SQRT its square.
MAX_LOG_RATIOS = {Shape.EXPONENTIAL: 700.0, Shape.INVERSE_SQRT: 350.0}

# As int: comparisons of an IntFlag cost more than the rest of `Timeline.locate`.
SHAPES = (Shape.CONSTANT, *(Shape(1 << bit) for bit in range(6)))
LINEAR, COSINE, POLYNOMIAL, POWER, EXPONENTIAL, INVERSE_SQRT = (int(shape) for shape in SHAPES[1:])


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
    it is 0, and the smaller value is not lost in the larger one. The foot of INVERSE_SQRT is its larger end, where the
    height is 1.

    Attributes:
        foot: Position of the foot.
        length: In units.
        shape: A `Shape`, seen from the foot; never CONSTANT, which is LINEAR with a span of 0.
        parameter: Exponent of POLYNOMIAL and POWER. EXPONENTIAL: logarithm of the other end over the foot.
            INVERSE_SQRT: square of the foot over the other end, less 1.
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
    part = _checked_part(f"parts[{index}]", part)
    scaling = part.scaling
    lengths, shift = exact_units([segment.steps for segment in part.segments])
    positions = [0, *accumulate(lengths)]
    period = positions.pop()
    compiled = [
        _compile_segment(segment, scaling, position, length)
        for segment, position, length in zip(part.segments, positions, lengths, strict=True)
    ]
    return (
        TimedPart(
            start=part.start,
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
    about_lr, about_momentum = scaling.about_lr, scaling.about_momentum
    ends = list(zip(segment.lr, segment.momentum or (0.0, 0.0), strict=True))
    distances = [(abs(lr - about_lr), abs(momentum - about_momentum)) for lr, momentum in ends]
    rises = distances[0] <= distances[1]
    if segment.shape == INVERSE_SQRT:
        rises = segment.lr[0] >= segment.lr[1]
    (lr_foot, momentum_foot), (lr_head, momentum_head) = ends if rises else ends[::-1]
    shape, parameter, unit = int(segment.shape), 0.0, 1.0
    lr_offset, lr_span = lr_foot - about_lr, lr_head - lr_foot
    if shape in (POLYNOMIAL, POWER):
        parameter = segment.power
        if not rises:
            # Seen from the other end, 1 - (1 - x)**power is x**power.
            shape = POLYNOMIAL + POWER - shape
    elif shape in MAX_LOG_RATIOS:
        parameter = math.log(lr_head / lr_foot)
    if shape == Shape.CONSTANT or (shape in MAX_LOG_RATIOS and abs(parameter) < LINEAR_LOG_RATIO):
        shape, parameter = LINEAR, 0.0
    elif shape == EXPONENTIAL:
        # Its height goes to this and not to 1, which saves the device a division.
        unit = math.expm1(parameter)
    elif shape == INVERSE_SQRT:
        parameter = (lr_foot - lr_head) / lr_head * ((lr_foot + lr_head) / lr_head)
        lr_offset, lr_span = -about_lr, lr_foot
    bounds = Bounds(about_lr, lr_offset, lr_span / unit, None, None, None)
    if segment.momentum is not None:
        bounds = bounds._replace(
            about_momentum=about_momentum,
            momentum_offset=momentum_foot - about_momentum,
            momentum_span=(momentum_head - momentum_foot) / unit,
        )
    return TimedSegment(start if rises else start + length, length, shape, parameter), bounds


def _checked_part(name: str, part: Any) -> Part:
    """The part with plain values. Raises a ValueError where it is not what `Part` and `Segment` state."""
    if not isinstance(part, Part):
        raise ValueError(f"{name} must be a Part, got {part!r}")
    given: Any = part.segments
    if not isinstance(given, (tuple, list)) or not given:
        raise ValueError(f"{name}.segments must hold at least one segment, got {none_or(given)}")
    segments = tuple(_checked_segment(f"{name}.segments[{i}]", segment) for i, segment in enumerate(given))
    if len({segment.momentum is None for segment in segments}) > 1:
        raise ValueError(f"{name}.segments must all have a momentum, or none of them")
    return Part(
        segments,
        check_bool(f"{name}.repeats", part.repeats),
        _checked_scaling(f"{name}.scaling", part.scaling),
        check_integer(f"{name}.start", part.start, "an integer >= 0", lambda start: start >= 0),
    )


def _checked_scaling(name: str, scaling: Any) -> Scaling:
    if not isinstance(scaling, Scaling):
        raise ValueError(f"{name} must be a Scaling, got {scaling!r}")
    if scaling.per not in ("cycle", "step"):
        raise ValueError(f"{name}.per must be 'cycle' or 'step', got {scaling.per!r}")
    if scaling.scale_fn is not None and not callable(scaling.scale_fn):
        raise ValueError(f"{name}.scale_fn must be callable or None, got {scaling.scale_fn!r}")
    total_steps = scaling.total_steps
    if total_steps is not None:
        total_steps = check_integer(f"{name}.total_steps", total_steps, "an integer >= 1 or None", lambda n: n >= 1)
    factor = check_number(f"{name}.factor", scaling.factor, "a finite number >= 0", lambda x: 0 <= x < math.inf)
    about_lr, about_momentum = (
        float(check_number(f"{name}.{field}", getattr(scaling, field), "a finite number"))
        for field in ("about_lr", "about_momentum")
    )
    return Scaling(float(factor), scaling.per, scaling.scale_fn, about_lr, about_momentum, total_steps)


def _checked_segment(name: str, segment: Any) -> Segment:
    if not isinstance(segment, Segment):
        raise ValueError(f"{name} must be a Segment, got {segment!r}")
    shape: Any = segment.shape
    momentum = segment.momentum
    if not isinstance(shape, Shape) or shape not in SHAPES:
        raise ValueError(f"{name}.shape must be one Shape, got {shape!r}")
    lr = _two(f"{name}.lr", segment.lr, "finite numbers >= 0", lambda lr: 0 <= lr < math.inf)
    if momentum is not None:
        momentum = _two(f"{name}.momentum", momentum, "numbers in [0, 1) or None", lambda momentum: 0 <= momentum < 1)
    if shape == Shape.CONSTANT:
        for values in (lr, momentum or (0.0, 0.0)):
            if values[0] != values[1]:
                raise ValueError(
                    f"{name} must have equal first and last values where its shape is CONSTANT, got {values}"
                )
    if shape in MAX_LOG_RATIOS:
        if not all(lr):
            raise ValueError(f"{name}.lr must be two numbers > 0 where the shape is {shape.name}, got {lr}")
        if abs(math.log(lr[1]) - math.log(lr[0])) > MAX_LOG_RATIOS[shape]:
            raise ValueError(f"{name}.lr are too far apart for a shape that is {shape.name}, got {lr}")
    if shape == Shape.INVERSE_SQRT and momentum is not None:
        raise ValueError(f"{name}.momentum must be None where the shape is INVERSE_SQRT, got {momentum}")
    return Segment(
        check_number(f"{name}.steps", segment.steps, "a finite number > 0", _is_positive),
        shape,
        lr,
        momentum,
        float(check_number(f"{name}.power", segment.power, "a finite number > 0", _is_positive)),
    )


def _two(name: str, values: Any, allowed: str, is_allowed: Callable[[float], bool]) -> tuple[float, float]:
    """Two numbers as floats."""
    try:
        first, last = values if isinstance(values, (tuple, list)) else ()
        return float(check_number(name, first, "", is_allowed)), float(check_number(name, last, "", is_allowed))
    except ValueError:
        raise ValueError(f"{name} must be two {allowed}, got {values!r}") from None


def none_or(given: Any) -> str:
    """What a message says that got ``given`` in place of a tuple that is not empty."""
    return "none" if isinstance(given, (tuple, list)) else repr(given)


def _is_positive(number: float) -> bool:
    return 0 < number < math.inf
