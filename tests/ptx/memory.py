"""The memory that a launch may touch, and checks of every access: bounds, alignment, races."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .dtypes import STORAGE, WARP
from .faults import MemoryFault

if TYPE_CHECKING:
    from .machine import Warp
    from .operands import Operands
    from .races import Shadow


class Synchronization(NamedTuple):
    """Semantics and scope of an atomic: what it orders, and for whom."""

    semantics: str
    scope: str

    @property
    def acquires(self) -> bool:
        """What was released at its address has happened before what follows it."""
        return self.semantics in ("acquire", "acq_rel")

    @property
    def releases(self) -> bool:
        """What came before it has happened before what follows an acquire at its address."""
        return self.semantics in ("release", "acq_rel")


class Segment:
    """A range of bytes that may be accessed.

    Attributes:
        name: In messages.
        base: Its first address.
        size: Bytes.
        origin: A multiple of 16 at or before the base, from which words are counted.
        views: Bytes of a word -> the memory from the origin on, as words.
        shadow: Who accessed it in this launch.

    Args:
        name: In messages.
        base: Its first address.
        size: Bytes.
        octets: Its memory, if that is not at the address ``base``.
    """

    def __init__(self, name: str, base: int, size: int, octets: Any = None) -> None:
        self.name, self.base, self.size = name, base, size
        self.origin = base & ~15
        if octets is None:
            total = -(-(base - self.origin + size) // 16) * 16
            octets = np.ctypeslib.as_array((ctypes.c_uint8 * total).from_address(self.origin))
        self.views = {itemsize: octets.view(dtype) for itemsize, dtype in STORAGE.items()}
        self.shadow: Shadow | None = None


class Memory:
    """An address space.

    Args:
        segments: What may be accessed. Overlapping ones become one.
        space: In messages.
    """

    def __init__(self, segments: Iterable[Segment], space: str) -> None:
        self.space = space
        self.segments: list[Segment] = []
        for segment in sorted(segments, key=lambda s: (s.base, -s.size)):
            last = self.segments[-1] if self.segments else None
            if last is not None and segment.base < last.base + last.size:
                end = max(last.base + last.size, segment.base + segment.size)
                if end > last.base + last.size:
                    self.segments[-1] = Segment(f"{last.name}+{segment.name}", last.base, end - last.base)
            elif segment.size:
                self.segments.append(segment)
        self._bases = np.array([s.base for s in self.segments], np.uint64)
        self._ends = np.array([s.base + s.size for s in self.segments], np.uint64)

    def load(self, w: Warp, at: Operands, lanes: Any, addresses: Any, dtype: np.dtype[Any], count: int) -> list[Any]:
        """Loads ``count`` adjacent words for each of the lanes; returns a vector for each word."""
        out = [np.empty(len(lanes), dtype) for _ in range(count)]
        for segment, chosen, first in self._resolve(w, at, lanes, addresses, dtype.itemsize, count):
            words = segment.views[dtype.itemsize]
            w.grid.races.read(w, at, segment, lanes[chosen], first * dtype.itemsize, dtype.itemsize * count)
            for k in range(count):
                out[k][chosen] = words[first + k].view(dtype)
        return out

    def store(self, w: Warp, at: Operands, lanes: Any, addresses: Any, values: Sequence[Any]) -> None:
        """Stores adjacent words for each of the lanes, from a vector for each word."""
        itemsize = values[0].dtype.itemsize
        for segment, chosen, first in self._resolve(w, at, lanes, addresses, itemsize, len(values)):
            words = segment.views[itemsize]
            index = first[:, None] + np.arange(len(values))
            new = np.stack([value[chosen] for value in values], axis=1).view(STORAGE[itemsize])
            w.grid.races.write(w, at, segment, lanes[chosen], first * itemsize, words[index], new)
            words[index] = new

    def atomic(
        self,
        w: Warp,
        at: Operands,
        lane: int,
        address: Any,
        dtype: np.dtype[Any],
        function: Callable[..., Any],
        values: Sequence[Any],
        sync: Synchronization,
    ) -> Any:
        """Replaces a word by a function of it and of values, for one lane; returns the old one."""
        lanes = np.array([lane])
        ((segment, _, first),) = self._resolve(w, at, lanes, np.array([address]), dtype.itemsize, 1)
        words = segment.views[dtype.itemsize]
        old = words[first].view(dtype)[0]
        new = np.array([[function(old, *values)]], dtype).view(STORAGE[dtype.itemsize])
        w.grid.races.write(w, at, segment, lanes, first * dtype.itemsize, words[first[:, None]], new, sync)
        words[first] = new[0]
        return old

    def _resolve(
        self, w: Warp, at: Operands, lanes: Any, addresses: Any, itemsize: int, count: int
    ) -> list[tuple[Segment, Any, Any]]:
        """Segments, which of the addresses lie in them, and the index of their first word there."""
        nbytes = itemsize * count
        misaligned = addresses % np.uint64(nbytes) != 0
        if misaligned.any():
            bad = int(np.argmax(misaligned))
            raise MemoryFault(
                f"misaligned: {self._place(w, at, lanes[bad], addresses[bad])} is no multiple of {nbytes}"
            )
        which = np.searchsorted(self._bases, addresses, side="right") - 1
        inside = which >= 0
        inside[inside] = addresses[inside] + np.uint64(nbytes) <= self._ends[which[inside]]
        if not inside.all():
            bad = int(np.argmin(inside))
            raise MemoryFault(f"out of bounds: {nbytes} bytes at {self._place(w, at, lanes[bad], addresses[bad])}")
        found = []
        for index in which[:1] if (which == which[0]).all() else np.unique(which):
            segment, chosen = self.segments[index], np.flatnonzero(which == index)
            first = ((addresses[chosen] - np.uint64(segment.origin)) // np.uint64(itemsize)).astype(np.int64)
            found.append((segment, chosen, first))
        return found

    def _place(self, w: Warp, at: Operands, lane: int, address: Any) -> str:
        address = int(address)
        near = "no memory"
        if self.segments:
            nearest = min(self.segments, key=lambda s: max(s.base - address, address - s.base - s.size, 0))
            near = f"{nearest.name}[{address - nearest.base:+d} of {nearest.size} bytes]"
        return f"{self.space} address {address:#x} ({near}), {at.instruction}, {w} lane {lane},"


class LocalMemory:
    """Local memory of one warp: a stack of bytes for each lane, which no other thread can see.

    Attributes:
        base: Where the variables of the running function begin.
        end: Where they end.
    """

    def __init__(self, size: int) -> None:
        self._octets = np.zeros((WARP, 0), np.uint8)
        self.base = self.end = 0
        self.enter(size)

    def enter(self, size: int) -> None:
        """Makes room for the variables of a function."""
        self.base, self.end = self.end, self.end + -(-size // 16) * 16
        missing = max(self.end - self._octets.shape[1], 0)
        self._octets = np.concatenate([self._octets, np.zeros((WARP, missing), np.uint8)], axis=1)

    def load(self, w: Warp, at: Operands, lanes: Any, addresses: Any, dtype: np.dtype[Any], count: int) -> list[Any]:
        """See `Memory.load`."""
        octets = self._octets[self._resolve(w, at, lanes, addresses, dtype.itemsize * count)]
        return [column.copy() for column in np.ascontiguousarray(octets).view(dtype).T]

    def store(self, w: Warp, at: Operands, lanes: Any, addresses: Any, values: Sequence[Any]) -> None:
        """See `Memory.store`."""
        new = np.ascontiguousarray(np.stack(values, axis=1)).view(np.uint8)
        self._octets[self._resolve(w, at, lanes, addresses, new.shape[1])] = new

    def _resolve(self, w: Warp, at: Operands, lanes: Any, addresses: Any, nbytes: int) -> Any:
        if (addresses + np.uint64(nbytes) > self.end).any() or (addresses % np.uint64(nbytes)).any():
            raise MemoryFault(f"out of bounds or misaligned: local memory, {at.instruction}, {w} lane {lanes[0]}")
        return lanes[:, None], addresses.astype(np.int64)[:, None] + np.arange(nbytes)
