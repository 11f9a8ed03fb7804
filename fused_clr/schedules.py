"""Schedules as values: what the learning rate does, apart from who applies it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

MODES = ("triangular", "triangular2", "exp_range")
SCALE_MODES = ("cycle", "iterations")
# Cycles of a plain Python scale_fn that are tabulated when no horizon is stated.
DEFAULT_TABLE_CYCLES = 1000

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


class StepUnits(NamedTuple):
    """Step sizes as integers: float64 step sizes are integers over ``2**shift``, so that the phase is exact."""

    up: int
    period: int
    shift: int


def is_triton_function(function: object) -> bool:
    """Whether ``function`` is decorated with ``@triton.jit`` (compiled or interpreted)."""
    return type(function).__module__.startswith("triton.") and hasattr(function, "fn")


@dataclasses.dataclass(frozen=True)
class Cyclic:
    """A learning rate, and with ``cycle_momentum`` a beta1, that travel between two bounds in a triangular wave.

    The policy of Smith 2017, "Cyclical Learning Rates for Training Neural Networks" (arXiv:1506.01186, sec. 3), with
    the arguments of `torch.optim.lr_scheduler.CyclicLR`::

        height   = phase / step_size_up                     while rising, from 0 to 1
                   (period - phase) / step_size_down        while falling, from 1 to 0
        lr       = base_lr + (max_lr - base_lr) * height * scale
        momentum = max_momentum - (max_momentum - base_momentum) * height * scale

    where ``phase = step mod period``, ``period = step_size_up + step_size_down``, and ``scale`` is 1 (triangular),
    ``2**-cycle`` with cycles counted from 0 (triangular2), ``gamma**step`` (exp_range), or what ``scale_fn`` says.

    Args:
        base_lr: Lower bound of the learning rate, >= 0. It may exceed ``max_lr``, as in torch: the wave then starts
            high and dips.
        max_lr: Upper bound of the learning rate, >= 0.
        step_size_up: Steps of the rising half, > 0. Need not be an integer.
        step_size_down: Steps of the falling half, > 0; ``step_size_up`` if None.
        mode: "triangular", "triangular2" or "exp_range"; ignored if ``scale_fn`` is given.
        gamma: Base of exp_range, finite and >= 0.
        scale_fn: A function of the cycle (counted from 1) or of the step, as ``scale_mode`` says. A ``@triton.jit``
            function runs on the device and is given a float64 block; a plain Python callable is tabulated there.
        scale_mode: "cycle" or "iterations": what ``scale_fn`` is given.
        cycle_momentum: Cycle beta1 against the learning rate.
        base_momentum: Lower bound of beta1, in [0, 1).
        max_momentum: Upper bound of beta1, in [0, 1).
        horizon: Steps a plain Python ``scale_fn`` is tabulated for on the triton backend. Needed there when
            ``scale_mode="iterations"``; 1,000 cycles if None and ``scale_mode="cycle"``.

    Raises:
        ValueError: An argument is outside what is stated above; the message names it.

    Example:
        >>> schedule = Cyclic(base_lr=0.1, max_lr=0.5, step_size_up=4, cycle_momentum=False)
        >>> schedule.lr(0), schedule.lr(2), schedule.lr(4)
        (0.1, 0.30000000000000004, 0.5)
    """

    base_lr: float
    max_lr: float
    step_size_up: float = 2000
    step_size_down: float | None = None
    mode: str = "triangular"
    gamma: float = 1.0
    scale_fn: Callable[[Any], Any] | None = None
    scale_mode: str = "cycle"
    cycle_momentum: bool = True
    base_momentum: float = 0.8
    max_momentum: float = 0.9
    horizon: int | None = None

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        for name in ("base_lr", "max_lr", "gamma"):
            set_field(self, name, _checked(name, getattr(self, name), "a finite number >= 0", lambda x: x >= 0))
        for name in ("base_momentum", "max_momentum"):
            set_field(self, name, _checked(name, getattr(self, name), "a number in [0, 1)", lambda x: 0 <= x < 1))
        if self.step_size_down is None:
            set_field(self, "step_size_down", self.step_size_up)
        for name in ("step_size_up", "step_size_down"):
            size = _checked(name, getattr(self, name), "a finite number of steps > 0", lambda x: x > 0)
            set_field(self, name, int(size) if size.is_integer() else size)
        if self.units.period >= 2**62:
            raise ValueError(
                f"step_size_up={self.step_size_up} and step_size_down={self.step_size_down} are too large or too far "
                "apart: as multiples of a power of two, their sum must stay below 2**62"
            )
        if self.scale_fn is None:
            if self.mode not in MODES:
                raise ValueError(f"mode must be one of {MODES} unless scale_fn is given, got mode={self.mode!r}")
            set_field(self, "scale_mode", "iterations" if self.mode == "exp_range" else "cycle")
        elif not callable(self.scale_fn):
            raise ValueError(f"scale_fn must be callable or None, got {self.scale_fn!r}")
        elif self.scale_mode not in SCALE_MODES:
            raise ValueError(f"scale_mode must be one of {SCALE_MODES}, got {self.scale_mode!r}")
        if self.horizon is not None and (self.horizon != int(self.horizon) or self.horizon < 1):
            raise ValueError(f"horizon must be an integer number of steps >= 1 or None, got {self.horizon}")

    @cached_property
    def units(self) -> StepUnits:
        """The step sizes as exact integers."""
        up, up_denominator = float(self.step_size_up).as_integer_ratio()
        down, down_denominator = float(self.step_size_down or 0).as_integer_ratio()
        denominator = max(up_denominator, down_denominator)
        up, down = up * (denominator // up_denominator), down * (denominator // down_denominator)
        return StepUnits(up, up + down, denominator.bit_length() - 1)

    @overload
    def lr(self, step: int) -> float: ...
    @overload
    def lr(self, step: IntArray) -> FloatArray: ...
    def lr(self, step: int | IntArray) -> float | FloatArray:
        """The learning rate at ``step``.

        For integer step sizes and ``0 <= base_lr <= max_lr`` within 4 ulp of the exact value in the modes triangular
        and triangular2, at any step below 2**53; within 1e-12 relative for exp_range.

        Args:
            step: int, or int64 array of any shape, >= 0. Updates already applied; torch's ``last_epoch``.

        Returns:
            float, or float64 array of the same shape.

        Raises:
            ValueError: ``step`` is negative.
        """
        height, scale = self.height_and_scale(step)
        lr: float | FloatArray = self.base_lr + (self.max_lr - self.base_lr) * height * scale
        return lr

    @overload
    def momentum(self, step: int) -> float: ...
    @overload
    def momentum(self, step: IntArray) -> FloatArray: ...
    def momentum(self, step: int | IntArray) -> float | FloatArray:
        """The momentum (Adam's beta1) at ``step``, whether or not ``cycle_momentum`` applies it.

        Args:
            step: int, or int64 array of any shape, >= 0.

        Returns:
            float, or float64 array of the same shape.

        Raises:
            ValueError: ``step`` is negative.
        """
        height, scale = self.height_and_scale(step)
        momentum: float | FloatArray = self.max_momentum - (self.max_momentum - self.base_momentum) * height * scale
        return momentum

    def lr_and_momentum(self, step: int) -> tuple[float, float]:
        """``lr(step)`` and ``momentum(step)``, with the triangle evaluated once."""
        height, scale = self.height_and_scale(step)
        lr = self.base_lr + (self.max_lr - self.base_lr) * height * scale
        return lr, self.max_momentum - (self.max_momentum - self.base_momentum) * height * scale

    @property
    def wave(self) -> tuple[Any, ...]:
        """What `height_and_scale` depends on; hashable. Schedules with other bounds may share it."""
        return self.step_size_up, self.step_size_down, self.mode, self.gamma, id(self.scale_fn), self.scale_mode

    def height_and_scale(self, step: int | IntArray) -> tuple[Any, Any]:
        """Height of the triangle at ``step``, in [0, 1], and what the mode or ``scale_fn`` multiplies it by."""
        up, period, shift = self.units
        if isinstance(step, np.ndarray):
            if step.size and step.min() < 0:
                raise ValueError(f"step must be >= 0, got {step.min()}")
            cycles, phases = _locate_array(step.astype(np.int64, copy=False), self.units)
            rising = phases <= up
            height = np.where(rising, phases, period - phases) / np.where(rising, up, period - up)
            return height, self._array_scale(step, cycles)
        if step < 0:
            raise ValueError(f"step must be >= 0, got {step}")
        cycle, phase = divmod(int(step) << shift, period)
        numerator, denominator = (phase, up) if phase <= up else (period - phase, period - up)
        return numerator / denominator, self._scale(int(step), cycle)

    def _scale(self, step: int, cycle: int) -> float:
        if self.scale_fn is not None:
            argument = step if self.scale_mode == "iterations" else cycle + 1
            return float(self._host_scale_fn(argument))
        if self.mode == "triangular2":
            return math.ldexp(1.0, -cycle)
        if self.mode == "exp_range":
            return self.gamma**step
        return 1.0

    def _array_scale(self, steps: IntArray, cycles: IntArray) -> FloatArray | float:
        if self.scale_fn is not None:
            arguments = steps if self.scale_mode == "iterations" else cycles + 1
            values, inverse = np.unique(arguments, return_inverse=True)
            return np.array([float(self._host_scale_fn(int(x))) for x in values])[inverse].reshape(steps.shape)
        if self.mode == "triangular2":
            return np.ldexp(1.0, -np.minimum(cycles, 2000).astype(np.int32))
        if self.mode == "exp_range":
            return np.power(self.gamma, steps.astype(np.float64))
        return 1.0

    @property
    def _host_scale_fn(self) -> Callable[[Any], Any]:
        # A @triton.jit function of plain arithmetic is a Python function underneath; one that calls triton's functions
        # fails there with triton's own message.
        function = self.scale_fn
        assert function is not None
        return function.fn if is_triton_function(function) else function  # type: ignore[attr-defined]

    def tabulated_scale(self) -> FloatArray:
        """The values of a plain Python ``scale_fn``, as the triton backend reads them.

        Returns:
            float64[n]: entry i is ``scale_fn(i + 1)`` for cycle i, or ``scale_fn(i)`` for step i, as ``scale_mode``
            says.

        Raises:
            ValueError: ``scale_mode="iterations"`` without a ``horizon``, or a value that is not finite.
        """
        if self.horizon is None and self.scale_mode == "iterations":
            raise ValueError(
                "horizon must be given (the number of steps of the training) to tabulate a Python scale_fn with "
                "scale_mode='iterations', got None; a @triton.jit scale_fn needs none"
            )
        _, period, shift = self.units
        if self.scale_mode == "iterations":
            arguments = range((self.horizon or 0) + 1)
        elif self.horizon is None:
            arguments = range(1, DEFAULT_TABLE_CYCLES + 1)
        else:
            arguments = range(1, (self.horizon << shift) // period + 2)
        table = np.array([float(self._host_scale_fn(x)) for x in arguments])
        if not np.isfinite(table).all():
            bad = arguments[int(np.flatnonzero(~np.isfinite(table))[0])]
            raise ValueError(f"scale_fn must return finite numbers, got {self._host_scale_fn(bad)} for {bad}")
        return table

    def last_step(self) -> float:
        """The last step at which a tabulated ``scale_fn`` has a value; infinity where nothing is tabulated."""
        if self.scale_fn is None or is_triton_function(self.scale_fn):
            return math.inf
        if self.horizon is not None:
            return self.horizon
        _, period, shift = self.units
        return ((DEFAULT_TABLE_CYCLES * period - 1) >> shift) if self.scale_mode == "cycle" else math.inf


def _checked(name: str, value: Any, allowed: str, is_allowed: Callable[[float], bool]) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} must be {allowed}, got {value!r}") from None
    if not (math.isfinite(number) and is_allowed(number)):
        raise ValueError(f"{name} must be {allowed}, got {value}")
    return number


def _locate_array(steps: IntArray, units: StepUnits) -> tuple[IntArray, IntArray]:
    """Cycle index and phase of each step, exact; as `locate_in_cycle` of the kernels, and for the same reason."""
    cycles, phases = np.divmod(steps, units.period)
    for _ in range(units.shift):
        phases = phases * 2
        wrapped = phases >= units.period
        phases = np.where(wrapped, phases - units.period, phases)
        cycles = np.minimum(cycles * 2 + wrapped, 1 << 61)
    return cycles, phases
