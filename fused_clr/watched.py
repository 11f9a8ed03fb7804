"""Dictionaries that tell when they are written, so that nobody has to look at every one of them at every step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, MutableMapping
from copy import deepcopy
from typing import Any


class WatchedDict(dict[Any, Any]):
    """A dict that tells of every write. Copies and pickles are plain dicts.

    Args:
        values: The initial items; setting them is no write.
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

    # The mixins go through the two methods above, where dict's own would write behind their back.
    pop = MutableMapping.pop
    popitem = MutableMapping.popitem
    clear = MutableMapping.clear
    update = MutableMapping.update
    setdefault = MutableMapping.setdefault

    def __ior__(self, other: Any) -> Any:
        self.update(other)
        return self

    def copy(self) -> dict[Any, Any]:
        """A plain dict of the present items."""
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


class OptimizerState(defaultdict[Any, Any]):
    """``optimizer.state``: parameter -> watched dict of its state tensors. A plain dict put into it becomes watched.

    Args:
        on_change: Called with a key after every write to this dict or one of its values.
    """

    def __init__(self, on_change: Callable[[Any], None]) -> None:
        super().__init__(dict)
        self.on_change = on_change

    def __missing__(self, key: Any) -> WatchedDict:
        value = WatchedDict({}, self.on_change)
        dict.__setitem__(self, key, value)
        return value

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, WatchedDict(value, self.on_change) if isinstance(value, dict) else value)
        self.on_change(key)

    def __delitem__(self, key: Any) -> None:
        super().__delitem__(key)
        self.on_change(key)

    pop = MutableMapping.pop
    popitem = MutableMapping.popitem
    clear = MutableMapping.clear
    update = MutableMapping.update
    setdefault = MutableMapping.setdefault

    def __reduce__(self) -> Any:
        return dict, (dict(self.items()),)
