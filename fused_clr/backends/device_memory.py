"""What launches read and write besides parameters, gradients and moments: allocated once per engine, never moved."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels import layout
from ..kernels.schedule import HYPER_COLUMNS


class DeviceMemory:
    """The tables and words of one engine.

    Attributes:
        words: int64[n]. The next three, one after another, so that one copy reads all that a device tells.
        clock: int64[CLOCK_WORDS].
        norm: float64[NORM_WORDS].
        live: float64[LIVE_ROWS, num_groups].
        history: float64[history_size, num_groups, HISTORY_COLUMNS].
        settings: int64[SETTINGS_WORDS].
        hyper_table: float64[num_groups, HYPER_COLUMNS].
        scalars: float32[2, num_tensors, SCALAR_COLUMNS].
        scalars_float64: float64, likewise.
        partial_sums: float64[max_updaters], of the norm's programs.
        update_steps: int64[num_tensors]. Updates each tensor got.
        step_mirror: float32[num_tensors]. What users see of them.
        no_grad_scale: float32[1], 1: what a step without GradScaler reads, so that its kernel is the same.
        no_found_inf: float32[1], 0: likewise.

    Args:
        step_mirror: On the device of everything else.
        num_groups: Param groups of the optimizer.
        max_updaters: The largest grid but for evaluators.
        history_size: Rows of the history.
    """

    def __init__(self, step_mirror: Tensor, num_groups: int, max_updaters: int, history_size: int) -> None:
        device, num_tensors = step_mirror.device, len(step_mirror)

        def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        sizes = (layout.CLOCK_WORDS.value, layout.NORM_WORDS.value, layout.LIVE_ROWS.value * num_groups)
        self.words = zeros(torch.int64, sum(sizes))
        self.clock, norm, live = self.words.split(sizes)
        self.norm = norm.view(torch.float64)
        self.live = live.view(torch.float64).view(layout.LIVE_ROWS.value, num_groups)
        # Without clipping nobody writes these.
        self.norm[layout.GRAD_NORM.value] = math.nan
        self.norm[layout.CLIP_COEFFICIENT.value] = 1.0
        self.history = zeros(torch.float64, max(history_size, 1), num_groups, layout.HISTORY_COLUMNS.value)
        self.settings = zeros(torch.int64, layout.SETTINGS_WORDS.value)
        self.hyper_table = zeros(torch.float64, num_groups, HYPER_COLUMNS.value)
        self.scalars = zeros(torch.float32, 2, max(num_tensors, 1), layout.SCALAR_COLUMNS.value)
        self.scalars_float64 = self.scalars.double()
        self.partial_sums = zeros(torch.float64, max_updaters)
        self.update_steps = step_mirror.to(torch.int64)
        self.step_mirror = step_mirror
        self.no_grad_scale, self.no_found_inf = zeros(torch.float32, 1) + 1, zeros(torch.float32, 1)
