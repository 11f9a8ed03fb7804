"""Warnings that point at the user's own line."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

# Beside our own: torch and a dict's `update` may stand between the user and us.
SKIPPED = {__package__, "torch", "collections"}


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the line that called into this package, or into torch, which called this package.

    Args:
        message: The message.
        category: Its category.
    """
    # 1 is this function.
    level = 1
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in SKIPPED:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
