"""`Engine` takes the steps of all parameters on one device; `EngineState` holds its schedule step and counters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, MutableMapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..schedules import Schedule
from ..telemetry import History, Live, Status
from .capture import Capture
from .moments import Moments
from .parameters import Parameters
from .rules import UpdateRule
from .settings import GroupSettings, Options, TensorRecord

# Added to the norm before ``max_grad_norm`` is divided by it, as in `torch.nn.utils.clip_grad_norm_`.
CLIP_EPS = 1e-6


class Snapshot(NamedTuple):
    """All values read from a device, at one moment.

    Attributes:
        status: What users see.
        applied_lr: float64[num_groups], the learning rates that the last step applied.
        applied_momentum: float64[num_groups], likewise.
        update_steps: int64[num_tensors], number of updates of each parameter.
        average_counts: How often the parameters of each group were averaged.
    """

    status: Status
    applied_lr: NDArray[np.float64]
    applied_momentum: NDArray[np.float64]
    update_steps: NDArray[np.int64]
    average_counts: Sequence[int]


class EngineState(ABC):
    """The schedule step of one device, the current values of its groups, its counters and its history.

    Attributes:
        live: See `Live`.
        step_mirror: float32[num_tensors]. Number of updates of each parameter, as users see it.
        groups: Settings of all groups, including groups with no parameter on this device.
        host_step: The schedule step as far as the host knows it.
    """

    live: Live
    step_mirror: Tensor
    groups: Sequence[GroupSettings]
    host_step: int

    @property
    @abstractmethod
    def capturing(self) -> bool:
        """Whether the current stream of the device is being captured."""

    @abstractmethod
    def read_lr_and_momentum(self, applied: bool) -> list[tuple[float, float]]:
        """Every group's learning rate and momentum: what the last step applied, or what the next one will."""

    @abstractmethod
    def set_schedule_step(self, step: int, is_ahead: bool = False) -> None:
        """Sets the schedule step, in place. With ``is_ahead`` the step before it counts as the one last applied."""

    @abstractmethod
    def get_update_steps(self) -> list[int]:
        """Reads the number of updates of each parameter."""

    @abstractmethod
    def set_update_steps(self, steps: Sequence[int]) -> None:
        """Sets the number of updates of each parameter, in place."""

    def restart_steps(self, indices: Collection[int]) -> None:
        """Sets the number of updates of some parameters to 0."""
        steps = self.get_update_steps() if indices else []
        if any(steps[index] for index in indices):
            self.set_update_steps([0 if index in indices else step for index, step in enumerate(steps)])

    @abstractmethod
    def get_average_counts(self) -> list[int]:
        """Reads how often the parameters of each group were averaged; 0 for a group without any on this device."""

    @abstractmethod
    def set_average_counts(self, counts: Sequence[int]) -> None:
        """Sets how often the parameters of each group were averaged, in place."""

    @abstractmethod
    def set_counts(self, applied_steps: int, skipped_steps: int) -> None:
        """Sets how many steps were applied and skipped, in place."""

    @abstractmethod
    def set_max_grad_norm(self, max_grad_norm: float) -> None:
        """Sets the limit of the gradient norm, in place."""

    @abstractmethod
    def refresh(self) -> None:
        """Applies values of ``state[p]["step"]`` that a user wrote in place, which are not reported."""

    @abstractmethod
    def copy_words(self) -> Tensor:
        """Starts a copy of all values from the device, without waiting for it; `parse` reads the copy."""

    @abstractmethod
    def parse(self, words: Tensor) -> Snapshot:
        """Reads a finished copy of `copy_words`."""

    @abstractmethod
    def read_history(self, count: int) -> History:
        """The latest steps, in one copy."""

    @abstractmethod
    def save_telemetry(self) -> Any:
        """Copies the history and the last norm, for `load_telemetry`."""

    @abstractmethod
    def load_telemetry(self, saved: Any) -> None:
        """Puts back what `save_telemetry` copied, in place."""


class EngineSetup(NamedTuple):
    """What an engine begins with.

    Attributes:
        device: The device of the parameters.
        records: The parameters, in the order of ``optimizer.param_groups``.
        state: Parameter -> dict of its state tensors.
        rule: The update rule.
        groups: Settings of all groups.
        options: Options for all groups.
        schedule_step: The schedule step to start from.
        update_steps: Number of updates of each parameter so far.
    """

    device: torch.device
    records: Sequence[TensorRecord]
    state: MutableMapping[Tensor, Any]
    rule: UpdateRule
    groups: Sequence[GroupSettings]
    options: Options
    schedule_step: int
    update_steps: Sequence[int]


class Engine(ABC):
    """Takes the steps of all parameters on one device. Subclasses are made from an `EngineSetup`.

    Attributes:
        device: Where the parameters are.
        parameters: The parameters.
        state: The schedule step, current values, counters and history.
        moments: The state tensors.
    """

    device: torch.device
    parameters: Parameters
    state: EngineState
    moments: Moments

    @staticmethod
    @abstractmethod
    def check_schedule(schedule: Schedule, step: int) -> None:
        """Raises an error if ``schedule`` cannot be evaluated, at its start or at ``step``."""

    @abstractmethod
    def set_groups(self, groups: Sequence[GroupSettings]) -> None:
        """Applies new hyperparameters and schedules, in place."""

    @abstractmethod
    def forget_plans(self) -> None:
        """Drops all plans: state tensors may have been replaced."""

    @abstractmethod
    def before_capture(self) -> None:
        """Does what a captured step needs and a capture cannot do: plans, code, tables, values written by a user."""

    @abstractmethod
    def prepare(self) -> Capture | None:
        """Prepares the next launch. Every error a user can cause is raised here, before anything has changed.

        Returns:
            The `Capture` of a captured or recorded step; None for an eager one.

        Raises:
            ParametersMovedError: The parameters must be sorted by device again.
        """

    @abstractmethod
    def compute_norm(self, grad_scale: Tensor | None, skip_if_nonfinite: bool) -> None:
        """Computes the norm of the gradients that `prepare` found, and their clip coefficient.

        Args:
            grad_scale: The loss scale.
            skip_if_nonfinite: A norm that is not finite makes `launch` skip.
        """

    @abstractmethod
    def sum_of_squares(self, grad_scale: Tensor | None) -> Tensor:
        """float64[], over all gradients and all processes that hold shards of them. After `compute_norm`."""

    @abstractmethod
    def set_sum_of_squares(self, total: Tensor, skip_if_nonfinite: bool) -> None:
        """Sets the norm to that of the gradients on all devices and processes."""

    @abstractmethod
    def launch(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Updates the parameters that `prepare` found, and advances the schedule. Skips the step on an overflow."""

    @abstractmethod
    def tick(self) -> None:
        """Advances the schedule without an update."""

    @abstractmethod
    def retire(self) -> None:
        """Makes launches captured from this engine do nothing, because another engine replaces it."""
