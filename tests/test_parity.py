"""Both backends against torch's pair, step by step, over what users combine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from fused_clr import CyclicLR, FusedAdam, FusedAdamW
from fused_clr.backends.step_launches import LaunchConfig
from fused_clr.backends.triton import TritonEngine

from .tolerances import AFTER_STEPS, SCHEDULED

# Two cycles at least; the interpreter takes its time.
STEPS = {"cpu": 55, "triton": 24}
BLOCK_SIZE = 256


def dense(*shape: int) -> Any:
    return lambda dtype, g: torch.randn(shape, generator=g).to(dtype)


def unaligned(numel: int) -> Any:
    """A parameter that starts one element after an aligned address."""
    return lambda dtype, g: torch.randn(numel + 1, generator=g).to(dtype)[1:]


def channels_last(dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
    return torch.randn(2, 3, 5, 7, generator=g).to(dtype).contiguous(memory_format=torch.channels_last)


def transposed(dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
    return torch.randn(33, 9, generator=g).to(dtype).t()


# Two groups: odd sizes, and every layout.
TENSORS = (
    (dense(1), dense(63), dense(BLOCK_SIZE - 1), dense(BLOCK_SIZE), dense(BLOCK_SIZE + 1), dense()),
    (dense(500), dense(0), channels_last, transposed, unaligned(300), dense(3, 1)),
)
# Never, or on some steps only, with a gradient.
NO_GRADIENT = {3: 2, 7: 5, 10: 3}


class Run:
    """An optimizer and its scheduler over the tensors above."""

    def __init__(
        self, kind: Any, scheduler: Any, dtype: torch.dtype, adam: dict[str, Any], cyclic: dict[str, Any]
    ) -> None:
        generator = torch.Generator().manual_seed(3)
        self.mixes_layouts = dtype in (torch.float32, torch.float64)
        self.groups = [[torch.nn.Parameter(make(dtype, generator)) for make in makers] for makers in TENSORS]
        self.params = [param for group in self.groups for param in group]
        self.optimizer = kind(
            [{"params": self.groups[0]}, {"params": self.groups[1], "weight_decay": 0.03, "betas": (0.9, 0.98)}], **adam
        )
        self.scheduler = scheduler(self.optimizer, **cyclic)

    def step(self, number: int) -> list[Any]:
        generator = torch.Generator().manual_seed(100 + number)
        for index, param in enumerate(self.params):
            gradient = torch.randn(param.shape, generator=generator).to(param.dtype)
            # Every other gradient is contiguous where its parameter is not: the layouts differ.
            if number % 2 or not self.mixes_layouts:
                gradient = torch.empty_like(param).copy_(gradient).detach()
            skipped = index in NO_GRADIENT and number % NO_GRADIENT[index] == 0
            param.grad = None if skipped else gradient
        self.optimizer.step()
        told = [[group["lr"], group["betas"][0], group["betas"][1]] for group in self.optimizer.param_groups]
        self.scheduler.step()
        return told


# Over mode, cycle_momentum, weight decay form, amsgrad, maximize and dtype: a covering selection of rows.
COVERING = [
    ("triangular", True, "l2", False, False, torch.float32),
    ("triangular", False, "decoupled", True, True, torch.float64),
    ("triangular2", True, "decoupled", True, False, torch.float32),
    ("triangular2", False, "l2", False, True, torch.float64),
    ("exp_range", True, "l2", True, True, torch.float32),
    ("exp_range", False, "decoupled", False, False, torch.float32),
    ("exp_range", True, "decoupled", False, True, torch.float64),
    ("triangular", True, "l2", True, False, torch.bfloat16),
    ("triangular2", False, "decoupled", False, True, torch.bfloat16),
    ("exp_range", True, "l2", False, False, torch.bfloat16),
    ("triangular", False, "decoupled", False, False, torch.float16),
    ("triangular2", True, "l2", True, True, torch.float16),
    ("exp_range", True, "decoupled", True, False, torch.float16),
]


@pytest.mark.parametrize(
    ("mode", "cycle_momentum", "decay", "amsgrad", "maximize", "dtype"),
    COVERING,
    ids=["-".join(map(str, row)).replace("torch.", "") for row in COVERING],
)
def test_step_by_step(
    backend: str,
    mode: str,
    cycle_momentum: bool,
    decay: str,
    amsgrad: bool,
    maximize: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Small chunks and few programs: tensors have several chunks, and programs loop over them.
    config = LaunchConfig(block_size=BLOCK_SIZE, num_warps=4, lanes=8, programs_per_multiprocessor=2)
    monkeypatch.setattr(TritonEngine, "config", config)
    cyclic = {
        "base_lr": [1e-4, 1e-3],
        "max_lr": [1e-2, 2e-2],
        "step_size_up": 7,
        "step_size_down": 4.5,
        "mode": mode,
        "gamma": 0.97,
        "cycle_momentum": cycle_momentum,
    }
    low_precision = dtype in (torch.float16, torch.bfloat16)
    # In float16 small second moments underflow, and the default eps with them: a division by 0, in torch too.
    adam = {"amsgrad": amsgrad, "maximize": maximize, "eps": 1e-3 if dtype == torch.float16 else 1e-8}
    ours = Run(FusedAdamW if decay == "decoupled" else FusedAdam, CyclicLR, dtype, adam, cyclic)
    kind = torch.optim.AdamW if decay == "decoupled" else torch.optim.Adam
    # Torch's fused CPU kernel ignores layouts, so it is no peer where they are mixed; its plain one rounds every
    # intermediate result to 16 bits, so it is none there.
    theirs = Run(kind, lr_scheduler.CyclicLR, dtype, {**adam, "fused": low_precision}, cyclic)
    for number in range(STEPS[backend]):
        torch.testing.assert_close(
            torch.tensor(ours.step(number), dtype=torch.float64),
            torch.tensor(theirs.step(number), dtype=torch.float64),
            rtol=SCHEDULED.rtol,
            atol=SCHEDULED.atol,
        )
    tolerance = AFTER_STEPS[dtype]
    for mine, torchs in zip(ours.params, theirs.params, strict=True):
        torch.testing.assert_close(mine, torchs, rtol=tolerance.rtol, atol=tolerance.atol)
        state, torch_state = ours.optimizer.state[mine], theirs.optimizer.state[torchs]
        assert set(state) == set(torch_state)
        assert state["step"] == torch_state["step"]
        for key in set(state) - {"step"}:
            torch.testing.assert_close(state[key], torch_state[key], rtol=tolerance.rtol, atol=tolerance.atol)
            assert state[key].dtype == dtype


def test_complex_parameters(backend: str) -> None:
    results = []
    for kind in (FusedAdam, torch.optim.Adam):
        generator = torch.Generator().manual_seed(0)
        param = torch.nn.Parameter(torch.randn(37, generator=generator, dtype=torch.complex64))
        optimizer = kind([param], lr=0.1, weight_decay=0.1, amsgrad=True)
        for number in range(20):
            gradient = torch.randn(37, generator=generator, dtype=torch.complex64)
            # A conjugated tensor's memory does not hold what it says.
            param.grad = gradient.conj() if number % 3 else gradient
            optimizer.step()
        results.append(param.detach())
    torch.testing.assert_close(*results, rtol=AFTER_STEPS[torch.float32].rtol, atol=AFTER_STEPS[torch.float32].atol)


def test_float32_parameters_with_bfloat16_gradients(backend: str) -> None:
    param, twin = (torch.nn.Parameter(torch.ones(300)) for _ in range(2))
    param.grad_dtype = None
    optimizer, torch_optimizer = FusedAdam([param], lr=0.1), torch.optim.Adam([twin], lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for number in range(20):
        gradient = torch.randn(300, generator=generator).bfloat16()
        # The dtype may change from step to step.
        param.grad = gradient if number % 4 else gradient.float()
        twin.grad = gradient.float()
        optimizer.step()
        torch_optimizer.step()
    torch.testing.assert_close(param, twin, rtol=AFTER_STEPS[torch.float32].rtol, atol=AFTER_STEPS[torch.float32].atol)


# The interpreter's numpy says when infinities meet.
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
def test_infinite_values_spread_no_further_than_in_torch(backend: str) -> None:
    results = []
    for kind in (FusedAdam, torch.optim.Adam):
        param = torch.nn.Parameter(torch.tensor([1.0, -torch.inf, 1.0, 1.0]))
        optimizer = kind([param], lr=0.1)
        # The square of 1e30 overflows: its second moment is infinite from then on, and its element stands still.
        for gradient in ([1.0, 0.0, 1e30, 1.0], [1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 1.0, torch.nan]):
            param.grad = torch.tensor(gradient)
            optimizer.step()
        results.append(param.detach())
    torch.testing.assert_close(*results, equal_nan=True)
