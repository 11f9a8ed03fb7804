"""What an optimizer's param group may say, and what a step needs to know of it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .schedules import Cyclic

if TYPE_CHECKING:
    from .param_group import ParamGroup

DEFAULT_BETAS = (0.9, 0.999)


class Hyperparameters(NamedTuple):
    """One param group's numbers, as a step uses them. ``lr`` may be a 1-element tensor, read at every step."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    amsgrad: bool
    maximize: bool
    decoupled_weight_decay: bool
    schedule: Cyclic | None


class StepOptions(NamedTuple):
    """What holds for all groups of an optimizer; the arguments of `FusedAdam`."""

    max_grad_norm: float | None = None
    skip_nonfinite: bool = False
    store_grads: bool = False
    advance_on_skip: bool = False
    history_size: int = 256


def check_options(options: StepOptions) -> StepOptions:
    """Checks what holds for all groups.

    Returns:
        ``options``, with plain numbers.

    Raises:
        ValueError: One is not allowed; the message names it and what is.
    """
    limit = None if options.max_grad_norm is None else check_max_grad_norm(options.max_grad_norm)
    size: Any = options.history_size
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise ValueError(f"history_size must be an integer >= 0, got {size!r}")
    for name in ("skip_nonfinite", "store_grads", "advance_on_skip"):
        if not isinstance(getattr(options, name), bool):
            raise ValueError(f"{name} must be True or False, got {getattr(options, name)!r}")
    if options.skip_nonfinite and limit is None:
        raise ValueError(
            "skip_nonfinite=True needs max_grad_norm, whose norm it looks at; math.inf measures without clipping"
        )
    return options._replace(max_grad_norm=limit)


def check_max_grad_norm(value: Any) -> float:
    """Checks a limit of the gradient norm.

    Raises:
        ValueError: It is not a number > 0.
    """
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not number > 0:
        raise ValueError(f"max_grad_norm must be a number > 0 (math.inf: measure alone) or None, got {value!r}")
    return number


def read_hyperparameters(groups: Iterable[ParamGroup]) -> list[Hyperparameters]:
    """What the groups say, as a step needs it; one entry per group."""
    return [
        Hyperparameters(
            beta1=float(group.stored("betas")[0]),
            beta2=float(group.stored("betas")[1]),
            **{name: group.stored(name) for name in Hyperparameters._fields if name not in ("beta1", "beta2")},
        )
        for group in groups
    ]


def _checked_number(name: str, value: Any, allowed: str, upper: float = math.inf) -> None:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name} must have 1 element where it is a tensor, got shape {tuple(value.shape)}")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be {allowed}, got {value!r}") from None
    # `not <=` refuses NaN too.
    if not 0.0 <= number < upper:
        raise ValueError(f"{name} must be {allowed}, got {value}")


def check_hyperparameter(name: str, value: Any) -> Any:
    """Checks a value for ``param_group[name]``.

    Args:
        name: Key of the param group.
        value: What is to be stored.

    Returns:
        What is to be stored: ``value``, or for ``betas`` a tuple.

    Raises:
        ValueError: ``value`` is not allowed; the message names it and what is.
        TypeError: ``schedule`` is neither a schedule nor None.
    """
    if name in ("lr", "eps", "weight_decay"):
        _checked_number(name, value, "a finite number >= 0")
    elif name == "betas":
        try:
            beta1, beta2 = value
        except (TypeError, ValueError):
            raise ValueError(f"betas must be a pair of numbers in [0, 1), got {value!r}") from None
        for index, beta in enumerate((beta1, beta2)):
            _checked_number(f"betas[{index}]", beta, "a number in [0, 1)", upper=1.0)
        return beta1, beta2
    elif name == "differentiable" and value:
        raise ValueError(
            "differentiable must be False: the fused step has no autograd formula, got differentiable=True"
        )
    elif name == "schedule" and not (value is None or isinstance(value, Cyclic)):
        raise TypeError(f"schedule must be a value from fused_clr.schedules or None, got {type(value).__name__}")
    return value


def check_schedule_step(name: str, step: Any) -> int:
    """Checks a place on the schedule's clock.

    Args:
        name: What error messages call it.
        step: Updates so far.

    Returns:
        int in [0, 2**53).

    Raises:
        ValueError: It is anything else.
    """
    if not isinstance(step, (int, float)) or isinstance(step, bool) or not 0 <= step < 2**53 or int(step) != step:
        raise ValueError(f"{name} must be an integer in [0, 2**53), got {step!r}")
    return int(step)


def check_parameter(name: str, param: Tensor) -> None:
    """Checks that a tensor can be a parameter of the fused step.

    Args:
        name: What error messages call it.
        param: The tensor.

    Raises:
        ValueError: Its dtype or layout is not supported.
    """
    if param.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got layout {param.layout}")
    if not (param.is_floating_point() or param.is_complex()) or param.element_size() == 1:
        raise ValueError(f"{name} must have a floating-point or complex dtype of 16 bits or more, got {param.dtype}")
    if not is_dense(param):
        raise ValueError(
            f"{name} must fill its storage without gaps or overlaps, got shape {tuple(param.shape)} with strides "
            f"{param.stride()}; make it contiguous"
        )


def check_gradient(name: str, param: Tensor, grad: Tensor) -> None:
    """Checks that ``grad`` can update ``param``.

    Args:
        name: What error messages call the parameter.
        param: The parameter.
        grad: Its gradient.

    Raises:
        RuntimeError: It is sparse, or its device, shape or kind of dtype is another than the parameter's.
    """
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"the gradient of {name} must be dense, got layout {grad.layout}; use torch.optim.SparseAdam"
        )
    if grad.device != param.device:
        raise RuntimeError(f"the gradient of {name} must be on {param.device} as the parameter is, got {grad.device}")
    if grad.shape != param.shape:
        raise RuntimeError(
            f"the gradient of {name} must have the parameter's shape {tuple(param.shape)}, got {tuple(grad.shape)}"
        )
    if grad.is_complex() != param.is_complex() or not (grad.is_floating_point() or grad.is_complex()):
        raise RuntimeError(f"the gradient of {name} ({param.dtype}) cannot have dtype {grad.dtype}")


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one span of memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((st, sz) for st, sz in zip(tensor.stride(), tensor.shape, strict=True) if sz != 1):
        if stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def same_layout(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one shape keep their elements in the same order."""
    pairs = zip(first.stride(), second.stride(), first.shape, strict=True)
    return all(a == b or size <= 1 for a, b, size in pairs) or first.numel() <= 1
