"""What a capture needs is ready before it begins, and what it cannot hold is refused by name.

The captures are emulated: in one, every stream counts as captured, and compiling or loading a kernel is an error.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton

import fused_clr
from fused_clr import FusedAdam, GraphedStep
from fused_clr._device import capture, launch, step_plan
from fused_clr._device.parameters import ParametersMovedError
from fused_clr._device.triton import TritonEngine
from fused_clr.graphs import _current_stream_kept
from fused_clr.schedules import Cyclic
from tests.helpers import emulated_graph, on_gpu
from tests.helpers.graphed import CYCLE, assert_same_models, batches, eager_torch, graphed_model

emulated = pytest.mark.usefixtures("emulated_cuda")


@triton.jit
def halved(cycle):
    return 0.5 * cycle / cycle


def stepped(**options: Any) -> tuple[torch.nn.Parameter, FusedAdam]:
    """A parameter with a gradient, and an optimizer that took one step."""
    param = torch.nn.Parameter(torch.zeros(4))
    param.grad = torch.ones(4)
    optimizer = FusedAdam([param], **({"lr": 0.1} | options))
    optimizer.step()
    return param, optimizer


def captured(optimizer: FusedAdam) -> emulated_graph.EmulatedGraph:
    graph = emulated_graph.EmulatedGraph()
    with emulated_graph.capture(graph):
        optimizer.step()
    return graph


# -- streams, code and tables --------------------------------------------------------------------------------------
def test_tables_are_uploaded_on_one_stream_that_takes_part_in_no_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[SimpleNamespace] = []
    entered: list[SimpleNamespace] = []
    # Torch hands out its streams in turn.
    pool = [SimpleNamespace(captured=False) for _ in range(32)]

    def new_stream(*_: Any, **__: Any) -> SimpleNamespace:
        made.append(pool[len(made) % len(pool)])
        return made[-1]

    @contextmanager
    def enter(stream: SimpleNamespace) -> Any:
        entered.append(stream)
        yield
        entered.pop()

    monkeypatch.setattr(torch.cuda, "Stream", new_stream)
    monkeypatch.setattr(torch.cuda, "stream", enter)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: entered[-1].captured)
    monkeypatch.setattr(capture, "_upload_streams", {})
    device = torch.device("cuda", 0)
    kept = capture.upload_stream(device)
    assert all(capture.upload_stream(device) is kept for _ in range(100))
    assert len(made) == 1
    kept.captured = pool[1].captured = True
    assert capture.upload_stream(device) is pool[2]
    for stream in pool:
        stream.captured = True
    with pytest.raises(RuntimeError, match="every stream of torch's pool on cuda:0 is being captured"):
        capture.upload_stream(device)


def test_code_is_loaded_when_it_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    compiled = SimpleNamespace(_init_handles=lambda: calls.append("loaded"))

    def warmup(*_: Any, **__: Any) -> Any:
        calls.append("compiled")
        return compiled

    monkeypatch.setattr(launch, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    kernel = SimpleNamespace(arg_names=["x_ptr"], warmup=warmup)
    made = launch.make_launch(kernel, 1, {}, torch.device("cuda", 0), x_ptr=None)
    assert made.compiled is compiled
    assert calls == ["compiled", "loaded"]
    assert hasattr(triton.compiler.CompiledKernel, "_init_handles")


@emulated
@pytest.mark.parametrize("max_grad_norm", [None, 1.0], ids=["plain", "clipped"])
def test_a_compiled_scale_fn_is_compiled_before_the_capture(max_grad_norm: float | None) -> None:
    _, optimizer = stepped(schedule=Cyclic(0.01, 0.1, 4, cycle_momentum=False), max_grad_norm=max_grad_norm)
    optimizer.set_schedule(Cyclic(0.01, 0.1, 4, cycle_momentum=False, scale_fn=halved))
    # The read applies the new schedule.
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 + 0.09 / 4 / 2)
    graph = captured(optimizer)
    graph.replay()
    assert optimizer.status().schedule_step == 2
    assert not optimizer.status().stale_replay


@emulated
def test_many_kinds_of_input_in_turn() -> None:
    ours, _, graphed = graphed_model(num_warmup_iters=2, check="always")
    theirs, _, eagerly = graphed_model(num_warmup_iters=100)
    for index, batch in enumerate(batches(30, 6)):
        for step in (graphed, eagerly):
            step(batch[: 1 + index % 6])
    assert graphed.num_graphs == 6
    assert_same_models(ours, theirs)


def write_weight_decay(optimizer: FusedAdam) -> None:
    optimizer.param_groups[0]["weight_decay"] = 0.25


def load(optimizer: FusedAdam) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def write_step(optimizer: FusedAdam) -> None:
    optimizer.state[optimizer.param_groups[0]["params"][0]]["step"].fill_(7)


def assign_step(optimizer: FusedAdam) -> None:
    optimizer.state[optimizer.param_groups[0]["params"][0]]["step"] = torch.tensor(7.0)


def replace_moment(optimizer: FusedAdam) -> None:
    entry = optimizer.state[optimizer.param_groups[0]["params"][0]]
    entry["exp_avg"] = entry["exp_avg"].clone()


CHANGES: list[Callable[[FusedAdam], None]] = [write_weight_decay, load, write_step, assign_step, replace_moment]


@emulated
@pytest.mark.parametrize("clear", [False, True], ids=["", "zero_grad"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_before_the_capturing_call_is_captured(change: Callable[[FusedAdam], None], clear: bool) -> None:
    ours, optimizer, graphed = graphed_model(num_warmup_iters=1)
    theirs, eager, eagerly = graphed_model(num_warmup_iters=100)
    for index, batch in enumerate(batches(6)):
        if index == 1:
            for each in (optimizer, eager):
                if clear:
                    each.zero_grad()
                change(each)
        graphed(batch)
        eagerly(batch)
    assert graphed.num_graphs == 1
    assert_same_models(ours, theirs)
    first, second = (o.state_dict()["state"][0] for o in (optimizer, eager))
    torch.testing.assert_close(first, second)


@emulated
def test_captures_without_eager_steps_between_them_run_out_of_tables_by_name() -> None:
    _, optimizer = stepped()
    for _ in range(step_plan.SPARE_TABLES):
        captured(optimizer)
    with pytest.raises(RuntimeError, match="another capture needs its own tables: take one eager step before it"):
        captured(optimizer)
    optimizer.step()
    captured(optimizer).replay()
    assert optimizer.status().schedule_step == 3


@emulated
def test_launches_that_fail_leave_no_captured_step(monkeypatch: pytest.MonkeyPatch) -> None:
    _, optimizer = stepped()

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("the driver's")

    with monkeypatch.context() as patch:
        patch.setattr(launch, "run", fail)
        with pytest.raises(RuntimeError, match="the driver's"):
            captured(optimizer)
    assert optimizer.captures == []
    captured(optimizer)
    assert len(optimizer.captures) == 1


# -- GraphedStep -----------------------------------------------------------------------------------------------------
@emulated
@pytest.mark.parametrize("check", ["first", "always"])
def test_gradients_are_those_of_the_graph_that_was_replayed(check: Any) -> None:
    model, _, graphed = graphed_model(num_warmup_iters=1, check=check)
    first, second = batches(2)
    graphed(first)
    graphed(first)
    written = [param.grad for param in model.parameters()]
    # A warm-up, which clears the gradients.
    graphed(second[:3])
    assert all(param.grad is not grad for param, grad in zip(model.parameters(), written, strict=True))
    graphed(first)
    assert all(param.grad is grad for param, grad in zip(model.parameters(), written, strict=True))


@emulated
@pytest.mark.parametrize("check", ["first", "always"])
def test_gradients_are_those_of_the_replay_whatever_came_between(check: Any) -> None:
    ours, optimizer, graphed = graphed_model(num_warmup_iters=1, check=check)
    theirs, eager, eagerly = graphed_model(num_warmup_iters=100)
    # Another step function of the same optimizer.
    other, other_eagerly = (
        GraphedStep(step._step, step._optimizers[0], num_warmup_iters=1 if step is graphed else 100, check=check)
        for step in (graphed, eagerly)
    )

    def between(model: torch.nn.Module, by: FusedAdam, step: GraphedStep, index: int) -> None:
        if index % 4 == 1:
            by.zero_grad()
        elif index % 4 == 2:
            by.zero_grad()
            model(batches(1)[0]).square().mean().backward()
            by.step()
        elif index % 4 == 3:
            step(batches(2)[1])

    for index, batch in enumerate(batches(24)):
        between(ours, optimizer, other, index)
        between(theirs, eager, other_eagerly, index)
        graphed(batch)
        eagerly(batch)
        for mine, torchs in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, torchs.grad, rtol=1e-5, atol=1e-6)
    assert graphed.num_graphs == other.num_graphs == 1
    assert_same_models(ours, theirs)


@emulated
@pytest.mark.parametrize("frozen", [True, False], ids=["freezes", "unfreezes"])
def test_a_parameter_frozen_or_unfrozen_before_the_capturing_call(frozen: bool) -> None:
    ours, _, graphed = graphed_model(num_warmup_iters=1, check="always")
    theirs, _, eagerly = graphed_model(num_warmup_iters=100)
    for model in (ours, theirs):
        next(model.parameters()).requires_grad_(frozen)
    for index, batch in enumerate(batches(6)):
        if index == 1:
            for model in (ours, theirs):
                next(model.parameters()).requires_grad_(not frozen)
        graphed(batch)
        eagerly(batch)
    assert graphed.num_graphs == 1
    assert_same_models(ours, theirs)


@emulated
def test_a_call_that_the_driver_refuses_is_explained() -> None:
    model, optimizer, _ = graphed_model()
    refuses = False

    def step(batch: torch.Tensor) -> None:
        model(batch).square().mean().backward()
        optimizer.step()
        if refuses:
            try:
                raise torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing\nmore")
            finally:
                # Ending the capture then fails, too.
                raise torch.AcceleratorError("CUDA error: operation failed due to a previous error during capture")

    graphed = GraphedStep(step, optimizer, num_warmup_iters=1)
    batch = batches(1)[0]
    graphed(batch)
    refuses = True
    with pytest.raises(RuntimeError, match=r"not permitted when stream is capturing\. .*default stream") as info:
        graphed(batch)
    assert isinstance(info.value.__cause__, torch.AcceleratorError)
    refuses = False
    graphed(batch)
    graphed(batch)
    assert graphed.num_graphs == len(optimizer.captures) == 1


@emulated
def test_parameters_that_moved_to_another_device_before_the_capturing_call(monkeypatch: pytest.MonkeyPatch) -> None:
    _, optimizer, graphed = graphed_model(num_warmup_iters=1)
    graphed(batches(1)[0])
    before = optimizer._engines.first

    with monkeypatch.context() as patch:
        prepare = TritonEngine.before_capture

        def raise_once(engine: TritonEngine) -> None:
            patch.setattr(TritonEngine, "before_capture", prepare)
            raise ParametersMovedError

        patch.setattr(TritonEngine, "before_capture", raise_once)
        graphed(batches(1)[0])
    # The optimizer has sorted its parameters again.
    assert optimizer._engines.first is not before
    assert graphed.num_graphs == 1


@emulated
def test_a_capture_in_an_except_block() -> None:
    model, optimizer, graphed = graphed_model(num_warmup_iters=1)
    data = batches(4)
    graphed(data[0])
    try:
        raise ValueError
    except ValueError:
        graphed(data[1])
    graphed(data[2])
    graphed(data[3])
    assert graphed.num_graphs == len(optimizer.captures) == 1
    assert_same_models(model, eager_torch(4)[0])


@emulated
def test_a_refused_capture_warms_up_again() -> None:
    model, optimizer, _ = graphed_model()
    extra = torch.nn.Parameter(torch.ones(()))
    optimizer.add_param_group({"params": [extra]})
    uses_extra = True
    eager = 0

    def step(batch: torch.Tensor) -> None:
        nonlocal eager
        loss = model(batch).square().mean() * (extra if uses_extra else 1.0)
        loss.backward()
        optimizer.step()
        eager += 1

    graphed = GraphedStep(step, optimizer, num_warmup_iters=2)
    batch = batches(1)[0]
    graphed(batch)
    graphed(batch)
    uses_extra = False
    with pytest.raises(RuntimeError, match="has none"):
        graphed(batch)
    assert optimizer.captures == []
    extra.requires_grad_(False)
    graphed(batch)
    graphed(batch)
    graphed(batch)
    assert (graphed.num_graphs, eager) == (1, 5)
    assert optimizer.status().schedule_step == 5


def test_an_invalidated_capture_restores_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    current = ["the user's"]

    @contextmanager
    def enter(stream: str) -> Any:
        before, current[0] = current[0], stream
        try:
            yield
        finally:
            current[0] = before

    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current[0])
    monkeypatch.setattr(torch.cuda, "stream", enter)
    with pytest.raises(RuntimeError, match="invalidated"), _current_stream_kept(torch.device("cuda", 0)):
        current[0] = "the capturing one"
        raise RuntimeError("invalidated")
    assert current == ["the user's"]


# -- GradScaler ------------------------------------------------------------------------------------------------------
@emulated
def test_a_refused_capture_under_gradscaler_leaves_no_scale_behind() -> None:
    param, optimizer = stepped(max_grad_norm=1.0)
    other = torch.nn.Parameter(torch.ones(4))
    optimizer.add_param_group({"params": [other]})
    param.grad, other.grad = torch.ones(4), torch.ones(4)
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(1))
    other.grad = None
    with emulated_graph.as_if_capturing(), pytest.raises(RuntimeError, match="has none"):
        scaler.step(optimizer)
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")
    other.grad = torch.ones(4)
    optimizer.step()
    history = optimizer.history(1)
    assert (history.grad_scale[0], history.grad_norm[0]) == (1.0, pytest.approx(8**0.5))


@pytest.mark.usefixtures("backend")
def test_a_hook_that_raises_under_gradscaler_leaves_no_scale_behind() -> None:
    param, optimizer = stepped()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(param.sum()).backward()

    def fail(*_: Any) -> None:
        raise ValueError("the user's")

    handle = optimizer.register_step_pre_hook(fail)
    with pytest.raises(ValueError, match="the user's"):
        scaler.step(optimizer)
    handle.remove()
    assert not hasattr(optimizer, "grad_scale")


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("max_grad_norm", [None, 1.0], ids=["plain", "clipped"])
def test_gradscaler_without_any_gradient(max_grad_norm: float | None) -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = FusedAdam([param], schedule=Cyclic(**CYCLE), max_grad_norm=max_grad_norm)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(1))
    scaler.step(optimizer)
    # As torch's fused Adam: nothing is updated, and the schedule advances.
    assert optimizer.status().schedule_step == 1
    assert optimizer.status().skipped_steps == 0
    assert torch.equal(param, torch.ones(3))


# -- refused by name -------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda o: o.status(), "the optimizer's status was read during CUDA graph capture"),
        (lambda o: o.status(wait=False), "the optimizer's status was read during CUDA graph capture"),
        (lambda o: o.state_dict(), "the optimizer's status was read during CUDA graph capture"),
        (lambda o: o.history(), "the history was read during CUDA graph capture"),
        (lambda o: fused_clr.CyclicLR(o, 0.1, 0.2).last_epoch, "during CUDA graph capture"),
        (lambda o: o.param_groups[0]["lr"], "a scheduled value of a param group was read during CUDA graph capture"),
        (lambda o: o.set_schedule_step(3), "the schedule step was set during CUDA graph capture"),
        (
            lambda o: o.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]}),
            r"add_param_group\(\) cannot be called during CUDA graph capture",
        ),
        (lambda o: (write_step(o), o.step()), r"state\['step'\] was written during CUDA graph capture"),
        (lambda o: (write_step(o), o.check_replay()), r"state\['step'\] was written during CUDA graph capture"),
        (lambda o: (assign_step(o), o.step()), "the optimizer's state was written during CUDA graph capture"),
        (
            lambda o: (write_weight_decay(o), o.step()),
            "hyperparameters or the schedule changed during CUDA",
        ),
    ],
)
def test_what_a_capture_cannot_hold(act: Callable[[FusedAdam], Any], message: str) -> None:
    param, optimizer = stepped(schedule=Cyclic(**CYCLE))
    before = [tensor.clone() for tensor in (optimizer._ready().first.state.memory.words, param)]
    with emulated_graph.as_if_capturing(), pytest.raises(RuntimeError, match=message):
        act(optimizer)
    after = [optimizer._engines.first.state.memory.words, param]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    optimizer.step()
    assert optimizer.status().schedule_step == 2


@pytest.mark.usefixtures("triton_backend")
def test_the_schedule_step_is_not_read_in_a_capture() -> None:
    _, optimizer = stepped()
    scheduler = fused_clr.CyclicLR(optimizer, **CYCLE)
    optimizer.step()
    scheduler.step()
    with emulated_graph.as_if_capturing(), pytest.raises(RuntimeError, match="read during CUDA graph capture"):
        _ = scheduler.last_epoch
    assert scheduler.last_epoch == 1


@pytest.mark.usefixtures("triton_backend")
def test_a_first_step_is_refused() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = FusedAdam([param], lr=0.1)
    with emulated_graph.as_if_capturing():
        with pytest.raises(RuntimeError, match="used for the first time .* during CUDA graph capture; .* eager step"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="used for the first time"):
            optimizer.live.schedule_step.item()
    assert list(optimizer._engines) == []
    optimizer.step()
    assert optimizer.status().schedule_step == 1


@pytest.mark.usefixtures("triton_backend")
def test_a_lr_on_the_cpu_is_refused_for_parameters_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    _, optimizer = stepped(lr=torch.tensor(0.5))
    state: Any = optimizer._engines.first.state
    monkeypatch.setattr(state, "device", torch.device("cuda", 0))
    message = r"the lr of param_groups\[0\] is a tensor on cpu, which a CUDA graph cannot read .* tensor on cuda:0"
    with emulated_graph.as_if_capturing(), pytest.raises(RuntimeError, match=message):
        optimizer.step()


def test_each_device_is_asked_for_its_own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    current, captured_device = [0], 1

    @contextmanager
    def on(device: torch.device) -> Any:
        before, current[0] = current[0], device.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[0] == captured_device)
    assert [capture.is_capturing(torch.device("cuda", index)) for index in (0, 1)] == [False, True]
    assert not capture.is_capturing(torch.device("cpu"))
    assert current == [0]


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("captured_first", [False, True])
def test_a_step_of_which_only_a_part_would_be_captured(monkeypatch: pytest.MonkeyPatch, captured_first: bool) -> None:
    param, optimizer = stepped()
    engine: Any = optimizer._engines.first

    class Stub:
        device = torch.device("cuda", 1)
        state = SimpleNamespace(capturing=not captured_first)
        moments = SimpleNamespace(steps_moved=lambda: False)

    monkeypatch.setattr(type(engine.state), "capturing", property(lambda _: captured_first))
    monkeypatch.setattr(optimizer._engines, "_engines", [engine, Stub()])
    before = param.detach().clone()
    names = ("cpu", "cuda:1") if captured_first else ("cuda:1", "cpu")
    message = "the current stream of {} is being captured, and that of {} is not".format(*names)
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert torch.equal(param, before)


def test_a_capture_on_another_device_than_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    _, optimizer = stepped()
    stub = SimpleNamespace(device=torch.device("cuda", 1), state=SimpleNamespace(capturing=False))
    monkeypatch.setattr(optimizer._engines, "_engines", [stub])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="a stream of cuda:0 is being captured, but the parameters are on cuda:1"):
        optimizer._engines.step(None, None)


# -- platforms -------------------------------------------------------------------------------------------------------
def test_the_library_that_is_loaded_is_found() -> None:
    assert capture.loaded_library("libc.so").startswith("/")
    assert capture.loaded_library("libnone.so") == "libnone.so"


@pytest.mark.parametrize(("platform", "warp_size", "lanes"), [("cuda", 32, 256), ("hip", 64, 256), ("hip", 32, 128)])
def test_an_evaluator_has_no_more_lanes_than_threads(platform: str, warp_size: int, lanes: int) -> None:
    config = step_plan.CONFIGS[platform].for_warp_size(warp_size)
    assert config.lanes == lanes <= config.num_warps * warp_size


def test_the_watch_for_syncs_is_silent_and_always_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []

    def set_mode(mode: str) -> None:
        modes.append(mode)
        if mode == "error":
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with pytest.raises(ValueError, match="the test's"), on_gpu.syncs_are_errors():
        raise ValueError("the test's")
    assert modes == ["error", "default"]
