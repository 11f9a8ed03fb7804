"""Whole optimizer steps on compiled kernels equal torch's pair, with no fault and no race."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from fused_clr import Averaging, FusedAdam, schedules, testing
from fused_clr._device.chunks import block_size_of
from fused_clr._device.step_plan import CONFIGS, LaunchConfig, config_for_device
from fused_clr._device.triton import TritonEngine
from fused_clr.kernels import layout
from tests.cases import ADAM, OPTIMIZERS, SCHEDULES, OptimizerCase, ScheduleCase, by_rows, covering
from tests.helpers.many_programs import engine_of
from tests.helpers.pairs import (
    assert_same_params,
    make_both,
    make_pair,
    record_step,
    rewrite_gradients,
    set_gradients,
    step,
)
from tests.helpers.schedules import CYCLIC, once, shape_segments
from tests.helpers.tolerances import AFTER_STEPS, SCHEDULED
from tests.parity.test_parity import Run, torch_run
from tests.ptx.device import Device, adapted

pytestmark = [pytest.mark.ptx, pytest.mark.usefixtures("device")]

# As what users get, a quarter as large: 8 elements a thread.
BLOCK_SIZE = 512
SMALL = LaunchConfig(BLOCK_SIZE, programs_per_multiprocessor=2)
# Below, at and above one chunk, and several.
SHAPES = ((1,), (BLOCK_SIZE - 1,), (BLOCK_SIZE,), (2 * BLOCK_SIZE + 5,))


@pytest.fixture(autouse=True)
def small_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonEngine, "config", SMALL)


def assert_same_steps(ours: Any, theirs: Any, steps: int, max_norm: float | None = None) -> None:
    """Takes steps with both, and compares what they tell and where they end."""
    for number in range(steps):
        for pair in (ours, theirs):
            set_gradients(pair.params, number)
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(theirs.params, max_norm)
        step(ours)
        step(theirs)
        assert ours.scheduler.get_last_lr() == pytest.approx(theirs.scheduler.get_last_lr(), rel=SCHEDULED.rtol)
    assert_same_params(ours, theirs, *AFTER_STEPS[torch.float32][:2])


# -- modes, dtypes, options and layouts --------------------------------------------------------------------------------
# Any two meet of a dtype, an optimizer, and its flags; schedules in turn. `make ptx` has those of `tests/parity` too.
ROWS = covering(list(AFTER_STEPS), list(OPTIMIZERS.values()), [False, True], [False, True])
TURNS = list(SCHEDULES.values()) * len(ROWS)


@by_rows("schedule_case dtype optimizer_case first second", [(TURNS[i], *row) for i, row in enumerate(ROWS)])
def test_every_dtype_and_flag(
    schedule_case: ScheduleCase, dtype: torch.dtype, optimizer_case: OptimizerCase, first: bool, second: bool
) -> None:
    """Odd sizes, every layout, missing gradients, and gradients of another layout."""
    options = optimizer_case.options(first, second)
    ours = Run(True, optimizer_case, schedule_case, dtype, options)
    theirs = torch_run(optimizer_case, schedule_case, dtype, options)
    for number in range(3):
        told = [torch.tensor(run.step(number), dtype=torch.float64) for run in (ours, theirs)]
        torch.testing.assert_close(*told, rtol=SCHEDULED.rtol, atol=SCHEDULED.atol)
    rtol, atol, _ = AFTER_STEPS[dtype]
    for mine, torchs in zip(ours.params, theirs.params, strict=True):
        torch.testing.assert_close(mine, torchs.to(dtype), rtol=rtol, atol=atol)
        state, torch_state = ours.optimizer.state[mine], theirs.optimizer.state[torchs]
        assert set(state) == set(torch_state)
        for key in state:
            expected = torch_state[key] if key == "step" else torch_state[key].to(dtype)
            torch.testing.assert_close(state[key], expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("dtype", "device"), [(torch.float32, 90), (torch.bfloat16, 80)], indirect=["device"], ids=["sm_90", "sm_80"]
)
def test_the_shipped_configuration(dtype: torch.dtype, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for_device()
    monkeypatch.setattr(TritonEngine, "config", config)
    results = []
    for kind in (FusedAdam, torch.optim.Adam):
        generator = torch.Generator().manual_seed(0)
        sizes = (7, config.block_size, config.block_size + 1)
        params = [torch.nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n in sizes]
        optimizer = kind(params, lr=0.01, **({"max_grad_norm": 1e9} if kind is FusedAdam else {"fused": True}))
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(dtype)
        optimizer.step()
        results.append(params)
    rtol, atol, _ = AFTER_STEPS[dtype]
    for mine, torchs in zip(*results, strict=True):
        torch.testing.assert_close(mine, torchs, rtol=rtol, atol=atol)
    assert device.launches == ["reevaluate_kernel", "norm_kernel", "step_kernel"]


@pytest.mark.parametrize("moved", ["param", "grad", "exp_avg", "exp_avg_sq"])
def test_tensors_off_an_aligned_address(moved: str) -> None:
    """An element after an address of 16 bytes: no 128-bit access may be made."""
    numel = 2 * BLOCK_SIZE + 1
    values = {name: torch.linspace(1, 2, numel) for name in ("param", "grad", "exp_avg", "exp_avg_sq")}

    def placed(name: str) -> torch.Tensor:
        return torch.cat([torch.zeros(int(name == moved)), values[name]])[int(name == moved) :]

    param, twin = torch.nn.Parameter(placed("param")), torch.nn.Parameter(values["param"].clone())
    param.grad, twin.grad = placed("grad"), values["grad"].clone()
    optimizer, theirs = FusedAdam([param], lr=0.1, max_grad_norm=1e9), torch.optim.Adam([twin], lr=0.1)
    for one, own in ((optimizer, param), (theirs, twin)):
        one.state[own] = {"step": torch.tensor(3.0)}
        one.state[own] |= {name: placed(name) if own is param else values[name].clone() for name in list(values)[2:]}
    optimizer.step()
    theirs.step()
    assert optimizer.state[param]["exp_avg"].data_ptr() % 16 == 4 * (moved == "exp_avg")
    torch.testing.assert_close(param, twin, rtol=1e-6, atol=1e-7)


def test_four_dtypes_and_gradients_of_a_fifth_combination() -> None:
    """A launch for each; the last one advances the schedule."""
    dtypes = [*AFTER_STEPS, torch.float32]
    ours: list[Any] = [torch.nn.Parameter(torch.linspace(1, 2, BLOCK_SIZE + 3).to(dtype)) for dtype in dtypes]
    theirs: list[Any] = [torch.nn.Parameter(param.detach().clone()) for param in ours]
    ours[-1].grad_dtype = None
    options: dict[str, Any] = {"lr": 0.01, "eps": 1e-3}
    optimizer = FusedAdam(ours, schedule=schedules.Cyclic(0.01, 0.02, 3), max_grad_norm=1.0, **options)
    others = [torch.optim.Adam([param], fused=param.element_size() == 2, **options) for param in theirs]
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        for index, (param, twin) in enumerate(zip(ours, theirs, strict=True)):
            gradient = torch.randn(param.shape, generator=generator).to(param.dtype)
            gradient = gradient.bfloat16() if index == len(ours) - 1 else gradient
            param.grad, twin.grad = gradient, gradient.to(twin.dtype)
        norm = torch.stack([param.grad.double().square().sum() for param in ours]).sum().sqrt()
        lr, beta1 = optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"][0]
        for twin, other in zip(theirs, others, strict=True):
            twin.grad = (twin.grad.double() / (norm + 1e-6)).to(twin.dtype)
            other.param_groups[0].update(lr=lr, betas=(beta1, 0.999))
            other.step()
        optimizer.step()
        assert optimizer.live.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
    for param, twin in zip(ours, theirs, strict=True):
        # The clipped float64 gradient has the precision of the norm's float32 squares.
        rtol, atol, _ = AFTER_STEPS[torch.float32 if param.dtype == torch.float64 else param.dtype]
        torch.testing.assert_close(param, twin, rtol=rtol, atol=atol)


def test_complex_parameters() -> None:
    results = []
    for kind in (FusedAdam, torch.optim.Adam):
        generator = torch.Generator().manual_seed(0)
        param = torch.nn.Parameter(torch.randn(BLOCK_SIZE, generator=generator, dtype=torch.complex64))
        optimizer = kind([param], lr=0.1, amsgrad=True)
        for _ in range(3):
            gradient = torch.randn(BLOCK_SIZE, generator=generator, dtype=torch.complex64)
            # torch's refuses a conjugated one.
            param.grad = gradient.conj() if kind is FusedAdam else gradient.conj().resolve_conj()
            optimizer.step()
        results.append(param.detach())
    torch.testing.assert_close(*results, rtol=AFTER_STEPS[torch.float32].rtol, atol=AFTER_STEPS[torch.float32].atol)


# -- norms, scales and skips -------------------------------------------------------------------------------------------
def test_clipping() -> None:
    ours, theirs = make_pair(True, shapes=SHAPES, max_grad_norm=3.0), make_pair(False, shapes=SHAPES)
    assert_same_steps(ours, theirs, 3, max_norm=3.0)


def test_a_norm_of_no_gradients() -> None:
    pair = make_pair(True, max_grad_norm=3.0)
    pair.optimizer.step()
    assert float(pair.optimizer.live.grad_norm) == 0
    assert int(pair.optimizer.live.schedule_step) == 1


@pytest.mark.parametrize("advance", [False, True], ids=["stand-still", "advance"])
def test_a_gradscaler_that_overflows(advance: bool) -> None:
    """Clipped, written back, and skipped together."""
    ours = make_pair(True, shapes=SHAPES, max_grad_norm=2.0, write_back_grads=True, advance_schedule_on_skip=advance)
    theirs = make_pair(False, shapes=SHAPES)
    scalers = [torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3) for _ in range(2)]
    for number in range(4):
        for pair, scaler in zip((ours, theirs), scalers, strict=True):
            set_gradients(pair.params, number, size=float(scaler.scale(torch.ones(()))))
            if number == 2:
                gradient: Any = pair.params[1].grad
                gradient[-1] = math.inf
        scalers[1].unscale_(theirs.optimizer)
        torch.nn.utils.clip_grad_norm_(theirs.params, 2.0)
        for pair, scaler in zip((ours, theirs), scalers, strict=True):
            scaler.step(pair.optimizer)
            scaler.update()
        ours.scheduler.step()
        if number != 2 or advance:
            theirs.scheduler.step()
        if number != 2:
            for mine, torchs in zip(ours.params, theirs.params, strict=True):
                torch.testing.assert_close(mine.grad, torchs.grad, rtol=1e-5, atol=1e-7)
        assert ours.scheduler.get_last_lr() == pytest.approx(theirs.scheduler.get_last_lr(), rel=SCHEDULED.rtol)
    assert_same_params(ours, theirs, 1e-5, 1e-6)
    assert (int(ours.optimizer.live.applied_steps), int(ours.optimizer.live.skipped_steps)) == (3, 1)
    assert ours.optimizer.history(4).skipped.tolist() == [False, False, True, False]


def test_a_norm_that_is_not_finite_skips() -> None:
    pair = make_pair(True, max_grad_norm=1.0, skip_if_nonfinite=True)
    set_gradients(pair.params, 0)
    gradient: Any = pair.params[1].grad
    gradient[5] = math.nan
    before = [param.detach().clone() for param in pair.params]
    step(pair)
    assert all(torch.equal(a, b) for a, b in zip(before, pair.params, strict=True))
    assert (int(pair.optimizer.live.skipped_steps), int(pair.optimizer.live.schedule_step)) == (1, 0)


def test_the_norm_over_several_devices(device: Device) -> None:
    pair = make_pair(True, max_grad_norm=1.0)
    set_gradients(pair.params, 0)
    engine = engine_of(pair.optimizer)
    engine.prepare()
    engine.compute_norm(None, False)
    own = engine.sum_of_squares(None).clone()
    engine.set_sum_of_squares(own * 4, False)
    assert float(pair.optimizer.live.grad_norm) == pytest.approx(2 * math.sqrt(own))
    assert device.launches[-2:] == ["norm_kernel", "shared_norm_kernel"]


# -- schedules ---------------------------------------------------------------------------------------------------------
@triton.jit
def cosine(x):  # type: ignore[no-untyped-def]
    return 0.6 + 0.4 * tl.cos(x)


@pytest.mark.parametrize(
    ("ours_given", "torch_given"),
    [
        ({"scale_fn": cosine, "scale_mode": "iterations"}, lambda x: 0.6 + 0.4 * math.cos(x)),
        ({"scale_fn": lambda x: 0.9**x, "scale_mode": "iterations", "total_steps": 40}, lambda x: 0.9**x),
    ],
    ids=["compiled", "tabulated"],
)
def test_scale_functions(ours_given: dict[str, Any], torch_given: Any) -> None:
    ours = make_pair(True, cyclic=ours_given)
    theirs = make_pair(False, cyclic={"scale_fn": torch_given, "scale_mode": ours_given["scale_mode"]})
    assert_same_steps(ours, theirs, 8)


def test_every_shape_of_segment_and_a_sequence(device: Device) -> None:
    """A group each, at steps near and far, against the host's closed form."""
    values = [*CYCLIC.values(), *(once(*segments) for segments in shape_segments().values())]
    values.append(
        schedules.sequence(schedules.Cyclic(1e-3, 1e-2, 3), schedules.Cyclic(1e-4, 1e-3, 4, 2), milestones=[9])
    )
    params = [torch.nn.Parameter(torch.ones(1)) for _ in values]
    optimizer = FusedAdam([{"params": [p], "schedule": s} for p, s in zip(params, values, strict=True)], lr=0.1)
    optimizer.step()
    for at in (1, 3, 8, 9, 10, 23, 47, 1000, 2**40):
        optimizer.set_schedule_step(at)
        expected = [schedule.lr(at) for schedule in values]
        assert optimizer.live.lr.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert device.launches.count("reevaluate_kernel") >= 9


