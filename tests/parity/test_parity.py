"""Both backends against torch's pair, step by step, over what users combine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fused_clr._device.step_plan import LaunchConfig
from fused_clr._device.triton import TritonEngine
from tests.cases import (
    OPTIMIZERS,
    SCHEDULES,
    SGD,
    OptimizerCase,
    ScheduleCase,
    by_optimizer,
    by_rows,
    covering,
    in_turn,
    momenta_of,
)
from tests.helpers.tolerances import AFTER_STEPS, SCHEDULED

# In the interpreter, which takes its time, two cycles.
STEPS = 55
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
        self,
        is_ours: bool,
        optimizer_case: OptimizerCase,
        schedule_case: ScheduleCase,
        dtype: torch.dtype,
        options: dict[str, Any],
        is_wide: bool = False,
    ) -> None:
        self.rounded_to = dtype if is_wide else None
        generator = torch.Generator().manual_seed(3)
        self.mixes_layouts = dtype in (torch.float32, torch.float64)
        self.groups = [[torch.nn.Parameter(make(dtype, generator)) for make in makers] for makers in TENSORS]
        self.params = [param for group in self.groups for param in group]
        for param in self.params if is_wide else ():
            param.data = param.data.float()
        float16 = optimizer_case.float16 if dtype == torch.float16 else {}
        groups = [
            {"params": self.groups[0], **float16},
            {"params": self.groups[1], **optimizer_case.settings, **float16},
        ]
        self.optimizer = (optimizer_case.ours if is_ours else optimizer_case.torch_peer)(groups, **options)
        scheduler = schedule_case.ours if is_ours else schedule_case.torch_peer
        self.scheduler = scheduler(self.optimizer, **schedule_case.arguments)

    def step(self, number: int) -> list[Any]:
        generator = torch.Generator().manual_seed(100 + number)
        for index, param in enumerate(self.params):
            gradient = torch.randn(param.shape, generator=generator).to(self.rounded_to or param.dtype).to(param.dtype)
            # Every other gradient is contiguous where its parameter is not: the layouts differ.
            if number % 2 or not self.mixes_layouts:
                gradient = torch.empty_like(param).copy_(gradient).detach()
            skipped = index in NO_GRADIENT and number % NO_GRADIENT[index] == 0
            param.grad = None if skipped else gradient
        self.optimizer.step()
        for param in self.params if self.rounded_to else ():
            for tensor in (param.data, *self.optimizer.state[param].values()):
                tensor.copy_(tensor.to(self.rounded_to))
        told = [[group["lr"], *momenta_of(group)] for group in self.optimizer.param_groups]
        self.scheduler.step()
        return told


def torch_run(
    optimizer_case: OptimizerCase, schedule_case: ScheduleCase, dtype: torch.dtype, options: dict[str, Any]
) -> Run:
    """Torch's pair, over the same tensors."""
    # Torch's fused CPU kernel ignores layouts, so it is no peer where they are mixed; its plain one rounds every
    # intermediate result to 16 bits, so it is none there. Its fused SGD is wrong in 16 bits: the plain one is given
    # float32, and what it stores is rounded.
    low_precision = dtype in (torch.float16, torch.bfloat16)
    is_wide = low_precision and optimizer_case is SGD
    return Run(
        False, optimizer_case, schedule_case, dtype, {**options, "fused": low_precision and not is_wide}, is_wide
    )


# Any two of them meet: a dtype, an optimizer, and its flags off and on.
FACTORS: list[Any] = [list(AFTER_STEPS), list(OPTIMIZERS.values()), [False, True], [False, True]]
# Every schedule, with them in turn. Random programs and `test_state_machine` mix all of them.
ROWS = [(schedule, *row) for schedule, row in in_turn(list(SCHEDULES.values()), covering(*FACTORS))]


