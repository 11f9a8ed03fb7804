"""What the driver's rules for captures forbid, and what is refused by name before the driver sees it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from fused_clr import CyclicLR, FusedAdam, GraphedStep
from fused_clr._device.step_plan import SPARE_TABLES
from fused_clr.schedules import Cyclic
from tests.helpers.on_gpu import CYCLE, two_devices

pytestmark = pytest.mark.gpu

PLAIN: dict[str, Any] = {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 4, "cycle_momentum": False}


@triton.jit
def halved(cycle):
    return tl.minimum(cycle, 0.5)


@triton.jit
def three_quarters(cycle):
    return tl.minimum(cycle, 0.75)


@triton.jit
def quartered(cycle):
    return tl.minimum(cycle, 0.25)


def stepped(count: int = 1, **options: Any) -> tuple[list[torch.nn.Parameter], FusedAdam]:
    """Parameters with gradients, and an optimizer that took one step."""
    params = [torch.nn.Parameter(torch.zeros(4, device="cuda")) for _ in range(count)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = FusedAdam(params, **({"lr": 0.1} | options))
    optimizer.step()
    return params, optimizer


@contextmanager
def capturing(**options: Any) -> Iterator[torch.cuda.CUDAGraph]:
    """Captures the body; when it raises, the graph is empty, which torch warns of."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream()
    with warnings.catch_warnings(), torch.cuda.stream(stream):
        warnings.filterwarnings("ignore", "The CUDA Graph is empty")
        with torch.cuda.graph(graph, **options):
            yield graph


def graphed_linear(**options: Any) -> tuple[torch.nn.Linear, FusedAdam, GraphedStep]:
    model = torch.nn.Linear(4, 3, device="cuda")
    optimizer = FusedAdam(model.parameters(), lr=0.1)

    def step(batch: torch.Tensor) -> None:
        model(batch).square().mean().backward()
        optimizer.step()

    return model, optimizer, GraphedStep(step, optimizer, num_warmup_iters=1, **options)


def test_captures_of_more_kinds_than_torch_has_streams() -> None:
    """Torch hands out its streams in turn, so that one of ours may be a capturing one."""
    _, optimizer, graphed = graphed_linear(max_graphs=2)
    for size in range(1, 36):
        for _ in range(2):
            graphed(torch.ones(size, 4, device="cuda"))
    assert optimizer.status().schedule_step == 70


@pytest.mark.parametrize(
    ("mode", "scale_fn"), [("global", halved), ("thread_local", three_quarters), ("relaxed", quartered)]
)
def test_a_new_compiled_scale_fn_is_loaded_before_the_capture(mode: Any, scale_fn: Any) -> None:
    params, optimizer = stepped(schedule=Cyclic(**PLAIN), max_grad_norm=1.0)
    optimizer.set_schedule(Cyclic(**PLAIN, scale_fn=scale_fn))
    # The read applies the new schedule.
    applied = optimizer.param_groups[0]["lr"]
    with capturing(capture_error_mode=mode) as graph:
        optimizer.step()
    before = params[0][0].item()
    graph.replay()
    assert before - params[0][0].item() == pytest.approx(applied, rel=1e-5)
    assert optimizer.status().schedule_step == 2


def test_captures_by_hand_without_eager_steps_between_run_out_of_tables_by_name() -> None:
    _, optimizer = stepped()
    for _ in range(SPARE_TABLES):
        with capturing():
            optimizer.step()
    with pytest.raises(RuntimeError, match="another capture needs its own tables: take one eager step"), capturing():
        optimizer.step()
    optimizer.step()
    with capturing() as graph:
        optimizer.step()
    graph.replay()
    assert optimizer.status().schedule_step == 3


def add_group(optimizer: FusedAdam) -> None:
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2, device="cuda"))]})


def write_lr(optimizer: FusedAdam) -> None:
    optimizer.param_groups[0]["weight_decay"] = 0.1
    optimizer.step()


