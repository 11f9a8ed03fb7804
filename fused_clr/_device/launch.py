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
        words: ``arguments`` with addresses in place of tensors, which compiled code takes as well.
    """

    kernel: Any
    grid: int
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    device: torch.device
    compiled: Any
    words: tuple[Any, ...]


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
    return Launch(kernel, grid, ordered, options, device, compiled, tuple(map(_word, ordered)))


def _word(argument: Any) -> Any:
    return argument.data_ptr() if isinstance(argument, torch.Tensor) else argument


def replace_arguments(launch: Launch, replaced: dict[str, Any]) -> Launch:
    """The launch with other values for arguments that the kernel is not specialised on."""
    arguments, words = list(launch.arguments), list(launch.words)
    for name, value in replaced.items():
        index = launch.kernel.arg_names.index(name)
        arguments[index], words[index] = value, _word(value)
    return launch._replace(arguments=tuple(arguments), words=tuple(words))


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
        _start(launch)
    else:
        with torch.cuda.device(launch.device):
            _start(launch)


def _start(launch: Launch) -> None:
    """Launches compiled code on the current device, as ``compiled[grid]`` does, in half the time."""
    runtime, driver = _triton()
    compiled = launch.compiled
    if _has_calls(runtime.launch_enter_hook) or _has_calls(runtime.launch_exit_hook):
        # Profilers ask for more.
        compiled[(launch.grid, 1, 1)](*launch.arguments)
        return
    stream = driver.active.get_current_stream(launch.device.index)
    # Without metadata for hooks, and without hooks.
    nothing = None, None, None
    compiled.run(launch.grid, 1, 1, stream, compiled.function, compiled.packed_metadata, *nothing, *launch.words)


def _has_calls(hook: Any) -> bool:
    # A chain of functions, or a function or None that somebody has put in its place.
    return bool(getattr(hook, "calls", hook))


@cache
def _triton() -> tuple[Any, Any]:
    from triton import knobs
    from triton.runtime.driver import driver

    return knobs.runtime, driver
