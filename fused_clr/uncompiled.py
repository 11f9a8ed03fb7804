"""Where torch.compile has to stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(reason: str) -> Callable[[Function], Function]:
    """Runs a function as it is where compiled code calls it: one graph break, and nothing that compiles anew.

    Args:
        reason: What the compiler's log says.

    Returns:
        A decorator.
    """
    disable: Callable[[Function], Function] = torch.compiler.disable(reason=reason)
    return disable
