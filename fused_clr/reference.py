"""The oracle: schedules in exact rationals, Adam in float64. Slow, and obviously right."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from .schedules import Cyclic


def exact_height_and_scale(schedule: Cyclic, step: int) -> tuple[Fraction, Fraction]:
    """The triangle's height and its scale at ``step``, without rounding (Smith 2017, arXiv:1506.01186, sec. 3).

    Args:
        schedule: A schedule without ``scale_fn``. Float step sizes stand for the rationals they are.
        step: Updates already applied, >= 0. For exp_range the cost grows with it.

    Returns:
        Height in [0, 1]; scale.

    Raises:
        ValueError: The schedule has a ``scale_fn``.
    """
    if schedule.scale_fn is not None:
        raise ValueError("a scale_fn has no exact value")
    up, down = Fraction(schedule.step_size_up), Fraction(schedule.step_size_down or schedule.step_size_up)
    cycle, phase = divmod(Fraction(step), up + down)
    height = phase / up if phase <= up else (up + down - phase) / down
    if schedule.mode == "triangular2":
        # Nothing that a float64 can tell from 0 is left after 4,096 halvings; Python cannot hold 2**(2**50) either.
        return height, Fraction(1, 2 ** int(cycle)) if cycle < 4096 else Fraction(0)
    if schedule.mode == "exp_range":
        return height, Fraction(schedule.gamma) ** step
    return height, Fraction(1)


def exact_lr(schedule: Cyclic, step: int) -> Fraction:
    """The learning rate at ``step`` without rounding. Arguments as for `exact_height_and_scale`.

    Example:
        >>> exact_lr(Cyclic(0.25, 1.0, step_size_up=4), 2)
        Fraction(5, 8)
    """
    height, scale = exact_height_and_scale(schedule, step)
    base_lr = Fraction(schedule.base_lr)
    return base_lr + (Fraction(schedule.max_lr) - base_lr) * height * scale


def exact_momentum(schedule: Cyclic, step: int) -> Fraction:
    """The momentum at ``step`` without rounding. Arguments as for `exact_height_and_scale`."""
    height, scale = exact_height_and_scale(schedule, step)
    max_momentum = Fraction(schedule.max_momentum)
    return max_momentum - (max_momentum - Fraction(schedule.base_momentum)) * height * scale


class ReferenceState(NamedTuple):
    """A parameter and its Adam state, float64 tensors of one shape."""

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor
    step: int


def initial_state(param: Tensor) -> ReferenceState:
    """The state before the first update."""
    zeros = torch.zeros(param.shape, dtype=torch.float64)
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
