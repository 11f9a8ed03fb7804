"""What the programs of a launch may and may not do: their order, their memory, their promises, and who ticks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from fused_clr import FusedAdam, FusedAdamW
from fused_clr.backends import launch as launcher
from fused_clr.backends.step_launches import LaunchConfig
from fused_clr.backends.triton import TritonEngine
from fused_clr.kernels import layout
from fused_clr.kernels.adam import update, update_chunk
from fused_clr.plan import CHUNK_BITS, block_size_of, chunk_words
from fused_clr.schedules import Cyclic

pytestmark = pytest.mark.usefixtures("triton_backend", "small_chunks")

BLOCK_SIZE = 64
SCHEDULE = Cyclic(1e-3, 1e-2, 3, 2.5, mode="triangular2")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several evaluators, and fewer updaters than chunks."""
    config = LaunchConfig(block_size=BLOCK_SIZE, num_warps=4, lanes=2, programs_per_multiprocessor=2)
    monkeypatch.setattr(TritonEngine, "config", config)


@pytest.fixture
def promised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every address that a kernel promises to be a multiple of 16; a false promise is an error."""
    addresses: list[int] = []
    set_attr = interpreter.TensorHandle.set_attr

    def checked(handle: Any, name: str, value: Any) -> None:
        if name == "tt.divisibility":
            assert not np.any(handle.data % value[0]), f"{handle.data} is promised to be a multiple of {value[0]}"
            addresses.extend(handle.data.ravel().tolist())
        set_attr(handle, name, value)

    monkeypatch.setattr(interpreter.TensorHandle, "set_attr", checked)
    return addresses


@pytest.fixture
def allow_access(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[Tensor]], None]:
    """Given tensors, makes every access of a kernel outside them an error, before it happens."""
    spans = np.array([(0, 2**64 - 1)], np.uint64)

    def check(pointers: Any, mask: Any) -> None:
        first = np.broadcast_to(pointers.data, mask.data.shape)[mask.data.astype(bool)].reshape(-1, 1)
        last = first + np.uint64(pointers.get_element_ty().primitive_bitwidth // 8)
        inside = ((first >= spans[:, 0]) & (last <= spans[:, 1])).any(axis=1)
        assert inside.all(), f"{(~inside).sum()} accesses outside the given tensors"

    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def allow(tensors: Sequence[Tensor]) -> None:
        nonlocal spans
        spans = np.array([(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors], np.uint64)

    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(builder, "create_masked_store", checked_store)
    return allow


def in_order(monkeypatch: pytest.MonkeyPatch, permuted: Callable[[int], Sequence[int]]) -> None:
    """Runs a grid's programs in the order that ``permuted`` gives for their number."""
    orders: dict[int, Sequence[int]] = {}

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        if x == 0:
            orders[0] = permuted(self.grid_dim[0])
        self.grid_idx = (orders[0][x], y, z)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", set_grid_idx)


def make_optimizer(**options: Any) -> FusedAdam:
    """Two groups, four odd tensors, float32 and float64: two launches a step, the last with three evaluators."""
    generator = torch.Generator().manual_seed(5)
    shapes = ((BLOCK_SIZE - 1,), (5 * BLOCK_SIZE + 1,), (BLOCK_SIZE,), (2, 40))
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    params[2].data = params[2].data.double()
    groups = [{"params": params[:2]}, {"params": params[2:], "betas": (0.9, 0.99), "weight_decay": 0.1}]
    return FusedAdamW(groups, schedule=SCHEDULE, **options)


def set_gradients(optimizer: FusedAdam, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params_of(optimizer):
        param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)


def params_of(optimizer: FusedAdam) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def engine_of(optimizer: FusedAdam) -> TritonEngine:
    (engine,) = optimizer._engines.ready()
    assert isinstance(engine, TritonEngine)
    return engine


def clock_of(optimizer: FusedAdam) -> dict[str, int]:
    words = engine_of(optimizer).memory.clock.tolist()
    names = ("SCHEDULE_STEP", "SLOT", "DONE", "GENERATION", "OVERRUN", "STALE")
    return {name: words[getattr(layout, name).value] for name in names}


