"""Executes the PTX of a compiled kernel on host memory, thread by thread, and checks what it does.

A register of the 32 lanes of a warp is a numpy vector. Every lane has its own program counter: lanes of a warp that
agree are a fragment, the fragment with the smallest counter goes first, and fragments that meet are joined. Warps of
all programs take turns in an order drawn from a seed.
"""

from __future__ import annotations

import collections
import random
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .access import LOCAL_WINDOW
from .decode import BARRIER, BRANCH, CONVERGENT, RETURN, SIMPLE, TABLE, Kernel
from .dtypes import FULL, LANES, NUMPY, POISON, WARP
from .faults import BarrierDivergence, Deadlock, PtxError, UnsupportedInstruction
from .memory import LocalMemory, Memory, Segment
from .races import Races
from .text import Function

# How many instructions a warp may run before another does.
BURSTS = (1, 2, 3, 8, 20, 60)


def launch(
    kernel: Kernel,
    grid: int,
    arguments: Sequence[int],
    memory: Iterable[tuple[str, int, int]],
    *,
    shared: int = 0,
    seed: int = 0,
    resident: int | None = None,
    limit: int = 20_000_000,
) -> None:
    """Runs a grid of a kernel.

    Args:
        kernel: The kernel.
        grid: Programs.
        arguments: Addresses, and the bits of scalars.
        memory: Name, address and bytes of what may be accessed.
        shared: Bytes of dynamic shared memory.
        seed: Of the order in which warps take turns.
        resident: Programs at a time; all if None.
        limit: Instructions of a program after which the launch is said to hang.

    Raises:
        PtxError: The kernel did something that it must not; the subclass and the message tell what.
    """
    module = kernel.module
    entry = module.functions[module.entry]
    if len(arguments) != len(entry.params):
        raise PtxError(f"{module.entry} takes {len(entry.params)} parameters, got {len(arguments)}")
    params = {}
    for (name, declared), value in zip(entry.params, arguments, strict=True):
        size = NUMPY[re.findall(r"\.([busf]\d+)", declared)[0]].itemsize
        octets = (int(value) % (1 << 8 * size)).to_bytes(size, "little")
        params[name] = np.tile(np.frombuffer(octets, np.uint8), (WARP, 1))
    segments = [Segment(name, address, size) for name, address, size in memory]
    segments += [Segment(name, array.ctypes.data, array.nbytes) for name, array in module.constants.items()]
    machine = Grid(kernel, grid, params, Memory(segments, "global"), shared + module.static_shared, seed)
    with np.errstate(all="ignore"):
        machine.run(resident, limit)
    machine.races.check()


class Fragment:
    """Lanes of a warp with the same program counter; mask None: all 32."""

    __slots__ = ("mask", "parked", "pc")

    def __init__(self, pc: int, mask: Any) -> None:
        # Parked: it waits for lanes that are elsewhere.
        self.pc, self.parked = pc, False
        self.mask = None if mask is None or mask.all() else mask

    @property
    def full_mask(self) -> Any:
        """The mask as an array."""
        return FULL if self.mask is None else self.mask


