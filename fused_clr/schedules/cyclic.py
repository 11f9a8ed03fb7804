"""`Cyclic`: torch's CyclicLR as a schedule."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from typing import Any

from .._checks import check_bool, check_integer
from .base import Schedule
from .fields import set_lrs, set_momenta, set_steps
from .parts import Part, Scaling, Segment, Shape

MODES = ("triangular", "triangular2", "exp_range")
SCALE_MODES = ("cycle", "iterations")
# Beyond the exponential of that, a scale would not be a finite float64.
MAX_LOG_AMPLITUDE = math.log(sys.float_info.max)


@dataclasses.dataclass(frozen=True)
class Cyclic(Schedule):
    """A triangular wave of the learning rate between two bounds, and with ``cycle_momentum`` one of beta1.

    The policy of Smith 2017, "Cyclical Learning Rates for Training Neural Networks" (arXiv:1506.01186, sec. 3), with
    the arguments of `torch.optim.lr_scheduler.CyclicLR`:

        height   = phase / step_size_up                     while rising, from 0 to 1
                   (period - phase) / step_size_down        while falling, from 1 to 0
        lr       = base_lr + (max_lr - base_lr) * height * scale
        momentum = max_momentum - (max_momentum - base_momentum) * height * scale

    where ``phase = step mod period``, ``period = step_size_up + step_size_down``, and ``scale`` is 1 (triangular),
    ``2**-cycle`` with cycles counted from 0 (triangular2), ``gamma**step`` (exp_range), or what ``scale_fn`` says.

    Args:
        base_lr: Lower bound of the learning rate, >= 0. It may exceed ``max_lr``, as in torch: the wave then starts
            high and falls first.
        max_lr: Upper bound of the learning rate, >= 0.
        step_size_up: Steps of the rising half, > 0. Need not be an integer.
        step_size_down: Steps of the falling half, > 0; ``step_size_up`` if None.
        mode: "triangular", "triangular2" or "exp_range"; ignored if ``scale_fn`` is given.
        gamma: Base of exp_range, finite and >= 0. Above 1, its power of the steps of a cycle must be finite; beyond
            the largest float64 the scale stays at it.
        scale_fn: A function of the cycle (counted from 1) or of the step, as ``scale_mode`` says. A ``@triton.jit``
            function runs on the device and is given a float64 block; a plain Python callable is tabulated there.
        scale_mode: "cycle" or "iterations": what ``scale_fn`` is given.
        cycle_momentum: Cycle beta1 against the learning rate.
        base_momentum: Lower bound of beta1, in [0, 1).
        max_momentum: Upper bound of beta1, in [0, 1).
        total_steps: Steps a plain Python ``scale_fn`` is tabulated for on the triton backend. Needed there when
            ``scale_mode="iterations"``; 1,000 cycles if None and ``scale_mode="cycle"``.

    Raises:
        ValueError: An argument is not allowed; the message names it.

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
    total_steps: int | None = None

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        # Gamma has their bounds.
        set_lrs(self, "base_lr", "max_lr", "gamma")
        set_momenta(self, "base_momentum", "max_momentum")
        if self.step_size_down is None:
            set_field(self, "step_size_down", self.step_size_up)
        set_steps(self, "step_size_up", "step_size_down")
        set_field(self, "cycle_momentum", check_bool("cycle_momentum", self.cycle_momentum))
        if self.scale_fn is None:
            if self.mode not in MODES:
                raise ValueError(f"mode must be one of {MODES} unless scale_fn is given, got mode={self.mode!r}")
            set_field(self, "scale_mode", "iterations" if self.mode == "exp_range" else "cycle")
            if self.mode == "exp_range" and self.gamma > 1:
                steps = float(self.step_size_up) + float(self.step_size_down or 0)
                # Torch raises an OverflowError at that step.
                if steps * math.log(self.gamma) > MAX_LOG_AMPLITUDE:
                    raise ValueError(
                        f"gamma must be a finite number >= 0 whose power of the {steps:g} steps of a cycle is finite, "
                        f"got {self.gamma}"
                    )
        elif not callable(self.scale_fn):
            raise ValueError(f"scale_fn must be callable or None, got {self.scale_fn!r}")
        elif self.scale_mode not in SCALE_MODES:
            raise ValueError(f"scale_mode must be one of {SCALE_MODES}, got {self.scale_mode!r}")
        if self.total_steps is not None:
            allowed = "an integer number of steps >= 1 or None"
            set_field(self, "total_steps", check_integer("total_steps", self.total_steps, allowed, lambda n: n >= 1))

    def parts(self) -> tuple[Part, ...]:
        """See `Schedule.parts`: one part, of a rising and a falling line, that repeats."""
        lrs, momenta = (self.base_lr, self.max_lr), (self.max_momentum, self.base_momentum)
        assert self.step_size_down is not None
        scaling = Scaling(
            factor=1.0,
            per="cycle" if self.scale_mode == "cycle" else "step",
            scale_fn=self.scale_fn,
            about_lr=self.base_lr,
            about_momentum=self.max_momentum,
            total_steps=self.total_steps,
        )
        if self.scale_fn is None:
            factors = {"triangular": 1.0, "triangular2": 0.5, "exp_range": self.gamma}
            scaling = scaling._replace(factor=factors[self.mode])
        up = Segment(self.step_size_up, Shape.LINEAR, lrs, momenta if self.cycle_momentum else None)
        down = Segment(self.step_size_down, Shape.LINEAR, lrs[::-1], momenta[::-1] if self.cycle_momentum else None)
        return (Part((up, down), repeats=True, scaling=scaling),)