def write_step(optimizer: FusedAdam) -> None:
    optimizer.state[optimizer.param_groups[0]["params"][0]]["step"].add_(1)
    optimizer.step()


def take_gradient(optimizer: FusedAdam) -> None:
    optimizer.zero_grad()
    optimizer.step()


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (add_group, r"add_param_group\(\) cannot be called during CUDA graph capture"),
        (write_lr, "hyperparameters or the schedule changed during CUDA graph capture"),
        (write_step, r"state\['step'\] was written during CUDA graph capture"),
        (take_gradient, "captured steps need a gradient of every parameter that requires one"),
        (lambda o: o.param_groups[0]["lr"], "a scheduled value of a param group was read during CUDA graph capture"),
        (lambda o: o.status(wait=False), "the optimizer's status was read during CUDA graph capture"),
        (lambda o: o.history(), "the history was read during CUDA graph capture"),
        (lambda o: o.state_dict(), "the optimizer's status was read during CUDA graph capture"),
        (lambda o: CyclicLR(o, 0.1, 0.2), "during CUDA graph capture"),
    ],
)
def test_what_a_capture_cannot_hold(act: Callable[[FusedAdam], Any], message: str) -> None:
    params, optimizer = stepped(schedule=Cyclic(**CYCLE))
    with pytest.raises(RuntimeError, match=message), capturing():
        act(optimizer)
    # What was written is applied by the next step.
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    with capturing() as graph:
        optimizer.step()
    graph.replay()
    assert optimizer.status().schedule_step == 3


def test_a_first_step_is_not_captured() -> None:
    param = torch.nn.Parameter(torch.zeros(4, device="cuda"))
    param.grad = torch.ones_like(param)
    optimizer = FusedAdam([param], lr=0.1)
    with pytest.raises(RuntimeError, match="used for the first time .* during CUDA graph capture"), capturing():
        optimizer.step()
    optimizer.step()
    assert optimizer.status().schedule_step == 1


def test_a_tensor_lr() -> None:
    lr = torch.tensor(0.5, device="cuda")
    params, optimizer = stepped(lr=lr)
    with capturing() as graph:
        optimizer.step()
    for value in (0.25, 1.0):
        before = params[0][0].item()
        lr.fill_(value)
        graph.replay()
        assert before - params[0][0].item() == pytest.approx(value, rel=1e-5)
    _, optimizer = stepped(lr=torch.tensor(0.5))
    with pytest.raises(RuntimeError, match=r"lr of param_groups\[0\] is a tensor on cpu"), capturing():
        optimizer.step()


# -- GradScaler ------------------------------------------------------------------------------------------------------
def test_gradscaler_without_any_gradient() -> None:
    params, optimizer = stepped()
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cuda")
    scaler.scale(torch.ones(1, device="cuda"))
    before = params[0].detach().clone()
    scaler.step(optimizer)
    assert torch.equal(params[0], before)
    assert optimizer.status().skipped_steps == 0


def test_a_refused_capture_under_gradscaler_leaves_no_scale_behind() -> None:
    params, optimizer = stepped(2, max_grad_norm=1.0)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    scaler.scale(torch.ones(1, device="cuda"))
    params[1].grad = None
    with pytest.raises(RuntimeError, match="has none"), capturing():
        scaler.step(optimizer)
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    history = optimizer.history(1)
    assert (history.grad_scale[0], history.grad_norm[0]) == (1.0, pytest.approx(8**0.5))


