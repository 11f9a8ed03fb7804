"""Named selections of cases, each of which runs unattended in minutes."""

from __future__ import annotations

from dataclasses import dataclass

# Cases are named as `bench.cases.Case.name` says: these patterns are matched with `re.search`.
SMALL = r"^(4x4|rl-policy|148x16|nnue|dlrm-mlps|1000x16|10000x16|4x4M) fp32$|^148x16 fp32 64-groups$"
MODELS = r"^(resnet50|vit-b16|gpt2-124m|bert-large|llama-1b|1x1G) "
CORE_PEERS = r"^(torch fused|torch foreach|fused-clr)$"
COMPILED = r"^(torch\.compile|heavyball|fused-clr)$"
NOT_COMPILED = r"^(?!torch\.compile|heavyball)"


@dataclass(frozen=True)
class Selection:
    """Cases in one mode.

    Attributes:
        mode: "eager", "captured", "host" or "loop".
        cases: Regular expression of their names.
        peers: Likewise.
        rounds: Rounds of each peer.
        round_seconds: A round lasts about this long; of no effect in captured mode.
    """

    mode: str
    cases: str = ""
    peers: str = ""
    rounds: int = 15
    round_seconds: float = 0.05


PARTS: dict[str, tuple[Selection, ...]] = {
    "steps-small": (Selection("eager", SMALL, NOT_COMPILED),),
    # Those that compile take a minute a case.
    "steps-compiled": (
        Selection("eager", r"^(4x4|rl-policy|dlrm-mlps|148x16) fp32$", COMPILED),
        Selection("captured", r"^(4x4|dlrm-mlps|148x16) fp32$", COMPILED),
    ),
    "steps-options": (
        Selection("eager", r"^(148x16|1000x16|nnue) (bf16|mixed)$", CORE_PEERS),
        Selection("eager", r"^(148x16|1000x16|nnue) fp32( 64-groups)? clip$", CORE_PEERS),
        Selection("eager", r"^1000x16 (bf16|mixed) 64-groups$", CORE_PEERS),
    ),
    "steps-models": (
        Selection("eager", MODELS + "(fp32|bf16|mixed)$", CORE_PEERS, 9, 0.02),
        Selection("eager", MODELS + "fp32 clip$", CORE_PEERS, 9, 0.02),
    ),
    "captured": (
        Selection("captured", SMALL, NOT_COMPILED),
        Selection("captured", MODELS + "(fp32|bf16|mixed)$", NOT_COMPILED, 9),
        Selection("captured", MODELS + "fp32 clip$", CORE_PEERS, 9),
    ),
    "host": (Selection("host", r"^(4x16|148x16|1000x16|10000x16) fp32$"),),
    "loops": (Selection("loop", rounds=15, round_seconds=0.2),),
    "quick": (
        Selection("eager", r"^(4x4|148x16|nnue|1000x16|resnet50) fp32$", CORE_PEERS, 9),
        Selection("captured", r"^(4x4|148x16|nnue|1000x16|4x4M|resnet50|gpt2-124m) (fp32|bf16)$", NOT_COMPILED, 9),
        Selection("captured", r"^(resnet50|gpt2-124m) (mixed|fp32 clip)$", CORE_PEERS, 9),
        Selection("loop", rounds=9, round_seconds=0.1),
    ),
}
DEFAULT_PART = "steps-small"
