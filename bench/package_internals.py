"""The one place where the benchmarks use what is private to fused_clr: its launches, and its kernels' compilation."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from fused_clr._device import launch


def _no_launch(*_: object, **__: object) -> None:
    """Stands in for a kernel launch."""


def launches_nothing() -> AbstractContextManager[object]:
    """Within, a step does all its host work and launches no kernel."""
    return mock.patch.object(launch, "run", _no_launch)


def torch_launches_nothing() -> AbstractContextManager[object]:
    """Likewise for torch's fused Adam."""
    return mock.patch.object(torch, "_fused_adam_", _no_launch)


@contextmanager
def triton_backend() -> Iterator[None]:
    """Within, optimizers over CPU tensors are built on the triton backend.

    Raises:
        RuntimeError: Triton was imported for compilation; CPU tensors need its interpreter.
    """
    if not launch.interpreted():
        raise RuntimeError("the triton backend over CPU tensors needs TRITON_INTERPRET=1 before triton is imported")
    with mock.patch.dict(os.environ, FUSED_CLR_BACKEND="triton"):
        yield


class CompiledUpdater(NamedTuple):
    """The machine code of the kernel that updates.

    Attributes:
        cubin: The code for sm_90.
        elements: Elements of a whole, aligned chunk, for each thread.
        loaded: Bytes that 128-bit loads take for an element.
        stored: Likewise of stores.
    """

    cubin: bytes
    elements: float
    loaded: float
    stored: float


def compile_updater(dtype: torch.dtype) -> CompiledUpdater:
    """Compiles the updaters for parameters and gradients of a dtype, which needs no GPU but Triton's compiler."""
    from tests.audit.checks import read
    from tests.audit.machine_code import WIDE_BYTES
    from tests.audit.variants import Kernels, Variant

    name = str(dtype).removeprefix("torch.")
    kernels = Kernels(Path(__file__).parents[1] / "kernels")
    variant = Variant("sm_90", "step_kernel", False, name, name, is_last=False)
    compiled = kernels.compile(variant)
    reading = read(kernels, variant, compiled)
    elements = variant.block_size / (variant.config.num_warps * 32)
    loaded, stored = (count * WIDE_BYTES / elements for count in (reading.wide_loads, reading.wide_stores))
    return CompiledUpdater(compiled.asm["cubin"], elements, loaded, stored)
