"""The figures of the command line, and the gallery of schedules: ``python -m fused_clr.plotting [docs/schedules.png]``.

Drawn without pyplot, so that no window system and no global state is involved.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from ._curves import Suggestion, centred_trend
from .schedules import (
    Constant,
    Cosine,
    CosineRestarts,
    Cyclic,
    Decay,
    Exponential,
    ExponentialDecay,
    InverseSqrt,
    Linear,
    OneCycle,
    Polynomial,
    Schedule,
    WarmupStableDecay,
    sequence,
    warmup,
)

DOTS_PER_INCH = 120
OURS, TORCH_PALE, MOMENTUM = "#d1495b", "#a9c3dc", "#30638e"


class Training(Protocol):
    """What was recorded of a training: losses by step, the rest by epoch."""

    name: str
    losses: list[float]
    accuracies: list[float]
    lrs: list[float]
    momenta: list[float]

    @property
    def step_seconds(self) -> float:
        """Seconds for a training step."""


def schedule_figure(lr: NDArray[np.float64], momentum: NDArray[np.float64] | None, title: str) -> Figure:
    """The curve of a schedule over the schedule step.

    Args:
        lr: float64[steps]. Learning rates.
        momentum: float64[steps]. Momenta, drawn in a second panel; None for no second panel.
        title: Title of the figure.
    """
    curves = [("learning rate", lr, OURS)]
    if momentum is not None:
        curves.append(("momentum (Adam's beta1)", momentum, MOMENTUM))
    figure = new_figure(9, 1 + 3 * len(curves))
    panels = figure.subplots(len(curves), sharex=True, squeeze=False)[:, 0]
    for axes, (label, values, colour) in zip(panels, curves, strict=True):
        axes.plot(values, color=colour, linewidth=1.4)
        set_labels(axes, "", label)
    panels[-1].set_xlabel("schedule step")
    panels[-1].xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    figure.suptitle(title)
    return figure


def range_figure(
    lr: NDArray[np.float64],
    loss: NDArray[np.float64],
    smoothed: NDArray[np.float64],
    stopped_by: str,
    suggestion: Suggestion,
) -> Figure:
    """Losses of a range test against the learning rate, with the bounds of a suggestion.

    Args:
        lr: float64[n]. See `fused_clr.RangeTest`, for the next three too.
        loss: float64[n].
        smoothed: float64[n].
        stopped_by: Why it stopped.
        suggestion: Its bounds are marked, and its reason is the title.
    """
    figure = new_figure(9, 4.5)
    axes = figure.subplots()
    draw_range(axes, lr, loss, smoothed, suggestion)
    axes.set_title(suggestion.reason)
    figure.suptitle(f"range test, {len(lr)} steps ({stopped_by}); rule: {suggestion.rule}")
    return figure


def draw_range(
    axes: Axes,
    lr: NDArray[np.float64],
    loss: NDArray[np.float64],
    smoothed: NDArray[np.float64],
    suggestion: Suggestion,
) -> None:
    """The panel of `range_figure`, without its titles."""
    axes.plot(lr, loss, ".-", color=TORCH_PALE, linewidth=1, label="loss")
    axes.plot(lr, centred_trend(loss), color=OURS, linewidth=1.8, label="loss, centred trend")
    axes.plot(lr, smoothed, color="gray", linestyle=":", linewidth=1.2, label="loss, average of the past")
    axes.set_xscale("log" if lr[:1].all() else "linear")
    # Diverging losses would hide the rest.
    if len(loss) and (low := loss.min()) < (high := np.quantile(loss[: len(loss) // 4 + 1], 0.9)):
        axes.set_ylim(low - 0.1 * (high - low), high + 0.5 * (high - low))
    if suggestion.base_lr is not None and suggestion.max_lr is not None:
        axes.axvspan(suggestion.base_lr, suggestion.max_lr, color=MOMENTUM, alpha=0.15)
        for name, bound in (("base_lr", suggestion.base_lr), ("max_lr", suggestion.max_lr)):
            axes.axvline(bound, color=MOMENTUM, linewidth=1.2, label=f"{name} {bound:.1e}")
    set_labels(axes, "learning rate", "training loss")
    axes.legend(loc="lower left")


def gallery() -> dict[str, Schedule]:
    """An example of each family and combinator, under its expression."""
    return {
        "Constant(1e-3)": Constant(1e-3),
        "Linear(1e-3, 0, 700)": Linear(1e-3, 0, 700),
        "Exponential(1e-3, 1e-5, 700)": Exponential(1e-3, 1e-5, 700),
        "ExponentialDecay(1e-3, 0.99)": ExponentialDecay(1e-3, 0.99),
        "Polynomial(1e-3, 0, 700, power=2)": Polynomial(1e-3, 0, 700, power=2),
        "Cosine(1e-3, 1e-4, 700)": Cosine(1e-3, 1e-4, 700),
        "CosineRestarts(1e-3, 100, T_mult=2)": CosineRestarts(1e-3, 100, T_mult=2),
        "InverseSqrt(1e-3, 100)": InverseSqrt(1e-3, 100),
        "WarmupStableDecay(1e-3, 100, 400, 200)": WarmupStableDecay(1e-3, 100, 400, 200),
        "Decay(1e-3, 700)": Decay(1e-3, 700),
        "OneCycle(1e-3, 700)": OneCycle(1e-3, 700),
        "OneCycle(..., three_phase=True)": OneCycle(1e-3, 700, three_phase=True),
        "Cyclic(1e-4, 1e-3, 100)": Cyclic(1e-4, 1e-3, 100),
        "Cyclic(..., mode='triangular2')": Cyclic(1e-4, 1e-3, 100, mode="triangular2"),
        "Cyclic(..., mode='exp_range')": Cyclic(1e-4, 1e-3, 100, mode="exp_range", gamma=0.998),
        "warmup(100, then=Cosine(...))": warmup(100, then=Cosine(1e-3, 0, 600)),
        "sequence(OneCycle(...), Constant(...))": sequence(OneCycle(1e-3, 400), Constant(2e-4), milestones=[500]),
    }


def gallery_figure(schedules: dict[str, Schedule], steps: int) -> Figure:
    """Small figures of schedules, three in a row: the learning rate, and the momentum where it is driven.

    Args:
        schedules: From titles.
        steps: Steps to draw.
    """
    rows = -(-len(schedules) // 3)
    figure = new_figure(12, 2.2 * rows)
    panels = list(figure.subplots(rows, 3, squeeze=False).flat)
    for axes in panels[len(schedules) :]:
        axes.set_axis_off()
    for axes, (title, schedule) in zip(panels, schedules.items(), strict=False):
        axes.plot(1e3 * schedule.lr(np.arange(steps)), color=OURS, linewidth=1.6)
        axes.set_ylim(0, 1.1)
        set_labels(axes, "", "")
        axes.set_title(title, fontsize=9, family="monospace")
        if schedule.drives_momentum:
            right = axes.twinx()
            right.plot(schedule.momentum(np.arange(steps)), color=MOMENTUM, linewidth=1.2, linestyle="--")
            right.set_ylim(0.7, 1.0)
            right.spines[["top"]].set_visible(False)
    figure.suptitle("learning rate in 1e-3 (left axis) and momentum (dashed, right axis) by schedule step")
    return figure


def training_figure(torch_run: Training, our_run: Training, title: str) -> Figure:
    """Two trainings from the same seed: loss, its difference, test accuracy, learning rate with the momentum."""
    figure = new_figure(12, 8)
    (loss, difference), (accuracy, rate) = figure.subplots(2, 2)

    # Torch's lines are wide and pale below ours, so that both are seen where they coincide.
    for run, colour, width in ((torch_run, TORCH_PALE, 4), (our_run, OURS, 1.2)):
        loss.semilogy(
            run.losses, color=colour, linewidth=width, label=f"{run.name}: {1 / run.step_seconds:,.0f} steps/s"
        )
        accuracy.plot(_epochs(run), 100 * np.array(run.accuracies), color=colour, linewidth=width, label=run.name)
        rate.plot(_epochs(run), run.lrs, color=colour, linewidth=width, marker="o", markersize=3)
    set_labels(loss, "step", "training loss", "loss curves")
    set_labels(accuracy, "epoch", "test accuracy (%)", "accuracy")
    set_labels(rate, "epoch", "learning rate", "learning rate and momentum at the end of each epoch")
    loss.legend()
    accuracy.legend(loc="lower right")

    momentum = rate.twinx()
    momentum.plot(_epochs(our_run), our_run.momenta, color=MOMENTUM, linestyle="--", linewidth=1.2)
    momentum.set_ylabel("momentum (dashed)")

    gap = np.abs(np.array(our_run.losses) - np.array(torch_run.losses))
    difference.plot(gap, ".", color=OURS, markersize=2)
    # Linear below float32's resolution: many differences are exactly 0.
    difference.set_yscale("symlog", linthresh=1e-8)
    difference.set_ylim(0, max(1e-6, 10 * gap.max()))
    set_labels(difference, "step", "absolute difference", f"difference of the losses: at most {gap.max():.1e}")

    figure.suptitle(title)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes ``figure`` to ``path``; creates its folder if needed.

    Raises:
        OSError: That is not possible; ``filename`` is set.
    """
    # Drawn in memory: on a full disk matplotlib raises errors of other kinds.
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:])
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.write_bytes(picture.getvalue())
    except OSError as error:
        # Only opening a file names it in the error.
        raise OSError(error.errno, error.strerror, str(path)) from error


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that many inches."""
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def set_labels(axes: Axes, x: str, y: str, title: str = "") -> None:
    """Labels a panel, and gives it the look of all of them."""
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _epochs(run: Training) -> range:
    return range(1, len(run.accuracies) + 1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws the gallery into the file that the first argument names, or ``docs/schedules.png``."""
    given = sys.argv[1:] if arguments is None else arguments
    save(gallery_figure(gallery(), 800), Path(given[0] if given else "docs/schedules.png"))


if __name__ == "__main__":
    main()
