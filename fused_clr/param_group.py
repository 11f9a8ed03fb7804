"""Param groups whose scheduled keys are true now."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator, Mapping, ValuesView
from typing import Any

from .watched import WatchedDict


class ParamGroup(WatchedDict):
    """An entry of ``optimizer.param_groups``.

    With a schedule, ``group["lr"]`` (and ``group["betas"]``, if it cycles momentum) is a plain float read from where
    the schedule runs, on every access and through every way of reading a dict. Writing them is an error.

    Args:
        values: The group as torch has it.
        on_change: Called after every write.
        read: Gives the present value of a key, given the key and the stored value.
        check: Called before a write with the key and the value; raises to refuse, returns what is stored.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        on_change: Callable[[], None],
        read: Callable[[ParamGroup, str, Any], Any],
        check: Callable[[ParamGroup, str, Any], Any],
    ) -> None:
        super().__init__(values, on_change)
        self._read = read
        self._check = check

    @property
    def schedule(self) -> Any:
        """The group's schedule, or None."""
        return self.stored("schedule")

    def stored(self, key: str) -> Any:
        """The value as last written, without asking the device; None if there is none."""
        return dict.get(self, key)

    def store(self, key: str, value: Any) -> None:
        """Writes without the checks a user's write gets."""
        WatchedDict.__setitem__(self, key, value)

    def __getitem__(self, key: str) -> Any:
        return self._read(self, key, super().__getitem__(key))

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, self._check(self, key, value))

    # With dict's own __iter__, dict(group), {**group} and f(**group) would copy what is stored without asking.
    def __iter__(self) -> Iterator[str]:
        return super().__iter__()

    get = Mapping.get  # type: ignore[assignment]
    __eq__ = Mapping.__eq__
    __hash__ = None  # type: ignore[assignment]

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        return ItemsView(self)

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        return ValuesView(self)

    def __repr__(self) -> str:
        return repr(self.copy())