@by_rows("schedule_case dtype optimizer_case first second", ROWS)
def test_step_by_step(
    backend: str,
    schedule_case: ScheduleCase,
    dtype: torch.dtype,
    optimizer_case: OptimizerCase,
    first: bool,
    second: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Small chunks and few programs: tensors have several chunks, and programs loop over them.
    config = LaunchConfig(block_size=BLOCK_SIZE, num_warps=4, lanes=8, programs_per_multiprocessor=2)
    monkeypatch.setattr(TritonEngine, "config", config)
    options = optimizer_case.options(first, second)
    ours = Run(True, optimizer_case, schedule_case, dtype, options)
    theirs = torch_run(optimizer_case, schedule_case, dtype, options)
    for number in range(schedule_case.steps if backend == "triton" else STEPS):
        torch.testing.assert_close(
            torch.tensor(ours.step(number), dtype=torch.float64),
            torch.tensor(theirs.step(number), dtype=torch.float64),
            rtol=SCHEDULED.rtol,
            atol=SCHEDULED.atol,
        )
    tolerance = AFTER_STEPS[dtype]
    for mine, torchs in zip(ours.params, theirs.params, strict=True):
        torch.testing.assert_close(mine, torchs.to(dtype), rtol=tolerance.rtol, atol=tolerance.atol)
        state, torch_state = ours.optimizer.state[mine], theirs.optimizer.state[torchs]
        assert set(state) == set(torch_state)
        assert state.get("step") == torch_state.get("step")
        for key in set(state) - {"step"}:
            expected = torch_state[key].to(dtype)
            torch.testing.assert_close(state[key], expected, rtol=tolerance.rtol, atol=tolerance.atol)
            assert state[key].dtype == dtype


@by_optimizer
def test_complex_parameters(backend: str, optimizer_case: OptimizerCase) -> None:
    results = []
    for kind in (optimizer_case.ours, optimizer_case.torch_peer):
        generator = torch.Generator().manual_seed(0)
        param = torch.nn.Parameter(torch.randn(37, generator=generator, dtype=torch.complex64))
        optimizer = kind([param], lr=0.1, weight_decay=0.1, **optimizer_case.options(True))
        for number in range(20):
            gradient = torch.randn(37, generator=generator, dtype=torch.complex64)
            # A conjugated tensor's memory does not hold what it says.
            conjugated = gradient.conj() if number % 3 else gradient
            # Some of torch's optimizers refuse one.
            param.grad = conjugated if kind is optimizer_case.ours else conjugated.resolve_conj()
            optimizer.step()
        results.append(param.detach())
    torch.testing.assert_close(*results, rtol=AFTER_STEPS[torch.float32].rtol, atol=AFTER_STEPS[torch.float32].atol)


@by_optimizer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_gradients_of_another_dtype(backend: str, optimizer_case: OptimizerCase, dtype: torch.dtype) -> None:
    """Torch itself raises an error: it is given them as float32."""
    param, twin = (torch.nn.Parameter(torch.ones(300)) for _ in range(2))
    param.grad_dtype = None
    optimizer, torch_optimizer = optimizer_case.ours([param], lr=0.1), optimizer_case.torch_peer([twin], lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for number in range(20):
        gradient = torch.randn(300, generator=generator).to(dtype)
        # The dtype may change from step to step.
        param.grad = gradient if number % 4 else gradient.float()
        twin.grad = gradient.float()
        optimizer.step()
        torch_optimizer.step()
    torch.testing.assert_close(param, twin, rtol=AFTER_STEPS[torch.float32].rtol, atol=AFTER_STEPS[torch.float32].atol)


@by_optimizer
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_expanded_gradients(backend: str, optimizer_case: OptimizerCase, factor: float) -> None:
    results = []
    for kind in (optimizer_case.ours, optimizer_case.torch_peer):
        param = torch.nn.Parameter(torch.ones(5, 3))
        is_ours = kind is optimizer_case.ours
        optimizer = kind([param], lr=0.1, **({"max_grad_norm": factor} if is_ours else {}))
        for _ in range(5):
            param.grad = torch.linspace(-1, 1, 3).expand(5, 3)
            if not is_ours:
                param.grad = param.grad.clone()
                torch.nn.utils.clip_grad_norm_([param], factor)
            optimizer.step()
        results.append(param.detach())
    torch.testing.assert_close(*results)


# The interpreter's numpy says when infinities meet.
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
@by_optimizer
def test_infinite_values_spread_no_further_than_in_torch(backend: str, optimizer_case: OptimizerCase) -> None:
    results = []
    for kind in (optimizer_case.ours, optimizer_case.torch_peer):
        param = torch.nn.Parameter(torch.tensor([1.0, -torch.inf, 1.0, 1.0]))
        optimizer = kind([param], lr=0.1)
        # The square of 1e30 overflows: its second moment is infinite from then on, and its element stands still.
        for gradient in ([1.0, 0.0, 1e30, 1.0], [1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 1.0, torch.nan]):
            param.grad = torch.tensor(gradient)
            optimizer.step()
        results.append(param.detach())
    torch.testing.assert_close(*results, equal_nan=True)
