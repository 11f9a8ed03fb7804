"""A training step captured once and replayed: forward, backward and update with no host code between."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter, is_not
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ._checks import check_integer
from ._device.capture import CapturedStep
from ._device.tensors import has_memory
from ._host.optimizer import FusedOptimizer

__all__ = ["CapturedStep", "GraphedStep"]

read_grad = attrgetter("grad")


class Graph(NamedTuple):
    """A captured step for inputs of one kind, with its input tensors, its output and the gradients it writes.

    ``written`` are the positions of the inputs that the step writes into.
    """

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    written: list[int]
    output: Any
    captured: list[tuple[FusedOptimizer, CapturedStep]]
    params: list[Tensor]
    grads: list[Tensor | None]
    awaits_scheduler: list[bool]


class GraphedStep:
    """Wraps a training step. On CUDA it captures the step in a graph and replays it.

    Every call is one training step, on any device: it clears the gradients (to None), then runs ``step`` or a replay of
    it. The first ``num_warmup_iters`` calls with inputs of a new kind run eagerly, on a side stream. The next call is
    captured. Inputs of another shape, dtype, ``requires_grad`` or structure get their own graph, and so do other values
    or types of arguments that are not tensors. If ``add_param_group`` or another change makes the graphs unusable, or a
    capture fails, calls warm up and capture again. On a machine without CUDA every call runs eagerly.

    Args:
        step: Does forward, backward and ``optimizer.step()`` for the batch it is given, and may return tensors. It is
            called with the arguments of a call; tensors among them are moved to the optimizer's device. What it writes
            into them, and their ``grad``, reaches the caller's tensors if those are on that device. All of it must be
            capturable: no ``.item()``, no control flow that depends on values of tensors. ``torch.autocast`` and
            `torch.amp.GradScaler` are capturable.
        optimizer: The `FusedAdam` that ``step`` steps, or a list where it steps several.
        num_warmup_iters: Eager calls before a capture, >= 1. Use 11 for DistributedDataParallel, as torch's
            documentation says.
        check: When `FusedAdam.check_replay` runs: "always"; "first", before a graph's first replay, and before later
            ones if a parameter has other memory, or another shape, stride or dtype; "never".
        max_graphs: Graphs kept, >= 1. The least recently used one is released first.
        capture_error_mode: As for `torch.cuda.graph`.

    Raises:
        ValueError: An argument is not allowed; the message names it, its value and the allowed values.
        TypeError: ``optimizer`` is, or contains, something other than a fused optimizer.

    Example:
        >>> import fused_clr
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = fused_clr.FusedAdam([weight], lr=0.1)
        >>> def step(batch):
        ...     loss = (weight * batch).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        ...     return loss.detach()
        >>> graphed = GraphedStep(step, optimizer)
        >>> float(graphed(torch.ones(3)))
        1.0
    """

    def __init__(
        self,
        step: Callable[..., Any],
        optimizer: FusedOptimizer | Sequence[FusedOptimizer],
        *,
        num_warmup_iters: int = 3,
        check: Literal["first", "always", "never"] = "first",
        max_graphs: int = 8,
        capture_error_mode: Literal["global", "thread_local", "relaxed"] = "global",
    ) -> None:
        if not callable(step):
            raise TypeError(f"step must be callable, got {type(step).__name__}")
        optimizers: list[Any] = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
        for entry in optimizers:
            if not isinstance(entry, FusedOptimizer):
                raise TypeError(f"optimizer must be a FusedAdam or a list of them, got {type(entry).__name__}")
        if not optimizers:
            raise ValueError("optimizer must not be an empty list")
        self._optimizers: list[FusedOptimizer] = optimizers
        counts: dict[str, Any] = {"num_warmup_iters": num_warmup_iters, "max_graphs": max_graphs}
        for name, value in counts.items():
            check_integer(name, value, "an integer >= 1", lambda n: n >= 1)
        _check_choice("check", check, ("first", "always", "never"))
        _check_choice("capture_error_mode", capture_error_mode, ("global", "thread_local", "relaxed"))
        self._step = step
        self._num_warmup_iters = num_warmup_iters
        self._check = check
        self._max_graphs = max_graphs
        self._capture_error_mode = capture_error_mode
        self._graphs: OrderedDict[Any, Graph] = OrderedDict()
        self._warmed: dict[Any, int] = {}
        self._stream: torch.cuda.Stream | None = None

    @property
    def num_graphs(self) -> int:
        """Graphs captured and kept; 0 without CUDA."""
        return len(self._graphs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Takes one training step.

        Args:
            args: A batch, as ``step`` takes it: tensors on any device, in any nesting of tuples, lists and dicts, and
                hashable values.
            kwargs: Likewise.

        Returns:
            What ``step`` returned. The next replay overwrites the tensors in it: clone the ones you keep.

        Raises:
            RuntimeError: The step cannot be captured, or `FusedAdam.check_replay` found that a replay would be wrong.
            TypeError: An argument is neither a tensor nor hashable.
            ValueError: A tensor was computed with autograd: a replay cannot send gradients back to its inputs.
        """
        device = self._device()
        leaves, structure = pytree.tree_flatten((args, kwargs))
        key = structure, tuple(_kind(leaf) for leaf in leaves)
        if not self._has_cuda(device):
            return self._run(structure, leaves, device)

        graph = self._graphs.get(key)
        if graph is not None and not all(captured.fits for _, captured in graph.captured):
            self.release()
            graph = None
        is_new = graph is None
        if graph is None:
            warmed = self._warmed.get(key, 0)
            if warmed < self._num_warmup_iters:
                self._warmed[key] = warmed + 1
                return self._run_on_side_stream(structure, leaves, device)
            graph = self._capture(key, structure, leaves, device)
        self._graphs.move_to_end(key)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        with torch.no_grad():
            for static, tensor in zip(graph.inputs, tensors, strict=True):
                static.copy_(tensor, non_blocking=True)
        if any(map(is_not, map(read_grad, graph.params), graph.grads)):
            # ``param.grad`` must be the gradients that this graph writes.
            for param, grad in zip(graph.params, graph.grads, strict=True):
                param.grad = grad
        for optimizer, captured in graph.captured:
            optimizer.refuse_averages("a GraphedStep")
            if self._check == "always" or (self._check == "first" and (is_new or captured.parameters_changed())):
                optimizer.check_replay(captured)
        graph.graph.replay()
        self._return_inputs(graph, tensors)
        for optimizer, awaits_scheduler in zip(self._optimizers, graph.awaits_scheduler, strict=True):
            optimizer._awaits_scheduler = awaits_scheduler
        return graph.output

    def release(self) -> None:
        """Frees all graphs, for example before a process group is destroyed. Later calls warm up and capture again."""
        while self._graphs:
            self._release_oldest()
        self._warmed.clear()

    def _device(self) -> torch.device:
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for param in group.stored("params"):
                    if has_memory(param):
                        device: torch.device = param.device
                        return device
        return torch.device("cpu")

    def _has_cuda(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def _run(self, structure: Any, leaves: list[Any], device: torch.device) -> Any:
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        moved = [leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(moved, structure)
        return self._step(*args, **kwargs)

    def _run_on_side_stream(self, structure: Any, leaves: list[Any], device: torch.device) -> Any:
        # What torch's libraries and autograd set up at first use, on the default stream, would make the capture fail.
        current = torch.cuda.current_stream(device)
        self._stream = self._stream or torch.cuda.Stream(device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            output = self._run(structure, leaves, device)
        current.wait_stream(self._stream)
        return output

    @staticmethod
    def _return_inputs(graph: Graph, tensors: list[Tensor]) -> None:
        """Gives the caller's tensors what an eager step would have written into them, and their gradients."""
        with torch.no_grad():
            for index in graph.written:
                if tensors[index].device == graph.inputs[index].device:
                    tensors[index].copy_(graph.inputs[index])
            for static, tensor in zip(graph.inputs, tensors, strict=True):
                if static.grad is None or tensor.device != static.device:
                    continue
                if tensor.grad is None:
                    tensor.grad = static.grad.clone()
                else:
                    tensor.grad += static.grad

    def _capture(self, key: Any, structure: Any, leaves: list[Any], device: torch.device) -> Graph:
        inputs = [
            torch.empty_like(leaf, device=device, requires_grad=leaf.requires_grad)
            for leaf in leaves
            if isinstance(leaf, Tensor)
        ]
        versions = [static._version for static in inputs]
        static = iter(inputs)
        static_leaves = [next(static) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(static_leaves, structure)
        before = [len(optimizer.captures) for optimizer in self._optimizers]
        graph = torch.cuda.CUDAGraph()
        for optimizer in self._optimizers:
            optimizer._before_capture()
        # The graph's backward then allocates its own gradients, and writes them instead of adding.
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        try:
            with (
                _current_stream_kept(device),
                torch.cuda.graph(graph, stream=self._stream, capture_error_mode=self._capture_error_mode),
            ):
                output = self._step(*args, **kwargs)
            captured = self._captured_since(before)
            if not captured:
                raise RuntimeError("the step called no optimizer.step() of the given optimizer while it was captured")
        except BaseException as error:
            for _, step in self._captured_since(before):
                step.release()
            # What was refused may be what eager calls set up.
            del self._warmed[key]
            if isinstance(error, torch.AcceleratorError):
                raise RuntimeError(_explain(error)) from error
            raise
        params = [
            p for optimizer in self._optimizers for group in optimizer.param_groups for p in group.stored("params")
        ]
        self._graphs[key] = Graph(
            graph,
            inputs,
            [index for index, version in enumerate(versions) if inputs[index]._version != version],
            output,
            captured,
            params,
            list(map(read_grad, params)),
            [optimizer._awaits_scheduler for optimizer in self._optimizers],
        )
        while len(self._graphs) > self._max_graphs:
            self._release_oldest()
        return self._graphs[key]

    def _captured_since(self, before: list[int]) -> list[tuple[FusedOptimizer, CapturedStep]]:
        """The captured steps of each optimizer after its first ``before``."""
        pairs = zip(self._optimizers, before, strict=True)
        return [(optimizer, step) for optimizer, count in pairs for step in optimizer.captures[count:]]

    def _release_oldest(self) -> None:
        _, oldest = self._graphs.popitem(last=False)
        oldest.graph.reset()
        for _, captured in oldest.captured:
            captured.release()


def _kind(leaf: Any) -> Any:
    """What distinguishes the graphs of two calls: a tensor's shape and dtype, or another argument's type and value."""
    if isinstance(leaf, Tensor):
        if not leaf.is_leaf:
            raise ValueError(
                "a tensor among the arguments was computed with autograd, and a replay sends no gradients back to what "
                "it was computed from; detach() it, or compute it in the step"
            )
        return leaf.shape, leaf.dtype, leaf.requires_grad
    if not isinstance(leaf, Hashable):
        raise TypeError(
            "arguments must be tensors or hashable values, in any nesting of tuples, lists and dicts, got "
            f"{type(leaf).__name__}"
        )
    # As text, NaN is equal to itself, and 0.0 is not -0.0.
    return type(leaf), leaf.hex() if isinstance(leaf, float) else leaf


def _explain(error: torch.AcceleratorError) -> str:
    """What the driver's error in a capture means. The first one is the cause, and the others follow from it."""
    first: BaseException = error
    while isinstance(first.__context__, torch.AcceleratorError):
        first = first.__context__
    return (
        f"the driver refused a call in the captured step: {str(first).splitlines()[0]}. A captured step must not wait "
        "for the device (.item(), .cpu(), printing a tensor) or use the default stream. Autograd uses the default "
        "stream for a parameter whose graph node was made there and is still held: by DistributedDataParallel, or by a "
        "loss with its graph; make such wrappers under torch.cuda.stream(torch.cuda.Stream())"
    )


@contextmanager
def _current_stream_kept(device: torch.device) -> Iterator[None]:
    """Restores the current stream after the body: `torch.cuda.graph` does not if CUDA invalidated the capture."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        yield


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
