"""Small PTX programs for tests of the executor."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import machine
from .decode import Kernel

HEAD = """.version 8.0
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 smem[];
{before}
.visible .entry k(.param .u64 k_param_0)
.reqntid {threads}
{{
.reg .pred %p<9>;
.reg .b16 %h<9>;
.reg .b32 %r<19>;
.reg .f32 %f<9>;
.reg .b64 %rd<19>;
.reg .f64 %fd<9>;
ld.param.b64 %rd1, [k_param_0];
mov.u32 %r1, %tid.x;
mov.u32 %r2, %ctaid.x;
{body}
ret;
}}
"""


def kernel(body: str, threads: int = 32, before: str = "") -> Kernel:
    """A kernel: %rd1 is its memory, %r1 the thread and %r2 the program; ``smem`` is shared memory."""
    return Kernel(HEAD.format(body=body, threads=threads, before=before))


def run(
    body: str, memory: Any = None, threads: int = 32, grid: int = 1, before: str = "", seed: int = 0, **options: Any
) -> Any:
    """Runs a kernel over an array, by default int32[64], and returns it."""
    memory = np.zeros(64, np.int32) if memory is None else memory
    machine.launch(
        kernel(body, threads, before),
        grid,
        [memory.ctypes.data],
        [("memory", memory.ctypes.data, memory.nbytes)],
        seed=seed,
        **options,
    )
    return memory
