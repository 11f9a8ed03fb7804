"""What has to be decided before triton, and with it fused_clr, is imported. So this imports neither."""

from __future__ import annotations

import os
import sys


def choose_triton_backend() -> None:
    """Makes fused_clr take the triton backend for CPU tensors, in triton's interpreter.

    Raises:
        RuntimeError: It is too late: triton has been imported, and not for its interpreter.
    """
    if "triton" in sys.modules and not runs_interpreted():
        raise RuntimeError("host mode on the CPU needs TRITON_INTERPRET=1 before triton is imported")
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["FUSED_CLR_BACKEND"] = "triton"


def runs_interpreted() -> bool:
    """Whether triton, once imported, interprets kernels and compiles nothing."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes", "y")
