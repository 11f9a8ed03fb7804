"""Copies values from the devices to the host without waiting."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .engine import Engine, Snapshot


class StatusCopy:
    """A copy of all values of some engines, started in the constructor: on the current streams, without waiting.

    Args:
        engines: The engines.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = list(engines)
        self._words = [engine.state.copy_words() for engine in engines]
        self._events = []
        for device in {engine.device for engine in engines if engine.device.type == "cuda"}:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            self._events.append(event)

    def arrived(self) -> bool:
        """Whether the host may read it."""
        return all(event.query() for event in self._events)

    def read(self) -> list[Snapshot]:
        """Waits for the devices; one entry per engine."""
        for event in self._events:
            event.synchronize()
        return [engine.state.parse(words) for engine, words in zip(self.engines, self._words, strict=True)]
