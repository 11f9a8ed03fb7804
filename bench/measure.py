"""Measures a peer beside torch's pair, round by round in turn, so that a slow minute is slow for both."""

from __future__ import annotations

import timeit
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import triton.testing
from torch import Tensor
from torch.utils.benchmark import Timer

from bench.cases import Case
from bench.loops import MODELS
from bench.parts import Run
from bench.peers import REFERENCE, Peer, Request, Stepper

QUANTILES = (20, 50, 80)
WARM_UP_STEPS = 3
# With more tensors, peers that compile are not run.
MOST_COMPILED = 200
# Steps that may wait in a stream: with more the host would be stopped, and its own time not be seen.
QUEUED_STEPS = 64
CPU_MEMORY = 4 << 30
# Of a GPU's free memory.
GPU_MEMORY_SHARE = 0.9
COPY_BYTES = 1 << 32


class NotAvailableError(Exception):
    """A run cannot be done here; the message says why."""


class Rounds:
    """A warm stepper and its rounds.

    Captured steps are timed by events of the device, one by one and with nothing in the L2; what the host does for the
    schedule comes between the events too. Host mode on a GPU does not wait for the device. All else is wall time of
    many steps in a row, the device's work included.

    Attributes:
        seconds: Of a step, one entry per round.

    Args:
        run: Its mode, and how long a round is.
        stepper: What to time.
        device: Where it runs.
        captured: Whether it is captured first.
    """

    def __init__(self, run: Run, stepper: Stepper, device: torch.device, captured: bool) -> None:
        self.run, self.device, self.seconds = run, device, list[float]()
        self.stepper = capture(stepper, device) if captured else stepper
        self._waits = run.mode != "host" or device.type == "cpu"
        # Torch's own clock waits for the device.
        clock: dict[str, Any] = {} if self._waits else {"timer": timeit.default_timer}
        threads, names = torch.get_num_threads(), {"step": self.stepper.step}
        self._timer = Timer("step()", globals=names, num_threads=threads, **clock)
        with self.stepper.context():
            for _ in range(WARM_UP_STEPS):
                self.stepper.step()
            self._number = max(1, int(run.round_seconds / self._timer.timeit(1).median))
        if not self._waits:
            self._number = min(self._number, QUEUED_STEPS)

    def time(self) -> float:
        """One more round. Returns seconds a step."""
        with self.stepper.context():
            self.seconds.append(self._time())
        return self.seconds[-1]

    def _time(self) -> float:
        if self.run.mode == "captured":
            rep = self.run.round_seconds * 1e3
            return float(triton.testing.do_bench(self.stepper.step, warmup=5, rep=rep, return_mode="median")) * 1e-3
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return float(self._timer.timeit(self._number).median)


def make_rounds(run: Run, device: torch.device) -> tuple[Rounds, Rounds]:
    """The reference and the peer, over the same parameters and gradients, which both write: that decides no time.

    Raises:
        NotAvailableError: The run cannot be done on the device.
        RuntimeError: A peer's step is none.
    """
    on_gpu = device.type == "cuda"
    if not on_gpu and (run.mode.startswith("captured") or run.peer.needs_cuda):
        raise NotAvailableError("needs CUDA")
    torchs = run.peer.reference or REFERENCE
    if isinstance(run.case, str):
        # A captured loop is compared with the eager loop of torch's pair.
        reference = make_loop(run.case, torchs, device, captured=False)
        captured = run.mode == "captured-loop"
        peer = make_loop(run.case, run.peer, device, captured)
        return Rounds(run, reference, device, captured=False), Rounds(run, peer, device, captured)
    if run.peer.compiles and run.case.num_tensors > MOST_COMPILED:
        raise NotAvailableError(f"compiles for minutes beyond {MOST_COMPILED} tensors")
    budget = torch.cuda.mem_get_info(device)[0] * GPU_MEMORY_SHARE if on_gpu else CPU_MEMORY
    if run.case.needed_bytes > budget:
        needed = run.case.needed_bytes / 2**30
        raise NotAvailableError(f"needs {needed:.1f} GiB, and the budget is {budget / 2**30:.1f} GiB")
    captured = run.mode == "captured"
    params = run.case.make_parameters(device)
    reference, peer = (make_stepper(run.case, p, params, device, captured) for p in (torchs, run.peer))
    return Rounds(run, reference, device, captured), Rounds(run, peer, device, captured)


