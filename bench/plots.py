"""Results as plots. Nothing else imports matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.peers import OURS, REFERENCE
from bench.schema import Result, Row

INCHES_PER_CASE = 0.42


def _figure(height: float) -> tuple[Any, Any]:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(9, height), layout="constrained")


def plot_ratios(result: Result, path: Path) -> None:
    """Draws the ratio of every peer to the reference, case by case, with p20 to p80 as a bar. Less is faster."""
    rows = [row for row in result.rows if row.ratio_p50 is not None]
    cases = list(dict.fromkeys((row.case, row.mode) for row in rows))
    peers = [name for name in dict.fromkeys(row.peer for row in rows) if name != REFERENCE.name]
    figure, axes = _figure(1.5 + INCHES_PER_CASE * max(len(cases), 2))
    axes.axvline(1, color="0.4", linewidth=1, label=REFERENCE.name)
    for index, peer in enumerate(peers):
        own = [row for row in rows if row.peer == peer]
        # Peers of a case stand one below the other.
        heights = [cases.index((row.case, row.mode)) + (index + 1) / (len(peers) + 1) - 0.5 for row in own]
        middles = [row.ratio_p50 or 0.0 for row in own]
        low = [max(middle - (row.ratio_p20 or middle), 0.0) for middle, row in zip(middles, own, strict=True)]
        high = [max((row.ratio_p80 or middle) - middle, 0.0) for middle, row in zip(middles, own, strict=True)]
        size = 7 if peer == OURS.name else 4
        axes.errorbar(middles, heights, xerr=[low, high], fmt="o", markersize=size, capsize=2, label=peer)
    axes.set_xscale("log")
    axes.set_yticks(range(len(cases)), [f"{case} ({mode})" for case, mode in cases])
    axes.invert_yaxis()
    axes.set_xlabel(f"time a step / {REFERENCE.name} + CyclicLR (less is faster)")
    axes.set_title(str(result.stamp.get("gpu") or result.stamp.get("cpu", "")))
    axes.grid(axis="x", which="both", alpha=0.25)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120)


def plot_roofline(floors: dict[str, tuple[float, float]], rows: list[Row], bandwidth: float, path: Path) -> None:
    """Draws the least time of each case over the bytes it moves, and the measured times.

    Args:
        floors: By case name: bytes a step moves, least microseconds.
        rows: Measured rows of our own peer; those of other cases are left out.
        bandwidth: Bytes per second behind ``floors``.
        path: Where to.
    """
    figure, axes = _figure(6)
    points = sorted(floors.values())
    label = f"floor at {bandwidth / 1e12:.2f} TB/s"
    axes.plot([x for x, _ in points], [y for _, y in points], color="0.4", marker=".", label=label)
    measured = [(floors[row.case][0], row.us_p50) for row in rows if row.case in floors and row.us_p50 is not None]
    if measured:
        axes.plot([x for x, _ in measured], [y for _, y in measured], "o", label=f"{OURS.name}, measured")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("bytes a step moves")
    axes.set_ylabel("us a step")
    axes.grid(which="both", alpha=0.25)
    axes.legend()
    figure.savefig(path, dpi=120)
