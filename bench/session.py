"""A run over selections of the registry, on one device."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from bench.cases import CASES
from bench.host import host_peers
from bench.loops import MODELS, measure_loop
from bench.parts import Selection
from bench.peers import all_peers, find_peers
from bench.runner import Settings, measure, memory_budget
from bench.schema import Row
from bench.timing import copy_bandwidth


class Session:
    """What all selections of a run share.

    Attributes:
        copy_bandwidth: Bytes per second of a copy on the device; None on the CPU.

    Args:
        device: Where to measure.
        memory: GiB that a case may take; None for the default.
        rounds: Rounds of each peer; None for the selection's.
    """

    def __init__(self, device: torch.device, memory: float | None = None, rounds: int | None = None) -> None:
        self.device = device
        self._memory = memory_budget(device) if memory is None else int(memory * 2**30)
        self.copy_bandwidth = copy_bandwidth(device) if device.type == "cuda" else None
        self._rounds = rounds

    def missing_peers(self) -> dict[str, str]:
        """Peers that are not installed, and the module each needs."""
        return {peer.name: peer.requires for peer in all_peers() if peer.is_missing}

    def rows(self, selection: Selection, case: str = "", peer: str = "") -> Iterator[Row]:
        """Measures a selection.

        Args:
            selection: What to measure.
            case: Regular expression that case names match as well.
            peer: Likewise for peers.
        """
        settings = Settings(
            self.device,
            selection.mode,
            self._rounds or selection.rounds,
            selection.round_seconds,
            self._memory,
            self.copy_bandwidth,
        )
        if selection.mode == "loop":
            for name in MODELS:
                if re.search(case, name):
                    yield from measure_loop(name, settings)
            return
        every = host_peers(self.device) if selection.mode == "host" else all_peers()
        peers = [found for found in find_peers(selection.peers, every) if not found.is_missing]
        peers = find_peers(peer, peers)
        for found_case in CASES:
            if re.search(selection.cases, found_case.name) and re.search(case, found_case.name):
                yield from measure(found_case, peers, settings)
