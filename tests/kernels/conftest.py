"""Small launches, and launches that are watched."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from torch import Tensor

from fused_clr._device.step_plan import LaunchConfig
from fused_clr._device.triton import TritonEngine
from tests.helpers import interpreter
from tests.helpers.many_programs import BLOCK_SIZE


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several evaluators, and fewer updaters than chunks."""
    config = LaunchConfig(block_size=BLOCK_SIZE, num_warps=4, lanes=2, programs_per_multiprocessor=2)
    monkeypatch.setattr(TritonEngine, "config", config)


@pytest.fixture
def promised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every address that a kernel promises to be a multiple of 16; a false promise is an error."""
    return interpreter.watch_promises(monkeypatch)


@pytest.fixture
def allow_access(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[Tensor]], None]:
    """Given tensors, makes every access of a kernel outside them an error, before it happens."""
    return interpreter.watch_accesses(monkeypatch)
