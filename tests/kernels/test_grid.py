"""How many programs a launch has: as many as run at once, by the registers of the compiled code."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fused_clr._device.launch import Launch
from fused_clr._device.step_plan import LaunchConfig, at_once

H200 = SimpleNamespace(regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, multi_processor_count=132)


def launch_of(compiled: Any) -> Launch:
    return Launch(None, 1, (), {}, torch.device("cuda", 0), compiled, ())


@pytest.mark.parametrize(
    ("registers", "programs"), [(32, 8), (40, 6), (64, 4), (65, 3), (80, 3), (81, 2), (128, 2), (255, 1)]
)
def test_programs_by_registers(monkeypatch: pytest.MonkeyPatch, registers: int, programs: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: H200)
    monkeypatch.setattr(torch.version, "hip", None)
    launch = launch_of(SimpleNamespace(n_regs=registers))
    assert at_once(launch, 10**6, LaunchConfig(num_warps=8)) == programs * 132
    # A step of few chunks has few programs.
    assert at_once(launch, 5, LaunchConfig(num_warps=8)) == 5


def test_without_registers() -> None:
    """In the interpreter nothing is compiled."""
    assert at_once(launch_of(None), 7, LaunchConfig()) == 7
