"""Runs the core tests against other versions of torch and triton, each in an environment of its own: ``make compat``.

python tests/compat.py [--cuda-builds] [--match REGEX] [--folder .compat]

A version of torch that has no CPU build on this machine's index is skipped, and said so: its CUDA build is gigabytes.
``--cuda-builds`` installs it all the same. Exits with 1 if tests failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import urllib.request
import venv
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
# All but the frameworks, the pictures and pages, the benchmarks and the slowest.
CORE = ["tests/api", "tests/kernels", "tests/parity", "tests/integrations"]
LEFT_OUT = [
    "tests/api/test_bench.py",
    "tests/api/test_cli.py",
    "tests/api/test_demo.py",
    "tests/api/test_docs.py",
    "tests/integrations/test_examples.py",
    "tests/integrations/test_huggingface.py",
    "tests/integrations/test_lightning.py",
    "tests/parity/test_accuracy.py",
    "tests/parity/test_state_machine.py",
]
# In a process of their own, without the interpreter.
COMPILED = ["tests/ptx", "-m", "ptx"]
TEST_PACKAGES = ("expecttest", "hypothesis", "pytest", "pytest-benchmark", "pytest-xdist", "tensorboard")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


class Environment(NamedTuple):
    """Versions to test together; an empty one is the newest."""

    name: str
    torch: str
    triton: str
    numpy: str = "numpy"
    pytest_options: tuple[str, ...] = ()


# Triton 3.6's interpreter makes scalars of arrays, which numpy 2.4 forbids and earlier ones warn of.
FOR_TRITON_3_6 = ("-W", "ignore:Conversion of an array:DeprecationWarning")
ENVIRONMENTS = (
    Environment("oldest", "2.11.0", "3.6.0", "numpy<2.4", FOR_TRITON_3_6),
    Environment("torch-2.13-triton-3.6", "2.13.0", "3.6.0", "numpy<2.4", FOR_TRITON_3_6),
    Environment("torch-2.13-newest-triton", "2.13.0", ""),
    Environment("newest", "", ""),
)


class Outcome(NamedTuple):
    """What became of an environment."""

    environment: str
    versions: str
    result: str
    failed: bool = False


def index_options() -> list[str]:
    """Where pip looks for CPU builds, if that can be reached; in vain, it would try for minutes."""
    try:
        with urllib.request.urlopen(CPU_INDEX, timeout=5):
            return ["--extra-index-url", CPU_INDEX]
    except OSError:
        return []


def pinned(package: str, version: str) -> str:
    """A requirement; without a version, the newest."""
    return f"{package}=={version}" if version else package


def torch_build(python: Path, version: str, options: list[str]) -> str:
    """The version of torch that pip would install, with its build, as ``2.13.0+cpu``; empty if there is none."""
    command = [
        python,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--ignore-installed",
        "--no-deps",
        "--quiet",
        "--report",
        "-",
    ]
    command += options
    for requirement in (f"{pinned('torch', version)}+cpu" if version else "", pinned("torch", version)):
        if not requirement:
            continue
        found = subprocess.run([*command, requirement], capture_output=True, text=True)
        if found.returncode == 0:
            report = json.loads(found.stdout[found.stdout.index("{") :])
            url: str = report["install"][0]["download_info"]["url"]
            release: str = report["install"][0]["metadata"]["version"]
            return release if "+" in release or "%2Bcpu" not in url else f"{release}+cpu"
    return ""


def run(environment: Environment, folder: Path, cuda_builds: bool, options: list[str]) -> Outcome:
    """Sets an environment up and runs the core tests in it."""
    home = folder / environment.name
    if not home.exists():
        venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    build = torch_build(python, environment.torch, options)
    if not build:
        return Outcome(environment.name, pinned("torch", environment.torch), "skipped: pip finds no such torch")
    if "+cpu" not in build and not cuda_builds:
        reason = f"skipped: torch {build} has no CPU build here (--cuda-builds installs the other, of gigabytes)"
        return Outcome(environment.name, f"torch {build}", reason)
    install = [python, "-m", "pip", "install", "--quiet", *options]
    for packages in (
        [f"torch=={build}"],
        [pinned("triton", environment.triton), environment.numpy, *TEST_PACKAGES],
    ):
        installed = subprocess.run([*install, *packages], capture_output=True, text=True)
        if installed.returncode:
            return Outcome(environment.name, f"torch {build}", f"not installed: {installed.stderr[-300:]}", failed=True)
    question = "import numpy, torch, triton; print(torch.__version__, triton.__version__, numpy.__version__)"
    versions = subprocess.run([python, "-c", question], capture_output=True, text=True).stdout.split()
    command = [python, "-m", "pytest", "-q", "--numprocesses", "2", "--dist", "worksteal", *environment.pytest_options]
    failed, summaries = False, []
    for tests, variables in (
        ([*CORE, *(f"--ignore={path}" for path in LEFT_OUT)], {}),
        (COMPILED, {"FUSED_CLR_TEST_PTX": "90"}),
    ):
        tested = subprocess.run(
            [*command, *tests], cwd=ROOT, env=os.environ | variables, capture_output=True, text=True
        )
        failed |= tested.returncode != 0
        lines = tested.stdout.strip().splitlines()
        for line in lines:
            if line.startswith(("FAILED", "ERROR")):
                print(line, flush=True)
        summaries.append(lines[-1] if lines else tested.stderr[-300:])
    words = zip(("torch", "triton", "numpy"), versions, strict=False)
    return Outcome(environment.name, ", ".join(map(" ".join, words)), "; ".join(summaries), failed)


def main() -> int:
    """Runs all environments and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuda-builds", action="store_true", help="install a CUDA build where there is no CPU build")
    parser.add_argument("--match", default="", help="only environments whose name holds this regular expression")
    parser.add_argument("--folder", type=Path, default=ROOT / ".compat", help="where the environments are made")
    arguments = parser.parse_args()
    failed, options = False, index_options()
    for environment in ENVIRONMENTS:
        if re.search(arguments.match, environment.name):
            outcome = run(environment, arguments.folder.resolve(), arguments.cuda_builds, options)
            print(f"{outcome.environment:26} {outcome.versions:45} {outcome.result}", flush=True)
            failed |= outcome.failed
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
