"""Whole training loops, forward and backward included: how much of a step's time the optimizer gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.interleave import run_interleaved
from bench.peers import OURS, REFERENCE, TORCH_CAPTURABLE, NotAvailableError, Peer, Request, Stepper
from bench.runner import Settings, row_of_error
from bench.schema import Row, figures
from bench.timing import HostClock, replay_of, warm_up_on_side_stream

CONTEXT = 64
VOCABULARY = 512


class Block(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """float[batch, tokens, width] to the same."""
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).reshape(batch, tokens, width))
        out: Tensor = x + self.feed_forward(self.norm2(x))
        return out


class SmallGpt(nn.Module):
    """A language model of 53 tensors."""

    def __init__(self, width: int = 128, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Parameter(torch.randn(CONTEXT, width) * 0.02)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64[batch, CONTEXT] to logits, float[batch, CONTEXT, VOCABULARY]."""
        logits: Tensor = self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions)))
        return logits


def small_mlp(device: torch.device) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A classifier of 6 tensors and its loss on one batch."""
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)).to(device)
    inputs, targets = torch.randn(128, 64, device=device), torch.randint(10, (128,), device=device)
    return model, lambda: F.cross_entropy(model(inputs), targets)


def small_gpt(device: torch.device) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A small GPT and its loss on one batch."""
    model = SmallGpt().to(device)
    tokens = torch.randint(VOCABULARY, (16, CONTEXT + 1), device=device)

    def loss() -> Tensor:
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    return model, loss


MODELS = {"loop small-mlp": small_mlp, "loop small-gpt": small_gpt}


@dataclass(frozen=True)
class Loop:
    """A way to run a training loop. With ``captured``, forward, backward and update are one graph."""

    peer: Peer
    captured: bool

    @property
    def name(self) -> str:
        """What it is called in results; the eager reference as everywhere."""
        return f"{self.peer.name}, captured loop" if self.captured else self.peer.name


LOOPS = (
    Loop(REFERENCE, captured=False),
    Loop(OURS, captured=False),
    Loop(TORCH_CAPTURABLE, captured=True),
    Loop(OURS, captured=True),
)


def make_loop(loop: Loop, model_name: str, device: torch.device) -> Stepper:
    """A stepper whose update is forward, backward and the optimizer's step; captured where that is asked for."""
    if loop.captured and device.type != "cuda":
        raise NotAvailableError("needs CUDA")
    torch.manual_seed(0)
    model, compute_loss = MODELS[model_name](device)
    params = list(model.parameters())
    optimizer = loop.peer.build(Request([{"params": params}], device, captured=loop.captured))

    def train_step() -> None:
        # In a graph the new gradients are memory of its own, at the same addresses in every replay.
        for param in params:
            param.grad = None
        compute_loss().backward()
        optimizer.update()

    stepper = Stepper(train_step, optimizer.schedule)
    if not loop.captured:
        return stepper
    warm_up_on_side_stream(stepper, device)
    return replay_of(stepper)


def measure_loop(model_name: str, settings: Settings) -> list[Row]:
    """One row per loop: wall time of a whole training step, the loops in turn."""
    clock = HostClock(settings.device, settings.round_seconds)
    builds = {loop.name: partial(make_loop, loop, model_name, settings.device) for loop in LOOPS}
    seconds, errors = run_interleaved(builds, clock, settings.rounds)
    rows = []
    for loop in LOOPS:
        make_row = partial(Row, case=model_name, mode="loop", peer=loop.name)
        if loop.name in errors:
            rows.append(row_of_error(make_row, errors[loop.name]))
        else:
            remark = loop.peer.remark_in("captured" if loop.captured else "eager")
            rows.append(make_row(remark=remark, **figures(seconds[loop.name], seconds.get(REFERENCE.name))))
    return rows
