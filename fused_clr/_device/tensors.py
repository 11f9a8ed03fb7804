"""Dtypes and layouts of the tensors of a step: what is supported, and how arrays are copied to the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

LOW_PRECISION = frozenset({torch.float16, torch.bfloat16, torch.complex32})


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of an element's real numbers: a complex tensor is updated as pairs of reals."""
    return dtype.to_real() if dtype.is_complex else dtype


def real_numel(tensor: Tensor) -> int:
    """How many real numbers a tensor holds."""
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def has_memory(param: Tensor) -> bool:
    """Whether a parameter can be stepped: it is not on meta, and not of a lazy module that has not run."""
    return not (param.is_meta or torch.nn.parameter.is_lazy(param))


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one span of memory, in any order of dimensions."""
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


def shares_elements(tensor: Tensor) -> bool:
    """Whether several elements may be in one place of memory, as those of an expanded tensor are."""
    span = 1
    for stride, size in sorted((st, sz) for st, sz in zip(tensor.stride(), tensor.shape, strict=True) if sz != 1):
        if stride < span:
            return tensor.numel() > 0
        span += stride * (size - 1)
    return False


def is_resolved(tensor: Tensor) -> bool:
    """Whether memory holds the tensor's values: neither its conj nor its neg bit is set."""
    return not (tensor.is_conj() or tensor.is_neg())


def is_low_precision(dtype: torch.dtype) -> bool:
    """Whether a step must compute in float32 what this dtype stores."""
    return dtype in LOW_PRECISION


def average_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a parameter's average: in 16 bits an exponential average would stop moving."""
    if not is_low_precision(dtype):
        return dtype
    return torch.complex64 if dtype.is_complex else torch.float32


def total_norm(grads: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients, as `torch.nn.utils.get_total_norm`; of float16 and bfloat16 ones in float32.

    In float16 the norm of scaled gradients would overflow.
    """
    low = [grad for grad in grads if is_low_precision(grad.dtype)]
    if not low:
        return torch.nn.utils.get_total_norm(grads)
    norms = [*torch._foreach_norm([torch.view_as_real(g) if g.is_complex() else g for g in low], 2.0, torch.float32)]
    others = [grad for grad in grads if not is_low_precision(grad.dtype)]
    if others:
        norms.append(torch.nn.utils.get_total_norm(others))
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def check_parameter(name: str, param: Tensor) -> None:
    """Checks that a tensor can be a parameter of the fused step.

    Args:
        name: Its name in error messages.
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


def check_gradient(name: str, param: Tensor, grad: Tensor, writes: bool) -> None:
    """Checks that ``grad`` can update ``param``.

    Args:
        name: The parameter's name in error messages.
        param: The parameter.
        grad: Its gradient.
        writes: The step writes into the gradient.

    Raises:
        RuntimeError: It is sparse, or its device, shape or kind of dtype differs from the parameter's; or it cannot be
            written.
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
    if writes and shares_elements(grad):
        raise RuntimeError(
            f"the gradient of {name} cannot be written, as write_back_grads=True asks: several of its elements share "
            f"memory, got shape {tuple(grad.shape)} with strides {grad.stride()}; clone() it"
        )


def upload(array: NDArray[Any], device: torch.device, out: Tensor | None = None) -> Tensor:
    """Copies a host array to a device without waiting for it.

    Args:
        array: The array; it may be changed as soon as this returns.
        device: The device.
        out: A tensor of its shape and dtype to fill; a new one if None.

    Returns:
        The device tensor.
    """
    host = torch.from_numpy(array.copy())
    if device.type == "cuda":
        # Torch's pinned allocator reuses a block only after the copies from it are done.
        host = host.pin_memory()
    if out is None:
        return host.to(device, non_blocking=True)
    return out.copy_(host, non_blocking=True)
