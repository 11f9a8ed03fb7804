"""A launch of compiled code gives Triton's launcher what Triton itself would, with addresses in place of tensors."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

from fused_clr._device import launch

GRID, STREAM = 5, 77
# Of ``run``: the arguments before the kernel's own, and of them the metadata and the hooks of profilers.
FRAME, HOOKS = 9, slice(6, 9)
DEVICE = torch.device("cuda", 0)


class Compiled(SimpleNamespace):
    """Compiled code whose ``run`` only records; what else Triton does with it is Triton's."""

    __getitem__ = CompiledKernel.__getitem__
    launch_metadata = CompiledKernel.launch_metadata


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Arguments of each ``run``."""
    found: list[tuple[Any, ...]] = []
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: DEVICE.index)
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.no_grad())
    monkeypatch.setattr(driver, "_active", None)
    driver.set_active(SimpleNamespace(get_current_device=lambda: DEVICE.index, get_current_stream=lambda _: STREAM))
    return found


def make(calls: list[tuple[Any, ...]], **arguments: Any) -> launch.Launch:
    compiled = Compiled(
        name="kernel",
        function=11,
        packed_metadata=(4, 1, 0),
        src=None,
        _init_handles=lambda: None,
        run=lambda *given: calls.append(given),
    )
    kernel = SimpleNamespace(arg_names=["x_ptr", "count", "y_ptr", "SIZE"], warmup=lambda *_, **__: compiled)
    return launch.make_launch(kernel, GRID, {}, DEVICE, **arguments)


def test_tensors_become_addresses(calls: list[tuple[Any, ...]]) -> None:
    x, y, z = torch.zeros(3, 4)
    made = make(calls, x_ptr=x, y_ptr=y, count=3, SIZE=None)
    made.compiled[(GRID, 1, 1)](*made.arguments)
    launch.run(made)
    launch.run(made, y_ptr=z, count=4)
    launch.run(launch.replace_arguments(made, {"x_ptr": z}))
    triton, *own = calls
    frame = (*triton[:6], None, None, None)
    assert frame[:4] == (GRID, 1, 1, STREAM)
    assert [call[:FRAME] for call in own] == 3 * [frame]
    assert len(triton) == FRAME + 4
    assert [call[FRAME:] for call in own] == [
        (x.data_ptr(), 3, y.data_ptr(), None),
        (x.data_ptr(), 4, z.data_ptr(), None),
        (z.data_ptr(), 3, y.data_ptr(), None),
    ]


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
@pytest.mark.parametrize("is_chained", [True, False], ids=["added", "assigned"])
def test_profilers_are_told(
    calls: list[tuple[Any, ...]], name: str, is_chained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hook(*_: Any) -> None:
        pass

    chain: Callable[..., Any] = hook
    if is_chained:
        chain = knobs.HookChain()
        chain.add(hook)
    monkeypatch.setattr(knobs.runtime, name, chain)
    launch.run(make(calls, x_ptr=torch.zeros(1), y_ptr=None, count=1, SIZE=2))
    assert chain in calls[0][HOOKS]
    assert isinstance(calls[0][FRAME], torch.Tensor)
