"""SGD with momentum as an update rule (Sutskever et al. 2013, as `torch.optim.SGD` has it): scalars, element update."""

import triton
import triton.language as tl

# The rule's columns of the group table, counted from RULE_COLUMNS.
ONE_MINUS_DAMPENING = tl.constexpr(0)
# 1 for Nesterov's momentum, else 0.
NESTEROV = tl.constexpr(1)


@triton.jit
def sgd_scalars(lr, momentum, weight_decay, update_step, group_row_ptr):
    """What the updates of a step need, in float64.

    Args:
        lr: float64 block. Learning rate of the update.
        momentum: float64 block. Momentum of the update.
        weight_decay: float64 block.
        update_step: float64 block >= 1. Number of the update since the momentum buffer was created, counted per tensor.
        group_row_ptr: float64 pointer block to the rule's columns of the group table.

    Returns:
        Tuple of float64 blocks, in the order in which ``sgd_update`` unpacks them.
    """
    # The first update does not dampen: its buffer becomes the gradient itself.
    grad_factor = tl.where(update_step == 1, 1.0, tl.load(group_row_ptr + ONE_MINUS_DAMPENING))
    return lr, momentum, grad_factor, weight_decay, tl.load(group_row_ptr + NESTEROV)


@triton.jit
def sgd_update(param, grad, states, scalars):
    """The element update; without states there is no momentum.

    Args:
        param: float32 or float64 block; so are ``grad`` and ``states``.
        grad: Gradients, unscaled and clipped.
        states: Perhaps momentum_buffer, which is 0 before the first update.
        scalars: Tuple of the scalars of ``sgd_scalars``, in the blocks' dtype; there may be more.

    Returns:
        The new param; the new states, a tuple.
    """
    lr, momentum, grad_factor, l2_decay, nesterov = scalars[0], scalars[1], scalars[2], scalars[3], scalars[4]
    # Without decay an infinite parameter must not turn its gradient into NaN.
    if l2_decay != 0:
        grad += l2_decay * param
    new_states = states
    if len(states) == 1:
        momentum_buffer = momentum * states[0] + grad_factor * grad
        ahead = tl.where(nesterov != 0, grad + momentum * momentum_buffer, momentum_buffer)
        # A schedule may set the momentum to 0. As in torch, such an update leaves the buffer alone.
        grad = tl.where(momentum == 0, grad, ahead)
        new_states = (tl.where(momentum == 0, states[0], momentum_buffer),)
    return param - lr * grad, new_states
