"""The entries of ``optimizer.param_groups``, whose scheduled keys read the current values."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator, Mapping, ValuesView
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from .._device.rules import UpdateRule
from .._device.settings import GroupSettings
from .._torch_internals import calling_scheduler
from .._warnings import warn
from ..averaging import Averaging
from ..schedules import OneCycle, Schedule
from .hyperparameters import N_AVERAGED, check_has_decay_schedule, check_hyperparameter
from .watched import WatchedDict, WatchedList


class Owner(Protocol):
    """What a group needs from its optimizer."""

    defaults: dict[str, Any]

    @property
    def rule(self) -> UpdateRule:
        """The update rule."""

    @property
    def averaging(self) -> Averaging | None:
        """Which steps average the parameters."""

    def on_group_change(self, key: str) -> None:
        """The value of ``key`` was written in some group."""

    def change_schedule(self, group: ParamGroup, schedule: Schedule | None) -> None:
        """Checks a schedule and gives it to ``group``."""

    def accepts_lr(self, group: ParamGroup, value: float) -> bool:
        """Whether ``value`` may be written to a scheduled ``lr``."""

    def check_schedule(self, schedule: Schedule | None) -> None:
        """Checks that steps could evaluate a schedule."""

    def read_scheduled(self, group: ParamGroup) -> tuple[float, float] | None:
        """Current learning rate and momentum of ``group``; None if it is not in the optimizer (yet)."""

    def read_n_averaged(self, group: ParamGroup) -> int | None:
        """How often the parameters of ``group`` were averaged; None if it is not in the optimizer (yet)."""

    def write_n_averaged(self, group: ParamGroup, count: Any) -> None:
        """Sets it."""

    def read_schedule_step(self) -> int:
        """The schedule step of the values that groups show."""


class ParamGroup(WatchedDict):
    """An entry of ``optimizer.param_groups``.

    With a schedule, ``group["lr"]`` (and the momentum, if it cycles: ``group["betas"]``) is the current value, as a
    float; so is ``group["weight_decay"]`` with a ``weight_decay_schedule``. Reading it synchronizes, with any method of
    a dict. Assigning another value raises an error.

    Args:
        values: The group as torch has it.
        owner: Returns the optimizer, or None if it was deleted: a group must not keep its optimizer alive.
    """

    def __init__(self, values: Mapping[str, Any], owner: Callable[[], Owner | None]) -> None:
        super().__init__(values, partial(_tell, owner))
        dict.__setitem__(self, "params", WatchedList(values["params"], partial(self.on_change, "params")))
        self._owner = owner
        optimizer = owner()
        assert optimizer is not None
        self._rule = optimizer.rule

    @property
    def schedule(self) -> Schedule | None:
        """The group's schedule."""
        schedule: Schedule | None = self.stored("schedule")
        return schedule

    @property
    def weight_decay_schedule(self) -> Schedule | None:
        """The schedule of the group's weight decay."""
        schedule: Schedule | None = self.stored("weight_decay_schedule")
        return schedule

    @property
    def scheduled_keys(self) -> tuple[str, ...]:
        """The keys that the schedule drives: the learning rate, and perhaps the momentum."""
        if self.schedule is None:
            return ()
        key = self._rule.momentum_key
        return ("lr", key) if key and self.schedule.drives_momentum else ("lr",)

    def stored(self, key: str) -> Any:
        """The value as last written, without reading the device; None if there is no such key."""
        return dict.get(self, key)

    def store(self, key: str, value: Any) -> None:
        """Writes without the checks of ``group[key] = value``."""
        super().__setitem__(key, value)

    def store_all(self, values: Mapping[str, Any]) -> None:
        """Writes several without the checks, and reports one write."""
        dict.update(self, values)
        self.on_change("schedule")

    def replace_all(self, values: Mapping[str, Any]) -> None:
        """Replaces all items without the checks, and reports one write."""
        dict.clear(self)
        self.store_all(values)

    def __delitem__(self, key: str) -> None:
        optimizer = self._owner()
        if optimizer is not None and (key == "params" or key in optimizer.defaults):
            raise KeyError(f"param_group[{key!r}] cannot be removed: every step needs it. Assign another value")
        super().__delitem__(key)

    def settings(self) -> GroupSettings:
        """The group as a step needs it."""
        values = dict(dict.items(self))
        momentum = self._rule.momentum_of(values)
        return GroupSettings(values["lr"], momentum, values["schedule"], bool(values.get("maximize")), values)

    def set_schedule(self, schedule: Schedule | None) -> None:
        """Replaces the schedule, and adds the keys that torch's schedulers add to a group.

        If the schedule is removed, the group keeps the learning rate and momentum that it would apply next. Warns if
        the schedule overrides a momentum that the user chose.
        """
        previous = self.schedule
        values: dict[str, Any] = {"schedule": schedule}
        if schedule is None:
            values |= {key: self[key] for key in self.scheduled_keys}
        else:
            if isinstance(schedule, OneCycle):
                values |= schedule.group_keys
            elif "initial_lr" not in self:
                values["initial_lr"] = schedule.initial_lr
            if schedule.drives_momentum:
                if not self._rule.momentum_key:
                    raise ValueError(
                        f"schedule must not cycle the momentum, since this optimizer has none, got {schedule}"
                    )
                values["base_momentum"], values["max_momentum"] = schedule.momentum_bounds
                self._warn_of_overridden_momentum(previous, values["base_momentum"], values["max_momentum"])
        self.store_all(values)

    def _warn_of_overridden_momentum(self, previous: Schedule | None, base: float, maximum: float) -> None:
        # A plain dict of a scheduled group has these keys, and the schedule's momentum.
        was_driven = self.stored("base_momentum") == base and self.stored("max_momentum") == maximum
        if was_driven or (previous is not None and previous.drives_momentum):
            return
        momentum = self._rule.momentum_of(self.settings().values)
        if momentum not in (maximum, *self._rule.usual_momenta):
            warn(
                f"cycle_momentum=True overrides the optimizer's momentum {momentum} ({self._rule.momentum_key}) with "
                f"{base} to {maximum}; cycle_momentum=False keeps it"
            )

    def __getitem__(self, key: str) -> Any:
        stored = super().__getitem__(key)
        if key == "weight_decay" and self.weight_decay_schedule is not None:
            optimizer = self._owner()
            return stored if optimizer is None else self.weight_decay_schedule.lr(optimizer.read_schedule_step())
        if key == N_AVERAGED:
            optimizer = self._owner()
            count = None if optimizer is None or optimizer.averaging is None else optimizer.read_n_averaged(self)
            return stored if count is None else count
        if key not in ("lr", self._rule.momentum_key) or key not in self.scheduled_keys:
            return stored
        optimizer = self._owner()
        current = None if optimizer is None else optimizer.read_scheduled(self)
        if current is None:
            return stored
        return current[0] if key == "lr" else self._rule.with_momentum(stored, current[1])

    def __setitem__(self, key: str, value: Any) -> None:
        value = check_hyperparameter(key, value, new=False)
        if key in self and _is_same(value, self.stored(key)) and key not in (*self.scheduled_keys, N_AVERAGED):
            # Wrappers of optimizers write all keys back at every step.
            return
        optimizer = self._owner()
        if key == N_AVERAGED and optimizer is not None and optimizer.averaging is not None:
            optimizer.write_n_averaged(self, value)
            return
        if key == "schedule" and optimizer is not None:
            optimizer.change_schedule(self, value)
            return
        check_has_decay_schedule(self._rule, {key: value})
        if key == "weight_decay_schedule" and optimizer is not None:
            optimizer.check_schedule(value)
        if key in self.scheduled_keys:
            self._write_scheduled(key, value)
            return
        if key == "weight_decay" and self.weight_decay_schedule is not None:
            if float(value) != self[key]:
                raise RuntimeError(
                    f"param_group['weight_decay'] cannot be set: {self.weight_decay_schedule} drives it in this group. "
                    "Assign another param_group['weight_decay_schedule'], or None"
                )
            return
        if key == "params":
            value = WatchedList(value, partial(self.on_change, key))
        super().__setitem__(key, value)

    def _write_scheduled(self, key: str, value: Any) -> None:
        """Accepts a value that changes nothing; raises an error for any other."""
        is_lr = key == "lr"
        momentum_in = self._rule.momentum_in
        scheduler = calling_scheduler()
        optimizer = self._owner()
        if is_lr and scheduler is None and optimizer is not None and optimizer.accepts_lr(self, float(value)):
            return
        if not is_lr and float(momentum_in(value)) == momentum_in(self[key]):
            # The schedule does not drive the rest of the value: Adam's beta2.
            super().__setitem__(key, self._rule.with_momentum(value, momentum_in(self.stored(key))))
            return
        index = "" if is_lr or self._rule.momentum_index is None else f"[{self._rule.momentum_index}]"
        raise RuntimeError(
            f"param_group[{key!r}]{index} cannot be set{f' by {scheduler}' if scheduler else ''}: the schedule drives "
            f"{'lr' if is_lr else 'the momentum'} in this group, {self.schedule}. Give it another schedule with "
            "optimizer.set_schedule(), or remove it with optimizer.set_schedule(None)"
        )

    # With dict's own __iter__, dict(group), {**group} and f(**group) would copy stored, not current, values.
    def __iter__(self) -> Iterator[str]:
        return super().__iter__()

    # By their types, these are no dict's: Mapping's methods are less general, and return other views.
    get = Mapping.get  # type: ignore[assignment]
    __eq__ = Mapping.__eq__
    __hash__ = None  # type: ignore[assignment]

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        """Key and value pairs, values as ``group[key]`` gives them."""
        return ItemsView(self)

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        """Values as ``group[key]`` gives them."""
        return ValuesView(self)

    def __repr__(self) -> str:
        return repr(self.copy())


def _is_same(value: Any, other: Any) -> bool:
    """Whether writing ``value`` over ``other`` changes nothing; False also if only reading a tensor could tell."""
    if value is other:
        return not isinstance(value, (Tensor, list))
    return type(value) is type(other) and isinstance(value, (int, float)) and value == other


def _tell(owner: Callable[[], Owner | None], key: str) -> None:
    optimizer = owner()
    if optimizer is not None:
        optimizer.on_group_change(key)
