"""The public names, their docstrings' examples, and what can be imported."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_clr
from fused_clr import CyclicLR, FusedAdam
from fused_clr.scheduler import KINDS

# They hold nothing public, or values whose use `schedules.base` shows.
WITHOUT_EXAMPLES = {
    *("schedules.compiled", "schedules.fields", "schedules.parts", "schedules.timeline"),
    *("scheduler.base", "scheduler.base_lr", "scheduler.checks", "scheduler.torchs"),
}


def test_public_names() -> None:
    classes = [
        "Averaging",
        "CapturedStep",
        "FusedAdam",
        "FusedAdamW",
        "FusedSGD",
        "GraphedStep",
        "History",
        "Live",
        "RangeTest",
        "Status",
    ]
    functions = ["fuse", "range_test", "schedules", "suggest_step_size", "testing", "unfuse"]
    assert sorted(fused_clr.__all__) == [*sorted([*classes, "Suggestion", *KINDS]), *functions]
    assert issubclass(FusedAdam, torch.optim.Optimizer)
    assert issubclass(CyclicLR, torch.optim.lr_scheduler.LRScheduler)


MODULES = [
    f"{package}.{path.stem}"
    for package in ("schedules", "scheduler")
    for path in sorted((Path(fused_clr.__file__).parent / package).glob("[a-z]*.py"))
]


@pytest.mark.parametrize("module", [*MODULES, "averaging", "optim", "graphs", "convert", "range_test"])
def test_public_modules_have_examples(module: str) -> None:
    """``make test`` runs them, by ``--doctest-modules``."""
    found = doctest.DocTestFinder().find(importlib.import_module(f"fused_clr.{module}"))
    assert any(test.examples for test in found) or module in WITHOUT_EXAMPLES


def test_there_is_one_version() -> None:
    root = Path(__file__).parents[2]
    project = (root / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in project
    assert 'path = "fused_clr/__init__.py"' in project
    cited = re.findall(r"^version:.*", (root / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited == []


def test_without_triton_the_package_imports_and_the_cpu_backend_works() -> None:
    program = """
import sys
sys.modules["triton"] = None
import torch
from fused_clr import FusedAdam, CyclicLR
from fused_clr._device.engines import engine_class
param = torch.nn.Parameter(torch.ones(2))
optimizer = FusedAdam([param]); scheduler = CyclicLR(optimizer, 1e-3, 1e-2)
param.grad = torch.ones(2); optimizer.step(); scheduler.step(); optimizer.state_dict()
assert param.max() < 1
try:
    engine_class(torch.device("cuda"))
except RuntimeError as error:
    assert "parameters on cuda need triton" in str(error), error
else:
    raise SystemExit("no error")
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("index", [0, 1], ids=["optimizer", "scheduler"])
def test_public_methods_take_torchs_arguments(index: int) -> None:
    def make(optimizer: Any, scheduler: Any) -> Any:
        made = optimizer([torch.nn.Parameter(torch.ones(1))])
        return made, scheduler(made, 0.1, 0.2)

    def arguments(method: Any) -> list[Any]:
        # Torch wraps the step at the first construction, and the signature is then the function's.
        found = inspect.signature(method).parameters.values()
        return [(argument.name, argument.kind, argument.default) for argument in found if argument.name != "self"]

    ours = make(FusedAdam, CyclicLR)[index]
    theirs = make(torch.optim.Adam, torch.optim.lr_scheduler.CyclicLR)[index]
    names = [name for name in dir(theirs) if not name.startswith("_") and inspect.isroutine(getattr(theirs, name))]
    assert len(names) > 3
    for name in names:
        assert arguments(getattr(ours, name)) == arguments(getattr(theirs, name)), name
