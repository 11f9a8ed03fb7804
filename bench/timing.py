"""Clocks: how long a step takes, on the host and on a GPU."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from bench.peers import Stepper

WARM_UP_STEPS = 3
# Replays that make up a round of ReplayClock; the round is their median.
REPLAYS = 11
# Steps that may wait in a stream: with more the host would be stopped, and its own time not be seen.
QUEUED_STEPS = 64
# Written between replays; several times the L2 of any GPU, and long enough to hide the launch that follows.
FLUSH_BYTES = 1 << 29
COPY_BYTES = 1 << 32


class Clock(Protocol):
    """Times rounds of a stepper."""

    def prepare(self, stepper: Stepper) -> Callable[[], None]:
        """Warms up.

        Returns:
            The step to time.
        """

    def time_round(self, name: str, step: Callable[[], None]) -> float:
        """Seconds a step takes in one more round of ``name``."""


class HostClock:
    """Wall time of many steps in a row.

    Args:
        device: Where the parameters are.
        round_seconds: A round of one peer lasts about this long.
        waits: Count the device's work too, by waiting for it at the end of a round.
    """

    def __init__(self, device: torch.device, round_seconds: float, waits: bool = True) -> None:
        self.device = device
        self.round_seconds = round_seconds
        self.waits = waits
        self._repeats: dict[str, int] = {}

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _time(self, step: Callable[[], None], repeats: int) -> float:
        self._synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        if self.waits:
            self._synchronize()
        seconds = time.perf_counter() - start
        self._synchronize()
        return seconds / repeats

    def prepare(self, stepper: Stepper) -> Callable[[], None]:
        """See `Clock.prepare`."""
        for _ in range(WARM_UP_STEPS):
            stepper.step()
        return stepper.step

    def time_round(self, name: str, step: Callable[[], None]) -> float:
        """See `Clock.time_round`. How many steps make a round is found out in the first."""
        if name not in self._repeats:
            repeats = max(1, int(self.round_seconds / max(self._time(step, 1), 1e-7)))
            self._repeats[name] = repeats if self.waits else min(repeats, QUEUED_STEPS)
        return self._time(step, self._repeats[name])


class ReplayClock:
    """Device time between two events around the replay of a captured update, its data not in the L2.

    What the host has to do for the schedule comes between the events too. The flush before them keeps the device busy
    while the host enqueues the replay, so that a launch's latency is not seen.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)

    def prepare(self, stepper: Stepper) -> Callable[[], None]:
        """See `Clock.prepare`. Steps on a side stream first, as torch asks, then captures."""
        warm_up_on_side_stream(stepper, self.device)
        return replay_of(stepper).step

    def time_round(self, name: str, step: Callable[[], None]) -> float:
        """See `Clock.time_round`."""
        del name
        return statistics.median(self._time_cold(step) for _ in range(REPLAYS))

    def _time_cold(self, step: Callable[[], None]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        start.record()
        step()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3


def warm_up_on_side_stream(stepper: Stepper, device: torch.device) -> None:
    """A few steps before a capture, as torch asks for them."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_STEPS):
            stepper.step()
    torch.cuda.current_stream(device).wait_stream(stream)


def replay_of(stepper: Stepper) -> Stepper:
    """A stepper whose update is the replay of a CUDA graph of this one's."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stepper.update()
    torch.cuda.synchronize()
    # The graph reads and writes what the stepper holds.
    return Stepper(graph.replay, stepper.schedule, stepper.context, keeps=stepper)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy on the device, those read and those written counted; the best of ten.

    Args:
        device: A CUDA device. A quarter of its free memory, or 4 GiB, is copied.
    """
    num_bytes = min(COPY_BYTES, torch.cuda.mem_get_info(device)[0] // 4)
    # Random bits: compressible data may move faster.
    source = torch.randint(1 << 31, (num_bytes // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(12):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        seconds.append(float(start.elapsed_time(end)) * 1e-3)
    del target
    return 2 * source.numel() * 4 / min(seconds[2:])


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keeps Python's garbage collector out of what is timed."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