class Warp:
    """32 threads of a program: registers, fragments, and what they know of other threads.

    Attributes:
        grid: The launch.
        program: The program.
        registers: Of the running function, by index.
        waits: At a barrier.
        params: Parameters and results of the running function: name -> uint8[32, bytes].
        local: Local memory.
        carry: The carry bit.
        tid: uint32[32]; likewise ntid, ctaid, nctaid.
        threads: Indices of its threads in the grid.
        clock: int32[threads of the grid]: the latest epoch of every thread that happened before now.
        lane_clocks: Likewise for lanes that know more.
    """

    def __init__(self, program: Program, index: int) -> None:
        self.program, self.index, self.grid = program, index, program.grid
        grid = program.grid
        self.waits = False
        self.carry = np.zeros(WARP, np.int64)
        self.params = dict(grid.params)
        self.tid: Any = (LANES + WARP * index).astype(np.uint32)
        self.ntid: Any = np.full(WARP, grid.threads, np.uint32)
        self.ctaid: Any = np.full(WARP, program.index, np.uint32)
        self.nctaid: Any = np.full(WARP, grid.size, np.uint32)
        self.threads = LANES + program.index * grid.threads + WARP * index
        self.clock = grid.no_clock
        self.lane_clocks: dict[int, Any] = {}
        self.local = LocalMemory(0)
        self._depth = 0
        self._enter(grid.kernel.module.functions[grid.kernel.module.entry], None)

    def __str__(self) -> str:
        return f"program {self.program.index} warp {self.index}"

    @property
    def ended(self) -> bool:
        """Whether no thread has anything left to do."""
        return not self._fragments

    def where(self) -> str:
        """The instructions that its lanes are at."""
        return " and ".join(str(self._function.instructions[f.pc - self.waits]) for f in self._fragments)

    def memory(self, space: str, addresses: Any) -> tuple[Memory | LocalMemory, Any]:
        """The memory of a state space, and addresses in it."""
        if space == "generic":
            in_window = addresses >= np.uint64(LOCAL_WINDOW)
            if in_window.all():
                return self.local, addresses - np.uint64(LOCAL_WINDOW)
            space = "global"
        if space == "local":
            return self.local, addresses
        return self.grid.memory if space == "global" else self.program.shared, addresses

    def run(self, budget: int) -> None:
        """Executes up to ``budget`` instructions, until a barrier or the end."""
        while budget > 0 and self._fragments and not self.waits:
            budget = self._run_fragment(self._next_fragment(), budget)

    def _enter(self, function: Function, mask: Any) -> None:
        self._function, self._code = function, self.grid.kernel.code[function.name]
        self.registers: list[Any] = [POISON[storage] for _, storage in function.registers.values()]
        self._fragments = [Fragment(0, mask)]
        self.local.enter(function.local_size)

    def call(self, callee: Function, mask: Any, params: dict[str, Any]) -> list[Any]:
        """Runs a function for some lanes at once; returns what it stored as results."""
        saved = self._function, self._code, self.registers, self._fragments, self.params
        frame = self.local.base, self.local.end
        self.params, self._depth = dict(params), self._depth + 1
        self._enter(callee, mask)
        while self._fragments:
            self.run(1000)
        results = [value for name, value in self.params.items() if name not in params]
        self._function, self._code, self.registers, self._fragments, self.params = saved
        self.local.base, self.local.end = frame
        self._depth -= 1
        return results

    def _next_fragment(self) -> Fragment:
        """The fragment with the smallest counter that can go on, after joining those that met."""
        if len(self._fragments) > 1:
            by_pc: dict[int, Fragment] = {}
            for f in self._fragments:
                by_pc[f.pc] = Fragment(f.pc, by_pc[f.pc].full_mask | f.full_mask) if f.pc in by_pc else f
            self._fragments = list(by_pc.values())
        if len(self._fragments) == 1:
            self._fragments[0].parked = False
            return self._fragments[0]
        free = [f for f in self._fragments if not f.parked]
        if not free:
            raise BarrierDivergence(f"lanes of a warp wait at different places: {self.where()}, {self}")
        return min(free, key=lambda f: f.pc)

    def _run_fragment(self, fragment: Fragment, budget: int) -> int:
        """Runs a fragment until it ends, waits or must take turns with others; returns what is left of the budget."""
        code, mask, alone = self._code, fragment.mask, len(self._fragments) == 1
        while budget > 0:
            kind, operation = code[fragment.pc]
            if not alone and kind in (CONVERGENT, BARRIER):
                # Lanes elsewhere must come first; see `_next_fragment`.
                fragment.parked = True
                return budget
            budget -= 1
            if kind in (SIMPLE, CONVERGENT):
                operation(self, mask)
                fragment.pc += 1
            else:
                self._control(fragment, kind, operation)
                if self.waits or self._fragments != [fragment]:
                    return budget
            if not alone:
                return budget
        return budget

    def _control(self, fragment: Fragment, kind: int, operation: Any) -> None:
        pc, active = fragment.pc, fragment.full_mask
        if kind == BRANCH:
            guard, negated, target = operation
            taken = FULL if guard is None else ~self.registers[guard] if negated else self.registers[guard]
            self._split(fragment, [(target, active & taken), (pc + 1, active & ~taken)])
        elif kind == TABLE:
            index, targets = operation
            chosen = index(self)
            if (chosen[active] >= len(targets)).any():
                raise PtxError(f"an index is beyond its table: {self._function.instructions[pc]}, {self}")
            places = np.array(targets)[np.where(active, chosen, 0)]
            self._split(fragment, [(int(place), active & (places == place)) for place in np.unique(places[active])])
        elif kind == RETURN:
            self._fragments.remove(fragment)
            for other in self._fragments:
                other.parked = False
        elif kind == BARRIER:
            if self._depth:
                raise UnsupportedInstruction("a barrier within a function that is called")
            fragment.pc = pc + 1
            self.waits = True
            self.program.arrive(self, int(operation(self)[0]))

    def _split(self, fragment: Fragment, targets: list[tuple[int, Any]]) -> None:
        """Sends the lanes of a fragment to targets, each with its mask."""
        targets = [(target, mask) for target, mask in targets if mask.any()]
        if len(targets) == 1:
            fragment.pc = targets[0][0]
        else:
            self._fragments.remove(fragment)
            self._fragments += [Fragment(target, mask) for target, mask in targets]


