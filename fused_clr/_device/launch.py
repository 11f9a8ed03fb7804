"""Launches kernels and reports launches to recorders. Nothing else in the package launches kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch


class Launch(NamedTuple):
    """A kernel, ready to be launched.

    Attributes:
        kernel: The ``@triton.jit`` function.
        grid: Programs.
        arguments: In the order of the kernel's signature, constants too.
        options: Compile options.
        device: Where it runs.
        compiled: What it was compiled to; None in the interpreter.
    """

    kernel: Any
    grid: int
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    device: torch.device
    compiled: Any


# Recorders of `fused_clr.testing.record_launches`, innermost last.
recorders: list[Callable[[Launch], None]] = []


@cache
def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter; decided when kernels are first imported."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def make_launch(kernel: Any, grid: int, options: dict[str, Any], device: torch.device, **arguments: Any) -> Launch:
    """Puts arguments in the kernel's order, and compiles and loads it for the device, or finds it compiled."""
    ordered = tuple(arguments.pop(name) for name in kernel.arg_names)
    if arguments:
        raise TypeError(f"{kernel.__name__} has no arguments {sorted(arguments)}")
    compiled = None
    if not interpreted():
        with torch.cuda.device(device):
            compiled = kernel.warmup(*ordered, grid=(grid,), **options)
            # Loads the code now: a first launch inside a capture would, and the driver refuses it there.
            compiled._init_handles()
    return Launch(kernel, grid, ordered, options, device, compiled)


def replace_arguments(launch: Launch, replaced: dict[str, Any]) -> Launch:
    """The launch with other values for arguments that the kernel is not specialised on."""
    arguments = list(launch.arguments)
    for name, value in replaced.items():
        arguments[launch.kernel.arg_names.index(name)] = value
    return launch._replace(arguments=tuple(arguments))


def run(launch: Launch, recorded: bool = True, **replaced: Any) -> None:
    """Launches on the current stream of its device.

    Args:
        launch: What to launch.
        recorded: Report it to recorders: it is part of the step, not of the host's preparations.
        replaced: See `replace_arguments`.
    """
    if replaced:
        launch = replace_arguments(launch, replaced)
    if recorded and recorders:
        for record in recorders:
            record(launch)
    if launch.compiled is None:
        launch.kernel[(launch.grid,)](*launch.arguments, **launch.options)
    elif launch.device.index == torch.cuda.current_device():
        launch.compiled[(launch.grid, 1, 1)](*launch.arguments)
    else:
        with torch.cuda.device(launch.device):
            launch.compiled[(launch.grid, 1, 1)](*launch.arguments)