def device_memory(optimizer: FusedAdam, telemetry: bool = True) -> Iterator[Tensor]:
    """Everything a launch may write; without telemetry, what training depends on."""
    memory = engine_of(optimizer).memory
    yield from (memory.live, memory.scalars, memory.scalars_float64, memory.update_steps, memory.step_mirror)
    yield memory.clock[: layout.APPLIED_STEPS.value]
    if telemetry:
        yield from (memory.words, memory.history)
    for param in params_of(optimizer):
        yield param.detach()
        yield from (value for value in optimizer.state.get(param, {}).values())


def copies(tensors: Iterator[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def same_bits(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(a.numpy().tobytes() == b.numpy().tobytes() for a, b in pairs)


# -- order -------------------------------------------------------------------------------------------------------------
ORDERS: dict[str, Callable[[int], Sequence[int]]] = {
    "reversed": lambda n: range(n)[::-1],
    "shuffled": lambda n: torch.randperm(n).tolist(),
    "rotated": lambda n: [*range(1, n), 0],
}


@pytest.mark.parametrize(
    "permuted",
    ORDERS.values(),
    ids=ORDERS,
)
def test_the_order_of_programs_does_not_matter(
    permuted: Callable[[int], Sequence[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for order in (range, permuted):
        with monkeypatch.context() as patch:
            in_order(patch, order)
            optimizer = make_optimizer(amsgrad=True)
            for step in range(8):
                set_gradients(optimizer, step)
                # Both launches, one of them, and none; then evaluators advance some tensors only.
                for param in params_of(optimizer)[: (0, 2, 4)[step % 3]]:
                    param.grad = None
                optimizer.step()
            results.append(copies(device_memory(optimizer)))
            assert clock_of(optimizer) | {"GENERATION": 0} == {
                "SCHEDULE_STEP": 8, "SLOT": 0, "DONE": 0, "GENERATION": 0, "OVERRUN": 0, "STALE": 0
            }  # fmt: skip
    assert same_bits(*results)


# -- who ticks ---------------------------------------------------------------------------------------------------------
def test_the_clock_ticks_once_a_step() -> None:
    optimizer = make_optimizer()
    start = clock_of(optimizer)
    assert start["GENERATION"] > 0
    assert start | {"GENERATION": 0} == dict.fromkeys(start, 0)
    for step in range(1, 4):
        set_gradients(optimizer, step)
        optimizer.step()
        assert clock_of(optimizer) == start | {"SCHEDULE_STEP": step, "SLOT": step % 2}
    # A step of no tensor, and a tick of the schedule alone.
    optimizer.zero_grad()
    optimizer.step()
    assert clock_of(optimizer) == start | {"SCHEDULE_STEP": 4, "SLOT": 0}
    optimizer._tick()
    assert clock_of(optimizer) == start | {"SCHEDULE_STEP": 5, "SLOT": 1}
    # Priming moves nothing; setting the step moves the step alone.
    optimizer.param_groups[0]["eps"] = 1e-7
    optimizer.set_schedule_step(40)
    assert clock_of(optimizer) == start | {"SCHEDULE_STEP": 40, "SLOT": 1}


@pytest.mark.parametrize("found_inf", [1.0, 2.0, float("nan"), float("inf")])
@pytest.mark.parametrize("warm", [False, True], ids=["first-step", "later-step"])
def test_a_skip_changes_no_bit(found_inf: float, warm: bool) -> None:
    optimizer, twin = make_optimizer(), make_optimizer()
    for step in range(2 * warm):
        for each in (optimizer, twin):
            set_gradients(each, step)
            each.step()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(found_inf)
    set_gradients(optimizer, 7)
    engine_of(optimizer).prepare()
    before = copies(device_memory(optimizer, telemetry=False))
    for _ in range(2):
        optimizer.step()
    assert same_bits(before, list(device_memory(optimizer, telemetry=False)))
    assert clock_of(optimizer)["SCHEDULE_STEP"] == 2 * warm
    # And training goes on as if nothing had been.
    optimizer.found_inf = torch.tensor(0.0)
    for each in (optimizer, twin):
        set_gradients(each, 8)
        each.step()
    assert same_bits(list(device_memory(optimizer, telemetry=False)), list(device_memory(twin, telemetry=False)))


def test_gradients_are_divided_by_the_loss_scale() -> None:
    """By a power of two, which is exact; bit for bit, in float32 and float64."""
    scaled, twin = make_optimizer(), make_optimizer()
    scaled.grad_scale, scaled.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    for step in range(3):
        for each in (scaled, twin):
            set_gradients(each, step)
        for param in params_of(scaled):
            assert param.grad is not None
            param.grad *= 1024
        scaled.step()
        twin.step()
    assert same_bits(list(device_memory(scaled, telemetry=False)), list(device_memory(twin, telemetry=False)))


def test_a_step_that_stops_between_its_launches_leaves_no_partial_count(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = make_optimizer()
    set_gradients(optimizer, 0)
    optimizer.step()
    before = clock_of(optimizer)
    run, calls = launcher.run, []

    def interrupted(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        run(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(launcher, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    assert clock_of(optimizer) == before
    optimizer.step()
    assert clock_of(optimizer) == before | {"SCHEDULE_STEP": 2, "SLOT": 0}


def test_a_launch_of_another_generation_says_so_and_does_nothing_else() -> None:
    optimizer = make_optimizer()
    set_gradients(optimizer, 0)
    optimizer.step()
    engine = engine_of(optimizer)
    engine.retire()
    before = copies(device_memory(optimizer))
    set_gradients(optimizer, 1)
    optimizer.step()
    assert clock_of(optimizer)["STALE"] == 1
    engine.memory.clock[layout.STALE.value] = 0
    assert same_bits(before, list(device_memory(optimizer)))


# -- memory ------------------------------------------------------------------------------------------------------------
def test_no_access_outside_the_tensors(allow_access: Callable[[Sequence[Tensor]], None]) -> None:
    optimizer = make_optimizer(amsgrad=True)
    set_gradients(optimizer, 0)
    engine = engine_of(optimizer)
    engine.prepare()
    ((plan, _),) = engine._plans.values()
    assert engine._scale_table is not None
    memory = engine.memory
    grads = [param.grad for param in params_of(optimizer) if param.grad is not None]
    read = [memory.settings, memory.hyper_table, engine._scale_table, memory.no_grad_scale, memory.no_found_inf]
    read += [plan.tensor_table, plan.chunk_table, *grads]
    allow_access([*read, *device_memory(optimizer)])
    optimizer.step()
    optimizer.step()
    assert clock_of(optimizer)["SCHEDULE_STEP"] == 2
    # The check is one: without the last gradient among the allowed, its load is refused.
    allow_access([*read[:-1], *device_memory(optimizer)])
    with pytest.raises(interpreter.InterpreterError, match="outside the given tensors"):
        optimizer.step()


# -- promises ----------------------------------------------------------------------------------------------------------
PARTS = ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("moved", [None, *PARTS])
def test_alignment_is_promised_only_where_it_is_true(
    moved: str | None, dtype: torch.dtype, promised: list[int]
) -> None:
    numel = 2 * BLOCK_SIZE + 1

    def tensor(part: str) -> Tensor:
        """Nonzero values, one element away from an aligned address for the part that is moved."""
        buffer = torch.linspace(1, 2, numel + 1).to(dtype)
        return buffer[1:] if part == moved else buffer[:-1].clone()

    parts = {part: tensor(part) for part in PARTS}
    param = torch.nn.Parameter(parts["param"])
    param.grad = parts["grad"]
    optimizer = FusedAdam([param], lr=0.1, amsgrad=True)
    optimizer.state[param] = {"step": torch.tensor(3.0)} | {part: parts[part] for part in PARTS[2:]}
    before = {part: value.clone() for part, value in parts.items()}
    optimizer.step()
    assert optimizer.state[param]["exp_avg"].data_ptr() == parts["exp_avg"].data_ptr()
    # The full chunks of five tensors; the ragged one is masked, and promises nothing.
    addresses = [parts[part].data_ptr() for part in PARTS]
    assert promised == ([] if moved else numel // block_size_of(dtype, BLOCK_SIZE) * addresses)

    # And every way through is the same update.
    twin = torch.nn.Parameter(before["param"])
    twin.grad = before["grad"].clone()
    reference = FusedAdam([twin], lr=0.1, amsgrad=True)
    reference.state[twin] = {"step": torch.tensor(3.0)} | {part: before[part].clone() for part in PARTS[2:]}
    reference.step()
    assert torch.equal(param, twin)
    for part in PARTS[2:]:
        assert torch.equal(optimizer.state[param][part], reference.state[twin][part])


@triton.jit
def one_chunk_kernel(
    tensor_table_ptr,
    scalars_ptr,
    grad_scale_ptr,
    BLOCK_SIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    update_chunk(
        tensor_table_ptr,
        0,
        BLOCK_SIZE,
        scalars_ptr,
        tl.load(grad_scale_ptr),
        tl.load(grad_scale_ptr).to(tl.float64),
        tl.float32,
        tl.float32,
        False,
        False,
        BLOCK_SIZE,
        ALIGNED,
        MASKED=False,
    )


@pytest.mark.parametrize("column", range(4), ids=PARTS[:4])
def test_a_false_promise_is_caught(column: int, promised: list[int]) -> None:
    parts = [torch.ones(BLOCK_SIZE + 1) for _ in range(4)]
    addresses = [part.data_ptr() + 4 * (column == i) for i, part in enumerate(parts)]
    table = torch.tensor([*addresses, 0, BLOCK_SIZE, 0, 1, layout.FLOAT32.value])
    scalars, grad_scale = torch.ones(layout.SCALAR_COLUMNS.value), torch.ones(1)
    with pytest.raises(interpreter.InterpreterError, match="promised to be a multiple of 16"):
        one_chunk_kernel[(1,)](table, scalars, grad_scale, BLOCK_SIZE, True)
    assert all(torch.equal(part, torch.ones(BLOCK_SIZE + 1)) for part in parts)
    one_chunk_kernel[(1,)](table, scalars, grad_scale, BLOCK_SIZE, False)
    assert not torch.equal(parts[0], torch.ones(BLOCK_SIZE + 1))


# -- offsets -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("numel", [2**31 - 1, 2**31, 2**31 + 1, 2**40 + 1])
def test_chunk_words_of_huge_tensors(numel: int) -> None:
    block_size = 2**20
    words = chunk_words([3, 2**31 - 1], [numel, 1], block_size)
    chunks = -(-numel // block_size)
    assert words.dtype == np.int64
    assert np.array_equal(words[:-1] >> CHUNK_BITS, np.full(chunks, 3))
    assert np.array_equal(words[:-1] & (2**CHUNK_BITS - 1), np.arange(chunks))
    assert words[-1] == (2**31 - 1) << CHUNK_BITS


@triton.jit
def one_update_kernel(
    tensor_table_ptr,
    chunk_table_ptr,
    scalars_ptr,
    grad_scale_ptr,
    BLOCK_SIZE: tl.constexpr,
):
    update(
        tl.program_id(0),
        0,
        tensor_table_ptr,
        chunk_table_ptr,
        scalars_ptr,
        tl.load(grad_scale_ptr),
        tl.load(grad_scale_ptr).to(tl.float64),
        1,
        tl.float32,
        tl.float32,
        False,
        False,
        BLOCK_SIZE,
    )


@pytest.mark.parametrize(
    "chunk", [2**31 // BLOCK_SIZE - 1, 2**31 // BLOCK_SIZE, 2**32 // BLOCK_SIZE, 2**CHUNK_BITS - 1]
)
@pytest.mark.parametrize("missing", [0, 5], ids=["full", "ragged"])
def test_offsets_beyond_two_to_the_31(
    chunk: int, missing: int, allow_access: Callable[[Sequence[Tensor]], None]
) -> None:
    """The tensors begin so far before a small buffer that this chunk of theirs lies in it."""
    numel = (chunk + 1) * BLOCK_SIZE - missing
    far, near = ([torch.linspace(1, 2, BLOCK_SIZE) for _ in range(4)] for _ in range(2))
    scalars, grad_scale = torch.full((layout.SCALAR_COLUMNS.value,), 0.5), torch.ones(1)
    for parts, index, size in ((far, chunk, numel), (near, 0, BLOCK_SIZE - missing)):
        addresses = [part.data_ptr() - 4 * BLOCK_SIZE * index for part in parts]
        table = torch.tensor([*addresses, 0, size, 0, 1, layout.FLOAT32.value])
        chunks = torch.tensor([index])
        allow_access([*parts, table, chunks, scalars, grad_scale])
        one_update_kernel[(1,)](table, chunks, scalars, grad_scale, BLOCK_SIZE)
    assert not torch.equal(near[0], torch.linspace(1, 2, BLOCK_SIZE))
    assert same_bits(far, near)
    # What lies beyond the end stays as it was.
    assert torch.equal(far[0][BLOCK_SIZE - missing :], torch.linspace(1, 2, BLOCK_SIZE)[BLOCK_SIZE - missing :])
