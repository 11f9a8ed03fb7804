"""Dictionaries and lists that report writes, so that a step need not look at each of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from copy import deepcopy
from functools import partial, wraps
from typing import Any


class Writes:
    """The other writing methods of a dict, on ``__setitem__`` and ``__delitem__``, which dict's own bypass."""

    pop = MutableMapping.pop
    popitem = MutableMapping.popitem
    clear = MutableMapping.clear
    update: Any = MutableMapping.update
    setdefault = MutableMapping.setdefault

    def __ior__(self, other: Any) -> Any:
        self.update(other)
        return self


class WatchedDict(Writes, dict[Any, Any]):
    """A dict that reports every write. Copies and pickles are plain dicts.

    Args:
        values: The initial items; they are not reported.
        on_change: Called with the key after every write.
    """

    def __init__(self, values: Mapping[Any, Any], on_change: Callable[[Any], None]) -> None:
        super().__init__(values)
        self.on_change = on_change

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        self.on_change(key)

    def __delitem__(self, key: Any) -> None:
        super().__delitem__(key)
        self.on_change(key)

    def copy(self) -> dict[Any, Any]:
        """A plain dict of the current items."""
        return dict(self.items())

    def __copy__(self) -> dict[Any, Any]:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[Any, Any]:
        return deepcopy(self.copy(), memo)

    def __reduce__(self) -> Any:
        return dict, (self.copy(),)

    def __or__(self, other: Any) -> Any:
        return self.copy() | dict(other.items())

    def __ror__(self, other: Any) -> Any:
        return other | self.copy()


class WatchedList(list[Any]):
    """A list that reports every edit. Copies and pickles are plain lists.

    Args:
        values: The initial entries; they are not reported.
        on_change: Called after every edit.
    """

    def __init__(self, values: Iterable[Any], on_change: Callable[[], None]) -> None:
        super().__init__(values)
        self.on_change = on_change

    def __reduce__(self) -> Any:
        return list, (list(self),)


def _reported(name: str) -> Any:
    method = getattr(list, name)

    @wraps(method)
    def edit(self: WatchedList, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        self.on_change()
        return result

    return edit


for _name in ("append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort"):
    setattr(WatchedList, _name, _reported(_name))
for _name in ("__setitem__", "__delitem__", "__iadd__", "__imul__"):
    setattr(WatchedList, _name, _reported(_name))


class OptimizerState(Writes, defaultdict[Any, Any]):
    """``optimizer.state``: parameter -> watched dict of its state tensors. A plain dict put into it becomes watched.

    Args:
        owner: Returns the optimizer, whose ``on_state_change`` is called after every write to this dict or one of its
            values; or None if it was deleted: the state must not keep its optimizer alive.
    """

    def __init__(self, owner: Callable[[], Any]) -> None:
        super().__init__(dict)
        self._tell = partial(_tell, owner)

    def __missing__(self, key: Any) -> WatchedDict:
        value = WatchedDict({}, self._tell)
        dict.__setitem__(self, key, value)
        return value

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, WatchedDict(value, self._tell) if isinstance(value, dict) else value)
        self._tell(key)

    def __delitem__(self, key: Any) -> None:
        super().__delitem__(key)
        self._tell(key)

    def copy(self) -> Any:
        """A defaultdict of the same entries, which does not report writes."""
        return defaultdict(dict, self)

    __copy__ = copy

    def __or__(self, other: Any) -> Any:
        return self.copy() | other

    def __ror__(self, other: Any) -> Any:
        return defaultdict(dict, other) | self.copy()

    def __reduce__(self) -> Any:
        return dict, (dict(self.items()),)


def _tell(owner: Callable[[], Any], key: Any) -> None:
    del key
    optimizer = owner()
    if optimizer is not None:
        optimizer.on_state_change()
