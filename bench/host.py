"""Host mode: what a step costs Python alone, with the launches of kernels replaced by nothing.

On a GPU nothing is replaced: the host's time is seen as long as it does not wait for the device. On the CPU ours runs
the triton backend over CPU tensors, which needs `bench.environment.choose_triton_backend` first.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from unittest import mock

import torch

from bench.peers import OURS, REFERENCE, Peer, Request, Stepper


def _no_launch(*_: object, **__: object) -> None:
    """Stands in for a kernel launch."""


def _without_our_launches() -> AbstractContextManager[object]:
    from fused_clr.backends import launch

    return mock.patch.object(launch, "run", _no_launch)


def _without_torch_kernel() -> AbstractContextManager[object]:
    return mock.patch.object(torch, "_fused_adam_", _no_launch)


def _ours(request: Request) -> Stepper:
    from fused_clr.backends import engine_class
    from fused_clr.backends.triton import TritonEngine

    # On the cpu backend there would be no launch to replace, and its kernel would run.
    if not issubclass(engine_class(request.device), TritonEngine):
        raise RuntimeError("host mode measures the triton backend: FUSED_CLR_BACKEND=triton TRITON_INTERPRET=1")
    return replace(OURS.build(request), context=_without_our_launches)


def _torch_without_kernel(request: Request) -> Stepper:
    return replace(REFERENCE.build(request), context=_without_torch_kernel)


HOST_PEERS = (
    replace(REFERENCE, remark="its CPU kernel runs, over a few elements a tensor"),
    Peer("torch fused, no kernel", _torch_without_kernel, remark="torch._fused_adam_ replaced by nothing"),
    Peer(OURS.name, _ours, remark="triton backend; its launch, Triton's launcher included, replaced by nothing"),
)


def host_peers(device: torch.device) -> tuple[Peer, ...]:
    """The peers of host mode: on a GPU the real ones, on the CPU those without kernels."""
    return (REFERENCE, OURS) if device.type == "cuda" else HOST_PEERS
