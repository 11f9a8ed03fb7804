"""Measures peers on a case, as far as memory allows in one batch."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from bench.cases import Case, make_parameters
from bench.interleave import Build, run_interleaved
from bench.peers import MOST_COMPILED, REFERENCE, NotAvailableError, Peer, Request, Stepper
from bench.schema import Row, describe, figures
from bench.timing import Clock, HostClock, ReplayClock

CPU_MEMORY = 4 << 30
# Of a GPU's free memory.
GPU_MEMORY_SHARE = 0.9
MESSAGE_LENGTH = 160


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        device: Where.
        mode: "eager": wall time of steps; "captured": device time of replays; "host": the host's time alone.
        rounds: Rounds of each peer.
        round_seconds: A round lasts about this long.
        memory: Bytes that parameters, gradients and states may take.
        copy_bandwidth: Bytes per second of a copy on the device, measured in this run; None if it was not.
    """

    device: torch.device
    mode: str = "eager"
    rounds: int = 15
    round_seconds: float = 0.05
    memory: int = CPU_MEMORY
    copy_bandwidth: float | None = None

    def clock(self) -> Clock:
        """A clock for the mode."""
        if self.mode == "captured":
            return ReplayClock(self.device)
        return HostClock(self.device, self.round_seconds, waits=self.mode != "host")


def memory_budget(device: torch.device) -> int:
    """Bytes that a case may take on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * GPU_MEMORY_SHARE)
    return CPU_MEMORY


def needed_bytes(case: Case, num_peers: int) -> int:
    """What a case takes: shared parameters and gradients, two moments for each peer, and as much for temporaries."""
    # Some peers keep float32 moments for bf16 parameters.
    moments = 2 * 4 * case.numel
    return 2 * case.parameter_bytes + moments * num_peers + 2 * case.parameter_bytes


def batches(case: Case, peers: Sequence[Peer], memory: int) -> list[list[Peer]]:
    """Which peers are measured together: all, or where memory is short each beside the reference; none if that is much.

    Args:
        case: The case.
        peers: The reference first.
        memory: Bytes they may take.
    """
    if needed_bytes(case, len(peers)) <= memory:
        return [list(peers)]
    if needed_bytes(case, 2) <= memory:
        return [[peers[0], peer] for peer in peers[1:]]
    return []


def row_of_error(make_row: Callable[..., Row], error: Exception) -> Row:
    """The row of a peer that raised: skipped where it cannot do what is asked, failed otherwise."""
    if isinstance(error, NotAvailableError):
        return make_row(status="skipped", remark=str(error))
    first_line = (str(error).strip().splitlines() or [""])[0]
    remark = f"{type(error).__name__}: {first_line}"[:MESSAGE_LENGTH].rstrip(": ")
    return make_row(status="failed", remark=remark)


def measure(case: Case, peers: Sequence[Peer], settings: Settings) -> list[Row]:
    """One row per peer.

    Args:
        case: What to step.
        peers: Installed ones, the reference first.
        settings: How.
    """

    def skipped(remark: str) -> list[Row]:
        return [Row(**describe(case), mode=settings.mode, peer=p.name, status="skipped", remark=remark) for p in peers]

    if settings.mode == "captured" and settings.device.type != "cuda":
        return skipped("needs CUDA")
    groups = batches(case, peers, settings.memory)
    if not groups:
        needed, budget = needed_bytes(case, min(len(peers), 2)) / 2**30, settings.memory / 2**30
        return skipped(f"needs {needed:.1f} GiB, and the budget is {budget:.1f} GiB")
    rows: dict[str, Row] = {}
    for group in groups:
        # The reference is measured in each batch; its first row stands.
        rows = {row.peer: row for row in _measure_batch(case, group, settings)} | rows
    return [rows[peer.name] for peer in peers]


def check_gradients(params: Sequence[torch.Tensor]) -> None:
    """Raises a RuntimeError where a step took gradients away: later steps of all peers would be empty."""
    missing = sum(param.grad is None for param in params)
    if missing:
        raise RuntimeError(f"the step took {missing} of {len(params)} gradients away")


def _measure_batch(case: Case, peers: Sequence[Peer], settings: Settings) -> list[Row]:
    # What the batch before held.
    gc.collect()
    params = make_parameters(case, settings.device)

    def builder(peer: Peer) -> Build:
        def build() -> Stepper:
            if peer.compiles and case.num_tensors > MOST_COMPILED:
                raise NotAvailableError(f"compiles for minutes beyond {MOST_COMPILED} tensors")
            # Parameters and gradients are shared; peers write their values, which decide no time.
            dealt = [{"params": params[index :: case.num_groups]} for index in range(case.num_groups)]
            stepper = peer.build(Request(dealt, settings.device, case.clips, settings.mode == "captured"))
            with stepper.context():
                stepper.update()
            check_gradients(params)
            return stepper

        return build

    builds = {peer.name: builder(peer) for peer in peers}
    seconds, errors = run_interleaved(builds, settings.clock(), settings.rounds)
    rows = []
    for peer in peers:
        make_row = partial(Row, **describe(case), mode=settings.mode, peer=peer.name)
        if peer.name in errors:
            rows.append(row_of_error(make_row, errors[peer.name]))
        else:
            found = figures(seconds[peer.name], seconds.get(REFERENCE.name))
            rows.append(_with_bandwidth(make_row(remark=peer.remark_in(settings.mode), **found), case, settings))
    return rows


def _with_bandwidth(row: Row, case: Case, settings: Settings) -> Row:
    """Adds GB/s where the time is the device's."""
    if settings.mode != "captured" or row.us_p50 is None:
        return row
    bytes_per_s = case.step_bytes / (row.us_p50 * 1e-6)
    share = bytes_per_s / settings.copy_bandwidth if settings.copy_bandwidth else None
    return replace(row, gb_per_s=round(bytes_per_s / 1e9, 2), copy_share=None if share is None else round(share, 4))
