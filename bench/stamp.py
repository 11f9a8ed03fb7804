"""Where and with what a result was measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
# Distributions of the peers, and what they run on.
DISTRIBUTIONS = (
    "triton", "numpy", "torch-optimi", "apex", "transformer-engine", "bitsandbytes", "heavyball"
)  # fmt: skip


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def cpu_model() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def make_stamp(device: torch.device) -> dict[str, Any]:
    """Date, commit, machine and versions; what is not there is left out."""
    stamp: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        # A copy without .git, as on a lent machine, says it by a variable.
        "commit": os.environ.get("FUSED_CLR_COMMIT") or _output("git", "describe", "--always", "--dirty"),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    stamp |= {name: _version(name) for name in DISTRIBUTIONS}
    if device.type == "cuda":
        stamp["gpu"] = torch.cuda.get_device_name(device)
        stamp["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {name: value for name, value in stamp.items() if value}
