"""The one schema of all results: rows under a stamp, as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from bench.cases import Case

SCHEMA_VERSION = 2
QUANTILES = (20, 50, 80)
STATUSES = ("measured", "failed", "skipped")


@dataclass(frozen=True)
class Row:
    """One peer on one case in one mode.

    Attributes:
        case: Name of the case.
        mode: "eager", "captured", "host" or "loop".
        peer: Name of the peer.
        status: One of STATUSES. Only measured rows have figures.
        remark: What the peer computes differently, or why there is no figure.
        num_tensors: Of the case; 0 for a training loop, whose figures are of the whole step.
        numel: Of the case, likewise.
        us_p20: Microseconds a step, as are the next two.
        us_p50: The median over rounds.
        us_p80: See above.
        ratio_p20: Time as a ratio to the reference in the same round, as are the next two; less is faster.
        ratio_p50: The median over rounds.
        ratio_p80: See above.
        gb_per_s: The bytes a step has to move, over its median time. On a GPU alone.
        copy_share: That as a share of the bandwidth of a copy in the same run.
    """

    case: str
    mode: str
    peer: str
    status: str = "measured"
    remark: str = ""
    num_tensors: int = 0
    numel: int = 0
    us_p20: float | None = None
    us_p50: float | None = None
    us_p80: float | None = None
    ratio_p20: float | None = None
    ratio_p50: float | None = None
    ratio_p80: float | None = None
    gb_per_s: float | None = None
    copy_share: float | None = None

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status must be one of {STATUSES}, got {self.status!r}")
        if (self.us_p50 is not None) != (self.status == "measured"):
            raise ValueError(f"{self.status} row of {self.peer!r} on {self.case!r} has us_p50 {self.us_p50}")


@dataclass
class Result:
    """What one run measured.

    Attributes:
        stamp: Where and with what.
        rows: In the order they were measured.
        missing: Peers that are not installed, and the module each needs.
    """

    stamp: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Writes JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"schema": SCHEMA_VERSION, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Result:
        """Reads what `write` wrote.

        Raises:
            ValueError: The file has another schema.
        """
        content = json.loads(path.read_text())
        if content.pop("schema", None) != SCHEMA_VERSION:
            raise ValueError(f"{path} is not of schema {SCHEMA_VERSION}")
        names = {item.name for item in fields(Row)}
        for row in content["rows"]:
            if set(row) != names:
                raise ValueError(f"{path} has a row with other fields: {sorted(set(row) ^ names)}")
        return cls(content["stamp"], [Row(**row) for row in content["rows"]], content["missing"])


def describe(case: Case) -> dict[str, Any]:
    """The fields of a row that the case decides."""
    return {"case": case.name, "num_tensors": case.num_tensors, "numel": case.numel}


def figures(seconds: ArrayLike, reference: ArrayLike | None) -> dict[str, Any]:
    """The times and ratios of a row.

    Args:
        seconds: Of a step, one entry per round.
        reference: Those of the reference in the same rounds; None if it could not be measured.
    """
    times = np.asarray(seconds, float)
    found = {f"us_p{q}": round(float(np.percentile(times, q)) * 1e6, 3) for q in QUANTILES}
    if reference is not None:
        ratios = times / np.asarray(reference, float)
        found |= {f"ratio_p{q}": round(float(np.percentile(ratios, q)), 4) for q in QUANTILES}
    return found
