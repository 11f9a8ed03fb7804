"""`FusedScheduler`: what the schedulers have in common. The optimizer's param groups hold their schedules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from torch.optim.lr_scheduler import EPOCH_DEPRECATION_WARNING, LRScheduler
from typing_extensions import Self

from .._host.hyperparameters import check_count
from .._host.optimizer import FusedOptimizer
from .._torch_internals import uncompiled
from .._warnings import warn
from ..schedules import Schedule
from .checks import check_frame, check_last_epoch, check_last_lrs

T = TypeVar("T")

# Optimizer steps per scheduler step from which a loop looks like one that steps its scheduler once an epoch.
STEPS_PER_CALL_LIMIT = 8


class FusedScheduler(LRScheduler, ABC):
    """A scheduler with torch's signature, whose schedules run inside the optimizer's step.

    The optimizer's step advances the schedule. Calling ``scheduler.step()`` is optional: after an ``optimizer.step()``
    it does no work on the device; without one it advances the schedule. The learning rates are torch's in both cases.
    While the optimizer has captured steps, ``scheduler.step()`` never advances the schedule. For a schedule per epoch,
    multiply its numbers of steps by the number of batches in an epoch.

    ``last_epoch`` can be assigned: as in torch, the next ``scheduler.step()`` goes to the step after it. Torch's other
    attributes read the schedules of the optimizer's groups, and cannot be assigned where their class does not say so.

    The last scheduler that was created for an optimizer drives it.
    """

    # Torch's class of the same name.
    TORCH: ClassVar[type[LRScheduler]]
    # Whether torch's class computes each learning rate from the step alone, and not from the one before.
    CLOSED_FORM: ClassVar[bool]
    # Keys without which a state_dict is not one of torch's class.
    NEEDED_KEYS: ClassVar[frozenset[str]]

    # -- what a class says of its schedules ---------------------------------------------------------------------------
    @classmethod
    @abstractmethod
    def recognises(cls, schedule: Schedule | None) -> bool:
        """Whether a schedule is of the form that this class makes."""

    @classmethod
    @abstractmethod
    def arguments_of(cls, schedules: Sequence[Any]) -> dict[str, Any]:
        """The arguments of torch's class for the schedules of all groups.

        Raises:
            ValueError: They differ in what torch has once for all groups.
        """

    @classmethod
    @abstractmethod
    def pack(
        cls,
        schedules: Sequence[Any],
        last_epoch: int,
        step_count: int,
        last_lrs: Sequence[float],
        use_beta1: bool,
    ) -> dict[str, Any]:
        """The state_dict of torch's class for the schedules of all groups.

        Args:
            schedules: One per group.
            last_epoch: Steps of the schedule so far; -1 where it has not begun.
            step_count: Calls of ``scheduler.step()``, and 1.
            last_lrs: The groups' learning rates.
            use_beta1: The momentum that cycles is ``betas[0]``.
        """

    @classmethod
    @abstractmethod
    def unpack(
        cls, name: str, state: Mapping[str, Any], groups: Sequence[dict[str, Any]], present: Sequence[Any]
    ) -> list[Any]:
        """The schedules in a state_dict of torch's class or of ours. Changes nothing.

        Args:
            name: Of the state_dict in messages.
            state: The state_dict; `check_frame` has checked it.
            groups: The param groups, ours or torch's, with the keys that torch's class reads.
            present: The schedule of each group that the new one will replace, or None.

        Raises:
            ValueError: A value is missing or not allowed; the message names it.
        """

    # -- attaching ----------------------------------------------------------------------------------------------------
    @classmethod
    def of_schedules(cls, optimizer: FusedOptimizer, schedules: Sequence[Any], step: int) -> Self:
        """A scheduler with the given schedules, one per group, at the given schedule step."""
        scheduler = cls.__new__(cls)
        scheduler._attach(optimizer, schedules, step)
        return scheduler

    def _attach(self, optimizer: FusedOptimizer, schedules: Sequence[Any], step: int) -> None:
        self._token = optimizer._attach_scheduler(schedules, step)
        self.optimizer = optimizer
        self._step_count = 1
        self._warned = False
        self._num_groups = len(schedules)
        self._latest = list(schedules)

    @property
    def _drives(self) -> bool:
        return bool(self.optimizer._scheduler_token == self._token)  # type: ignore[attr-defined]

    @property
    def _fused(self) -> FusedOptimizer:
        optimizer = self.optimizer
        assert isinstance(optimizer, FusedOptimizer)
        if not self._drives:
            raise RuntimeError(
                f"this {type(self).__name__} no longer drives its optimizer: a later scheduler was created for it"
            )
        return optimizer

    @property
    def schedules(self) -> list[Any]:
        """The schedules of the groups that this scheduler drives.

        Raises:
            RuntimeError: A group has been given another kind of schedule, or none.
        """
        schedules = [group.schedule for group in self._fused._adopt_groups()[: self._num_groups]]
        for index, schedule in enumerate(schedules):
            if not self.recognises(schedule):
                raise RuntimeError(
                    f"{type(self).__name__} no longer drives param_groups[{index}]: its schedule is now {schedule!r}, "
                    f"which is not of the form that {type(self).__name__} makes"
                )
        return schedules

    def _set_schedules(self, schedules: Sequence[Any]) -> None:
        # The scheduler does not drive groups added after it was created.
        others = [group.schedule for group in self._fused._adopt_groups()[self._num_groups :]]
        self._fused.set_schedule([*schedules, *others])
        self._latest = list(schedules)

    @property
    def use_beta1(self) -> bool:
        """Whether the momentum that a schedule drives is ``betas[0]``."""
        return self._fused.rule.momentum_key == "betas"

    # -- torch's methods ----------------------------------------------------------------------------------------------
    @property
    def last_epoch(self) -> int:
        """Steps of the schedule so far, as torch counts them. Waits for the device.

        Assigning it changes nothing before the next ``scheduler.step()``, which goes to the step after it, as in torch.
        `FusedAdam.set_schedule_step` changes the schedule step at once.
        """
        optimizer = self._fused
        if optimizer._assigned_epoch is not None:
            return optimizer._assigned_epoch
        return optimizer.read_schedule_step()

    @last_epoch.setter
    def last_epoch(self, value: int) -> None:
        self._fused._assigned_epoch = check_last_epoch(value)

    @uncompiled
    def step(self, epoch: int | None = None) -> None:
        """Advances the schedule, unless the optimizer's step has done so already.

        Args:
            epoch: Sets ``last_epoch``. Deprecated, as in torch.

        Raises:
            RuntimeError: A newer scheduler was created for the optimizer.
            ValueError: ``epoch`` is not an integer in [0, 2**53].
        """
        optimizer = self._fused
        if epoch is not None:
            epoch = check_count("epoch", epoch)
            # Torch's CosineAnnealingWarmRestarts does not deprecate it.
            if self.TORCH.step is LRScheduler.step:
                warn(EPOCH_DEPRECATION_WARNING)
            optimizer.set_schedule_step(epoch)
            self._step_count += 1
            return
        if optimizer._steps_since_scheduler >= STEPS_PER_CALL_LIMIT and not self._warned:
            self._warned = True
            warn(
                f"scheduler.step() was called after {optimizer._steps_since_scheduler} optimizer steps. The schedule "
                "advances with every optimizer.step(), not with scheduler.step(): its step sizes count optimizer steps"
            )
        optimizer._steps_since_scheduler = 0
        # Plain dicts among the groups would not show the new values.
        optimizer._adopt_groups()
        if optimizer._assigned_epoch is not None:
            optimizer.set_schedule_step(optimizer._assigned_epoch + 1)
        elif optimizer._awaits_scheduler:
            optimizer._awaits_scheduler = False
        else:
            optimizer._tick()
        self._step_count += 1

    @uncompiled
    def get_last_lr(self) -> list[float]:  # type: ignore[override]
        """The groups' learning rates, as floats. One copy from the device, for all groups."""
        optimizer = self._fused
        with optimizer._one_copy():
            return [group["lr"] for group in optimizer.param_groups]

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """The learning rates of ``last_epoch``: the same as `get_last_lr` unless it was assigned."""
        epoch = self._fused._assigned_epoch
        return self.get_last_lr() if epoch is None else [schedule.lr(epoch) for schedule in self.schedules]

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's state with torch's keys, loadable by torch's class of the same name."""
        optimizer, last_epoch = self._fused, self.last_epoch
        clock = (int(optimizer.live.schedule_step), optimizer._awaits_scheduler)
        if optimizer._assigned_epoch is not None:
            clock = last_epoch, False
        packed = self.pack(self.schedules, last_epoch, self._step_count, self.get_last_lr(), self.use_beta1)
        # Not torch's: it is one ahead of last_epoch between optimizer.step() and scheduler.step().
        return packed | {"schedule_step": clock}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads a state_dict of this class or of torch's class of the same name.

        Args:
            state_dict: What ``state_dict()`` returned. Not changed.

        Raises:
            ValueError: It is corrupt, has another number of groups, or does not fit the present schedules. Nothing has
                been loaded.
        """
        optimizer, present = self._fused, self.schedules
        check_frame("state_dict", state_dict, type(self).__name__, self.NEEDED_KEYS)
        last_epoch = check_count("state_dict['last_epoch']", state_dict["last_epoch"])
        schedules = self.unpack("state_dict", state_dict, optimizer.param_groups[: len(present)], present)
        step, is_ahead = state_dict.get("schedule_step", (-1, False))
        if max(step - is_ahead, 0) != last_epoch or step < 0:
            # Torch trained on, and carried our key along as it was; or a user changed last_epoch.
            step, is_ahead = last_epoch, False
            if not self.CLOSED_FORM:
                check_last_lrs(type(self).__name__, state_dict.get("_last_lr"), schedules, last_epoch)
        optimizer._check_schedules(schedules)
        self._step_count = state_dict.get("_step_count", self._step_count)
        self._set_schedules(schedules)
        optimizer._set_schedule_step(step, is_ahead)


class Argument(Generic[T]):
    """An attribute of torch's scheduler, which reads the groups' schedules: an argument of the constructor.

    Args:
        doc: What it is.
    """

    def __init__(self, doc: str) -> None:
        self.__doc__ = doc

    def __set_name__(self, owner: type[FusedScheduler], name: str) -> None:
        self._name = name

    def __get__(self, scheduler: FusedScheduler | None, owner: Any = None) -> T:
        if scheduler is None:
            return self  # type: ignore[return-value]
        value: T = scheduler.arguments_of(scheduler.schedules)[self._name]
        return value

    def __set__(self, scheduler: FusedScheduler, value: Any) -> None:
        raise AttributeError(
            f"{type(scheduler).__name__}.{self._name} cannot be assigned: it has no setter, since it reads the "
            "schedules of the groups. Create another scheduler, or give the groups schedules with "
            "optimizer.set_schedule()"
        )
