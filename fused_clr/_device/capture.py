"""Checks that a captured step still matches its tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .fingerprint import Fingerprint

RELAXED = 2


class Place(NamedTuple):
    """Where a tensor was and how it was laid out when a step was captured."""

    name: str
    address: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    # Bits of a tensor whose memory does not hold its values as they are.
    conj: bool
    neg: bool

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Place:
        """The current place of a tensor."""
        layout = tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg()
        return cls(name, tensor.data_ptr(), *layout)

    def same_layout(self, other: Place) -> bool:
        """Whether two places differ in their address at most."""
        return self[2:] == other[2:]


class CapturableEngine(Protocol):
    """What a `Capture` needs from its engine."""

    @property
    def generation(self) -> int:
        """The current generation: captured launches of another one do nothing."""

    def active_parameters(self, active: Sequence[int]) -> list[Tensor]:
        """What a step of the active parameters writes."""

    def present_places(self, active: Sequence[int]) -> tuple[list[Place], list[Place | None], list[Place]]:
        """Places of the active parameters, of all gradients, and of the active parameters' state."""

    def refresh_capture(self, capture: Capture) -> None:
        """Writes current addresses into a captured launch's tables."""


class Capture:
    """A captured or recorded step of one engine. Holds everything its launches point to, until released.

    Args:
        engine: The engine.
        active: Indices of the parameters that it updates.
        tables: Tables that only its launches read.
        tensors: The gradients and moments that it points to.
    """

    def __init__(self, engine: CapturableEngine, active: list[int], tables: Any, tensors: list[Any]) -> None:
        self.engine = engine
        self.active = active
        self.tables = tables
        self.tensors = tensors
        self.generation = engine.generation
        self.params, self.grads, self.state = engine.present_places(active)
        self._remember_parameters()

    def _remember_parameters(self) -> None:
        self._addresses = [place.address for place in self.params]
        self._layouts = Fingerprint([], self.engine.active_parameters(self.active))

    def parameters_changed(self) -> bool:
        """Whether an updated parameter has another address or layout than its launches use."""
        addresses = [param.data_ptr() for param in self.engine.active_parameters(self.active)]
        return addresses != self._addresses or not (self._layouts.matches([]) or self._layouts.matches_slowly([]))

    def release(self) -> None:
        """Frees what a replay needs."""
        self.tables, self.tensors = None, []

    def check(self, optimizer_only: bool) -> None:
        """Compares the tensors that the launches use with the current ones.

        Args:
            optimizer_only: The graph holds only ``optimizer.step()``: moved addresses are written into its tables, and
                are not an error.

        Raises:
            RuntimeError: A replay would be wrong, or do nothing; the message says why.
        """
        if self.generation != self.engine.generation:
            raise RuntimeError(
                "this captured step no longer fits its optimizer: parameters, groups, amsgrad, a scale_fn, or "
                "whether an SGD group has momentum changed "
                "since the capture, and a replay would update nothing; capture the step again"
            )
        params, grads, state = self.engine.present_places(self.active)
        if params == self.params and state == self.state and grads == self.grads:
            return
        moved = self._compare(params, self.params, optimizer_only) | self._compare(state, self.state, optimizer_only)
        for index, (now, then) in enumerate(zip(grads, self.grads, strict=True)):
            if now is None and then is not None and optimizer_only:
                raise RuntimeError(
                    f"{then.name} existed at capture and is None now, and a replay would apply the captured one; "
                    "run backward first, or capture the step again"
                )
            if now is not None and then is None:
                raise RuntimeError(
                    f"{now.name} did not exist at capture, and a replay would not apply it; capture the step again"
                )
            if now is not None and then is not None:
                moved |= self._compare([now], [then], optimizer_only)
            elif now is None:
                grads[index] = then
        if moved:
            self.engine.refresh_capture(self)
            self.params, self.grads, self.state = params, grads, state
            self._remember_parameters()

    @staticmethod
    def _compare(now: Sequence[Place], then: Sequence[Place], optimizer_only: bool) -> bool:
        """Whether any moved. Raises an error if the step must be captured again."""
        for new, old in zip(now, then, strict=True):
            if (new.conj, new.neg) != (old.conj, old.neg):
                bit = "conj" if new.conj != old.conj else "neg"
                raise RuntimeError(
                    f"the {bit} bit of {old.name} was {'set' if getattr(new, bit) else 'cleared'} since the capture: "
                    f"a replay would misread its memory; call resolve_{bit}(), or capture again"
                )
            if not new.same_layout(old):
                raise RuntimeError(
                    f"{old.name} was captured with shape {tuple(old.shape)}, strides {old.stride} and {old.dtype}, and "
                    f"now has {tuple(new.shape)}, {new.stride} and {new.dtype}; capture the step again"
                )
            if new.address != old.address and not optimizer_only:
                raise RuntimeError(
                    f"{old.name} has moved in memory since it was captured, and a replay would work on the old memory. "
                    "Write into it in place (copy_, set_to_none=False), or capture again; if the graph holds "
                    "only optimizer.step(), check_replay(optimizer_only=True) writes the new address into it"
                )
        return list(now) != list(then)


