"""A captured or recorded step: what its replays assume, checked cheaply."""

from __future__ import annotations

from collections.abc import Sequence

from .backends.capture import EngineCapture


class CapturedStep:
    """One ``optimizer.step()`` that was captured in a CUDA graph, or recorded; see ``optimizer.captured_steps``.

    It holds the tables, gradients and moments that the graph's launches point to, until released.
    """

    def __init__(self, parts: Sequence[EngineCapture]) -> None:
        self.parts = list(parts)
        self._released = False

    @property
    def released(self) -> bool:
        """Whether `release` was called."""
        return self._released

    @property
    def fits(self) -> bool:
        """Whether replays still update anything: no parameters, groups, amsgrad or compiled scale_fn changed since."""
        return not self._released and all(part.generation == part.engine.generation for part in self.parts)

    def check(self, step_only: bool = False) -> None:
        """Compares what replays assume with the present; see `FusedAdam.check_replay`."""
        if self._released:
            raise RuntimeError("this captured step was released: its graph must not be replayed any more")
        for part in self.parts:
            part.check(step_only)

    def release(self) -> None:
        """Lets go of the memory. The graph must not be replayed any more."""
        self._released = True
        for part in self.parts:
            part.release()