def make_stepper(
    case: Case, peer: Peer, params: Sequence[torch.nn.Parameter], device: torch.device, captured: bool
) -> Stepper:
    """A stepper that has done its first step.

    Raises:
        RuntimeError: It took gradients away, so that later steps of both would be empty, or left parameters unchanged.
    """

    def first_elements(param: Tensor) -> Tensor:
        return param.detach().flatten()[:16].clone()

    groups: list[dict[str, Any]] = [{"params": params[index :: case.num_groups]} for index in range(case.num_groups)]
    stepper = peer.build(Request(groups, device, case.clips, captured))
    before = [first_elements(param) for param in params]
    with stepper.context():
        stepper.update()
    taken = sum(param.grad is None for param in params)
    if taken:
        raise RuntimeError(f"the step of {peer.name} took {taken} of {len(params)} gradients away")
    unchanged = sum(torch.equal(first_elements(param), old) for param, old in zip(params, before, strict=True))
    if unchanged and stepper.context is nullcontext:
        raise RuntimeError(f"the step of {peer.name} left {unchanged} of {len(params)} parameters unchanged")
    return stepper


def make_loop(model_name: str, peer: Peer, device: torch.device, captured: bool) -> Stepper:
    """A stepper whose update is forward, backward and the optimizer's step."""
    torch.manual_seed(0)
    params, compute_loss = MODELS[model_name](device)
    optimizer = peer.build(Request([{"params": params}], device, captured=captured))

    def train_step() -> None:
        # In a graph the new gradients are memory of its own, at the same addresses in every replay.
        for param in params:
            param.grad = None
        compute_loss().backward()
        optimizer.update()

    return Stepper(train_step, optimizer.schedule)


def capture(stepper: Stepper, device: torch.device) -> Stepper:
    """A stepper whose update is the replay of a CUDA graph of this one's."""
    # First some steps on a side stream, as torch asks.
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_STEPS):
            stepper.step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stepper.update()
    torch.cuda.synchronize()
    # The graph reads and writes what the stepper holds.
    return Stepper(graph.replay, stepper.schedule, stepper.context, keeps=stepper)


def figures_of(run: Run, reference: Sequence[float], peer: Sequence[float], copy: float | None) -> dict[str, Any]:
    """What a benchmark's ``extra_info`` says: quantiles of ratios, round by round, and of microseconds a step.

    Args:
        run: What was measured.
        reference: Seconds of a step of the reference, in each round.
        peer: Those of the peer in the same rounds.
        copy: Bytes per second of a copy on the device, measured in this session; None on the CPU.
    """
    found = {"mode": run.mode, "case": run.case_name, "peer": run.peer.name, "remark": run.peer.remark_in(run.mode)}
    figures: dict[str, Any] = {**found, "rounds": len(peer)}
    times = {"us": np.multiply(peer, 1e6), "reference_us": np.multiply(reference, 1e6)}
    for name, values in (("ratio", np.divide(peer, reference)), *times.items()):
        figures |= {f"{name}_p{q}": round(float(np.percentile(values, q)), 4) for q in QUANTILES}
    if isinstance(run.case, Case) and run.mode == "captured" and copy is not None:
        bytes_per_s = run.case.step_bytes(run.peer.states) / float(np.median(peer))
        shares = {"copy_gb_per_s": round(copy / 1e9, 2), "copy_share": round(bytes_per_s / copy, 4)}
        figures |= {"gb_per_s": round(bytes_per_s / 1e9, 2), **shares}
    return figures


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy on a CUDA device, those read and those written counted; the best of many."""
    num_bytes = min(COPY_BYTES, torch.cuda.mem_get_info(device)[0] // 4)
    # Random bits: compressible data may move faster.
    source = torch.randint(1 << 31, (num_bytes // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    milliseconds = triton.testing.do_bench(lambda: target.copy_(source), return_mode="min")
    return 2 * source.nbytes / (float(milliseconds) * 1e-3)
