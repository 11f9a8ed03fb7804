"""The one place that launches kernels, and that lets a recorder listen."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes", "y")


class Launch(NamedTuple):
    """A kernel with its grid, arguments (in the order of its signature, constants too) and compile options."""

    kernel: Any
    grid: int
    arguments: tuple[Any, ...]
    options: dict[str, Any]


# Recorders of `fused_clr.testing.record_launches`, innermost last.
recorders: list[Callable[[Launch], None]] = []


def compile_launch(launch: Launch) -> Any:
    """Compiles a launch's kernel for the current device, or finds it compiled.

    Returns:
        What `run` wants as ``compiled``; None in the interpreter.
    """
    if INTERPRETED:
        return None
    return launch.kernel.warmup(*launch.arguments, grid=(launch.grid,), **launch.options)


def run(launch: Launch, compiled: Any, recorded: bool = True) -> None:
    """Launches on the current device and stream.

    Args:
        launch: What to launch.
        compiled: What `compile_launch` gave for it, or for one that differs in its grid and tensors alone.
        recorded: Whether recorders hear of it: it belongs to the step, and not to the host's preparations.
    """
    if recorded:
        for record in recorders:
            record(launch)
    if compiled is None:
        launch.kernel[(launch.grid,)](*launch.arguments, **launch.options)
    else:
        compiled[(launch.grid, 1, 1)](*launch.arguments)
