"""What the executor may find wrong, by name."""

from __future__ import annotations


class PtxError(RuntimeError):
    """Anything wrong with a module or its run."""


class UnsupportedInstruction(PtxError):
    """An opcode, modifier, operand or directive that the executor does not know."""


class MemoryFault(PtxError):
    """An access outside the memory of the launch, misaligned for its width, or of shared memory that nobody wrote."""


class DataRace(PtxError):
    """Two accesses of a word by two threads, at least one a write of another value, with no order between them."""


class BarrierDivergence(PtxError):
    """Lanes of a warp wait at different places, or warps at a barrier that another ended without reaching."""


class Deadlock(PtxError):
    """No warp can go on, or one never ends."""
