"""Options of ``pytest bench``, what its JSON says about the machine, and the ratios that it prints at its end."""

from __future__ import annotations

import os
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest
import torch

# Of the peers, and what they run on.
DISTRIBUTIONS = (
    "torch", "triton", "numpy", "torch-optimi", "apex", "transformer-engine", "bitsandbytes", "heavyball"
)  # fmt: skip
MESSAGE_LENGTH = 200
DEVICE = pytest.StashKey[torch.device]()
LINES = pytest.StashKey[list[str]]()
NOT_MEASURED = pytest.StashKey[dict[str, str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fused-clr benchmarks")
    group.addoption("--part", default="steps-small", help="a key of bench.parts.PARTS; -k narrows it")
    group.addoption("--rounds", type=int, help="rounds of each peer")
    group.addoption("--device", help="cpu or cuda; by default cuda where there is one")


def pytest_configure(config: pytest.Config) -> None:
    device = torch.device(config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda, and torch sees no GPU")
    if config.getoption("--part") == "host" and device.type == "cpu":
        # The triton backend over CPU tensors needs the interpreter, and triton has not been imported yet.
        os.environ["TRITON_INTERPRET"] = "1"
    # The suite's warnings are errors; those of other packages need not be.
    config.addinivalue_line("filterwarnings", "default")
    config.stash[DEVICE], config.stash[LINES], config.stash[NOT_MEASURED] = device, [], {}


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return pytestconfig.stash[DEVICE]


@pytest.fixture
def lines(pytestconfig: pytest.Config) -> list[str]:
    """What is printed at the end, a line for each run."""
    return pytestconfig.stash[LINES]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # Imports triton.
    from bench.parts import PARTS, runs_of

    part, rounds = metafunc.config.getoption("--part"), metafunc.config.getoption("--rounds")
    if part not in PARTS:
        raise pytest.UsageError(f"--part must be one of {', '.join(PARTS)}, got {part!r}")
    metafunc.parametrize("run", runs_of(part, metafunc.config.stash[DEVICE], rounds), ids=lambda run: run.name)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Function, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if call.excinfo is not None and not report.passed:
        first_line = str(call.excinfo.value).strip().split("\n")[0]
        message = first_line if report.skipped else f"{call.excinfo.typename}: {first_line}"
        item.config.stash[NOT_MEASURED][item.callspec.id] = message[:MESSAGE_LENGTH]
    return report


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    # What tells readers nothing.
    machine_info.pop("node", None)
    machine_info.get("cpu", {}).pop("flags", None)
    machine_info |= {"cores": os.cpu_count(), "torch_threads": torch.get_num_threads()}
    for name in DISTRIBUTIONS:
        try:
            machine_info[name] = version(name)
        except PackageNotFoundError:
            continue
    if config.stash[DEVICE].type == "cuda":
        machine_info["gpu"] = torch.cuda.get_device_name(config.stash[DEVICE])
        machine_info["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    # A copy without .git, as on a lent machine, says it by a variable.
    if "FUSED_CLR_COMMIT" in os.environ:
        commit_info["id"] = os.environ["FUSED_CLR_COMMIT"]
    else:
        # The result that is being written, and those before it, are no change of what is measured.
        changes = _output("git", "status", "--porcelain", "--", "fused_clr", "kernels", "bench", ":!bench/results")
        commit_info["dirty"] = bool(changes)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    from bench.peers import PEERS

    for benchmark in output_json["benchmarks"]:
        # A run, which is no JSON; `extra_info` says what it is.
        benchmark["params"] = None
    output_json["not_measured"] = config.stash[NOT_MEASURED]
    output_json["missing"] = {peer.name: peer.requires for peer in PEERS if peer.is_missing}


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    terminalreporter.write_line(f"\ntime of a step / torch's pair (p20 p50 p80), on {config.stash[DEVICE]}")
    for line in config.stash[LINES]:
        terminalreporter.write_line(line)
