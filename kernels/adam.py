"""Adam and AdamW as an update rule (Kingma & Ba 2015, arXiv:1412.6980): scalars of a step, and the element update."""

import triton
import triton.language as tl

# The rule's columns of the group table, counted from RULE_COLUMNS.
BETA2 = tl.constexpr(0)
LOG2_BETA2 = tl.constexpr(1)
EPS = tl.constexpr(2)
# 1 where the weight decay is added to the gradient, else 0.
IS_L2 = tl.constexpr(3)
# Coefficients of 1, lr and lr**2: what decoupled weight decay is multiplied by.
DECAY_CONSTANT = tl.constexpr(4)
DECAY_LINEAR = tl.constexpr(5)
DECAY_SQUARE = tl.constexpr(6)

# The smallest normal float32. Smaller second moments count as this, the root of which is 1e-19.
TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def adam_scalars(lr, momentum, weight_decay, update_step, group_row_ptr):
    """What the updates of a step need (algorithm 1), in float64: in float32, ``1 - 0.9999**t`` would be off by 1e-4.

    Args:
        lr: float64 block. Learning rate of the update.
        momentum: float64 block. beta1 of the update.
        weight_decay: float64 block.
        update_step: float64 block >= 1. Number of the update, counted per tensor.
        group_row_ptr: float64 pointer block to the rule's columns of the group table.

    Returns:
        Tuple of float64 blocks, in the order in which ``adam_update`` unpacks them.
    """
    bias_correction1 = 1.0 - tl.exp2(update_step * tl.log2(momentum))
    bias_correction2 = 1.0 - tl.exp2(update_step * tl.load(group_row_ptr + LOG2_BETA2))
    decay = tl.load(group_row_ptr + DECAY_LINEAR) + lr * tl.load(group_row_ptr + DECAY_SQUARE)
    decay = tl.load(group_row_ptr + DECAY_CONSTANT) + lr * decay
    return (
        lr / bias_correction1,
        1.0 / tl.sqrt(bias_correction2),
        1.0 - momentum,
        1.0 - tl.load(group_row_ptr + BETA2),
        tl.load(group_row_ptr + EPS),
        weight_decay * tl.load(group_row_ptr + IS_L2),
        1.0 - weight_decay * decay,
    )


@triton.jit
def square_root(x):
    """``sqrt(x)``, correctly rounded.

    Refines the approximate root with what the compiler's own root does, but without its branch: that would take the
    slow path of special cases for every 0, which is what untouched rows of an embedding hold.

    Args:
        x: float32 block of at least TINY and below inf; NaN stays NaN.

    Returns:
        float32 block.
    """
    reciprocal = tl.rsqrt(x)
    root = x * reciprocal
    return tl.fma(tl.fma(-root, root, x), 0.5 * reciprocal, root)


@triton.jit
def quotient(x, y):
    """``x / y``, correctly rounded unless ``x`` is so small that a remainder underflows. See ``square_root``.

    Args:
        x: float32 block.
        y: float32 block, normal and positive; NaN stays NaN.

    Returns:
        float32 block.
    """
    reciprocal = tl.rsqrt(y)
    reciprocal *= reciprocal
    reciprocal = tl.fma(tl.fma(-y, reciprocal, 1.0), reciprocal, reciprocal)
    ratio = x * reciprocal
    return tl.fma(tl.fma(-y, ratio, x), reciprocal, ratio)


@triton.jit
def adam_update(param, grad, states, scalars):
    """The element update; with three states AMSGrad's (Reddi et al. 2018, algorithm 2).

    Args:
        param: float32 or float64 block; so are ``grad`` and ``states``.
        grad: Gradients, unscaled and clipped.
        states: exp_avg, exp_avg_sq and perhaps max_exp_avg_sq.
        scalars: Tuple of the scalars of ``adam_scalars``, in the blocks' dtype; there may be more.

    Returns:
        The new param; the new states, a tuple.
    """
    step_size, bias_correction2_rsqrt, one_minus_beta1, one_minus_beta2 = scalars[0], scalars[1], scalars[2], scalars[3]
    eps, l2_decay, decay_factor = scalars[4], scalars[5], scalars[6]
    exp_avg, exp_avg_sq = states[0], states[1]

    # Without decay an infinite parameter must not turn its gradient into NaN.
    if l2_decay != 0:
        grad += l2_decay * param
    param = param * decay_factor
    exp_avg += one_minus_beta1 * (grad - exp_avg)
    # As torch's fused kernels, the factor goes before the square, which would overflow for a gradient of 3e19.
    grad_sq = one_minus_beta2 * grad * grad
    next_exp_avg_sq = exp_avg_sq + (grad_sq - one_minus_beta2 * exp_avg_sq)
    # inf - inf would be NaN. As in torch, a second moment that overflowed stays infinite: its element stops.
    exp_avg_sq = tl.where(next_exp_avg_sq < float("inf"), next_exp_avg_sq, exp_avg_sq + grad_sq)
    new_states = (exp_avg, exp_avg_sq)
    second_moment = exp_avg_sq
    if len(states) == 3:
        second_moment = tl.maximum(states[2], exp_avg_sq, propagate_nan=tl.PropagateNan.ALL)
        new_states = (exp_avg, exp_avg_sq, second_moment)
    if param.dtype == tl.float64:
        denominator = tl.sqrt(second_moment) * bias_correction2_rsqrt + eps
        param -= step_size * (exp_avg / denominator)
    else:
        normal = tl.maximum(second_moment, TINY, propagate_nan=tl.PropagateNan.ALL)
        ratio = quotient(exp_avg, square_root(normal) * bias_correction2_rsqrt + eps)
        # 0 where the second moment is infinite.
        param -= step_size * tl.where(second_moment < float("inf"), ratio, exp_avg * tl.rsqrt(normal))
    return param, new_states