# -- GraphedStep -----------------------------------------------------------------------------------------------------
def test_a_step_that_waits_for_the_device_is_explained() -> None:
    model = torch.nn.Linear(4, 3, device="cuda")
    optimizer = FusedAdam(model.parameters(), lr=0.1)
    waits = True

    def step(batch: torch.Tensor) -> None:
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        if waits:
            loss.item()

    graphed = GraphedStep(step, optimizer, num_warmup_iters=1)
    batch = torch.ones(5, 4, device="cuda")
    current = torch.cuda.current_stream()
    graphed(batch)
    with pytest.raises(RuntimeError, match=r"the driver refused a call in the captured step.*\.item\(\)"):
        graphed(batch)
    assert torch.cuda.current_stream() == current
    waits = False
    for _ in range(3):
        graphed(batch)
    assert graphed.num_graphs == len(optimizer.captures) == 1
    assert optimizer.status().schedule_step == 4


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match")
def test_graph_nodes_made_on_the_default_stream_are_explained() -> None:
    model, _, graphed = graphed_linear()
    # As DistributedDataParallel holds them.
    nodes = [param.view_as(param).grad_fn.next_functions[0][0] for param in model.parameters()]
    batch = torch.ones(5, 4, device="cuda")
    graphed(batch)
    with pytest.raises(RuntimeError, match="node was made there and is still held: by DistributedDataParallel"):
        graphed(batch)
    del nodes
    graphed(batch)
    graphed(batch)
    assert graphed.num_graphs == 1


def test_everything_under_a_default_device() -> None:
    torch.set_default_device("cuda")
    try:
        _, optimizer, graphed = graphed_linear()
        for _ in range(4):
            graphed(torch.ones(2, 4))
            optimizer.status(wait=False)
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.history(4).schedule_step.tolist() == [0, 1, 2, 3]
        assert optimizer.status().schedule_step == 4
    finally:
        torch.set_default_device(None)


def test_gradients_of_another_layout_are_captured() -> None:
    model = torch.nn.Conv2d(4, 8, 3, device="cuda").to(memory_format=torch.channels_last)
    optimizer = FusedAdam(model.parameters(), lr=0.1, max_grad_norm=1.0, write_back_grads=True)
    model.weight.grad = torch.ones_like(model.weight, memory_format=torch.contiguous_format)
    model.bias.grad = torch.ones_like(model.bias)
    optimizer.step()
    with capturing() as graph:
        optimizer.step()
    before = model.weight.detach().clone()
    graph.replay()
    torch.testing.assert_close(before - model.weight, torch.full_like(before, 0.1), rtol=1e-3, atol=1e-3)
    assert optimizer.live.grad_norm.item() == pytest.approx(1.0, rel=1e-5)


# -- two devices -----------------------------------------------------------------------------------------------------
@two_devices
@pytest.mark.parametrize("max_grad_norm", [None, 1.0], ids=["plain", "clipped"])
def test_a_capture_of_a_part_of_the_step_is_refused(max_grad_norm: float | None) -> None:
    params = [torch.nn.Parameter(torch.ones(8, device=f"cuda:{index}")) for index in (0, 1)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = FusedAdam(params, lr=0.1, max_grad_norm=max_grad_norm)
    optimizer.step()
    with pytest.raises(RuntimeError, match="of cuda:0 is being captured, and that of cuda:1 is not"), capturing():
        optimizer.step()
    alone = FusedAdam([params[1]], lr=0.1)
    alone.step()
    with pytest.raises(RuntimeError, match="a stream of cuda:0 is being captured, but the parameters"), capturing():
        alone.step()
    assert (optimizer.status().schedule_step, alone.status().schedule_step) == (1, 1)


@two_devices
def test_a_model_on_another_device_than_the_current_one() -> None:
    model = torch.nn.Linear(4, 3, device="cuda:1")
    optimizer = FusedAdam(model.parameters(), schedule=Cyclic(**CYCLE), max_grad_norm=1.0)

    def step(batch: torch.Tensor) -> None:
        model(batch).square().mean().backward()
        optimizer.step()

    graphed = GraphedStep(step, optimizer, check="always")
    for _ in range(8):
        graphed(torch.ones(2, 4, device="cuda:0"))
        optimizer.status(wait=False)
    assert graphed.num_graphs == 1
    assert optimizer.status().schedule_step == 8
    assert torch.cuda.current_device() == 0
