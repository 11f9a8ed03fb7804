"""What is measured: runs of a mode, a case and a peer; and parts, selections of runs that take minutes, unattended."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from bench.cases import CASES, Case
from bench.loops import MODELS
from bench.peers import HOST_PEERS, OURS, PEERS, TORCH_CAPTURABLE, Peer

# Regular expressions of cases and peers.
SMALL = r"^(4x4|rl-policy|148x16|nnue|dlrm-mlps|1000x16|10000x16|4x4M) fp32$|^148x16 fp32 64-groups$"
REAL = r"^(resnet50|vit-b16|gpt2-124m|bert-large|llama-1b|1x1G) "
CORE = r"^(torch foreach|fused-clr|SGD fused-clr)$"
COMPILED = r"^(torch\.compile|heavyball|fused-clr)$"
NOT_COMPILED = r"^(?!torch\.compile|heavyball)"


@dataclass(frozen=True)
class Run:
    """One benchmark: a peer on a case, beside torch's pair.

    Attributes:
        mode: "eager": wall time of steps; "captured": device time of a replay; "host": the host's time alone; "loop":
            wall time of whole training steps; "captured-loop": of their replay.
        case: A case, or in the loop modes a key of MODELS.
        peer: What is measured.
        rounds: Rounds of it and of the reference.
        round_seconds: About how long a round lasts.
    """

    mode: str
    case: Case | str
    peer: Peer
    rounds: int = 15
    round_seconds: float = 0.05

    @property
    def case_name(self) -> str:
        """The case in results."""
        return self.case if isinstance(self.case, str) else self.case.name

    @property
    def name(self) -> str:
        """The run as a test's id: one word, which ``pytest -k`` searches."""
        return f"{self.mode}-{self.case_name}-{self.peer.name}".replace(" ", "-")


# Mode, cases, peers, rounds, seconds of a round.
Selection = tuple[str, str, str, int, float]
PARTS: dict[str, tuple[Selection, ...]] = {
    "steps-small": (("eager", SMALL, NOT_COMPILED, 15, 0.05),),
    # Those that compile take a minute a case.
    "steps-compiled": (
        ("eager", r"^(4x4|rl-policy|dlrm-mlps|148x16) fp32$", COMPILED, 15, 0.05),
        ("captured", r"^(4x4|dlrm-mlps|148x16) fp32$", COMPILED, 15, 0.02),
    ),
    "steps-options": (
        ("eager", r"^(148x16|1000x16|nnue) (bf16|mixed)$", CORE, 15, 0.05),
        ("eager", r"^(148x16|1000x16|nnue) fp32( 64-groups)? clip$", CORE, 15, 0.05),
        ("eager", r"^1000x16 (bf16|mixed) 64-groups$", CORE, 15, 0.05),
    ),
    "steps-models": (("eager", REAL + r"(fp32|bf16|mixed|fp32 clip)$", CORE, 9, 0.02),),
    "captured": (
        ("captured", SMALL, NOT_COMPILED, 15, 0.02),
        ("captured", REAL + r"(fp32|bf16|mixed)$", NOT_COMPILED, 9, 0.02),
        ("captured", REAL + r"fp32 clip$", CORE, 9, 0.02),
    ),
    "host": (("host", r"^(4x16|148x16|1000x16|10000x16) fp32$", "", 15, 0.05),),
    "loops": (("loop", "", "", 15, 0.2), ("captured-loop", "", "", 15, 0.2)),
    "quick": (
        ("eager", r"^(4x4|148x16|nnue|1000x16|resnet50) fp32$", CORE, 9, 0.05),
        ("captured", r"^(4x4|148x16|nnue|1000x16|4x4M|resnet50|gpt2-124m) (fp32|bf16)$", NOT_COMPILED, 9, 0.02),
        ("captured", r"^(resnet50|gpt2-124m) (mixed|fp32 clip)$", CORE, 9, 0.02),
        ("loop", "", "", 9, 0.1),
        ("captured-loop", "", "", 9, 0.1),
    ),
}


def peers_of(mode: str, device: torch.device) -> tuple[Peer, ...]:
    """The peers that a mode can measure on a device, installed or not."""
    if mode == "host":
        return (OURS,) if device.type == "cuda" else HOST_PEERS
    return {"loop": (OURS,), "captured-loop": (TORCH_CAPTURABLE, OURS)}.get(mode, PEERS)


def runs_of(part: str, device: torch.device, rounds: int | None = None) -> list[Run]:
    """The runs of a part on a device, of the peers that are installed; with ``rounds``, of that many."""
    runs = []
    for mode, case_pattern, peer_pattern, own_rounds, seconds in PARTS[part]:
        cases: list[Case | str] = [*MODELS] if mode.endswith("loop") else [*CASES]
        peers = [p for p in peers_of(mode, device) if re.search(peer_pattern, p.name) and not p.is_missing]
        all_runs = [Run(mode, case, peer, rounds or own_rounds, seconds) for case in cases for peer in peers]
        runs += [run for run in all_runs if re.search(case_pattern, run.case_name)]
    return runs
