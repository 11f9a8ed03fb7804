"""The optimizers that are compared, each with a scheduler: torch's pair is the reference, the others its peers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch.optim.lr_scheduler import CyclicLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fused_clr
from bench import package_internals
from bench.cases import MAX_GRAD_NORM

CYCLE: dict[str, Any] = {"base_lr": 2.5e-4, "max_lr": 1e-3, "step_size_up": 2000, "mode": "triangular2"}
BETAS = (0.9, 0.999)
EMA_DECAY = 0.999
NO_MOMENTUM = "no CyclicLR momentum: beta1 is constant"
FROZEN_BETA1 = "beta1 is frozen in the graph; CyclicLR writes lr from the host between replays"
FROZEN = "lr and beta1 are frozen in the graph"
FLOAT32_MOMENTS = "one step count per group; float32 moments for bf16 parameters"


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


@dataclass(frozen=True)
class Stepper:
    """One training step, without the model.

    Attributes:
        update: Clips and updates. In captured mode, this is what the graph holds.
        schedule: Advances the schedule from the host; None if nothing has to be done there.
        context: Entered around what is timed, and not timed itself: it replaces the launches by nothing.
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
        needs_cuda: Whether it runs on a GPU alone.
        compiles: Whether it compiles code for each tensor, which takes minutes for hundreds.
        reference: Torch's pair that it is compared with; None: REFERENCE.
        states: Its state tensors.
    """

    name: str
    build: Callable[[Request], Stepper]
    remark: str = ""
    captured_remark: str = ""
    requires: str = "torch"
    needs_cuda: bool = False
    compiles: bool = False
    reference: Peer | None = None
    states: int = 2

    @property
    def is_missing(self) -> bool:
        """Whether the module it needs is not installed."""
        return importlib.util.find_spec(self.requires) is None

    def remark_in(self, mode: str) -> str:
        """What is to be said about its results in a mode."""
        remarks = [self.remark, self.captured_remark if mode.startswith("captured") else ""]
        return "; ".join(remark for remark in remarks if remark)


def _with_clipping(request: Request, step: Callable[[], object]) -> Callable[[], object]:
    if not request.clips:
        return step
    params = [param for group in request.groups for param in group["params"]]

    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(params, MAX_GRAD_NORM)
        step()

    return clip_and_step


def _tensor_lr(request: Request) -> torch.Tensor:
    return torch.tensor(1e-3, dtype=torch.float32, device=request.device)


def _pair(request: Request, optimizer: torch.optim.Optimizer, lr_is_tensor: bool = False, **cycle: Any) -> Stepper:
    scheduler = CyclicLR(optimizer, **CYCLE, **cycle)
    # A float lr is a constant of the graph: to write it between replays would change nothing.
    is_frozen = request.captured and not lr_is_tensor
    # The scheduler has wrapped optimizer.step, which fails once the scheduler is gone.
    return Stepper(_with_clipping(request, optimizer.step), None if is_frozen else scheduler.step, keeps=scheduler)


def _torch_pair(*, lr_is_tensor: bool = False, **arguments: Any) -> Callable[[Request], Stepper]:
    def build(request: Request) -> Stepper:
        lr = _tensor_lr(request) if lr_is_tensor else 1e-3
        capturable = {"capturable": True} if request.captured else {}
        return _pair(request, torch.optim.Adam(request.groups, lr=lr, **(capturable | arguments)), lr_is_tensor)

    return build


def _torch_compiled(request: Request) -> Stepper:
    # A tensor lr, or each new value would compile anew; foreach takes one on a GPU alone, and capturable.
    on_gpu = request.device.type == "cuda"
    optimizer = torch.optim.Adam(request.groups, lr=_tensor_lr(request), foreach=on_gpu, capturable=on_gpu)
    scheduler = CyclicLR(optimizer, **CYCLE, cycle_momentum=False)
    return Stepper(_with_clipping(request, torch.compile(optimizer.step)), scheduler.step)


def _torch_sgd(request: Request) -> Stepper:
    return _pair(request, torch.optim.SGD(request.groups, lr=1e-3, momentum=0.9, fused=True))


def _torch_ema(request: Request) -> Stepper:
    stepper = REFERENCE.build(request)
    module = torch.nn.ParameterList(param for group in request.groups for param in group["params"])
    averaged = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))

    def update() -> None:
        stepper.update()
        averaged.update_parameters(module)

    return replace(stepper, update=update)


def _fused_clr(request: Request, kind: Any = fused_clr.FusedAdam, **options: Any) -> Stepper:
    clipping: dict[str, Any] = {"max_grad_norm": MAX_GRAD_NORM} if request.clips else {}
    optimizer = kind(request.groups, lr=1e-3, **clipping, **options)
    scheduler = fused_clr.CyclicLR(optimizer, **CYCLE)
    # In a graph, the schedule needs nothing from the host.
    return Stepper(optimizer.step, None if request.captured else scheduler.step, keeps=scheduler)


def _fused_clr_without_launches(request: Request) -> Stepper:
    with package_internals.triton_backend():
        stepper = _fused_clr(request)
    return replace(stepper, context=package_internals.launches_nothing)


def _torch_without_kernel(request: Request) -> Stepper:
    return replace(REFERENCE.build(request), context=package_internals.torch_launches_nothing)


def _optimi(request: Request) -> Stepper:
    optimizer = import_module("optimi").Adam(request.groups, lr=1e-3, betas=BETAS, eps=1e-8, kahan_sum=False)
    return _pair(request, optimizer, cycle_momentum=False)


def _fused_adam_of(module: str) -> Callable[[Request], Stepper]:
    def build(request: Request) -> Stepper:
        arguments = {"adam_w_mode": False, "capturable": request.captured}
        optimizer = import_module(module).FusedAdam(request.groups, lr=1e-3, **arguments)
        return _pair(request, optimizer, lr_is_tensor=request.captured)

    return build


def _bitsandbytes(request: Request) -> Stepper:
    return _pair(request, import_module("bitsandbytes").optim.Adam32bit(request.groups, lr=1e-3))


def _heavyball(request: Request) -> Stepper:
    # It takes the gradients away unless told otherwise.
    arguments = {"betas": BETAS, "eps": 1e-8, "consume_grad": False}
    return _pair(request, import_module("heavyball").AdamW(request.groups, lr=1e-3, **arguments))


REFERENCE = Peer("torch fused", _torch_pair(fused=True), "", FROZEN)
OURS = Peer("fused-clr", _fused_clr)
TORCH_CAPTURABLE = Peer(
    "torch capturable tensor-lr",
    _torch_pair(foreach=True, capturable=True, lr_is_tensor=True),
    captured_remark=FROZEN_BETA1,
    needs_cuda=True,
)
OPTIMI = f"{NO_MOMENTUM}; one step count per group; no Kahan sum"
OPTIMI_CAPTURED = "lr, beta1 and the step count are frozen in the graph"
COMPILED = f"{NO_MOMENTUM} (a new one would compile anew)"
COMPILED_CAPTURED = "CyclicLR writes lr from the host between replays"
BITSANDBYTES = "32-bit moments; one launch per tensor"
HEAVYBALL = "eps is a lower bound of the root, not added to it; stochastic rounding for bf16; compiled"
TRANSFORMER_ENGINE = _fused_adam_of("transformer_engine.pytorch.optimizers")
TORCH_SGD = Peer("torch SGD fused", _torch_sgd, "", "lr and momentum are frozen in the graph", states=1)
SGD = "momentum cycles; compared with torch's SGD(fused=True) and CyclicLR"
TORCH_EMA = Peer("torch fused EMA", _torch_ema, "", f"{FROZEN}, and so is the count of averages", states=3)
EMA = "an EMA of the parameters at every step; compared with torch's pair and AveragedModel"
PEERS = (
    OURS,
    Peer("SGD fused-clr", partial(_fused_clr, kind=fused_clr.FusedSGD), SGD, reference=TORCH_SGD, states=1),
    Peer(
        "EMA fused-clr",
        partial(_fused_clr, averaging=fused_clr.Averaging.ema(EMA_DECAY)),
        EMA,
        reference=TORCH_EMA,
        states=3,
    ),
    Peer("torch foreach", _torch_pair(foreach=True), "", FROZEN),
    TORCH_CAPTURABLE,
    Peer("torch fused tensor-lr", _torch_pair(fused=True, lr_is_tensor=True), "", FROZEN_BETA1),
    Peer("torch.compile", _torch_compiled, COMPILED, COMPILED_CAPTURED, compiles=True),
    Peer("torch-optimi", _optimi, OPTIMI, OPTIMI_CAPTURED, "optimi"),
    Peer("apex", _fused_adam_of("apex.optimizers"), FLOAT32_MOMENTS, FROZEN_BETA1, "apex", True),
    Peer("TransformerEngine", TRANSFORMER_ENGINE, FLOAT32_MOMENTS, FROZEN_BETA1, "transformer_engine", True),
    Peer("bitsandbytes", _bitsandbytes, BITSANDBYTES, f"{FROZEN}, and so is the step count", "bitsandbytes"),
    Peer("heavyball", _heavyball, HEAVYBALL, FROZEN, "heavyball", compiles=True),
)
# Of host mode on the CPU. On a GPU nothing is replaced.
WITHOUT_LAUNCHES = "triton backend; its launch, Triton's launcher included, replaced by nothing"
HOST_PEERS = (
    Peer(OURS.name, _fused_clr_without_launches, WITHOUT_LAUNCHES),
    Peer("torch fused without kernel", _torch_without_kernel, "torch._fused_adam_ replaced by nothing"),
)
