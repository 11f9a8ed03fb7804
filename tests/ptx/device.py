"""A GPU that is none: the project's launches, compiled as Triton's JIT would for one, and executed by `machine`.

The host code, Triton's specialisation of the real arguments and its compiler are the real ones. Replaced are Triton's
launcher and what asks for a CUDA device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver

from fused_clr._device import launch as launcher
from fused_clr._device import state
from fused_clr._device.capture import Capture
from fused_clr._device.step_plan import LaunchConfig
from fused_clr._device.triton import TritonEngine

from . import machine
from .decode import Kernel
from .dtypes import WARP
from .faults import PtxError

# Addresses of scratch memory, which Triton adds to the parameters of every kernel.
NO_SCRATCH = (0, 0)


class Device:
    """What tests see of the device, and what Triton asks its driver.

    Attributes:
        seed: Of the order in which warps take turns. Every launch adds 1.
        resident: Programs at a time; all if None.
        launches: The name of every kernel launched so far.
        rewrite: Changes the PTX before it runs: a fault to be found.
        adapts: Give an engine's programs as many threads as `adapted` says.

    Args:
        capability: 80, 90, ...
        seed: See above.
    """

    def __init__(self, capability: int, seed: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)
        self.seed = seed
        # With odd seeds, some programs begin when others have ended.
        self.resident = 2 if seed % 2 else None
        self.launches: list[str] = []
        self.rewrite: Callable[[str], str] = lambda ptx: ptx
        self.adapts = True
        self._states: list[state.DeviceState] = []
        self._engines: list[TritonEngine] = []
        self._captures: list[Capture] = []
        self._kernels: dict[str, Kernel] = {}

    def get_current_target(self) -> GPUTarget:
        """For Triton."""
        return self._target

    def get_current_device(self) -> int:
        """For Triton, which caches compiled kernels by it."""
        return int(self._target.arch)

    def get_current_stream(self, device: int) -> int:
        """For Triton."""
        del device
        return 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Makes the triton backend launch on it, with tensors on the CPU."""
        monkeypatch.setattr(driver, "_active", self)
        monkeypatch.setattr(CompiledKernel, "_init_handles", lambda compiled: None)
        monkeypatch.setattr(CompiledKernel, "__getitem__", lambda own, grid: lambda *given: self._run(own, grid, given))
        monkeypatch.setattr(state, "interpreted", lambda: True)
        cuda = SimpleNamespace(device=lambda device: contextlib.nullcontext(), current_device=lambda: None)
        monkeypatch.setattr(launcher, "torch", SimpleNamespace(cuda=cuda, Tensor=Tensor))
        monkeypatch.setattr(launcher, "_start", lambda own: own.compiled[(own.grid, 1, 1)](*own.arguments))
        # Tests ask for small programs, which the interpreter does not divide into threads.
        construct = TritonEngine.__init__

        def with_enough_elements(engine: TritonEngine, *arguments: Any) -> None:
            engine.config = adapted(engine.config) if self.adapts else engine.config
            construct(engine, *arguments)

        monkeypatch.setattr(TritonEngine, "__init__", with_enough_elements)
        # What tables point to, the engines know. The first launch is made while they are constructed.
        _remember(monkeypatch, state.DeviceState, "set_groups", self._states)
        _remember(monkeypatch, TritonEngine, "prepare", self._engines)
        _remember(monkeypatch, Capture, "__init__", self._captures)

    def _run(self, compiled: CompiledKernel, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        ptx = self.rewrite(compiled.asm["ptx"])
        if ptx not in self._kernels:
            self._kernels[ptx] = Kernel(ptx)
        values: list[int] = []
        tensors = list(self._reachable())
        for (name, kind), value in zip(compiled.src.signature.items(), arguments, strict=True):
            if isinstance(value, Tensor):
                values.append(value.data_ptr())
                tensors.append((name, value))
            elif kind != "constexpr" and not isinstance(kind, tuple):
                assert kind[0] in "iu", f"{name} has type {kind}"
                values.append(value)
        try:
            machine.launch(
                self._kernels[ptx],
                grid[0],
                [*values, *NO_SCRATCH],
                [(name, tensor.data_ptr(), _extent(tensor)) for name, tensor in tensors],
                shared=compiled.metadata.shared,
                seed=self.seed,
                resident=self.resident,
            )
        except PtxError as error:
            raise type(error)(f"{compiled.metadata.name}: {error}") from error
        self.seed += 1
        self.launches.append(compiled.metadata.name)

    def _reachable(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of what kernels may reach through addresses in tables."""
        for own in self._states:
            yield "schedule table", own._schedule_tables
        for engine in self._engines:
            yield from (("parameter", tensor) for tensor in engine.parameters.tensors)
            yield from (("gradient", grad) for grad in engine.parameters.grads() if grad is not None)
            for plan in engine._plans.plans():
                yield from (("state", tensor) for tensor in plan.states + plan.idle_params + plan.averages)
                yield from (("gradient buffer", buffer) for buffer in plan.buffers.values())
        for capture in self._captures:
            yield from (("captured", tensor) for tensor in capture.tensors if isinstance(tensor, Tensor))


def adapted(config: LaunchConfig) -> LaunchConfig:
    """As many lanes as threads and, as in what users get, 8 elements a thread, if there are so many.

    With fewer, Triton gives an element to several threads, of which one stores what the others load.
    """
    num_warps = max(config.block_size // (8 * WARP), 2)
    return config._replace(num_warps=num_warps, lanes=num_warps * WARP)


def _remember(monkeypatch: pytest.MonkeyPatch, owner: type[Any], name: str, callers: list[Any]) -> None:
    """Collects the objects whose method is called."""
    method = getattr(owner, name)

    def remember(caller: Any, *arguments: Any) -> Any:
        if all(caller is not known for known in callers):
            callers.append(caller)
        return method(caller, *arguments)

    monkeypatch.setattr(owner, name, remember)


def _extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to its last."""
    if tensor.numel() == 0:
        return 0
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.element_size() * (1 + steps)
