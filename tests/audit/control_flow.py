"""Control flow of an assembly listing: which instruction may run after which, and what must run before another."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple


class Instruction(NamedTuple):
    """An instruction of a listing, in whatever dialect.

    Attributes:
        text: As in the listing.
        kind: "load" or "store" (of global memory), "atomic", "barrier" (of the whole block), or "other".
        writes: Registers it writes.
        reads: Registers it reads, those of addresses among them.
        addresses: Registers that make up the address of a memory access.
        loads_clock: Registers that it loads the address of the clock into, if ``addresses`` point to the arguments.
        targets: Labels that it may branch to.
        falls_through: The next instruction may run after it.
        counter: What counts this load while it is under way; empty where the hardware keeps order by itself.
        awaits: Counters that this instruction waits for until they are 0.
        source_line: Line of the kernel's source, 0 if unknown.
    """

    text: str
    kind: str = "other"
    writes: frozenset[str] = frozenset()
    reads: frozenset[str] = frozenset()
    addresses: frozenset[str] = frozenset()
    loads_clock: frozenset[str] = frozenset()
    targets: tuple[str, ...] = ()
    falls_through: bool = True
    counter: str = ""
    awaits: frozenset[str] = frozenset()
    source_line: int = 0


class Listing(NamedTuple):
    """A kernel: its instructions, and the instruction after each label.

    Attributes:
        instructions: In the order of the text; the first one is the entry.
        labels: Label to index.
        entry_origins: What registers hold on entry, see `retire.find_origins`.
    """

    instructions: Sequence[Instruction]
    labels: dict[str, int]
    entry_origins: frozenset[tuple[str, str]] = frozenset()

    def successors(self) -> list[list[int]]:
        """Indices that may run right after each index."""
        count = len(self.instructions)
        result = []
        for index, instruction in enumerate(self.instructions):
            following = [self.labels[target] for target in instruction.targets]
            if instruction.falls_through:
                following.append(index + 1)
            result.append([following_index for following_index in following if following_index < count])
        return result


def reachable(successors: Sequence[Sequence[int]], start: int, without: Collection[int] = ()) -> set[int]:
    """Indices that may run once ``start`` runs, itself among them, on paths that avoid ``without``."""
    pending = [start] if start not in without else []
    seen = set(pending)
    while pending:
        for following in successors[pending.pop()]:
            if following not in seen and following not in without:
                seen.add(following)
                pending.append(following)
    return seen


def dominates(successors: Sequence[Sequence[int]], dominator: int, index: int) -> bool:
    """Whether every path from the entry to ``index`` passes ``dominator``."""
    return index not in reachable(successors, 0, without=[dominator])
