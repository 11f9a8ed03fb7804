"""The values every schedule is made of: segments, and parts of segments."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntFlag
from typing import Any, NamedTuple


class Shape(IntFlag):
    """How a segment goes from its first value to its last; ``x`` is the fraction of its steps that are done.

    - ``CONSTANT``: does not change; the first and the last value must be equal.
    - ``LINEAR``: progress ``x``.
    - ``COSINE``: progress ``(1 - cos(pi x)) / 2``.
    - ``POLYNOMIAL``: progress ``1 - (1 - x)**power``, as `torch.optim.lr_scheduler.PolynomialLR`.
    - ``POWER``: progress ``x**power``; falling with power 0.5 it is the "1-sqrt" decay.
    - ``EXPONENTIAL``: the learning rate is multiplied by the same factor at every step. The momentum moves in
      proportion to the learning rate.
    - ``INVERSE_SQRT``: ``1 / lr**2`` has progress ``x``. There is no momentum.
    """

    CONSTANT = 0
    LINEAR = 1
    COSINE = 2
    POLYNOMIAL = 4
    POWER = 8
    EXPONENTIAL = 16
    INVERSE_SQRT = 32


class Segment(NamedTuple):
    """A stretch of steps with one shape.

    Attributes:
        steps: Number of steps, > 0. Need not be an integer.
        shape: How the values go from first to last.
        lr: First and last learning rate, >= 0. Both > 0 where the shape is EXPONENTIAL or INVERSE_SQRT.
        momentum: First and last momentum (Adam's beta1), in [0, 1); None: the segment does not set it.
        power: Exponent of POLYNOMIAL and POWER, > 0.
    """

    steps: float
    shape: Shape
    lr: tuple[float, float]
    momentum: tuple[float, float] | None = None
    power: float = 1.0


class Scaling(NamedTuple):
    """How the amplitude of a part changes: ``value = about + (segment's value - about) * scale``.

    Attributes:
        factor: ``scale = factor**n``, >= 0.
        per: What ``n`` counts, from 0: the "cycle" of a part that repeats, or the "step" of the part.
        scale_fn: ``scale = scale_fn(cycle + 1)`` or ``scale_fn(step)``, in place of ``factor``. A ``@triton.jit``
            function runs on the device and is given a float64 block; a plain Python callable is tabulated there.
        about_lr: The learning rate that scaling does not change.
        about_momentum: The momentum that scaling does not change.
        total_steps: Steps of the part for which a plain Python ``scale_fn`` is tabulated. Needed if ``per`` is
            "step" and the part has no end; 1,000 cycles if None and ``per`` is "cycle".
    """

    factor: float = 1.0
    per: str = "cycle"
    scale_fn: Callable[[Any], Any] | None = None
    about_lr: float = 0.0
    about_momentum: float = 0.0
    total_steps: int | None = None


class Part(NamedTuple):
    """Segments one after another, once or repeated.

    Past its end, a part that does not repeat holds its last value.

    Attributes:
        segments: At least one. All of them have a momentum, or none.
        repeats: Start again with the first segment after the last.
        scaling: How the amplitude changes.
        start: The schedule step of its first step. The first part starts at 0, each other one after the one before.
    """

    segments: tuple[Segment, ...]
    repeats: bool = False
    scaling: Scaling = Scaling()
    start: int = 0


def is_triton_function(function: object) -> bool:
    """Whether ``function`` is decorated with ``@triton.jit`` (compiled or interpreted)."""
    return type(function).__module__.startswith("triton.") and hasattr(function, "fn")


def host_function(function: Any) -> Callable[[Any], Any]:
    """A ``scale_fn`` that the host can call.

    A ``@triton.jit`` function of plain arithmetic is a Python function underneath; one that calls triton's functions
    fails there with triton's own message.
    """
    return function.fn if is_triton_function(function) else function  # type: ignore[no-any-return]
