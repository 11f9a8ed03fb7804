"""The registry through pytest-benchmark: ``pytest bench --benchmark-only``; by default the small cases.

The environment variable FUSED_CLR_BENCH_CASE, a regular expression, chooses others. What a row of `bench.schema` says
about case and peer stands in ``extra_info``. For ratios and captured steps, run ``python -m bench``.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import asdict
from typing import Any

import pytest
import torch

from bench.cases import CASES, Case, make_parameters
from bench.parts import SMALL
from bench.peers import NotAvailableError, Peer, Request, all_peers
from bench.schema import Row, describe, figures
from bench.timing import WARM_UP_STEPS

CHOSEN = os.environ.get("FUSED_CLR_BENCH_CASE", SMALL)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 10
ROUND_SECONDS = 0.02
QUICK_TO_COMPILE = 32


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("peer", all_peers(), ids=lambda peer: peer.name)
@pytest.mark.parametrize("case", [c for c in CASES if re.search(CHOSEN, c.name)], ids=lambda case: case.name)
def test_step(benchmark: Any, case: Case, peer: Peer) -> None:
    if peer.is_missing:
        pytest.skip(f"{peer.name} needs the module {peer.requires}")
    if peer.compiles and case.num_tensors > QUICK_TO_COMPILE:
        pytest.skip(f"{peer.name} compiles for long beyond {QUICK_TO_COMPILE} tensors")
    params = make_parameters(case, DEVICE)
    groups = [{"params": params[index :: case.num_groups]} for index in range(case.num_groups)]
    try:
        stepper = peer.build(Request(groups, DEVICE, case.clips))
        for _ in range(WARM_UP_STEPS):
            stepper.step()
    except (NotAvailableError, AssertionError, RuntimeError) as error:
        pytest.skip(f"{peer.name} does not run here: {error}")

    def step() -> None:
        stepper.step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    start = time.perf_counter()
    step()
    iterations = max(1, int(ROUND_SECONDS / (time.perf_counter() - start)))
    benchmark.group = case.name
    benchmark.pedantic(step, rounds=ROUNDS, iterations=iterations)
    seconds = benchmark.stats.stats.data
    row = Row(**describe(case), mode="eager", peer=peer.name, remark=peer.remark, **figures(seconds, None))
    benchmark.extra_info.update(asdict(row))
