"""A stand-in for CUDA graph capture, for machines without a GPU: records the launches of a step and replays them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .backends import launch as _launch


class RecordedGraph:
    """The launches made while recording. ``len(graph)`` counts them; ``replay()`` runs them and nothing else."""

    def __init__(self) -> None:
        self._launches: list[_launch.Launch] = []

    def __len__(self) -> int:
        return len(self._launches)

    def replay(self) -> None:
        """Runs the recorded launches once more, with no other host code, as ``torch.cuda.CUDAGraph.replay`` does."""
        for launch in self._launches:
            _launch.run(launch, _launch.compile_launch(launch))


@contextmanager
def record_launches() -> Iterator[RecordedGraph]:
    """Records the kernel launches made in its body; a stand-in for ``torch.cuda.graph``.

    Needs the triton backend (on a machine without a GPU: ``TRITON_INTERPRET=1`` and ``FUSED_CLR_BACKEND=triton``).
    Unlike a real capture, recording also runs the launches, once. A recorded step keeps tables of its own, as a
    captured one does: later eager steps over other gradients do not disturb it. Kernels alone are recorded: a tensor
    ``lr`` counts as it was, and a gradient that must be copied into its parameter's layout first is refused.

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
