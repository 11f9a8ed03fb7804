"""The learning rate range test, and its result."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import _curves
from ._checks import check_bool, check_integer, check_number, plain_number
from ._curves import Suggestion
from ._host.hyperparameters import MAX_SCHEDULE_STEP
from ._host.optimizer import FusedOptimizer
from ._host.snapshot import Snapshot
from ._warnings import warn
from .schedules import Cyclic, Exponential, Linear, Schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RangeTest", "Suggestion", "range_test", "suggest_step_size"]

MODES: dict[str, Any] = {"exponential": Exponential, "linear": Linear}
# Calls without an update after which a sweep ends: the loss scale has long become small enough, if it ever does.
MAX_IDLE_CALLS = 1000


class RangeTest(NamedTuple):
    """The curve of a range test: one entry for each applied step, in order.

    Attributes:
        lr: float64[n], the learning rates.
        loss: float64[n], the mean of what ``step`` returned between two updates.
        smoothed: float64[n], the exponential moving average of ``loss``, without the bias of its start.
        stopped_by: "end"; "diverged": the last entry's average is beyond ``stop_factor``, or the next loss was not
            finite; "stalled": no step was applied in 1,000 calls.

    Example:
        >>> lr = np.geomspace(1e-5, 1.0, 100)
        >>> loss = 2.3 - 2.0 / (1 + (1e-2 / lr) ** 2) + (lr / 0.3) ** 4
        >>> result = RangeTest(lr, loss, loss, stopped_by="end")
        >>> suggestion = result.suggest("steepest")
        >>> suggestion.base_lr < 1e-2 < suggestion.max_lr * 2
        True
        >>> result.schedule(step_size_up=200, mode="triangular2").step_size_up
        200
    """

    lr: NDArray[np.float64]
    loss: NDArray[np.float64]
    smoothed: NDArray[np.float64]
    stopped_by: str

    def suggest(self, rule: Literal["valley", "steepest", "smith"] = "smith") -> Suggestion:
        """Bounds of a cyclical learning rate. Slopes are against the logarithm of the learning rate.

        The rule "smith" is that of Smith 2017, arXiv:1506.01186, sec. 3.3; "valley" is fastai's.

        | rule | bounds |
        | --- | --- |
        | "smith" | ``base_lr``: where the loss starts to fall; ``max_lr``: where it becomes ragged or turns |
        | "valley" | ``max_lr``: the middle of the longest fall; ``base_lr``: a quarter of it |
        | "steepest" | ``max_lr``: where the loss falls fastest; ``base_lr``: a quarter of it |

        Returns:
            A `Suggestion`. Its bounds are None, and ``reason`` says why, if the curve does not show them.

        Raises:
            ValueError: ``rule`` is not one of these.
        """
        return _curves.suggest(rule, self.lr, self.loss, self.smoothed)

    def schedule(self, step_size_up: float, mode: str = "triangular", *, rule: Any = "smith", **options: Any) -> Cyclic:
        """A `Cyclic` between the suggested bounds.

        Args:
            step_size_up: See `suggest_step_size`.
            mode: See `Cyclic`.
            rule: See `suggest`.
            options: Other arguments of `Cyclic`.

        Raises:
            ValueError: There is no suggestion, and the message says why; or an argument is not allowed.
        """
        base_lr, max_lr, _, reason = self.suggest(rule)
        if base_lr is None or max_lr is None:
            raise ValueError(f"rule={rule!r} suggests no bounds: {reason}")
        return Cyclic(base_lr, max_lr, step_size_up, mode=mode, **options)

    def plot(self, path: str | PathLike[str] | None = None, rule: Any = "smith") -> Figure:
        """Draws losses against the learning rate, with the suggestion marked. Needs matplotlib.

        Args:
            path: Picture to write, .png, .svg or .pdf; None writes none.
            rule: See `suggest`.

        Returns:
            The figure.
        """
        from . import plotting

        figure = plotting.range_figure(*self, self.suggest(rule))
        if path is not None:
            plotting.save(figure, Path(path))
        return figure

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Writes a row for each step: step, lr, loss, smoothed."""
        with open(path, "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(("step", "lr", "loss", "smoothed"))
            rows.writerows(zip(range(len(self.lr)), *(column.tolist() for column in self[:3]), strict=True))


def range_test(
    step: Callable[[Any], Any],
    optimizer: FusedOptimizer,
    batches: Iterable[Any],
    *,
    start_lr: float = 1e-7,
    end_lr: float = 10.0,
    num_steps: int = 100,
    mode: Literal["exponential", "linear"] = "exponential",
    stop_factor: float = 4.0,
    smoothing: float = 0.98,
    restore: Sequence[Any] = (),
    check_every: int = 10,
    progress: bool = True,
) -> RangeTest:
    """Trains while the learning rate rises from ``start_lr`` to ``end_lr``, records the losses, and undoes everything.

    The learning rate range test of Smith 2017, "Cyclical Learning Rates for Training Neural Networks"
    (arXiv:1506.01186, sec. 3.3). The sweep is a schedule, which the optimizer's kernel follows: it rises with every
    *applied* update, not with micro-batches or skipped steps, and in a captured loop too. Every group follows it. A
    momentum that a schedule drives stays at its present value.

    Afterwards, also after an error or Ctrl-C, these have their old values, bit for bit and at the same addresses:
    parameters of ``optimizer``, their gradients, its state, groups, schedule, counters and history; the objects in
    ``restore``; and the random states of torch, numpy and Python. Captured steps stay valid, unless the present
    schedule has a ``@triton.jit`` ``scale_fn``. If a step that is captured during the test creates state, that state
    stays, as zeros.

    Args:
        step: One training step: takes a batch, calls ``optimizer.step()`` (not for every batch, if it accumulates
            gradients), and returns the loss, a number or a real tensor of 1 element. It may be a `GraphedStep`.
        optimizer: A `FusedAdam`, `FusedAdamW` or `FusedSGD`.
        batches: What ``step`` takes. Iterated again with a warning if there are too few.
        start_lr: First learning rate, > 0; >= 0 in mode "linear".
        end_lr: Last learning rate, > ``start_lr``.
        num_steps: Updates from the first to the last, >= 10.
        mode: The learning rate rises by the same factor ("exponential") or by the same amount ("linear").
        stop_factor: Stop when the smoothed loss exceeds the smallest so far by ``stop_factor - 1`` times its size, > 1;
            ``math.inf`` stops only at a loss that is not finite.
        smoothing: Weight of the past in the smoothed loss, in [0, 1).
        restore: What else ``step`` changes: the model, a `torch.amp.GradScaler`, other optimizers, `torch.Generator`
            objects, anything with ``state_dict`` and ``load_state_dict``. Without the model, its buffers (such as the
            statistics of BatchNorm) and its training flags are not restored.
        check_every: Calls of ``step`` between two reads of the losses, >= 1. Nothing else waits for the device. The
            result does not depend on it.
        progress: Show a progress bar, if tqdm is installed.

    Returns:
        A `RangeTest`.

    Raises:
        TypeError: ``optimizer`` is not a fused optimizer, ``step`` is not callable or returned no number, ``batches``
            is not iterable, or something in ``restore`` cannot be restored.
        ValueError: An argument is not allowed; the message names it. ``batches`` is empty. A parameter has no memory.
        RuntimeError: ``step`` applied no update in 1,000 calls, or ``batches`` is an iterator that ended.

    Example:
        >>> import fused_clr, torch
        >>> weight = torch.nn.Parameter(torch.full((3,), 5.0))
        >>> optimizer = fused_clr.FusedAdam([weight])
        >>> def step(batch):
        ...     optimizer.zero_grad()
        ...     loss = (weight * batch).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        ...     return loss.detach()
        >>> result = range_test(step, optimizer, [torch.ones(3)] * 100, start_lr=1e-4, progress=False)
        >>> result.stopped_by, len(result.lr), float(result.lr[-1])
        ('end', 100, 10.0)
        >>> weight.tolist(), optimizer.status().applied_steps
        ([5.0, 5.0, 5.0], 0)
    """
    if not callable(step):
        raise TypeError(f"step must be callable, got {type(step).__name__}")
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(f"optimizer must be a FusedAdam, FusedAdamW or FusedSGD, got {type(optimizer).__name__}")
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches must be iterable, got {type(batches).__name__}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {tuple(MODES)}, got {mode!r}")
    num_steps = check_integer(
        "num_steps", num_steps, "an integer in [10, 2**53)", lambda n: 10 <= n < MAX_SCHEDULE_STEP
    )
    # Checks the learning rates too.
    sweep = MODES[mode](start_lr, end_lr, num_steps - 1)
    if not sweep.start_lr < sweep.end_lr:
        raise ValueError(f"end_lr must be > start_lr={start_lr!r}, got {end_lr!r}")
    stop_factor = check_number("stop_factor", stop_factor, "a number > 1", lambda x: x > 1)
    smoothing = check_number("smoothing", smoothing, "a number in [0, 1)", lambda x: 0 <= x < 1)
    check_every = check_integer("check_every", check_every, "an integer >= 1", lambda n: n >= 1)
    progress = check_bool("progress", progress)
    if not isinstance(restore, (list, tuple)):
        raise TypeError(f"restore must be a list of objects, got {type(restore).__name__}")
    names = [f"restore[{index}]" for index in range(len(restore))]
    snapshot = Snapshot([("optimizer", optimizer), *zip(names, restore, strict=True)])
    curve = _curves.Recorder(num_steps, stop_factor, smoothing)
    try:
        stopped_by = _sweep(step, optimizer, _cycled(batches), sweep, curve, check_every, progress)
    finally:
        snapshot.restore()
    steps, loss, smoothed = curve.columns()
    return RangeTest(sweep.lr(steps), loss, smoothed, stopped_by)


def _sweep(
    step: Callable[[Any], Any],
    optimizer: FusedOptimizer,
    batches: Iterator[Any],
    sweep: Schedule,
    curve: _curves.Recorder,
    check_every: int,
    progress: bool,
) -> str:
    """Takes steps into ``curve`` until one of the reasons in ``RangeTest.stopped_by``, which it returns."""
    _set_sweep(optimizer, sweep)
    optimizer.set_schedule_step(0)
    device = optimizer.live.schedule_step.device
    # The schedule step before each call and the loss, and the schedule step after the last call.
    rows = torch.zeros(2, check_every + 1, dtype=torch.float64, device=device)
    done, idle = 0, 0
    bar = _progress_bar(curve.num_steps) if progress else None
    try:
        while done < curve.num_steps:
            # A call is one update at most, unless the user's step has several.
            calls = min(check_every, curve.num_steps - done)
            for call in range(calls):
                rows[0, call].copy_(optimizer.live.schedule_step)
                loss = _check_loss(step(next(batches)))
                rows[1, call].copy_(loss, non_blocking=True) if isinstance(loss, Tensor) else rows[1, call].fill_(loss)
            rows[0, calls].copy_(optimizer.live.schedule_step)
            (*steps, present), losses = rows[:, : calls + 1].tolist()
            idle = 0 if present > done else idle + calls
            done = int(present)
            if curve.record(steps, losses, done):
                return "diverged"
            if bar is not None:
                bar.set_postfix(curve.latest(sweep), refresh=False)
                bar.update(min(done, curve.num_steps) - bar.n)
            if idle >= MAX_IDLE_CALLS:
                if done:
                    return "stalled"
                raise RuntimeError(
                    f"step applied no update in {idle:,} calls: it never called optimizer.step(), or all were skipped"
                )
    finally:
        if bar is not None:
            bar.close()
    return "end"


def _set_sweep(optimizer: FusedOptimizer, sweep: Schedule) -> None:
    """Gives every group the sweep. A momentum that a schedule drives stays at its present value."""
    rule = optimizer.rule
    momenta = optimizer.status().momentum.tolist()
    for group, momentum in zip(optimizer.param_groups, momenta, strict=True):
        values: dict[str, Any] = {"schedule": sweep}
        if group.schedule is not None and group.schedule.drives_momentum:
            values[rule.momentum_key] = rule.with_momentum(group.stored(rule.momentum_key), momentum)
        # In one write: SGD without momentum is another kernel, which would end captures.
        group.store_all(values)


def _check_loss(loss: Any) -> Tensor | float:
    if isinstance(loss, Tensor) and loss.numel() == 1 and not loss.is_complex() and loss.dtype != torch.bool:
        return loss.detach().reshape(())
    number = plain_number(loss)
    if number is None:
        got = f"a {loss.dtype} tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"step must return the loss, a number or a real tensor of 1 element, got {got}")
    return float(number)


def _cycled(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, again and again."""
    total = 0
    while True:
        count = 0
        for batch in batches:
            count += 1
            yield batch
        if count == 0 and total == 0:
            raise ValueError("batches must not be empty")
        if count == 0:
            raise RuntimeError(
                f"batches ended after {total:,} entries and cannot be iterated again, because it is an iterator: give "
                "more, or a DataLoader or a list"
            )
        if total == 0:
            warn(f"batches has only {count:,} entries, fewer than the range test needs: it uses them again")
        total += count


def _progress_bar(num_steps: int) -> Any:
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return None
    return tqdm(total=num_steps, desc="range test", mininterval=0.5)


def suggest_step_size(batches_per_epoch: int, epochs_per_half_cycle: float = 4) -> int:
    """Steps from ``base_lr`` to ``max_lr``: 2 to 10 epochs' (Smith 2017, arXiv:1506.01186, sec. 3.2).

    Args:
        batches_per_epoch: Optimizer steps in an epoch, >= 1: with accumulation fewer than batches.
        epochs_per_half_cycle: Epochs from one bound to the other, in [2, 10].

    Raises:
        ValueError: An argument is not allowed; the message names it.

    Example:
        >>> suggest_step_size(45, epochs_per_half_cycle=2)
        90
    """
    batches = check_integer("batches_per_epoch", batches_per_epoch, "an integer >= 1", lambda n: n >= 1)
    epochs = check_number("epochs_per_half_cycle", epochs_per_half_cycle, "in [2, 10]", lambda x: 2 <= x <= 10)
    return max(math.ceil(batches * epochs), 1)
