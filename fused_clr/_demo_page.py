"""The demo's picture page: bounds, schedule, training and captured loop, with what each of them shows."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ._captured_demo import WARMUP, CapturedLoop
from .plotting import MOMENTUM, OURS, TORCH_PALE, Training, draw_range, new_figure, set_labels
from .range_test import RangeTest
from .schedules import Cyclic

TORCH = "#5b7fa6"


def demo_page(
    measured: RangeTest,
    schedule: Cyclic,
    runs: tuple[Training, Training],
    loops: dict[str, CapturedLoop],
    loop_schedule: Cyclic,
    speedup: float,
    device: Any,
) -> Figure:
    """Four panels, to be read in order.

    Args:
        measured: A range test.
        schedule: Of the trainings.
        runs: The trainings with torch's pair and with ours.
        loops: The captured loops, by the same names.
        loop_schedule: Theirs.
        speedup: How many times torch's steps per second of optimizer and scheduler ours are.
        device: Where all of it ran.
    """
    figure = new_figure(13, 9)
    (bounds, cycles), (training, captured) = figure.subplots(2, 2)
    suggestion = measured.suggest()
    draw_range(bounds, measured.lr, measured.loss, measured.smoothed, suggestion)
    found = suggestion.max_lr is not None
    _title(bounds, f"1. Find the bounds: a range test of {len(measured.lr)} steps" + ("" if found else " (none found)"))
    _draw_schedule(cycles, schedule, len(runs[1].losses))
    _title(cycles, f"2. Cycle between them: CyclicLR, {schedule.mode}")
    _draw_training(training, *runs, speedup)
    _draw_captured(captured, loops, loop_schedule, device)
    _title(captured, f"4. {captured.get_title('left')}")
    figure.suptitle(
        "fused-clr: Adam and its cyclical learning rate in one kernel launch, also inside a CUDA graph", fontsize=15
    )
    return figure


def captured_figure(loops: dict[str, CapturedLoop], schedule: Cyclic, device: Any) -> Figure:
    """The panel of the captured loops alone; see `demo_page`."""
    figure = new_figure(9, 4.5)
    _draw_captured(figure.subplots(), loops, schedule, device)
    return figure


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=12, fontweight="bold")


def _draw_schedule(axes: Axes, schedule: Cyclic, steps: int) -> None:
    axes.plot(schedule.lr(np.arange(steps)), color=OURS, linewidth=1.8)
    set_labels(axes, "training step", "learning rate (solid)")
    for bound in (schedule.base_lr, schedule.max_lr):
        axes.axhline(bound, color=MOMENTUM, linewidth=1.2, alpha=0.6)
    if schedule.drives_momentum:
        right = axes.twinx()
        right.plot(schedule.momentum(np.arange(steps)), color=MOMENTUM, linestyle="--", linewidth=1, alpha=0.7)
        right.set_ylabel("momentum, Adam's beta1 (dashed)", color=MOMENTUM)
        right.spines[["top"]].set_visible(False)


def _draw_training(axes: Axes, theirs: Training, ours: Training, speedup: float) -> None:
    for run, colour, width, name in ((theirs, TORCH_PALE, 6, "torch"), (ours, OURS, 1.6, "fused-clr")):
        epochs = len(run.accuracies)
        means = np.reshape(run.losses, (epochs, -1)).mean(axis=1)
        text = f"{name}: {100 * run.accuracies[-1]:.1f} % of the test digits right"
        axes.semilogy(np.arange(1, epochs + 1), means, color=colour, linewidth=width, label=text)
    set_labels(axes, "epoch", "training loss, mean of the epoch")
    axes.legend(loc="upper right", title=f"optimizer + scheduler: {speedup:.1f}x torch's steps/s here")
    gap = np.abs(np.subtract(ours.losses, theirs.losses)).max()
    _title(axes, "3. Train as with torch: " + ("the same losses" if gap == 0 else f"losses within {gap:.0e}"))


def _draw_captured(axes: Axes, loops: dict[str, CapturedLoop], schedule: Cyclic, device: Any) -> None:
    steps = np.arange(len(loops["torch"].losses))
    axes.plot(steps, schedule.lr(steps), color="black", linestyle=":", linewidth=3, label="the schedule")
    for name, colour, width, verdict in (("torch", TORCH, 3, "frozen"), ("fused-clr", OURS, 1.6, "follows")):
        text = f"{name}, captured: {verdict}; loss at the end {np.mean(loops[name].losses[-20:]):.2f}"
        axes.plot(steps, loops[name].applied_lrs, color=colour, linewidth=width, label=text)
    axes.axvline(WARMUP, color="gray", linewidth=1)
    axes.annotate("captured here", (WARMUP, 0), xytext=(4, 4), textcoords="offset points", color="gray", fontsize=9)
    set_labels(axes, "step: eager, then replays", "learning rate, measured on a weight")
    axes.set_ylim(0, 1.8 * schedule.max_lr)
    title = (
        "a CUDA graph" if device.type == "cuda" else "a CUDA graph, emulated on the CPU: replays of the recorded step"
    )
    axes.legend(loc="upper left", title=title)
    _title(axes, "Capture the loop: torch freezes, fused-clr follows")
