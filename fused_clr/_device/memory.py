"""Device memory of launches besides parameters, gradients and moments. Allocated once per engine, never moved."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels import layout
from ..kernels.schedule import GROUP_COLUMNS, SETTINGS_WORDS
from .settings import Options


class DeviceMemory:
    """The tables and words of one engine.

    Attributes:
        words: int64[n]. The next five, one after another, so that one copy reads all of them.
        control: int64[CONTROL_WORDS].
        norm: float64[NORM_WORDS].
        live: float64[LIVE_ROWS, num_groups].
        update_steps: int64[num_tensors]. Number of updates of each tensor.
        average_counts: int64[num_tensors]. How often each was averaged; ``update_steps`` itself if none ever is.
        history: float64[history_size, num_groups, HISTORY_COLUMNS].
        tables: int64[n]. The next two, one after another, so that one copy writes both.
        settings: int64[SETTINGS_WORDS]. What all groups' schedules have in common.
        group_table: float64[num_groups, GROUP_COLUMNS].
        scalars: float32[2, num_tensors, SCALAR_COLUMNS].
        scalars_float64: float64, likewise.
        partial_sums: float64[max_updaters], of the norm's programs.
        step_mirror: float32[num_tensors]. ``update_steps`` as users see them, in ``state[p]["step"]``.
        no_grad_scale: float32[1], 1: what a step without GradScaler reads, so that its kernel is the same.
        no_found_inf: float32[1], 0: likewise.

    Args:
        step_mirror: On the device of everything else.
        num_groups: Param groups of the optimizer.
        max_updaters: The largest number of updaters of a launch.
        options: Options for all groups.
    """

    def __init__(self, step_mirror: Tensor, num_groups: int, max_updaters: int, options: Options) -> None:
        device, num_tensors = step_mirror.device, len(step_mirror)

        def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.sizes = (
            layout.CONTROL_WORDS.value,
            layout.NORM_WORDS.value,
            layout.LIVE_ROWS.value * num_groups,
            num_tensors,
            num_tensors if options.averaging else 0,
        )
        self.words = zeros(torch.int64, sum(self.sizes))
        self.control, norm, live, self.update_steps, counts = self.words.split(self.sizes)
        # An argument needs an address.
        self.average_counts = counts if options.averaging else self.update_steps
        self.norm = norm.view(torch.float64)
        self.live = live.view(torch.float64).view(layout.LIVE_ROWS.value, num_groups)
        # Without clipping no kernel writes these.
        self.norm[layout.GRAD_NORM.value].fill_(math.nan)
        self.norm[layout.CLIP_COEFFICIENT.value].fill_(1.0)
        self.history = zeros(torch.float64, max(options.history_size, 1), num_groups, layout.HISTORY_COLUMNS.value)
        self.tables = zeros(torch.int64, SETTINGS_WORDS.value + num_groups * GROUP_COLUMNS.value)
        self.settings = self.tables[: SETTINGS_WORDS.value]
        groups = self.tables[SETTINGS_WORDS.value :].view(torch.float64)
        self.group_table = groups.view(num_groups, GROUP_COLUMNS.value)
        self.scalars = zeros(torch.float32, 2, max(num_tensors, 1), layout.SCALAR_COLUMNS.value)
        self.scalars_float64 = self.scalars.double()
        self.partial_sums = zeros(torch.float64, max_updaters)
        self.step_mirror = step_mirror
        self.no_grad_scale, self.no_found_inf = zeros(torch.float32, 1) + 1, zeros(torch.float32, 1)

    def evaluator_arguments(self) -> dict[str, Tensor]:
        """The arguments of evaluators, by name."""
        return {
            "control_ptr": self.control,
            "live_ptr": self.live,
            "settings_ptr": self.settings,
            "group_table_ptr": self.group_table,
            "scalars_ptr": self.scalars,
            "scalars_float64_ptr": self.scalars_float64,
            "update_steps_ptr": self.update_steps,
            "step_mirror_ptr": self.step_mirror,
            "average_counts_ptr": self.average_counts,
        }

    def step_arguments(self) -> dict[str, Tensor]:
        """The arguments of a step, by name."""
        return {
            **self.evaluator_arguments(),
            "norm_ptr": self.norm,
            "history_ptr": self.history,
            "grad_scale_ptr": self.no_grad_scale,
            "found_inf_ptr": self.no_found_inf,
        }
