"""What a captured launch assumes of one engine, and the checks of it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

RELAXED = 2


class Place(NamedTuple):
    """Where a tensor was and how it was laid out when a step was captured."""

    name: str
    address: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Place:
        """The present place of a tensor."""
        return cls(name, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)

    def same_layout(self, other: Place) -> bool:
        """Whether two places differ in their address at most."""
        return self[2:] == other[2:]


class CapturableEngine(Protocol):
    """What an `EngineCapture` asks of its engine."""

    generation: int

    def get_stale_replay(self) -> bool:
        """Whether a captured launch was replayed that no longer fits."""

    def present_places(self, active: Sequence[int]) -> tuple[list[Place], list[Place | None], list[Place]]:
        """Places of the active parameters, of all gradients, and of the active parameters' state."""

    def refresh_capture(self, capture: EngineCapture) -> None:
        """Writes present addresses into a captured launch's tables."""


class EngineCapture:
    """A captured or recorded step of one engine. Holds everything its launches point to, until released.

    Args:
        engine: The engine.
        active: Indices of the parameters that it updates.
        tables: What its launches read, and nothing else does.
        tensors: The gradients and moments that it points to.
    """

    def __init__(self, engine: CapturableEngine, active: list[int], tables: Any, tensors: list[Any]) -> None:
        self.engine = engine
        self.active = active
        self.tables = tables
        self.tensors = tensors
        self.generation = engine.generation
        self.params, self.grads, self.state = engine.present_places(active)

    def release(self) -> None:
        """Lets go of what a replay would need."""
        self.tables, self.tensors = None, []

    def check(self, step_only: bool) -> None:
        """Compares what the launches assume with the present.

        Args:
            step_only: The graph holds ``optimizer.step()`` alone, so that moved addresses can be written into its
                tables instead of being an error.

        Raises:
            RuntimeError: A replay would be wrong, or do nothing; the message says why.
        """
        if self.generation != self.engine.generation:
            raise RuntimeError(
                "this captured step no longer fits its optimizer: parameters, groups, amsgrad or a scale_fn changed "
                "since the capture, and a replay would update nothing; capture the step again"
            )
        params, grads, state = self.engine.present_places(self.active)
        if params == self.params and state == self.state and grads == self.grads:
            return
        moved = self._compare(params, self.params, step_only) | self._compare(state, self.state, step_only)
        for index, (now, then) in enumerate(zip(grads, self.grads, strict=True)):
            if now is None and then is not None and step_only:
                raise RuntimeError(
                    f"{then.name} existed at capture and is None now, and a replay would apply the captured one; "
                    "run backward first, or capture the step again"
                )
            if now is not None and then is None:
                raise RuntimeError(
                    f"{now.name} did not exist at capture, and a replay would not apply it; capture the step again"
                )
            if now is not None and then is not None:
                moved |= self._compare([now], [then], step_only)
            elif now is None:
                grads[index] = then
        if moved:
            self.engine.refresh_capture(self)
            self.params, self.grads, self.state = params, grads, state

    @staticmethod
    def _compare(now: Sequence[Place], then: Sequence[Place], step_only: bool) -> bool:
        """Whether any moved; an error if that cannot be helped."""
        for new, old in zip(now, then, strict=True):
            if not new.same_layout(old):
                raise RuntimeError(
                    f"{old.name} was captured with shape {tuple(old.shape)}, strides {old.stride} and {old.dtype}, and "
                    f"now has {tuple(new.shape)}, {new.stride} and {new.dtype}; capture the step again"
                )
            if new.address != old.address and not step_only:
                raise RuntimeError(
                    f"{old.name} has moved in memory since it was captured, and a replay would work on the old memory. "
                    "Write into it in place (copy_, set_to_none=False), or capture again; if the graph holds "
                    "optimizer.step() alone, check_replay(step_only=True) takes the new address over"
                )
        return list(now) != list(then)


@contextmanager
def relaxed_capture(device: torch.device) -> Iterator[None]:
    """Lets the body wait for another stream while this thread captures, in whatever mode it does.

    The driver forbids calls that a capture cannot see; here they are meant not to be seen.
    """
    if device.type != "cuda":
        yield
        return
    exchange = _exchange_capture_mode()
    mode = ctypes.c_int(RELAXED)
    if exchange(ctypes.byref(mode)) != 0:
        raise RuntimeError("the driver refused to change the capture mode of this thread")
    try:
        yield
    finally:
        exchange(ctypes.byref(mode))


def _exchange_capture_mode() -> Any:
    if torch.version.hip:
        return ctypes.CDLL("libamdhip64.so").hipThreadExchangeStreamCaptureMode
    return ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode
