"""Finds races by happens-before, and not by luck: vector clocks of threads against a shadow of every word touched.

Barriers and acquiring and releasing atomics (with their scopes) order accesses; nothing else between threads does. A
write of the value that is there already is no race: several threads may store the same.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .dtypes import FULL, LANES, WARP
from .faults import DataRace, MemoryFault

if TYPE_CHECKING:
    from .machine import Warp
    from .memory import Segment, Synchronization
    from .operands import Operands

NOBODY, MANY = -1, -2
# How strong the last write was: plain, an atomic of a program's scope, or of a wider one.
PLAIN, NARROW, WIDE = range(3)


class Shadow:
    """Who last wrote and read each word of a segment in this launch: thread, its epoch, the instruction's index."""

    def __init__(self, words: int) -> None:
        self.writer, self.reader = (np.full(words, NOBODY, np.int32) for _ in range(2))
        self.write_epoch, self.write_pc, self.read_epoch, self.read_pc = (np.zeros(words, np.int32) for _ in range(4))
        self.strength = np.zeros(words, np.int8)
        # Whether the last write changed the word.
        self.changed = np.zeros(words, bool)
        # Words with MANY readers: warp -> epochs (0: none) and instructions of its lanes.
        self.readers: dict[int, dict[Warp, tuple[Any, Any]]] = {}


class Race(NamedTuple):
    """What tells races apart: the kind, both instructions, the earlier first, and how near the threads are."""

    kind: str
    first: str
    second: str
    threads: str


