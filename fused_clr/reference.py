"""The oracle: schedules in exact rationals, Adam in float64. Slow, and obviously right."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from .schedules import Part, Schedule, Shape


def exact_lr(schedule: Schedule, step: int) -> Fraction:
    """The learning rate at ``step`` without rounding.

    Args:
        schedule: A schedule without ``scale_fn``, of segments that are CONSTANT or LINEAR. Floats are taken as
            exact rationals.
        step: Updates already applied, >= 0. Where the amplitude is scaled per step, the cost grows with it.

    Raises:
        ValueError: The value at ``step`` is not rational, or depends on a ``scale_fn``.

    Example:
        >>> from fused_clr.schedules import Cyclic
        >>> exact_lr(Cyclic(0.25, 1.0, step_size_up=4), 2)
        Fraction(5, 8)
    """
    part, step_of_part = _find_part(schedule, step)
    index, progress, cycle = _find_segment(part, step_of_part)
    first, last = map(Fraction, part.segments[index].lr)
    about = Fraction(part.scaling.about_lr)
    return about + (first + (last - first) * progress - about) * _scale(part, step_of_part, cycle)


def exact_momentum(schedule: Schedule, step: int) -> Fraction:
    """The momentum at ``step`` without rounding. Arguments as for `exact_lr`.

    Raises:
        ValueError: As `exact_lr`, or the schedule does not set the momentum.
    """
    part, step_of_part = _find_part(schedule, step)
    index, progress, cycle = _find_segment(part, step_of_part)
    momentum = part.segments[index].momentum
    if momentum is None:
        raise ValueError(f"the schedule does not set the momentum at step {step}")
    first, last = map(Fraction, momentum)
    about = Fraction(part.scaling.about_momentum)
    return about + (first + (last - first) * progress - about) * _scale(part, step_of_part, cycle)


def _find_part(schedule: Schedule, step: int) -> tuple[Part, int]:
    """The part at ``step``, and the step of the part; past the end of the part, the step of its end."""
    part = [part for part in schedule.parts() if part.start <= step][-1]
    step -= part.start
    return part, step if part.repeats else min(step, math.ceil(_period(part)))


def _find_segment(part: Part, step: int) -> tuple[int, Fraction, int]:
    """The segment at a step of a part, the fraction of it that is done, and the cycle, counted from 0."""
    cycle, phase = divmod(Fraction(step), _period(part)) if part.repeats else (0, min(Fraction(step), _period(part)))
    index = 0
    # The last segment has no successor: its end belongs to it.
    while index < len(part.segments) - 1 and phase >= Fraction(part.segments[index].steps):
        phase -= Fraction(part.segments[index].steps)
        index += 1
    segment = part.segments[index]
    if segment.shape not in (Shape.CONSTANT, Shape.LINEAR):
        raise ValueError(f"only CONSTANT and LINEAR segments have exact values, got {segment.shape!r}")
    return index, phase / Fraction(segment.steps), int(cycle)


def _period(part: Part) -> Fraction:
    return sum((Fraction(segment.steps) for segment in part.segments), Fraction(0))


def _scale(part: Part, step: int, cycle: int) -> Fraction:
    if part.scaling.scale_fn is not None:
        raise ValueError("a scale_fn has no exact value")
    factor, count = Fraction(part.scaling.factor), step if part.scaling.per == "step" else cycle
    # After 4,096 halvings the value is below every positive float64. Python cannot compute 2**(2**50) exactly.
    return Fraction(0) if factor <= Fraction(1, 2) and count >= 4096 else factor**count


class ReferenceState(NamedTuple):
    """A parameter and its Adam state, float64 tensors of one shape."""

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor
    step: int


def initial_state(param: Tensor) -> ReferenceState:
    """The state before the first update."""
    zeros = torch.zeros(param.shape, dtype=torch.float64, device=param.device)
    return ReferenceState(param.detach().double().clone(), zeros, zeros, zeros, 0)


def adam_step(
    state: ReferenceState,
    grad: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
) -> ReferenceState:
    """One update in float64: Kingma & Ba 2015 (arXiv:1412.6980), algorithm 1, with the options of `torch.optim.Adam`.

    Args:
        state: The state before.
        grad: Gradient, of the parameter's shape.
        lr: Learning rate of this update.
        beta1: Decay rate of the first moment, at this update.
        beta2: Decay rate of the second moment.
        eps: Added to the denominator.
        weight_decay: L2 penalty, or the decoupled decay of Loshchilov & Hutter 2019 (arXiv:1711.05101).
        amsgrad: Divide by the largest second moment so far (Reddi et al. 2018, algorithm 2).
        maximize: Ascend.
        decoupled_weight_decay: Which of the two decays.

    Returns:
        The state after.
    """
    param, grad = state.param, -grad.double() if maximize else grad.double()
    if decoupled_weight_decay:
        param = param * (1 - lr * weight_decay)
    else:
        grad = grad + weight_decay * param
    step = state.step + 1
    exp_avg = beta1 * state.exp_avg + (1 - beta1) * grad
    exp_avg_sq = beta2 * state.exp_avg_sq + (1 - beta2) * grad**2
    max_exp_avg_sq = torch.maximum(state.max_exp_avg_sq, exp_avg_sq)
    second_moment = max_exp_avg_sq if amsgrad else exp_avg_sq
    denominator = (second_moment / (1 - beta2**step)).sqrt() + eps
    param = param - lr * (exp_avg / (1 - beta1**step)) / denominator
    return ReferenceState(param, exp_avg, exp_avg_sq, max_exp_avg_sq, step)