class CapturedStep:
    """One ``optimizer.step()`` that was captured in a CUDA graph, or recorded; see ``optimizer.captures``.

    It holds the tables, gradients and state tensors that the graph's launches point to, until released.
    """

    def __init__(self, parts: Sequence[Capture]) -> None:
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

    def parameters_changed(self) -> bool:
        """Whether a parameter has another address or layout than replays use: a part of `check`, for every replay."""
        return any(part.parameters_changed() for part in self.parts)

    def check(self, optimizer_only: bool = False) -> None:
        """Compares the tensors that replays use with the current ones; see `FusedAdam.check_replay`."""
        if self._released:
            raise RuntimeError("this captured step was released: its graph must not be replayed again")
        for part in self.parts:
            part.check(optimizer_only)

    def release(self) -> None:
        """Frees the memory that replays need. The graph must not be replayed again."""
        self._released = True
        for part in self.parts:
            part.release()


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of a device is being captured: each device has its own."""
    if device.type != "cuda":
        return False
    if device.index == torch.cuda.current_device():
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def refuse_capture(device: torch.device, what: str) -> None:
    """Raises an error if the current stream of ``device`` is being captured; ``what`` says what happened."""
    if is_capturing(device):
        raise RuntimeError(f"{what} during CUDA graph capture; do it before, and take one eager step")


_upload_streams: dict[torch.device, torch.cuda.Stream] = {}


def upload_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream for uploads during a capture: the same one each time, unless it takes part in a capture itself.

    Torch hands out 32 streams in turn, so that every one may also be somebody else's. Those of high priority are rarer.
    """
    for _ in range(64):
        stream = _upload_streams.get(device)
        if stream is None:
            stream = _upload_streams[device] = torch.cuda.Stream(device, priority=-1)
        with torch.cuda.stream(stream):
            if not torch.cuda.is_current_stream_capturing():
                return stream
        del _upload_streams[device]
    raise RuntimeError(f"every stream of torch's pool on {device} is being captured: uploading a table needs another")


@contextmanager
def relaxed_capture(device: torch.device) -> Iterator[None]:
    """Lets the body wait for another stream while this thread captures, in any capture mode.

    The driver forbids calls that a capture cannot record. The calls in the body must not be recorded.
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


@cache
def _exchange_capture_mode() -> Any:
    if torch.version.hip:
        # The one that torch loaded: its wheels bring their own, and a second one would know nothing of this thread.
        return ctypes.CDLL(loaded_library("libamdhip64.so")).hipThreadExchangeStreamCaptureMode
    return ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode


def loaded_library(name: str) -> str:
    """The path of a shared library that this process has loaded; ``name`` itself if there is none."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return name
    # Five columns come before the path, which may contain spaces.
    paths = [columns[5] for columns in (line.split(maxsplit=5) for line in lines) if len(columns) == 6]
    return next((path for path in paths if Path(path).name.startswith(name)), name)
