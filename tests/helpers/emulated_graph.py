"""CUDA graphs on the CPU: what was captured, operators and kernel launches, runs again at every replay.

`fused_clr.testing.OperatorRecorder` says how. A replay runs no other host code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from fused_clr import graphs
from fused_clr._device import capture as capturing
from fused_clr._device import launch as launcher
from fused_clr._device import state, step_plan
from fused_clr._device.triton import TritonEngine
from fused_clr.testing import OperatorRecorder
from fused_clr.testing import RecordedStep as EmulatedGraph


@contextmanager
def as_if_capturing() -> Iterator[None]:
    """In the body every stream counts as captured, and no kernel may be compiled."""

    def make_launch(kernel: Any, *_: Any, **__: Any) -> Any:
        raise AssertionError(f"{kernel.__name__} would be compiled and loaded during a capture")

    with pytest.MonkeyPatch.context() as patch:
        for module in (capturing, state):
            patch.setattr(module, "is_capturing", lambda device: True)
        # transformers asks, and then reads no value.
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        for module in (launcher, state, step_plan):
            patch.setattr(module, "make_launch", make_launch)
        yield


@contextmanager
def capture(graph: EmulatedGraph, **_: Any) -> Iterator[None]:
    """Stands in for `torch.cuda.graph`."""

    def record(launch: launcher.Launch) -> None:
        graph.work.append(lambda: launcher.run(launch))

    launcher.recorders.append(record)
    mode = OperatorRecorder(graph)
    try:
        with mode, as_if_capturing():
            yield
    finally:
        launcher.recorders.remove(record)
        mode.undo()


class _NoStream:
    def wait_stream(self, _: Any) -> None:
        pass


def emulate_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `GraphedStep` capture emulated graphs. For the triton backend, in the interpreter.

    Unlike a real capture, the emulated one also runs what it captures. The optimizer's launches are kept from running
    then, and the first replay is the first step, as it is on a GPU.
    """
    prepare_capture, run = TritonEngine._prepare_capture, launcher.run

    def hidden_from_the_capture(engine: TritonEngine, grads: Any) -> Any:
        # A real capture does not see what the engine does on another stream.
        with _disable_current_modes():
            return prepare_capture(engine, grads)

    def run_unless_captured(launch: launcher.Launch, recorded: bool = True, **replaced: Any) -> None:
        if recorded and launcher.recorders:
            for record in launcher.recorders:
                record(launcher.replace_arguments(launch, replaced))
        else:
            run(launch, recorded, **replaced)

    capture_step = graphs.GraphedStep._capture

    def capture_of_zeros(*arguments: Any) -> Any:
        # It runs, before the inputs are there: any indices among them must exist.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "empty_like", torch.zeros_like)
            return capture_step(*arguments)

    monkeypatch.setattr(graphs.GraphedStep, "_capture", capture_of_zeros)
    monkeypatch.setattr(TritonEngine, "_prepare_capture", hidden_from_the_capture)
    monkeypatch.setattr(launcher, "run", run_unless_captured)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", EmulatedGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(graphs.GraphedStep, "_has_cuda", lambda self, device: True)
    monkeypatch.setattr(graphs.GraphedStep, "_run_on_side_stream", graphs.GraphedStep._run)
