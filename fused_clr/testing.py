"""A stand-in for CUDA graph capture, for machines without a GPU: records the launches of a step and replays them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ._device import launch as _launch


class RecordedGraph:
    """Recorded launches. ``len(graph)`` is their number; ``replay()`` runs them and nothing else."""

    def __init__(self) -> None:
        self._launches: list[_launch.Launch] = []

    def __len__(self) -> int:
        return len(self._launches)

    def replay(self) -> None:
        """Runs the recorded launches once more, with no other host code, as ``torch.cuda.CUDAGraph.replay`` does."""
        for launch in self._launches:
            _launch.run(launch)


@contextmanager
def record_launches() -> Iterator[RecordedGraph]:
    """Records the kernel launches made in its body; a stand-in for ``torch.cuda.graph``.

    Needs the triton backend (on a machine without a GPU: ``TRITON_INTERPRET=1`` and ``FUSED_CLR_BACKEND=triton``).
    Unlike a real capture, recording also runs the launches, once. A recorded step has its own tables, as a captured
    one does: later eager steps with other gradients do not change it. Only kernels are recorded. A tensor ``lr``
    therefore keeps its value, and a gradient whose layout differs from its parameter's raises an error.

    Yields:
        The `RecordedGraph`.

    Example:
        >>> with record_launches() as graph:  # doctest: +SKIP
        ...     optimizer.step()
        >>> graph.replay()  # doctest: +SKIP
    """
    graph = RecordedGraph()
    _launch.recorders.append(graph._launches.append)
    try:
        yield graph
    finally:
        _launch.recorders.remove(graph._launches.append)
