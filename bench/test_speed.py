"""Each run of the chosen part as one test of pytest-benchmark: torch's pair and the peer in turn, round by round."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from bench.measure import QUANTILES, NotAvailableError, copy_bandwidth, figures_of, make_rounds
from bench.parts import Run

# Seconds that rounds of peers have taken, as `bench.measure` timed them. This is pytest-benchmark's clock, so that its
# table and its JSON show the time of a step.
clock = 0.0


@pytest.fixture(scope="session")
def copy(device: torch.device) -> float | None:
    return copy_bandwidth(device) if device.type == "cuda" else None


@pytest.mark.benchmark(timer=lambda: clock)
def test_speed(run: Run, device: torch.device, copy: float | None, benchmark: Any, lines: list[str]) -> None:
    # What the run before held.
    gc.collect()
    torch.cuda.empty_cache()
    try:
        reference, peer = make_rounds(run, device)
    except NotAvailableError as error:
        pytest.skip(str(error))

    def time_peer() -> None:
        global clock
        clock += peer.time()

    def time_reference() -> None:
        reference.time()

    benchmark.group = f"{run.mode} {run.case_name}"
    benchmark.pedantic(time_peer, setup=time_reference, rounds=run.rounds, warmup_rounds=1)
    # Without the round of the warm-up, and without one that a profiler slowed down.
    rounds = slice(1, 1 + run.rounds) if benchmark.enabled else slice(None)
    figures = figures_of(run, reference.seconds[rounds], peer.seconds[rounds], copy)
    benchmark.extra_info.update(figures)
    ratios = " ".join(f"{figures[f'ratio_p{q}']:8.3f}" for q in QUANTILES)
    lines.append(f"{run.name:60} {ratios} {figures['us_p50']:14,.1f} us")
