"""The optimizers that are compared, each with a scheduler: torch's, ours, and the table of all of them."""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.optim.lr_scheduler import CyclicLR

import fused_clr
from bench.cases import MAX_GRAD_NORM

CYCLE: dict[str, Any] = {"base_lr": 2.5e-4, "max_lr": 1e-3, "step_size_up": 2000, "mode": "triangular2"}

# With more tensors, peers that compile are not run.
MOST_COMPILED = 200

NO_MOMENTUM = "no CyclicLR momentum: beta1 is constant"
FROZEN_BETA1 = "beta1 is frozen in the graph; CyclicLR writes lr from the host between replays"
FROZEN = "lr and beta1 are frozen in the graph"


class NotAvailableError(Exception):
    """A peer cannot do what a case asks; the message says what."""


class Request(NamedTuple):
    """What a peer is asked to step.

    Attributes:
        groups: Param groups; every parameter has a gradient, which stays.
        device: Where they are.
        clips: Whether to clip the gradients' norm to MAX_GRAD_NORM before the update.
        captured: Whether the update will be captured in a CUDA graph.
    """

    groups: list[dict[str, Any]]
    device: torch.device
    clips: bool = False
    captured: bool = False

    @property
    def params(self) -> list[torch.nn.Parameter]:
        """The parameters of all groups."""
        return [param for group in self.groups for param in group["params"]]


@dataclass(frozen=True)
class Stepper:
    """One training step, without the model.

    Attributes:
        update: Clips and updates. In captured mode, this is what the graph holds.
        schedule: Advances the schedule from the host; None if nothing has to be done there.
        context: Entered around rounds and warm-up, outside of what is timed.
        keeps: What has to live as long as the callables.
    """

    update: Callable[[], object]
    schedule: Callable[[], object] | None = None
    context: Callable[[], AbstractContextManager[object]] = field(default=nullcontext)
    keeps: object = None

    def step(self) -> None:
        """The whole step."""
        self.update()
        if self.schedule is not None:
            self.schedule()


@dataclass(frozen=True)
class Peer:
    """An optimizer with a scheduler.

    Attributes:
        name: What it is called in results.
        build: Makes a stepper.
        remark: What it computes differently from Adam + CyclicLR, if anything.
        captured_remark: What it computes differently in a graph.
        requires: A module without which it is missing.
        compiles: Whether it compiles code for each tensor, which takes minutes beyond MOST_COMPILED of them.
    """

    name: str
    build: Callable[[Request], Stepper]
    remark: str = ""
    captured_remark: str = ""
    requires: str = "torch"
    compiles: bool = False

    @property
    def is_missing(self) -> bool:
        """Whether the module it needs is not installed."""
        return importlib.util.find_spec(self.requires) is None

    def remark_in(self, mode: str) -> str:
        """What is to be said about its results in a mode."""
        remarks = [self.remark, self.captured_remark if mode == "captured" else ""]
        return "; ".join(remark for remark in remarks if remark)


def with_clipping(request: Request, step: Callable[[], object]) -> Callable[[], object]:
    """``step``, after torch's clipping where that is asked for."""
    if not request.clips:
        return step
    params = request.params

    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(params, MAX_GRAD_NORM)
        step()

    return clip_and_step


def tensor_lr(request: Request) -> torch.Tensor:
    """A learning rate on the parameters' device, for CyclicLR to write into."""
    return torch.tensor(1e-3, dtype=torch.float32, device=request.device)


def _torch_pair(request: Request, *, lr_is_tensor: bool = False, **arguments: Any) -> Stepper:
    if request.captured:
        arguments.setdefault("capturable", True)
    lr = tensor_lr(request) if lr_is_tensor else 1e-3
    optimizer = torch.optim.Adam(request.groups, lr=lr, **arguments)
    scheduler = CyclicLR(optimizer, **CYCLE)
    # A float lr is a constant of the graph: to write it between replays would change nothing.
    frozen = request.captured and not lr_is_tensor
    # Torch's scheduler has wrapped optimizer.step, which fails once the scheduler is gone.
    return Stepper(with_clipping(request, optimizer.step), None if frozen else scheduler.step, keeps=scheduler)


def _torch_fused(request: Request) -> Stepper:
    return _torch_pair(request, fused=True)


def _torch_foreach(request: Request) -> Stepper:
    return _torch_pair(request, foreach=True)


def _torch_capturable(request: Request) -> Stepper:
    return _torch_pair(request, foreach=True, capturable=True, lr_is_tensor=True)


def _torch_fused_tensor_lr(request: Request) -> Stepper:
    return _torch_pair(request, fused=True, lr_is_tensor=True)


def _torch_compiled(request: Request) -> Stepper:
    # A tensor lr, or each new value would compile anew; foreach takes one on a GPU alone, and capturable.
    on_gpu = request.device.type == "cuda"
    optimizer = torch.optim.Adam(request.groups, lr=tensor_lr(request), foreach=on_gpu, capturable=on_gpu)
    scheduler = CyclicLR(optimizer, **CYCLE, cycle_momentum=False)
    compiled = torch.compile(optimizer.step)
    return Stepper(with_clipping(request, compiled), scheduler.step)


def fused_clr_pair(request: Request) -> Stepper:
    """Our pair. In a graph its schedule needs nothing from the host."""
    arguments: dict[str, Any] = {}
    if request.clips:
        if "max_grad_norm" not in inspect.signature(fused_clr.FusedAdam).parameters:
            raise NotAvailableError("this version of FusedAdam has no max_grad_norm")
        arguments["max_grad_norm"] = MAX_GRAD_NORM
    optimizer = fused_clr.FusedAdam(request.groups, lr=1e-3, **arguments)
    scheduler = fused_clr.CyclicLR(optimizer, **CYCLE)
    return Stepper(optimizer.step, None if request.captured else scheduler.step, keeps=scheduler)


REFERENCE = Peer("torch fused", _torch_fused, captured_remark=FROZEN)
OURS = Peer("fused-clr", fused_clr_pair)
TORCH_CAPTURABLE = Peer("torch capturable tensor-lr", _torch_capturable, captured_remark=FROZEN_BETA1)
TORCH_PEERS = (
    Peer("torch foreach", _torch_foreach, captured_remark=FROZEN),
    TORCH_CAPTURABLE,
    Peer("torch fused tensor-lr", _torch_fused_tensor_lr, captured_remark=FROZEN_BETA1),
    Peer(
        "torch.compile",
        _torch_compiled,
        remark=f"{NO_MOMENTUM} (a new one would compile anew)",
        captured_remark="CyclicLR writes lr from the host between replays",
        compiles=True,
    ),
)


def all_peers() -> tuple[Peer, ...]:
    """Every peer, the reference first."""
    from bench.external_peers import EXTERNAL_PEERS

    return (REFERENCE, OURS, *TORCH_PEERS, *EXTERNAL_PEERS)


def find_peers(pattern: str, peers: Iterable[Peer]) -> list[Peer]:
    """The peers whose name holds a match of ``pattern``, and the reference, without which there is no ratio."""
    return [peer for peer in peers if peer.name == REFERENCE.name or re.search(pattern, peer.name)]
