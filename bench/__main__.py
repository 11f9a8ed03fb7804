"""Measures a step of every peer on every case, in one process and interleaved; writes JSON and a Markdown table.

    python -m bench [--device cpu] [--out bench/results] [--rounds 15]

The result is the ratio to torch's pair in the same run; times alone say little on a shared machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.cases import CASES, PEERS, REFERENCE, Case, make_step

# A round of one peer lasts about this long, in seconds.
ROUND_SECONDS = 0.05


def time_round(step: Callable[[], None], repeats: int, device: torch.device) -> float:
    """Seconds per step, the device's work included."""
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def measure(case: Case, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """One row per peer."""
    steps = {peer.name: make_step(case, peer, device) for peer in PEERS}
    repeats = {}
    for name, step in steps.items():
        time_round(step, 3, device)
        repeats[name] = max(1, int(ROUND_SECONDS / time_round(step, 3, device)))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            seconds[name].append(time_round(step, repeats[name], device))
    rows = []
    for peer in PEERS:
        times, ratios = np.array(seconds[peer.name]), np.array(seconds[peer.name]) / np.array(seconds[REFERENCE])
        rows.append(
            {
                "case": case.name,
                "mode": "eager",
                "peer": peer.name,
                "remark": peer.remark,
                **{f"us_p{q}": round(float(np.percentile(times, q)) * 1e6, 2) for q in (20, 50, 80)},
                **{f"ratio_p{q}": round(float(np.percentile(ratios, q)), 4) for q in (20, 50, 80)},
            }
        )
    return rows


def stamp(device: torch.device) -> dict[str, Any]:
    """Where and with what this was measured."""

    def output(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        except OSError:
            return ""

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": output("git", "describe", "--always", "--dirty"),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
    }


def as_markdown(result: dict[str, Any]) -> str:
    """The rows as a table, under their stamp."""
    lines = [", ".join(f"{key} {value}" for key, value in result["stamp"].items() if value), ""]
    lines += [
        "| case | mode | peer | us a step (p20 p50 p80) | ratio to torch's pair (p20 p50 p80) |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        times = " ".join(f"{row[f'us_p{q}']:,.1f}" for q in (20, 50, 80))
        ratios = " ".join(f"{row[f'ratio_p{q}']:.3f}" for q in (20, 50, 80))
        remark = f" ({row['remark']})" if row["remark"] else ""
        lines.append(f"| {row['case']} | {row['mode']} | {row['peer']}{remark} | {times} | {ratios} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the cases and writes ``steps-<device>.json`` and ``.md``."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    rows = [row for case in CASES for row in measure(case, device, arguments.rounds)]
    result = {"stamp": stamp(device), "rows": rows}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"steps-{device.type}.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / f"steps-{device.type}.md").write_text(as_markdown(result))
    print(as_markdown(result))


if __name__ == "__main__":
    main()