def test_a_schedule_step_that_is_set_and_steps_of_the_scheduler_alone() -> None:
    ours, theirs = make_both()
    assert_same_steps(ours, theirs, 2)
    for pair in (ours, theirs):
        pair.scheduler.step()
    ours.optimizer.set_schedule_step(11)
    theirs.scheduler.last_epoch = 10
    theirs.scheduler.step()
    assert_same_steps(ours, theirs, 2)


# -- many groups and tensors -------------------------------------------------------------------------------------------
def test_many_groups_and_tensors() -> None:
    """Several evaluators; most tensors have no gradient on a step."""
    results = []
    for ours in (True, False):
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(1 + i % 5, generator=generator)) for i in range(150)]
        groups = [{"params": params[i::70], "weight_decay": 0.001 * i} for i in range(70)]
        optimizer = (ADAM.ours if ours else ADAM.torch_peer)(groups)
        case = SCHEDULES["triangular2"]
        bounds = {"base_lr": [1e-4 + 1e-5 * i for i in range(70)], "max_lr": [1e-2 + 1e-4 * i for i in range(70)]}
        scheduler = (case.ours if ours else case.torch_peer)(optimizer, **(case.arguments | bounds))
        for number in range(3):
            for i, param in enumerate(params):
                gradient = torch.randn(param.shape, generator=generator)
                param.grad = gradient if i % 6 == number % 3 else None
            optimizer.step()
            scheduler.step()
        results.append((params, scheduler.get_last_lr(), [int(optimizer.state[p].get("step", 0)) for p in params]))
    assert results[0][1] == pytest.approx(results[1][1], rel=SCHEDULED.rtol)
    assert results[0][2] == results[1][2]
    for mine, torchs in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(mine, torchs, rtol=2e-5, atol=2e-6)


