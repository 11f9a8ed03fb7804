"""`BaseLRScheduler`: schedulers that need each group's base learning rate, and arguments that all groups share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Any, ClassVar

from torch.optim import Optimizer

from .._checks import check_integer
from ..schedules import Schedule
from ..schedules.fields import END_OF_STEPS, checked_lr
from .base import FusedScheduler
from .checks import check_optimizer, common, pack_frame


def no_position(arguments: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Torch's class saves nothing but its arguments and ``last_epoch``."""
    return {}


class BaseLRScheduler(FusedScheduler):
    """A scheduler whose schedules follow from each group's base learning rate and from arguments that all groups share.

    As in torch, the base learning rate is the group's ``initial_lr``, which the first scheduler sets to its ``lr``. An
    ``lr`` that was written after that counts in a group without a schedule, where torch's class would continue from it.
    """

    # What else torch's class saves, which follows from its arguments and the step.
    POSITION: ClassVar[staticmethod[[Mapping[str, Any], int], dict[str, Any]]] = staticmethod(no_position)

    @classmethod
    @abstractmethod
    def build(cls, base_lr: float, **arguments: Any) -> Schedule:
        """The schedule of a group. Raises a ValueError that names an argument which is not allowed."""

    @classmethod
    @abstractmethod
    def read(cls, schedule: Schedule | None) -> dict[str, Any] | None:
        """``base_lr`` and the arguments of a schedule; None for one that `build` does not make."""

    def _start(self, optimizer: Optimizer, last_epoch: int, **arguments: Any) -> None:
        fused, step = check_optimizer(optimizer, type(self).__name__, last_epoch)
        groups = fused._adopt_groups()
        base_lrs = []
        for index, group in enumerate(groups):
            from_initial_lr = self.CLOSED_FORM or group.schedule is not None or step > 0
            key = "initial_lr" if from_initial_lr and "initial_lr" in group else "lr"
            base_lrs.append(checked_lr(f"param_groups[{index}][{key!r}]", group.stored(key)))
        is_new = ["initial_lr" not in group for group in groups]
        self._attach(fused, [self.build(base_lr, **arguments) for base_lr in base_lrs], step)
        for group, base_lr in compress(zip(groups, base_lrs, strict=True), is_new):
            group.store("initial_lr", base_lr)

    @property
    def base_lrs(self) -> list[float]:  # type: ignore[override]
        """The base learning rate of each group."""
        return _base_lrs(self, self.schedules)

    # -- what `FusedScheduler` asks ------------------------------------------------------------------------------------
    @classmethod
    def recognises(cls, schedule: Schedule | None) -> bool:
        """See `FusedScheduler.recognises`."""
        return cls.read(schedule) is not None

    @classmethod
    def arguments_of(cls, schedules: Sequence[Schedule]) -> dict[str, Any]:
        """See `FusedScheduler.arguments_of`."""
        arguments = [dict(cls.read(schedule) or {}) for schedule in schedules]
        for own in arguments:
            del own["base_lr"]
        return common(cls.__name__, arguments)

    @classmethod
    def pack(
        cls,
        schedules: Sequence[Schedule],
        last_epoch: int,
        step_count: int,
        last_lrs: Sequence[float],
        use_beta1: bool,
    ) -> dict[str, Any]:
        """See `FusedScheduler.pack`."""
        arguments = cls.arguments_of(schedules)
        frame = pack_frame(_base_lrs(cls, schedules), last_epoch, step_count, last_lrs)
        return arguments | cls.POSITION(arguments, max(last_epoch, 0)) | frame

    @classmethod
    def unpack(
        cls,
        name: str,
        state: Mapping[str, Any],
        groups: Sequence[dict[str, Any]],
        present: Sequence[Schedule | None],
    ) -> list[Any]:
        """See `FusedScheduler.unpack`."""
        arguments = {key: state[key] for key in cls.NEEDED_KEYS - {"base_lrs", "last_epoch"}}
        position = {key: arguments.pop(key) for key in cls.POSITION({"T_0": 1, "T_mult": 1}, 0)}
        schedules = [cls.build(base_lr, **arguments) for base_lr in saved_lrs(name, state, len(groups))]
        for key, expected in cls.POSITION(arguments, max(state["last_epoch"], 0)).items():
            if isinstance(position[key], bool) or position[key] != expected:
                raise ValueError(
                    f"{name}[{key!r}] must be {expected} at last_epoch={state['last_epoch']}, got {position[key]!r}"
                )
        return schedules


def saved_lrs(name: str, state: Mapping[str, Any], num_groups: int) -> list[float]:
    """The ``base_lrs`` in a state_dict. Raises a ValueError if they are not one number >= 0 per group."""
    name, saved = f"{name}['base_lrs']", state["base_lrs"]
    if not isinstance(saved, (list, tuple)) or len(saved) != num_groups:
        raise ValueError(f"{name} must have {num_groups} entries, one per param group, got {saved!r}")
    return [checked_lr(f"{name}[{index}]", value) for index, value in enumerate(saved)]


def check_count(name: str, value: Any) -> int:
    """Checks a number of steps. Raises a ValueError if it is not an integer from 1 on."""
    return check_integer(name, value, "an integer in [1, 2**53)", lambda n: 1 <= n < END_OF_STEPS)


def _base_lrs(kind: type[BaseLRScheduler] | BaseLRScheduler, schedules: Sequence[Schedule]) -> list[float]:
    return [(kind.read(schedule) or {})["base_lr"] for schedule in schedules]
