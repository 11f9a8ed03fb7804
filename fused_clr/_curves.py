"""Curves of range tests: recorded and smoothed while they grow, and the bounds that they show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .schedules import Schedule

Curve = NDArray[np.float64]


class Suggestion(NamedTuple):
    """Bounds of a cyclical learning rate, as a range test shows them.

    Attributes:
        base_lr: Lower bound; None if the curve does not show bounds.
        max_lr: Upper bound; likewise.
        rule: The rule that was used.
        reason: Where the bounds are from, or why there are none.
    """

    base_lr: float | None
    max_lr: float | None
    rule: str
    reason: str


class Recorder:
    """Collects the losses of a sweep, and finds the step at which they diverge, however many losses it gets at a time.

    Attributes:
        num_steps: Steps of the sweep.

    Args:
        num_steps: Steps of the sweep.
        stop_factor: See `range_test`.
        smoothing: See `range_test`.
    """

    def __init__(self, num_steps: int, stop_factor: float, smoothing: float) -> None:
        self.num_steps = num_steps
        self._stop_factor, self._smoothing = stop_factor, smoothing
        # Of the step whose losses are not all there yet.
        self._open: list[float] = []
        self._open_step = 0
        self._rows: list[tuple[int, float, float]] = []
        self._average, self._best = 0.0, math.inf

    def record(self, steps: Sequence[float], losses: Sequence[float], present: int) -> bool:
        """Takes losses, each with the sweep's step at its call.

        Args:
            steps: They do not fall.
            losses: Those beyond the number of ``steps`` do not count.
            present: The sweep's step now.

        Returns:
            Whether they diverge; what follows is not recorded.
        """
        for step, loss in [*zip(map(int, steps), losses, strict=False), (present, 0.0)]:
            if step != self._open_step:
                if self._open and self._close():
                    return True
                self._open, self._open_step = [], step
            if step >= self.num_steps or not math.isfinite(loss):
                return step < self.num_steps
            self._open.append(loss)
        # The last one is not a loss.
        self._open.pop()
        return False

    def _close(self) -> bool:
        loss = sum(self._open) / len(self._open)
        self._average = self._smoothing * self._average + (1 - self._smoothing) * loss
        smoothed = self._average / (1 - self._smoothing ** (len(self._rows) + 1))
        self._rows.append((self._open_step, loss, smoothed))
        limit = self._best + (self._stop_factor - 1) * abs(self._best)
        self._best = min(self._best, smoothed)
        return smoothed > limit

    def latest(self, sweep: Schedule) -> dict[str, str]:
        """The last learning rate and smoothed loss, as text."""
        if not self._rows:
            return {}
        step, _, smoothed = self._rows[-1]
        return {"lr": f"{sweep.lr(step):.2e}", "loss": f"{smoothed:.4g}"}

    def columns(self) -> tuple[NDArray[np.int64], Curve, Curve]:
        """The steps, their losses and the smoothed losses."""
        steps, loss, smoothed = zip(*self._rows, strict=True) if self._rows else ((), (), ())
        return np.array(steps, np.int64), np.array(loss, np.float64), np.array(smoothed, np.float64)


RULES = ("smith", "valley", "steepest")
# Parts of the whole fall of the loss: it has started; a rise back by that much is no noise.
STARTED, RAGGED = 0.05, 0.2
# Standard deviations of the noise. A fall: 100 steps of noise alone seem to fall in 1 of 300 tests. A single loss.
LEAST_FALL, OUTLIER = 2.5, 4.0
# Smith's rule of thumb: a third or a quarter of ``max_lr`` (sec. 3.3).
RATIO = 4.0


def suggest(rule: str, lr: Curve, loss: Curve, smoothed: Curve) -> Suggestion:
    """Bounds by a rule; see `RangeTest.suggest`.

    Args:
        rule: One of ``RULES``.
        lr: Rising.
        loss: As long as ``lr``.
        smoothed: Likewise; "valley" reads it, as fastai does.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {RULES}, got {rule!r}")
    count = len(lr)
    if count < 10:
        return Suggestion(None, None, rule, f"the curve has {count} steps, and 10 are needed: lower start_lr")
    trend = centred_trend(loss)
    lowest = int(trend.argmin())
    head = max(count // 10, 3)
    # Of half of the steps before the lowest point, which is a better estimate, unless the loss falls from the start.
    level = float(max(np.median(loss[:head]), np.median(loss[: max(lowest // 2, head)])))
    fall = level - float(trend[lowest])
    # Of differences, which a trend hardly changes; 1.4826 times the median deviation of a normal one is its deviation.
    noise = 1.4826 * float(np.median(np.abs(np.diff(loss[: max(lowest, count // 2)])))) / math.sqrt(2)
    if lowest < head or not fall > LEAST_FALL * noise:
        reason = f"the loss does not fall: by {fall:.3g} at most, with noise of {noise:.3g}; try another range"
        return Suggestion(None, None, rule, reason)
    if rule == "smith":
        return _smith(lr, loss, trend, level, fall, noise, head)
    if rule == "valley":
        index, what = _valley(smoothed), "the middle of the longest fall"
    else:
        # Beyond the lowest point, losses that have diverged may fall faster.
        slopes = np.gradient(trend[: lowest + 2], np.log(np.maximum(lr[: lowest + 2], np.finfo(float).tiny)))
        index, what = int(slopes.argmin()), "the steepest fall"
    max_lr = float(lr[index])
    return Suggestion(max_lr / RATIO, max_lr, rule, f"max_lr: {what}; base_lr: a quarter of it")


def centred_trend(loss: Curve) -> Curve:
    """Running medians of the loss, averaged over as many steps. Unlike an average of the past it does not lag."""
    if not len(loss):
        return loss
    reach = max(2, len(loss) // 40)
    for statistic in (np.median, np.mean):
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(loss, reach, mode="edge"), 2 * reach + 1)
        loss = statistic(windows, axis=1)
    return loss


def _smith(lr: Curve, loss: Curve, trend: Curve, level: float, fall: float, noise: float, head: int) -> Suggestion:
    """Where the loss starts to fall, and where it becomes ragged or turns."""
    lowest = int(trend.argmin())
    start = int(np.nonzero(trend[: lowest + 1] > level - max(STARTED * fall, noise))[0][-1])
    # Single losses, not the trend: it smooths away the first spike.
    smallest = np.minimum.accumulate(loss[start:])
    ragged = np.nonzero(loss[start:] > smallest + max(RAGGED * fall, OUTLIER * noise))[0]
    last = len(lr) - 1
    end = min(lowest, start + int(ragged[0]) - 1 if len(ragged) else last)
    what = "turns" if end == lowest else "becomes ragged"
    # The window of the trend is cut off there.
    if end >= last - max(2, len(lr) // 40):
        return Suggestion(
            None, None, "smith", f"the loss still falls at the last learning rate, {lr[-1]:.3g}: raise end_lr"
        )
    if start < head or start >= end:
        how = "from the start" if start < head else "at once"
        reason = f"max_lr: where the loss {what}; base_lr: a quarter of it, since the loss falls {how}"
        return Suggestion(float(lr[end]) / RATIO, float(lr[end]), "smith", reason)
    reason = f"base_lr: where the loss starts to fall; max_lr: where it {what}"
    return Suggestion(float(lr[start]), float(lr[end]), "smith", reason)


def _valley(smoothed: Curve) -> int:
    """The middle of the longest falling subsequence, as `fastai.callback.schedule.valley` counts it."""
    # Its margins: the first tenth, and the last five, which diverge.
    first = len(smoothed) // 10
    values = smoothed[first:-5]
    lengths = np.ones(len(values), np.int64)
    for index in range(1, len(values)):
        lengths[index] += np.max(lengths[:index], where=values[:index] > values[index], initial=0)
    end = int(lengths.argmax())
    length = int(lengths[end])
    return first + max(end - length, 0) + length // 3 + length // 6
