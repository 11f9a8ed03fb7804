"""Where a step runs: `triton` (CUDA and ROCm, or Triton's interpreter) and `cpu`."""

from __future__ import annotations

import os
from typing import Any

import torch

from .engine import Engine, TensorRecord

__all__ = ["Engine", "TensorRecord", "engine_class"]

VARIABLE = "FUSED_CLR_BACKEND"


def engine_class(device: torch.device) -> type[Engine[Any]]:
    """The engine for parameters on ``device``; the environment variable FUSED_CLR_BACKEND overrides.

    Args:
        device: Where the parameters are.

    Returns:
        A class of engines.

    Raises:
        RuntimeError: No backend can take them.
        ValueError: FUSED_CLR_BACKEND names no backend.
    """
    name = os.environ.get(VARIABLE) or {"cuda": "triton", "cpu": "cpu"}.get(device.type)
    if name not in ("triton", "cpu", None):
        raise ValueError(f"{VARIABLE} must be 'triton' or 'cpu', got {name!r}")
    if name is None or (name == "cpu" and device.type != "cpu"):
        raise RuntimeError(
            f"no fused-clr backend takes parameters on {device}: backend {name!r}, of 'triton' and 'cpu'"
        )
    if name == "cpu":
        from .cpu import CpuEngine

        return CpuEngine
    try:
        from .triton import TritonEngine
    except ImportError as error:
        raise RuntimeError(f"parameters on {device} need triton, which cannot be imported: {error}") from error
    return TritonEngine