class Program:
    """A program of the grid (CUDA's block): its warps, shared memory and barriers."""

    def __init__(self, grid: Grid, index: int) -> None:
        self.grid, self.index = grid, index
        octets = np.zeros(-(-max(grid.shared, 16) // 16) * 16, np.uint8)
        self.shared = Memory([Segment("shared", 0, grid.shared, octets)], "shared")
        self.warps = [Warp(self, i) for i in range(grid.threads // WARP)]
        self._waiting: dict[int, list[Warp]] = collections.defaultdict(list)

    def arrive(self, warp: Warp, barrier: int) -> None:
        """A warp waits at a barrier; the last one opens it for all."""
        waiting = self._waiting[barrier]
        waiting.append(warp)
        if len(waiting) == len(self.warps):
            self.grid.races.join(waiting)
            for w in waiting:
                w.waits = False
                if w is not self.grid.running:
                    self.grid.runnable.append(w)
            waiting.clear()


class Grid:
    """One launch."""

    def __init__(
        self, kernel: Kernel, size: int, params: dict[str, Any], memory: Memory, shared: int, seed: int
    ) -> None:
        self.kernel, self.size, self.params, self.memory, self.shared = kernel, size, params, memory, shared
        self.threads = kernel.module.threads
        self.random = random.Random(seed)
        self.races = Races(size * self.threads, kernel.unit)
        self.no_clock = np.zeros(size * self.threads, np.int32)
        self.runnable: list[Warp] = []
        self.running: Warp | None = None
        self._programs: dict[int, Program] = {}

    def warp_of(self, thread: int) -> Warp:
        """The warp of a thread of the grid."""
        return self._programs[thread // self.threads].warps[thread % self.threads // WARP]

    def run(self, resident: int | None, limit: int) -> None:
        """Runs all programs to their end. See `launch`."""
        pending = list(range(self.size))
        self.random.shuffle(pending)
        for _ in range(min(resident or self.size, self.size)):
            self._start(pending.pop())
        spent = 0
        while self.runnable:
            position = self.random.randrange(len(self.runnable))
            self.runnable[position], self.runnable[-1] = self.runnable[-1], self.runnable[position]
            self.running = w = self.runnable.pop()
            burst = self.random.choice(BURSTS)
            w.run(burst)
            spent += burst
            if spent > limit * self.size:
                raise Deadlock(f"no end after {spent} instructions: {w} is at {w.where()}")
            self.running = None
            if not w.ended and not w.waits:
                self.runnable.append(w)
            if w.ended:
                # Of a large grid, memory matters.
                w.clock, w.lane_clocks, w.registers = self.no_clock, {}, []
                if pending and all(other.ended for other in w.program.warps):
                    self._start(pending.pop())
        if stuck := [w for program in self._programs.values() for w in program.warps if not w.ended]:
            ended = any(w.ended for w in stuck[0].program.warps)
            kind, why = (BarrierDivergence, "which others ended without") if ended else (Deadlock, "for ever")
            raise kind(f"{len(stuck)} warps wait for a barrier, {why}: {stuck[0]} is at {stuck[0].where()}")

    def _start(self, index: int) -> None:
        self._programs[index] = Program(self, index)
        self.runnable += self._programs[index].warps
