"""Stand-ins for CUDA graph capture, for machines without a GPU: they record a step, or its launches, and replay it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

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


# Operators that give the host a value, or a shape, which the device must work out first.
WAITING = frozenset(
    getattr(torch.ops.aten, name).default
    for name in ("_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "_unique2", "bincount")
)


class RecordedStep:
    """A recorded training step: its operators and kernel launches. ``replay()`` runs them and nothing else."""

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []

    def replay(self) -> None:
        """Runs the recorded work once more, on the memory it had, as ``torch.cuda.CUDAGraph.replay`` does."""
        for run in self.work:
            run()

    def reset(self) -> None:
        """Forgets the recorded work."""
        self.work.clear()


class OperatorRecorder(TorchDispatchMode):
    """Adds the operators that run under it to a `RecordedStep`.

    Numbers among their arguments are kept as they were, as a captured kernel keeps them. What an operator returns at a
    replay is written into the memory that it returned then. An operator that would wait for the device, which a
    capture forbids, raises an error.
    """

    def __init__(self, step: RecordedStep) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.step = step
        self._written: dict[int, tuple[Tensor, Tensor]] = {}

    def undo(self) -> None:
        """Puts back what the operators wrote in place."""
        for tensor, before in self._written.values():
            tensor.copy_(before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = pytree.tree_leaves(args[1:]) if func is torch.ops.aten.index.Tensor else ()
        if func in WAITING or any(isinstance(mask, Tensor) and mask.dtype == torch.bool for mask in masks):
            raise RuntimeError(
                f"{func} would wait for the device, and a capture forbids that: the step reads a tensor's value "
                "(.item(), float(), bool(), a mask as an index)"
            )
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for leaf in pytree.tree_leaves(value):
                    self._written.setdefault(leaf.data_ptr(), (leaf.detach(), leaf.detach().clone()))
        result = func(*args, **(kwargs or {}))
        args, kwargs, outputs = pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs or {}, result))

        @torch.no_grad()
        def run() -> None:
            fresh = pytree.tree_leaves(func(*args, **kwargs))
            for old, new in zip(pytree.tree_leaves(outputs), fresh, strict=True):
                # Views and in-place operators have written where they belong.
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        self.step.work.append(run)
        return result


@contextmanager
def record_step() -> Iterator[RecordedStep]:
    """Records the torch operators and the kernel launches made in its body; a stand-in for ``torch.cuda.graph``.

    Forward, backward and the step of any optimizer, on CPU tensors. A fused optimizer needs the triton backend, as for
    `record_launches`. Unlike a real capture, recording also runs the body, once. Before it, take one eager step.

    Yields:
        The `RecordedStep`.

    Raises:
        RuntimeError: The body reads a tensor's value.

    Example:
        >>> weight = torch.ones(1)
        >>> with record_step() as step:
        ...     _ = weight.mul_(2)
        >>> step.replay()
        >>> weight
        tensor([4.])
    """
    step = RecordedStep()

    def record(launch: _launch.Launch) -> None:
        step.work.append(lambda: _launch.run(launch))

    _launch.recorders.append(record)
    try:
        with OperatorRecorder(step):
            yield step
    finally:
        _launch.recorders.remove(record)
