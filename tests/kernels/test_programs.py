"""The programs of a launch: in any order, and who ticks the clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from fused_clr._device import launch as launcher
from fused_clr.kernels import layout
from tests.helpers.interpreter import run_programs_in_order
from tests.helpers.many_programs import (
    clock_of,
    copies,
    device_memory,
    engine_of,
    make_optimizer,
    params_of,
    same_bits,
    set_gradients,
)

pytestmark = pytest.mark.usefixtures("triton_backend", "small_chunks")


# -- order -------------------------------------------------------------------------------------------------------------
ORDERS: dict[str, Callable[[int], Sequence[int]]] = {
    "reversed": lambda n: range(n)[::-1],
    "shuffled": lambda n: torch.randperm(n).tolist(),
    "rotated": lambda n: [*range(1, n), 0],
}


@pytest.mark.parametrize(
    "permuted",
    ORDERS.values(),
    ids=ORDERS,
)
def test_the_order_of_programs_does_not_matter(
    permuted: Callable[[int], Sequence[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for order in (range, permuted):
        with monkeypatch.context() as patch:
            run_programs_in_order(patch, order)
            optimizer = make_optimizer(amsgrad=True)
            for step in range(8):
                set_gradients(optimizer, step)
                # Both launches, one of them, and none; then evaluators advance some tensors only.
                for param in params_of(optimizer)[: (0, 2, 4)[step % 3]]:
                    param.grad = None
                optimizer.step()
            results.append(copies(device_memory(optimizer)))
            assert clock_of(optimizer) | {"GENERATION": 0} == {
                "SCHEDULE_STEP": 8, "SLOT": 0, "DONE": 0, "GENERATION": 0, "OVERRUN": 0, "STALE": 0
            }  # fmt: skip
    assert same_bits(*results)


# -- who ticks ---------------------------------------------------------------------------------------------------------
def test_the_clock_ticks_once_a_step() -> None:
    optimizer = make_optimizer()
    start = clock_of(optimizer)
    assert start["GENERATION"] > 0
    assert start | {"GENERATION": 0} == dict.fromkeys(start, 0)
    for step in range(1, 4):
        set_gradients(optimizer, step)
        optimizer.step()
        assert clock_of(optimizer) == start | {"SCHEDULE_STEP": step, "SLOT": step % 2}
    # A step of no tensor, and a tick of the schedule alone.
    optimizer.zero_grad()
    optimizer.step()
    assert clock_of(optimizer) == start | {"SCHEDULE_STEP": 4, "SLOT": 0}
    optimizer._tick()
    assert clock_of(optimizer) == start | {"SCHEDULE_STEP": 5, "SLOT": 1}
    # A reevaluation moves nothing; setting the step moves the step alone.
    optimizer.param_groups[0]["eps"] = 1e-7
    optimizer.set_schedule_step(40)
    assert clock_of(optimizer) == start | {"SCHEDULE_STEP": 40, "SLOT": 1}


@pytest.mark.parametrize("found_inf", [1.0, 2.0, float("nan"), float("inf")])
@pytest.mark.parametrize("warm", [False, True], ids=["first-step", "later-step"])
def test_a_skip_changes_no_bit(found_inf: float, warm: bool) -> None:
    optimizer, twin = make_optimizer(), make_optimizer()
    for step in range(2 * warm):
        for each in (optimizer, twin):
            set_gradients(each, step)
            each.step()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(found_inf)
    set_gradients(optimizer, 7)
    engine_of(optimizer).prepare()
    before = copies(device_memory(optimizer, telemetry=False))
    for _ in range(2):
        optimizer.step()
    assert same_bits(before, list(device_memory(optimizer, telemetry=False)))
    assert clock_of(optimizer)["SCHEDULE_STEP"] == 2 * warm
    # And training goes on as if nothing had been.
    optimizer.found_inf = torch.tensor(0.0)
    for each in (optimizer, twin):
        set_gradients(each, 8)
        each.step()
    assert same_bits(list(device_memory(optimizer, telemetry=False)), list(device_memory(twin, telemetry=False)))


def test_gradients_are_divided_by_the_loss_scale() -> None:
    """By a power of two, which is exact; bit for bit, in float32 and float64."""
    scaled, twin = make_optimizer(), make_optimizer()
    scaled.grad_scale, scaled.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    for step in range(3):
        for each in (scaled, twin):
            set_gradients(each, step)
        for param in params_of(scaled):
            assert param.grad is not None
            param.grad *= 1024
        scaled.step()
        twin.step()
    assert same_bits(list(device_memory(scaled, telemetry=False)), list(device_memory(twin, telemetry=False)))


def test_a_step_that_stops_between_its_launches_leaves_no_partial_count(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = make_optimizer()
    set_gradients(optimizer, 0)
    optimizer.step()
    before = clock_of(optimizer)
    run, calls = launcher.run, []

    def interrupted(*arguments: Any, **replaced: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        run(*arguments, **replaced)

    with monkeypatch.context() as patch:
        patch.setattr(launcher, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    assert clock_of(optimizer) == before
    optimizer.step()
    assert clock_of(optimizer) == before | {"SCHEDULE_STEP": 2, "SLOT": 0}


def test_a_launch_of_another_generation_says_so_and_does_nothing_else() -> None:
    optimizer = make_optimizer()
    set_gradients(optimizer, 0)
    optimizer.step()
    engine = engine_of(optimizer)
    engine.retire()
    before = copies(device_memory(optimizer))
    set_gradients(optimizer, 1)
    optimizer.step()
    assert clock_of(optimizer)["STALE"] == 1
    engine.state.memory.control[layout.STALE.value] = 0
    assert same_bits(before, list(device_memory(optimizer)))