class Races:
    """The detector of one launch.

    Args:
        num_threads: Of the grid.
        unit: Bytes of a word.
    """

    def __init__(self, num_threads: int, unit: int) -> None:
        self._epoch = np.ones(num_threads, np.int32)
        self._unit = unit
        self._found: collections.Counter[Race] = collections.Counter()
        self._examples: dict[Race, str] = {}
        # What releases at an address made known: within a program, and to all (None).
        self._released: dict[tuple[int, Any], Any] = {}

    def check(self) -> None:
        """Raises an error that names the races found so far, if there are any.

        Raises:
            DataRace: There are.
        """
        if self._found:
            named = [f"{'; '.join(race)}; {n} times, as at {self._examples[race]}" for race, n in self._found.items()]
            raise DataRace("\n".join(named[:5] + [f"and {len(named) - 5} others"] * (len(named) > 5)))

    # -- order --------------------------------------------------------------------------------------------------------
    def join(self, warps: Sequence[Warp], mask: Any = FULL) -> None:
        """A barrier of these warps, or of some lanes of one."""
        clock = np.zeros(len(self._epoch), np.int32)
        for w in warps:
            own = [w.lane_clocks[lane] for lane in LANES[mask].tolist() if lane in w.lane_clocks]
            for known in (w.clock, *own):
                np.maximum(clock, known, out=clock)
        threads = np.concatenate([w.threads[mask] for w in warps])
        clock[threads] = self._epoch[threads]
        self._epoch[threads] += 1
        for w in warps:
            if mask.all():
                w.clock, w.lane_clocks = clock, {}
            else:
                w.lane_clocks |= dict.fromkeys(LANES[mask].tolist(), clock)

    def _clock(self, w: Warp, lane: int) -> Any:
        """The latest epoch of every thread that happened before now for a lane."""
        return w.lane_clocks.get(lane, w.clock)

    def _known(self, w: Warp, lanes: Any, others: Any) -> Any:
        """The latest epoch of each thread of ``others`` that happened before now, for each of ``lanes``."""
        out = w.clock[others]
        for lane, clock in w.lane_clocks.items():
            own = lanes == lane
            out[own] = clock[others[own]]
        return out

    def _synchronize(self, w: Warp, lane: int, address: int, sync: Synchronization) -> None:
        """What an atomic at an address learns and makes known."""
        keys = [(address, w.program), *([] if sync.scope == "cta" else [(address, None)])]
        if sync.acquires:
            for key in keys:
                if key in self._released:
                    w.lane_clocks[lane] = np.maximum(self._clock(w, lane), self._released[key])
        if sync.releases:
            thread = w.threads[lane]
            clock = self._clock(w, lane).copy()
            clock[thread] = self._epoch[thread]
            for key in keys:
                self._released[key] = np.maximum(self._released.get(key, clock), clock)
            self._epoch[thread] += 1

    # -- accesses -----------------------------------------------------------------------------------------------------
    def _words(self, segment: Segment, lanes: Any, first: Any, nbytes: int) -> tuple[Shadow, Any, Any]:
        """The shadow, the words of all accesses, and the lane of each."""
        if segment.shadow is None:
            segment.shadow = Shadow(len(segment.views[1]) // self._unit + 1)
        count = nbytes // self._unit
        words = ((first // self._unit)[:, None] + np.arange(count)).ravel()
        return segment.shadow, words, np.repeat(lanes, count)

    def read(self, w: Warp, at: Operands, segment: Segment, lanes: Any, first: Any, nbytes: int) -> None:
        """Lanes load ``nbytes`` each, from their ``first`` byte after the segment's origin on."""
        shadow, words, lane = self._words(segment, lanes, first, nbytes)
        threads, writer = w.threads[lane], shadow.writer[words]
        if segment.name == "shared" and (writer == NOBODY).any():
            raise MemoryFault(f"uninitialised: nobody has written the shared memory of {at.instruction}, {w}")
        foreign = (writer != threads) & (writer != NOBODY)
        if foreign.any():
            foreign &= (shadow.write_epoch[words] > self._known(w, lane, writer)) & shadow.changed[words]
            self._report("write, then read", w, at, segment, foreign, shadow.write_pc[words], writer, lane, words)
        reader = shadow.reader[words]
        ascending = len(words) == 1 or bool((words[1:] > words[:-1]).all())
        if ascending:
            free = (reader == NOBODY) | (reader == threads)
            if not free.all():
                free |= (reader >= 0) & (shadow.read_epoch[words] <= self._known(w, lane, np.maximum(reader, 0)))
            if free.all():
                shadow.reader[words], shadow.read_pc[words] = threads, at.pc
                shadow.read_epoch[words] = self._epoch[threads]
                return
        for word in dict.fromkeys(words.tolist()):
            readers = shadow.readers.setdefault(word, {})
            if shadow.reader[word] >= 0:
                epochs, places = _entry(readers, w.grid.warp_of(int(shadow.reader[word])))
                other = shadow.reader[word] % WARP
                epochs[other], places[other] = shadow.read_epoch[word], shadow.read_pc[word]
            shadow.reader[word] = MANY
            own = lane[words == word]
            epochs, places = _entry(readers, w)
            epochs[own], places[own] = self._epoch[w.threads[own]], at.pc

    def write(
        self,
        w: Warp,
        at: Operands,
        segment: Segment,
        lanes: Any,
        first: Any,
        old: Any,
        new: Any,
        sync: Synchronization | None = None,
    ) -> None:
        """Lanes store their row of ``new`` over that of ``old``; by an atomic if ``sync`` is given."""
        shadow, words, lane = self._words(segment, lanes, first, new.itemsize * new.shape[1])
        threads, strength = w.threads[lane], PLAIN if sync is None else NARROW if sync.scope == "cta" else WIDE
        changed = np.repeat((old != new).ravel(), len(words) // new.size)
        if len(words) > 1 and not (words[1:] > words[:-1]).all():
            self._write_twice(w, at, segment, words, lane, new)
        writer, reader = shadow.writer[words], shadow.reader[words]
        late = (writer >= 0) & (writer != threads)
        racing_value = np.zeros(len(words), bool)
        if late.any():
            late &= shadow.write_epoch[words] > self._known(w, lane, np.maximum(writer, 0))
            # The same value once more: a reader still races with the write before.
            racing_value = late & shadow.changed[words]
            both = (shadow.strength[words] > PLAIN) & (strength > PLAIN)
            wide = (shadow.strength[words] == WIDE) & (strength == WIDE)
            late &= changed & ~(both & (wide | (writer // w.grid.threads == w.program.index)))
            self._report("write, then write", w, at, segment, late, shadow.write_pc[words], writer, lane, words)
        late = (reader >= 0) & (reader != threads) & changed
        if late.any():
            late &= shadow.read_epoch[words] > self._known(w, lane, np.maximum(reader, 0))
            self._report("read, then write", w, at, segment, late, shadow.read_pc[words], reader, lane, words)
        for i in np.flatnonzero(reader == MANY):
            clock = self._clock(w, int(lane[i]))
            for other, (epochs, places) in shadow.readers.pop(int(words[i]), {}).items():
                late = (epochs > clock[other.threads]) & (other.threads != threads[i]) & changed[i]
                own = np.full(WARP, lane[i]), np.full(WARP, words[i])
                self._report("read, then write", w, at, segment, late, places, other.threads, *own)
        shadow.writer[words], shadow.write_epoch[words], shadow.write_pc[words] = threads, self._epoch[threads], at.pc
        shadow.strength[words], shadow.reader[words] = strength, NOBODY
        shadow.changed[words] = changed | racing_value
        if sync is not None:
            self._synchronize(w, int(lanes[0]), segment.origin + int(first[0]), sync)

    def _write_twice(self, w: Warp, at: Operands, segment: Segment, words: Any, lane: Any, new: Any) -> None:
        """Reports lanes of one instruction that store different values into one word."""
        octets = np.ascontiguousarray(new).view(np.uint8).reshape(len(words), -1)
        seen: dict[int, int] = {}
        for i, word in enumerate(words.tolist()):
            before = seen.setdefault(word, i)
            if lane[before] != lane[i] and not np.array_equal(octets[before], octets[i]):
                both = np.array([at.pc]), w.threads[lane[[before]]], lane[[i]], words[[i]]
                self._report("write and write", w, at, segment, np.ones(1, bool), *both)

    def _report(
        self,
        kind: str,
        w: Warp,
        at: Operands,
        segment: Segment,
        racing: Any,
        first_pcs: Any,
        others: Any,
        lanes: Any,
        words: Any,
    ) -> None:
        """Notes races: one for each true entry of ``racing``, with the entries of the last four."""
        per_program = w.grid.threads
        for i in np.flatnonzero(racing).tolist():
            other, thread = int(others[i]), int(w.threads[lanes[i]])
            near = "other program"
            if other // per_program == thread // per_program:
                near = "same warp" if other // WARP == thread // WARP else "same program"
            race = Race(kind, str(at.function.instructions[int(first_pcs[i])]), str(at.instruction), near)
            self._found[race] += 1
            if race not in self._examples:
                offset = segment.origin + int(words[i]) * self._unit - segment.base
                names = [f"program {t // per_program} thread {t % per_program}" for t in (other, thread)]
                self._examples[race] = f"{segment.name}[{offset:+d}], {names[0]}, then {names[1]}"


def _entry(readers: dict[Warp, tuple[Any, Any]], w: Warp) -> tuple[Any, Any]:
    return readers.setdefault(w, (np.zeros(WARP, np.int32), np.zeros(WARP, np.int32)))
