"""The schedule step, the groups' values and the counters of the cpu backend, kept on the host."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._torch_internals import hold
from ..telemetry import History, Live, Status
from .engine import CLIP_EPS, EngineState, Snapshot
from .settings import GroupSettings, Options

# A Python number would be converted at every step.
ONE = np.ones((), np.float32)


class CpuState(EngineState):
    """Evaluates schedules by their closed form; see `EngineState`.

    Attributes:
        host_step: The schedule step.
        steps: float32[] each. The entries of ``step_mirror``, for torch's kernel.
        alike: For each group, the first group that has the same values at every step.
        next: Learning rate and momentum that the next step applies, by group. A new list at every step.
        weight_decay: What the next step applies, by group.
        must_evaluate: Call `evaluate` before a step uses ``next``: a tensor lr may have changed, or a ``scale_fn``
            raised an error, which is the next step's.
        clip_coefficient: The factor that clips unscaled gradients.
        overflow: The next step must be skipped.

    Args:
        groups: Settings of all groups.
        options: Options for all groups.
        schedule_step: The schedule step to start from.
        update_steps: Number of updates of each parameter so far.
    """

    def __init__(
        self, groups: Sequence[GroupSettings], options: Options, schedule_step: int, update_steps: Sequence[int]
    ) -> None:
        self.step_mirror = torch.tensor(list(update_steps), dtype=torch.float32, device="cpu")
        # Users have other views: ``.data`` of theirs may be replaced.
        self.steps = list(self.step_mirror.unbind())
        self._held = hold(self.steps)
        self._counted, self._counted_address = self.step_mirror.numpy(), self.step_mirror.data_ptr()
        lr, momentum = torch.zeros(2, len(groups), dtype=torch.float64, device="cpu")
        counts = torch.zeros(3, dtype=torch.int64, device="cpu")
        grad_norm = torch.tensor(math.nan, dtype=torch.float64, device="cpu")
        self.live = Live(lr, momentum, grad_norm, *counts)
        # Writes through numpy cost a tenth of a torch call. Applied steps, skipped steps, schedule step.
        self._lr, self._momentum, self._counts = lr.numpy(), momentum.numpy(), counts.numpy()
        self._grad_norm = grad_norm.numpy()
        self._max_grad_norm = options.max_grad_norm
        self.clip_coefficient, self.overflow = 1.0, False
        # Schedule step, next, norm, clip coefficient, loss scale, skipped.
        self._history: deque[tuple[Any, ...]] = deque(maxlen=options.history_size)
        self._averaging, self._average_counts = options.averaging, [0] * len(groups)
        self.host_step = schedule_step
        self.next: list[tuple[float, float]] = [(math.nan, math.nan)] * len(groups)
        self.set_groups(groups)
        self._applied = self.next

    @property
    def capturing(self) -> bool:
        """See `EngineState.capturing`."""
        return False

    def set_groups(self, groups: Sequence[GroupSettings]) -> None:
        """Takes new hyperparameters and schedules."""
        first: dict[Any, int] = {}
        alike = [first.setdefault(group.values_key, index) for index, group in enumerate(groups)]
        # Groups whose schedules differ only in their values share one call of `locate`.
        timelines: dict[Any, tuple[Any, list[Any]]] = {}
        constants = []
        for index in first.values():
            group = groups[index]
            if group.schedule is None:
                constants.append((index, group.lr, group.momentum))
                continue
            timeline = group.schedule.timeline
            empty: list[list[Any]] = [[[] for _ in segments] for segments in timeline.bounds]
            _, members = timelines.setdefault(timeline.key, (timeline.locate, empty))
            # The members of each segment of each part: index, then the six bounds.
            for own, part in zip(members, timeline.bounds, strict=True):
                for entries, bounds in zip(own, part, strict=True):
                    momentum = bounds[3:] if bounds.about_momentum is not None else (group.momentum, 0.0, 0.0)
                    entries.append((index, *bounds[:3], *momentum))
        self.groups, self.alike, self._are_all_alike = list(groups), alike, len(first) == 1
        self._has_tensor_lr = any(group.tensor_lr is not None for group in groups)
        self._constants, self._timelines = constants, list(timelines.values())
        self.weight_decay = [group.weight_decay for group in groups]
        decays = [(index, groups[index].weight_decay_schedule) for index in first.values()]
        self._decay_schedules = [(index, schedule) for index, schedule in decays if schedule is not None]
        self._try_evaluate()

    def evaluate(self) -> None:
        """Evaluates every group's schedule at the current step, for the next update."""
        values: list[Any] = [None] * len(self.groups)
        for index, lr, momentum in self._constants:
            values[index] = float(lr), momentum
        for locate, members in self._timelines:
            part, segment, height, scale = locate(self.host_step)
            for index, lr, lr_offset, lr_span, momentum, offset, span in members[part][segment]:
                values[index] = (
                    lr + (lr_offset + lr_span * height) * scale,
                    momentum + (offset + span * height) * scale,
                )
        for index, schedule in self._decay_schedules:
            self.weight_decay[index] = schedule.lr(self.host_step)
        if self._decay_schedules:
            self.weight_decay = [self.weight_decay[index] for index in self.alike]
        if self._are_all_alike:
            self.next = [values[0]] * len(values)
            lr, momentum = values[0]
            self._lr.fill(lr)
            self._momentum.fill(momentum)
        else:
            self.next = [values[index] for index in self.alike]
            self._lr[:], self._momentum[:] = zip(*self.next, strict=True) if values else ((), ())
        self.must_evaluate = self._has_tensor_lr
        self._counts[2] = self.host_step

    def _try_evaluate(self) -> None:
        try:
            self.evaluate()
        except Exception:
            # A user's scale_fn may raise anything. The step that needs the value evaluates again and raises; until then
            # the last values can be read.
            self._counts[2] = self.host_step
            self.must_evaluate = True

    def count_updates(self, indices: NDArray[np.intp] | None) -> None:
        """Counts an update of some parameters; None: of all.

        Torch's addition takes four times as long, and would count as a user's write.
        """
        if self.step_mirror.data_ptr() != self._counted_address:
            # A user has moved its memory with share_memory_().
            self._counted, self._counted_address = self.step_mirror.numpy(), self.step_mirror.data_ptr()
        if indices is None:
            np.add(self._counted, ONE, self._counted)
        else:
            self._counted[indices] += ONE

    def tick(self) -> None:
        """Advances the schedule."""
        self.host_step += 1
        self._applied = self.next
        self._try_evaluate()

    def set_norm(self, norm: float, skip_if_nonfinite: bool) -> None:
        """Takes the norm of the gradients that the next step updates with."""
        assert self._max_grad_norm is not None
        self._grad_norm[...] = norm
        ratio = self._max_grad_norm / (norm + CLIP_EPS)
        # A comparison: a minimum would drop a NaN.
        self.clip_coefficient = 1.0 if ratio > 1.0 else ratio
        self.overflow = skip_if_nonfinite and not math.isfinite(norm)

    def finish_step(self, grad_scale: float, skipped: bool, ticks: bool) -> None:
        """Counts a step, records it in the history, and advances the schedule if ``ticks``."""
        norm = float(self._grad_norm)
        self._history.append((self.host_step, self.next, norm, self.clip_coefficient, grad_scale, skipped))
        self._counts[int(skipped)] += 1
        if ticks:
            self.tick()

    def read_lr_and_momentum(self, applied: bool) -> list[tuple[float, float]]:
        """See `EngineState.read_lr_and_momentum`."""
        return self._applied if applied else self.next

    def set_schedule_step(self, step: int, is_ahead: bool = False) -> None:
        """See `EngineState.set_schedule_step`."""
        self.host_step = max(step - is_ahead, 0)
        self._try_evaluate()
        if is_ahead:
            self._applied = self.next
            self.host_step = step
            self._try_evaluate()

    def get_update_steps(self) -> list[int]:
        """See `EngineState.get_update_steps`."""
        return [int(step) for step in self.step_mirror.tolist()]

    def set_update_steps(self, steps: Sequence[int]) -> None:
        """See `EngineState.set_update_steps`."""
        self.step_mirror.copy_(torch.tensor(list(steps), dtype=torch.float32, device="cpu"))

    def get_average_counts(self) -> list[int]:
        """See `EngineState.get_average_counts`."""
        return list(self._average_counts)

    def set_average_counts(self, counts: Sequence[int]) -> None:
        """See `EngineState.set_average_counts`."""
        self._average_counts = list(counts)

    def count_averages(self) -> list[float]:
        """Counts the averages of this step. Returns each group's weight, 0 where there is none; empty: nowhere."""
        assert self._averaging is not None
        if self._averaging.every != "cycle" and not self._averaging.is_due(self.host_step, False):
            return []
        weights = [0.0] * len(self.groups)
        for index, group in enumerate(self.groups):
            ends_cycle = group.schedule is not None and group.schedule.timeline.ends_cycle(self.host_step)
            if self._averaging.is_due(self.host_step, ends_cycle):
                weights[index] = self._averaging.weight(self._average_counts[index])
                self._average_counts[index] += 1
        return weights

    def set_counts(self, applied_steps: int, skipped_steps: int) -> None:
        """See `EngineState.set_counts`."""
        self._counts[:2] = applied_steps, skipped_steps

    def set_max_grad_norm(self, max_grad_norm: float) -> None:
        """See `EngineState.set_max_grad_norm`."""
        self._max_grad_norm = max_grad_norm

    def refresh(self) -> None:
        """See `EngineState.refresh`: torch's kernel reads the mirror itself."""

    def copy_words(self) -> Tensor:
        """See `EngineState.copy_words`: there is no device to read."""
        return torch.empty(0, dtype=torch.int64, device="cpu")

    def parse(self, words: Tensor) -> Snapshot:
        """See `EngineState.parse`."""
        del words
        status = Status(
            schedule_step=self.host_step,
            lr=self._lr.copy(),
            momentum=self._momentum.copy(),
            grad_norm=float(self._grad_norm),
            applied_steps=int(self._counts[0]),
            skipped_steps=int(self._counts[1]),
            schedule_exhausted=False,
            stale_replay=False,
        )
        lrs, momenta = np.array(self._applied, np.float64).reshape(-1, 2).T
        update_steps = self.step_mirror.numpy().astype(np.int64)
        return Snapshot(status, lrs, momenta, update_steps, self.get_average_counts())

    def read_history(self, count: int) -> History:
        """See `EngineState.read_history`."""
        rows = list(self._history)[max(len(self._history) - count, 0) :]
        columns = list(zip(*rows, strict=True)) if rows else [()] * 6
        steps, values, norms, clip_coefficients, grad_scales, skipped = columns
        lrs, momenta = np.moveaxis(np.array(values, np.float64).reshape(len(rows), len(self.groups), 2), 2, 0)
        return History(
            schedule_step=np.array(steps, np.int64),
            lr=lrs,
            momentum=momenta,
            grad_norm=np.array(norms, np.float64),
            clip_coefficient=np.array(clip_coefficients, np.float64),
            grad_scale=np.array(grad_scales, np.float64),
            skipped=np.array(skipped, np.bool_),
        )

    def save_telemetry(self) -> Any:
        """See `EngineState.save_telemetry`."""
        return self._grad_norm.copy(), self.clip_coefficient, list(self._history)

    def load_telemetry(self, saved: Any) -> None:
        """See `EngineState.load_telemetry`."""
        self._grad_norm[...], self.clip_coefficient, history = saved
        self._history.clear()
        self._history.extend(history)
