"""The demo's captured loops: torch's pair and ours, in a CUDA graph or in a recorded step that stands in for one."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .testing import record_step

# Eager steps before the capture.
WARMUP = 3
# What lets the kernels run on a CPU, in Triton's interpreter.
INTERPRETER = {"TRITON_INTERPRET": "1", "FUSED_CLR_BACKEND": "triton"}


class CapturedLoop(NamedTuple):
    """What a loop did, by step: the learning rates that its updates applied, as measured, and its training losses."""

    applied_lrs: list[float]
    losses: list[float]


def captured_loops(
    make_pairs: dict[str, Callable[[list[nn.Parameter]], tuple[Any, Any]]],
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
) -> dict[str, CapturedLoop]:
    """Captures the training step of each pair after a few eager steps, and replays it for the other batches.

    Without CUDA the loops run in a process of their own, since Triton's interpreter is switched on before Triton is
    imported, and the captures are emulated by `record_step`.

    Args:
        make_pairs: Each makes an optimizer and a scheduler of parameters.
        model: First weights; not changed.
        batches: Inputs and labels; all of one shape.
    """
    if batches[0][0].device.type == "cuda":
        return _run_all(make_pairs, model, batches)
    before = {name: os.environ.get(name) for name in INTERPRETER}
    os.environ |= INTERPRETER
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(_run_all, make_pairs, model, batches).result()
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ |= {} if value is None else {name: value}


def _run_all(make_pairs: Any, model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> dict[str, CapturedLoop]:
    # Small tensors: threads would only wait for each other.
    torch.set_num_threads(1)
    return {name: _run(make_pair, deepcopy(model), batches) for name, make_pair in make_pairs.items()}


def _run(make_pair: Any, model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> CapturedLoop:
    inputs, labels = batches[0][0].clone(), batches[0][1].clone()
    # Its gradient is always 1: Adam moves it by the learning rate that the update applied.
    probe = nn.Parameter(torch.zeros((), dtype=torch.float32, device=inputs.device))
    optimizer, scheduler = make_pair([*model.parameters(), probe])

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        (loss + probe).backward()
        optimizer.step()
        return loss.detach()

    graph, loss = None, torch.zeros((), dtype=torch.float32, device=inputs.device)
    applied, losses = [], []
    side = None
    if inputs.is_cuda:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
    # A capture needs another stream than the default one, also for the steps before it.
    with torch.cuda.stream(side):
        for index, (new_inputs, new_labels) in enumerate(batches):
            inputs.copy_(new_inputs)
            labels.copy_(new_labels)
            before = probe.item()
            if index < WARMUP:
                loss = step()
            elif graph is None:
                graph, loss = _capture(step, side)
            else:
                graph.replay()
            # Of torch's scheduler the graph knows nothing: it holds the numbers of its capture.
            scheduler.step()
            applied.append(before - probe.item())
            losses.append(loss.item())
    return CapturedLoop(applied, losses)


def _capture(step: Callable[[], Tensor], side: Any) -> tuple[Any, Tensor]:
    """The graph of a step, after its first run."""
    if side is None:
        with record_step() as recorded:
            loss = step()
        return recorded, loss
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        loss = step()
    graph.replay()
    return graph, loss