# -- replays -----------------------------------------------------------------------------------------------------------
def test_replays_between_eager_steps_with_other_gradients() -> None:
    ours, theirs = make_both(shapes=((3,), (BLOCK_SIZE + 1,), (5, 5), ()))
    for pair in (ours, theirs):
        rewrite_gradients(pair, 0)
    graph = record_step(ours)
    step(theirs)
    recorded: list[Any] = [param.grad for param in ours.params]
    for number in range(1, 6):
        for pair in (ours, theirs):
            rewrite_gradients(pair, number)
        if number % 3:
            graph.replay()
        else:
            for param, gradient in zip(ours.params, recorded, strict=True):
                param.grad = gradient.clone()
            ours.optimizer.step()
            for param, gradient in zip(ours.params, recorded, strict=True):
                param.grad = gradient
        ours.scheduler.step()
        step(theirs)
        assert ours.scheduler.get_last_lr() == pytest.approx(theirs.scheduler.get_last_lr(), rel=SCHEDULED.rtol)
    assert_same_params(ours, theirs, 1e-5, 1e-6)


def test_a_replay_of_another_generation_changes_nothing() -> None:
    pair = make_pair(True, max_grad_norm=1.0)
    set_gradients(pair.params, 0)
    with testing.record_launches() as graph:
        pair.optimizer.step()
    pair.optimizer.param_groups[0]["amsgrad"] = True
    pair.optimizer.step()
    memory = engine_of(pair.optimizer).state.memory
    before = [*pair.params, memory.control[: layout.STALE.value]]
    copies = [tensor.detach().clone() for tensor in before]
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(before, copies, strict=True))
    assert pair.optimizer.status().stale_replay


def test_no_element_has_two_threads() -> None:
    """In what users get: of two threads, one would store what the other loads."""
    for config in (*CONFIGS.values(), SMALL):
        threads = 32 * adapted(config).num_warps if config is SMALL else 32 * config.num_warps
        for dtype in (torch.float32, torch.float64):
            assert block_size_of(dtype, config.block_size) // 2 >= threads


# -- averages ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_averages(dtype: torch.dtype) -> None:
    """On some steps alone, of tensors that are updated and of one that is not, at aligned addresses and at others."""
    ours = make_pair(True, shapes=SHAPES, dtype=dtype, averaging=Averaging.swa(every=2))
    ours.params[3].data = torch.ones(SHAPES[3][0] + 1, dtype=dtype)[1:]
    stored = []
    for number in range(4):
        set_gradients(ours.params, number)
        if number == 3:
            ours.params[2].grad = None
        step(ours)
        if number % 2:
            stored.append([param.detach().float().clone() for param in ours.params])
    for param, first, second in zip(ours.params, *stored, strict=True):
        average = ours.optimizer.state[param]["average"]
        torch.testing.assert_close(average, (first + second) / 2, rtol=1e-6, atol=1e-6)
