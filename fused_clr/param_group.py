"""Param groups whose scheduled keys are true now."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, ItemsView, Iterator, Mapping, ValuesView
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from .hyperparameters import DEFAULT_BETAS, check_hyperparameter
from .schedules import Cyclic
from .watched import WatchedDict


class ParamGroup(WatchedDict):
    """An entry of ``optimizer.param_groups``.

    With a schedule, ``group["lr"]`` (and ``group["betas"]``, if it cycles momentum) is a plain float read from where
    the schedule runs, on every access and through every way of reading a dict. Writing them is an error.

    Args:
        values: The group as torch has it.
        on_change: Called with the key after every write.
        read_live: Gives the present learning rate and beta1 of the group; None if it is not in an optimizer (yet).
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        on_change: Callable[[str], None],
        read_live: Callable[[ParamGroup], tuple[float, float] | None],
    ) -> None:
        super().__init__(values, on_change)
        self._read_live = read_live

    @property
    def schedule(self) -> Cyclic | None:
        """The group's schedule."""
        schedule: Cyclic | None = self.stored("schedule")
        return schedule

    @property
    def scheduled_keys(self) -> tuple[str, ...]:
        """The keys that the schedule drives."""
        if self.schedule is None:
            return ()
        return ("lr", "betas") if self.schedule.cycle_momentum else ("lr",)

    def stored(self, key: str) -> Any:
        """The value as last written, without asking the device; None if there is none."""
        return dict.get(self, key)

    def store(self, key: str, value: Any) -> None:
        """Writes without the checks that a user's write gets."""
        super().__setitem__(key, value)

    def set_schedule(self, schedule: Cyclic | None) -> None:
        """Replaces the schedule; leaves in the group what torch's CyclicLR does.

        Without a schedule the group keeps the learning rate and beta1 that the one it loses would apply next. Warns
        when a beta1 that the user chose is overridden.
        """
        previous = self.schedule
        if schedule is None:
            kept = {key: self[key] for key in self.scheduled_keys}
            self.store("schedule", None)
            for key, value in kept.items():
                self.store(key, value)
            return
        self.store("schedule", schedule)
        if "initial_lr" not in self:
            self.store("initial_lr", schedule.base_lr)
        if schedule.cycle_momentum:
            self.store("max_momentum", schedule.max_momentum)
            self.store("base_momentum", schedule.base_momentum)
            beta1 = float(self.stored("betas")[0])
            overridden_before = previous is not None and previous.cycle_momentum
            if not overridden_before and beta1 not in (schedule.max_momentum, DEFAULT_BETAS[0]):
                warnings.warn(
                    f"cycle_momentum=True overrides the optimizer's beta1={beta1} by {schedule.base_momentum} to "
                    f"{schedule.max_momentum}; cycle_momentum=False would keep it",
                    stacklevel=4,
                )

    def __getitem__(self, key: str) -> Any:
        stored = super().__getitem__(key)
        if key not in ("lr", "betas") or key not in self.scheduled_keys:
            return stored
        live = self._read_live(self)
        if live is None:
            return stored
        return live[0] if key == "lr" else (live[1], stored[1])

    def __setitem__(self, key: str, value: Any) -> None:
        value = check_hyperparameter(key, value)
        if key in self and _is_same(value, self.stored(key)) and key not in self.scheduled_keys:
            # Wrappers of optimizers write all keys back at every step.
            return
        if key == "schedule":
            self.set_schedule(value)
            return
        if key == "lr" and key in self.scheduled_keys and float(value) == self["lr"] and not _by_scheduler():
            return
        if key in self.scheduled_keys and (key == "lr" or float(value[0]) != self["betas"][0]):
            what, setter = ("['lr']", "lr") if key == "lr" else ("['betas'][0]", "beta1")
            raise RuntimeError(
                f"param_group{what} cannot be set{_by_scheduler()}: the schedule drives {setter} in this group, "
                f"{self.schedule}. Give it another with optimizer.set_schedule(), or take it away with "
                "optimizer.set_schedule(None)"
            )
        super().__setitem__(key, value)

    # With dict's own __iter__, dict(group), {**group} and f(**group) would copy what is stored without asking.
    def __iter__(self) -> Iterator[str]:
        return super().__iter__()

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
    """Whether writing ``value`` over ``other`` changes nothing; False also where that takes asking a tensor."""
    if value is other:
        return not isinstance(value, (Tensor, list))
    return type(value) is type(other) and isinstance(value, (int, float)) and value == other


def _by_scheduler() -> str:
    """`` by ClassName`` if a torch scheduler is what is writing, or nothing."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, LRScheduler):
            return f" by {type(owner).__name__}"
        frame = frame.f_back
    return ""
