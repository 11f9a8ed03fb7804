"""The retire protocol, proven on compiled code.

A program's last act is to count itself done in the clock, and the last program to do so ticks the clock. Were a warp
able to count its program before another warp has read the clock, that other warp could read the next step's.
"""

from __future__ import annotations

from collections.abc import Callable

from .assembly import parse_amdgcn, parse_ptx
from .control_flow import Instruction, Listing, dominates, reachable

READERS: dict[str, Callable[[str], Listing]] = {"ptx": parse_ptx, "amdgcn": parse_amdgcn}


def _origins_after(instruction: Instruction, origins: frozenset[tuple[str, str]]) -> frozenset[tuple[str, str]]:
    """What registers may hold after an instruction, given what they may hold before it."""
    kept = {(register, origin) for register, origin in origins if register not in instruction.writes}
    if instruction.loads_clock:
        points_to_arguments = not instruction.addresses or any(
            register in instruction.addresses and origin == "arguments" for register, origin in origins
        )
        if points_to_arguments:
            kept |= {(register, "clock") for register in instruction.loads_clock}
    elif instruction.kind == "other":
        passed_on = {origin for register, origin in origins if register in instruction.reads}
        kept |= {(register, origin) for register in instruction.writes for origin in passed_on}
    return frozenset(kept)


def find_origins(listing: Listing) -> list[frozenset[tuple[str, str]]]:
    """Pairs (register, "clock" or "arguments") before each instruction: addresses that the register may be made of.

    It follows moves and arithmetic, over every path, and forgets a register that is overwritten.
    """
    successors = listing.successors()
    before: list[frozenset[tuple[str, str]]] = [frozenset()] * len(listing.instructions)
    before[0] = listing.entry_origins
    pending = [0]
    seen = {0}
    while pending:
        index = pending.pop()
        after = _origins_after(listing.instructions[index], before[index])
        for following in successors[index]:
            merged = before[following] | after
            if merged != before[following] or following not in seen:
                before[following] = merged
                seen.add(following)
                pending.append(following)
    return before


def retire_problems(text: str, dialect: str) -> list[str]:
    """What is wrong with the way a kernel retires.

    A barrier counts if it comes from a source line of its own: the one that some versions of Triton put before a scalar
    atomic has the atomic's line, and may be gone in the next version.

    Args:
        text: A listing.
        dialect: "ptx" or "amdgcn".

    Returns:
        Sentences; none if the protocol holds.

    Raises:
        UnreadableError: The listing cannot be read.
    """
    listing = READERS[dialect](text)
    origins = find_origins(listing)
    successors = listing.successors()

    def touching_clock(kind: str) -> list[int]:
        return [
            index
            for index, instruction in enumerate(listing.instructions)
            if instruction.kind == kind
            and any(register in instruction.addresses and origin == "clock" for register, origin in origins[index])
        ]

    atomics, loads = touching_clock("atomic"), touching_clock("load")
    if len(atomics) != 1:
        return [f"{len(atomics)} atomics on the clock, not one that retires"]
    if not loads:
        return ["no load of the clock found: the audit has lost its trail"]
    retire = atomics[0]
    retire_line = listing.instructions[retire].source_line
    barriers = [
        index
        for index, instruction in enumerate(listing.instructions)
        if instruction.kind == "barrier"
        and instruction.source_line not in (0, retire_line)
        and dominates(successors, index, retire)
    ]
    if not barriers:
        return ["no block barrier dominates the retire atomic (tl.debug_barrier() before it is missing)"]
    # The last of them: all others dominate it.
    barrier = max(barriers, key=lambda index: sum(dominates(successors, other, index) for other in barriers))
    after_barrier = reachable(successors, barrier)
    problems = []
    for index in loads:
        load = listing.instructions[index]
        waits = [i for i, instruction in enumerate(listing.instructions) if load.counter in instruction.awaits]
        if index in after_barrier:
            problems.append(f"the clock is loaded after the barrier that precedes the retire atomic: {load.text}")
        elif load.counter and barrier in reachable(successors, index, without=waits):
            problems.append(f"a load of the clock may still be under way at the barrier: {load.text}")
    return problems
