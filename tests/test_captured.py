"""Captured steps: what replays assume is checked, refused or refreshed; never silently wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fused_clr
from fused_clr import FusedAdam, GraphedStep, testing
from fused_clr.schedules import Cyclic

from .emulated_graph import EmulatedGraph, capture, emulated_cuda  # noqa: F401
from .pairs import Pair, assert_same_params, make_pair
from .test_replay import set_gradients

EVERYTHING = (0, 1, 2, 3)
CYCLE: dict[str, Any] = {"base_lr": 1e-3, "max_lr": 2e-2, "step_size_up": 5, "step_size_down": 3}

triton_only = pytest.mark.usefixtures("triton_backend")


def recorded_pair(**adam: Any) -> tuple[Pair, testing.RecordedGraph]:
    """A pair with one recorded step."""
    pair = make_pair(True, **adam)
    set_gradients(pair, 0, EVERYTHING)
    with testing.record_launches() as graph:
        pair.optimizer.step()
    pair.scheduler.step()
    return pair, graph


# -- the replay contract -----------------------------------------------------------------------------------------------
@triton_only
def test_check_replay_passes_while_nothing_moves() -> None:
    pair, graph = recorded_pair()
    for step in range(1, 4):
        set_gradients(pair, step, EVERYTHING)
        pair.optimizer.check_replay()
        graph.replay()
    # The graph's own backward would write a gradient that is None now.
    pair.params[1].grad = None
    pair.optimizer.check_replay()
    assert [step.fits for step in pair.optimizer.captured_steps] == [True]


def move_parameter(pair: Pair) -> None:
    pair.params[2].data = pair.params[2].data.clone()


def move_gradient(pair: Pair) -> None:
    pair.params[2].grad = torch.zeros_like(pair.params[2])


def replace_state(pair: Pair) -> None:
    state = pair.optimizer.state[pair.params[2]]
    state["exp_avg"] = state["exp_avg"].clone()


MOVES = {
    r"param_groups\[1\]\['params'\]\[0\] has moved": move_parameter,
    r"the gradient of param_groups\[1\]\['params'\]\[0\] has moved": move_gradient,
    r"state\['exp_avg'\] of param_groups\[1\]\['params'\]\[0\] has moved": replace_state,
}


@triton_only
@pytest.mark.parametrize(("message", "move"), MOVES.items(), ids=["parameter", "gradient", "state"])
def test_a_moved_tensor_is_named(message: str, move: Callable[[Pair], None]) -> None:
    pair, _ = recorded_pair()
    move(pair)
    with pytest.raises(RuntimeError, match=message):
        pair.optimizer.check_replay()


@triton_only
@pytest.mark.parametrize("move", MOVES.values(), ids=["parameter", "gradient", "state"])
def test_a_graph_of_the_step_alone_takes_new_addresses_over(move: Callable[[Pair], None]) -> None:
    pair, graph = recorded_pair()
    twin = make_pair(False)
    set_gradients(twin, 0, EVERYTHING)
    twin.optimizer.step()
    twin.scheduler.step()
    for step in range(1, 12):
        set_gradients(pair, step, EVERYTHING)
        set_gradients(twin, step, EVERYTHING)
        if step % 3 == 0:
            old = [param.grad.clone() for param in pair.params]
            move(pair)
            for param, grad in zip(pair.params, old, strict=True):
                param.grad.copy_(grad)
        pair.optimizer.check_replay(step_only=True)
        graph.replay()
        twin.optimizer.step()
        twin.scheduler.step()
        assert_same_params(pair, twin, 1e-5, 1e-6)


@triton_only
def test_other_gradients_are_refused() -> None:
    pair, _ = recorded_pair()
    pair.params[0].grad = None
    with pytest.raises(RuntimeError, match=r"\['params'\]\[0\] existed at capture and is None now"):
        pair.optimizer.check_replay(step_only=True)
    pair.params[0].grad = torch.zeros(3).double().float()
    pair.params[0].data = pair.params[0].data.double()
    pair.params[0].grad = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"captured with shape \(3,\), strides \(1,\) and torch.float32"):
        pair.optimizer.check_replay(step_only=True)


@triton_only
def test_a_gradient_that_appears_is_refused() -> None:
    pair = make_pair(True)
    set_gradients(pair, 0, (0, 1, 2))
    with testing.record_launches():
        pair.optimizer.step()
    pair.params[3].requires_grad_(True)
    pair.params[3].grad = torch.ones(())
    with pytest.raises(RuntimeError, match=r"\['params'\]\[1\] did not exist at capture"):
        pair.optimizer.check_replay()


@triton_only
def test_a_parameter_without_its_gradient_is_refused_at_capture() -> None:
    pair = make_pair(True)
    set_gradients(pair, 0, EVERYTHING)
    pair.optimizer.step()
    pair.params[1].grad = None
    before = [param.detach().clone() for param in pair.params]
    with testing.record_launches() as graph, pytest.raises(RuntimeError, match=r"\['params'\]\[1\] has none"):
        pair.optimizer.step()
    assert len(graph) == 0
    assert all(torch.equal(a, b) for a, b in zip(before, pair.params, strict=True))
    assert pair.optimizer.captured_steps == []


@triton_only
def test_nothing_captured_and_released_are_told() -> None:
    pair, _ = recorded_pair()
    (captured,) = pair.optimizer.captured_steps
    captured.release()
    assert pair.optimizer.captured_steps == []
    with pytest.raises(RuntimeError, match="was released"):
        pair.optimizer.check_replay(captured)
    with pytest.raises(RuntimeError, match="no captured step"):
        pair.optimizer.check_replay()


@triton_only
@pytest.mark.parametrize("change", ["add_param_group", "amsgrad"])
def test_a_graph_that_no_longer_fits_says_so_and_does_nothing(change: str) -> None:
    pair, graph = recorded_pair()
    if change == "amsgrad":
        pair.optimizer.param_groups[0]["amsgrad"] = True
    else:
        pair.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.1})
    with pytest.raises(RuntimeError, match="capture the step again"):
        pair.optimizer.check_replay()
    before = [param.detach().clone() for param in pair.params]
    assert not pair.optimizer.stale_replay
    graph.replay()
    assert pair.optimizer.stale_replay
    assert all(torch.equal(a, b) for a, b in zip(before, pair.params, strict=True))


# -- set on the device -------------------------------------------------------------------------------------------------
@triton_only
@pytest.mark.parametrize(
    "schedule",
    [
        Cyclic(1e-3, 3e-2, 4, mode="exp_range", gamma=0.99),
        Cyclic(1e-3, 3e-2, 2.5, 1.25, mode="triangular2"),
        Cyclic(1e-3, 3e-2, 4, scale_fn=lambda x: 1 / (1 + x), horizon=100, cycle_momentum=False),
        None,
    ],
    ids=["exp_range", "fractions", "scale_fn", "constant"],
)
def test_replays_follow_a_new_schedule(schedule: Cyclic | None) -> None:
    """Captured with one kind of schedule, replayed with another: no recompilation, and no host code in between."""
    pair, graph = recorded_pair()
    graph.replay()
    pair.optimizer.set_schedule(schedule)
    pair.optimizer.set_schedule_step(7)
    kept = [group["lr"] for group in pair.optimizer.param_groups]
    for step in range(8, 30):
        graph.replay()
        expected = [schedule.lr(step)] * 2 if schedule else kept
        assert [group["lr"] for group in pair.optimizer.param_groups] == pytest.approx(expected, rel=1e-12)
    assert not pair.optimizer.stale_replay


@triton_only
def test_replays_follow_changed_hyperparameters() -> None:
    ours, theirs = make_pair(True), make_pair(False)
    for pair in (ours, theirs):
        set_gradients(pair, 0, EVERYTHING)
    with testing.record_launches() as graph:
        ours.optimizer.step()
    theirs.optimizer.step()
    theirs.scheduler.step()
    changes = [("weight_decay", 0.3), ("betas", (0.9, 0.95)), ("eps", 1e-3), ("maximize", True), ("lr", None)]
    for step in range(1, 22):
        for pair in (ours, theirs):
            set_gradients(pair, step, EVERYTHING)
            if step % 4 == 0:
                key, value = changes[step // 4 - 1]
                if key == "betas":
                    value = (pair.optimizer.param_groups[0]["betas"][0], 0.95)
                if key != "lr":
                    pair.optimizer.param_groups[0][key] = value
        graph.replay()
        theirs.optimizer.step()
        theirs.scheduler.step()
        assert_same_params(ours, theirs, 1e-5, 1e-6)


# -- GraphedStep -------------------------------------------------------------------------------------------------------
def make_model(seed: int = 0) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))


def batches(count: int, size: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, 4, generator=generator) for _ in range(count)]


def eager_torch(steps: int, sizes: Callable[[int], int] = lambda _: 5) -> tuple[torch.nn.Module, list[float]]:
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters())
    scheduler = torch.optim.lr_scheduler.CyclicLR(optimizer, **CYCLE)
    losses = []
    for index, batch in enumerate(batches(steps)):
        optimizer.zero_grad()
        loss = model(batch[: sizes(index)]).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return model, losses


def graphed_model(**options: Any) -> tuple[torch.nn.Module, FusedAdam, GraphedStep]:
    model = make_model()
    optimizer = FusedAdam(model.parameters(), schedule=Cyclic(**CYCLE))

    def step(batch: torch.Tensor) -> torch.Tensor:
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return model, optimizer, GraphedStep(step, optimizer, **options)


def assert_same_models(first: torch.nn.Module, second: torch.nn.Module) -> None:
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_graphed_step_runs_eagerly_without_cuda(backend: str) -> None:
    model, optimizer, graphed = graphed_model()
    losses = [graphed(batch).item() for batch in batches(20)]
    theirs, expected = eager_torch(20)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert_same_models(model, theirs)
    assert graphed.num_graphs == 0
    assert optimizer.captured_steps == []


@pytest.mark.parametrize("check", ["first", "always", "never"])
@pytest.mark.usefixtures("emulated_cuda")
def test_every_call_is_one_step_captured_or_not(check: Any) -> None:
    steps = 3 * 8 + 2
    model, optimizer, graphed = graphed_model(check=check, warmup=2)
    losses = [graphed(batch).item() for batch in batches(steps)]
    theirs, expected = eager_torch(steps)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert_same_models(model, theirs)
    assert graphed.num_graphs == 1
    assert optimizer.schedule_step == int(optimizer.applied_steps) == steps


@pytest.mark.usefixtures("emulated_cuda")
def test_shapes_have_graphs_of_their_own() -> None:
    steps = 30
    model, optimizer, graphed = graphed_model(check="always", warmup=1, max_graphs=2)
    sizes = [5, 3, 5, 5, 3, 2]

    def size(index: int) -> int:
        return sizes[index % len(sizes)]

    losses = [graphed(batch[: size(index)]).item() for index, batch in enumerate(batches(steps))]
    theirs, expected = eager_torch(steps, size)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert_same_models(model, theirs)
    assert graphed.num_graphs == len(optimizer.captured_steps) == 2


@pytest.mark.usefixtures("emulated_cuda")
def test_a_group_added_later_is_captured_anew() -> None:
    model, optimizer, graphed = graphed_model(warmup=1)
    for batch in batches(5):
        graphed(batch)
    extra = torch.nn.Parameter(torch.ones(4))
    optimizer.add_param_group({"params": [extra], "lr": 0.5, "schedule": None})
    model.register_forward_pre_hook(lambda _, args: (args[0] * extra,))
    before = int(optimizer.applied_steps)
    for batch in batches(5):
        graphed(batch)
    assert graphed.num_graphs == 1
    assert int(optimizer.applied_steps) == before + 5
    assert optimizer.state[extra]["step"] == 5
    assert not optimizer.stale_replay


@pytest.mark.usefixtures("emulated_cuda")
def test_a_scheduler_in_the_loop_never_ticks_twice() -> None:
    model, optimizer, graphed = graphed_model(warmup=1)
    scheduler = fused_clr.CyclicLR(optimizer, **CYCLE)
    theirs = make_model()
    torch_optimizer = torch.optim.Adam(theirs.parameters())
    torch_scheduler = torch.optim.lr_scheduler.CyclicLR(torch_optimizer, **CYCLE)
    for batch in batches(12):
        graphed(batch)
        torch_optimizer.zero_grad()
        theirs(batch).square().mean().backward()
        torch_optimizer.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(torch_optimizer.param_groups[0]["lr"], rel=1e-12)
        scheduler.step()
        torch_scheduler.step()
        assert scheduler.get_last_lr() == pytest.approx(torch_scheduler.get_last_lr(), rel=1e-12)
    assert_same_models(model, theirs)


@pytest.mark.usefixtures("emulated_cuda")
def test_a_released_graphed_step_starts_anew() -> None:
    model, optimizer, graphed = graphed_model(warmup=1)
    for index, batch in enumerate(batches(12)):
        graphed(batch)
        if index == 5:
            graphed.release()
            assert graphed.num_graphs == 0
            assert optimizer.captured_steps == []
    assert graphed.num_graphs == 1
    assert_same_models(model, eager_torch(12)[0])


@pytest.mark.usefixtures("emulated_cuda")
def test_a_moved_parameter_stops_a_graphed_step() -> None:
    model, _, graphed = graphed_model(check="always", warmup=1)
    for batch in batches(4):
        graphed(batch)
    weight = next(model.parameters())
    weight.data = weight.data.clone()
    with pytest.raises(RuntimeError, match="has moved in memory"):
        graphed(batches(1)[0])


@pytest.mark.usefixtures("emulated_cuda")
def test_a_step_that_fails_leaves_no_graph() -> None:
    model, optimizer, _ = graphed_model()
    fail = False

    def step(batch: torch.Tensor) -> None:
        model(batch).square().mean().backward()
        optimizer.step()
        if fail:
            raise ValueError("the user's")

    graphed = GraphedStep(step, optimizer, warmup=1)
    graphed(batches(1)[0])
    fail = True
    with pytest.raises(ValueError, match="the user's"):
        graphed(batches(1)[0])
    assert graphed.num_graphs == 0
    assert optimizer.captured_steps == []


@pytest.mark.usefixtures("emulated_cuda")
def test_a_step_without_an_optimizer_step_is_refused() -> None:
    model, optimizer, _ = graphed_model()
    graphed = GraphedStep(lambda batch: model(batch).sum().backward(), optimizer, warmup=1)
    graphed(batches(1)[0])
    with pytest.raises(RuntimeError, match=r"called no optimizer\.step\(\)"):
        graphed(batches(1)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"warmup": 0}, "warmup must be an integer >= 1, got 0"),
        ({"warmup": "3"}, "warmup must be an integer >= 1, got '3'"),
        ({"max_graphs": 2.5}, "max_graphs must be an integer >= 1, got 2.5"),
        ({"max_graphs": -1}, "max_graphs must be an integer >= 1, got -1"),
        ({"check": "sometimes"}, "check must be one of 'first', 'always', 'never', got 'sometimes'"),
        ({"capture_error_mode": "strict"}, "capture_error_mode must be one of .*, got 'strict'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        graphed_model(**arguments)
    with pytest.raises(TypeError, match="optimizer must be a FusedAdam or a list of them, got SGD"):
        GraphedStep(print, torch.optim.SGD([torch.ones(1)]))


def test_bad_objects() -> None:
    _, optimizer, graphed = graphed_model()
    with pytest.raises(TypeError, match="step must be callable, got NoneType"):
        GraphedStep(None, optimizer)
    with pytest.raises(ValueError, match="optimizer must not be an empty list"):
        GraphedStep(print, [])
    with pytest.raises(TypeError, match="tensors or hashable values, .* got set"):
        graphed({1, 2})
    with pytest.raises(TypeError, match=r"captured must be one of optimizer\.captured_steps or None, got str"):
        optimizer.check_replay("newest")
    with pytest.raises(TypeError, match="optimizer must be a FusedAdam, got SGD"):
        fused_clr.Monitor(torch.optim.SGD([torch.ones(1)]))


@pytest.mark.usefixtures("emulated_cuda")
def test_batches_may_be_nested_and_named() -> None:
    model, optimizer, _ = graphed_model()
    seen = []

    def step(batch: dict[str, Any], *, scale: float) -> dict[str, torch.Tensor]:
        loss = model(batch["inputs"]).square().mean() * scale
        loss.backward()
        optimizer.step()
        seen.append(batch["name"])
        return {"loss": loss.detach()}

    graphed = GraphedStep(step, optimizer, warmup=1)
    losses = [graphed({"inputs": batch, "name": "x"}, scale=2.0)["loss"].item() for batch in batches(6)]
    assert losses == pytest.approx([2 * loss for loss in _losses_at_twice_the_scale(6)], rel=1e-5)
    assert seen == ["x", "x"]
    # Another value that is no tensor is another graph.
    graphed({"inputs": batches(1)[0], "name": "y"}, scale=2.0)
    graphed({"inputs": batches(1)[0], "name": "y"}, scale=2.0)
    assert graphed.num_graphs == 2


def _losses_at_twice_the_scale(steps: int) -> list[float]:
    model = make_model()
    optimizer = FusedAdam(model.parameters(), schedule=Cyclic(**CYCLE))
    losses = []
    for batch in batches(steps):
        optimizer.zero_grad()
        loss = model(batch).square().mean()
        (loss * 2).backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.usefixtures("emulated_cuda")
def test_accumulation_inside_a_captured_step() -> None:
    model, reference = make_model(), make_model()
    optimizer = FusedAdam(model.parameters(), schedule=Cyclic(**CYCLE), max_grad_norm=0.1)
    torch_optimizer = torch.optim.Adam(reference.parameters())
    scheduler = torch.optim.lr_scheduler.CyclicLR(torch_optimizer, **CYCLE)

    def step(micro_batches: list[torch.Tensor]) -> None:
        for batch in micro_batches:
            (model(batch).square().mean() / len(micro_batches)).backward()
        optimizer.step()

    graphed = GraphedStep(step, optimizer, warmup=1)
    data = batches(36)
    for index in range(0, 36, 3):
        graphed(data[index : index + 3])
        torch_optimizer.zero_grad()
        for batch in data[index : index + 3]:
            (reference(batch).square().mean() / 3).backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
        torch_optimizer.step()
        scheduler.step()
    assert graphed.num_graphs == 1
    assert_same_models(model, reference)


@pytest.mark.usefixtures("emulated_cuda")
@pytest.mark.parametrize("max_grad_norm", [None, 0.05], ids=["plain", "clipped"])
def test_gradscaler_inside_a_captured_step(max_grad_norm: float | None) -> None:
    """Overflows injected by the batch; torch's eager pair, which skips on the host, ticks its schedule by hand."""
    model, reference = make_model(), make_model()
    optimizer = FusedAdam(model.parameters(), schedule=Cyclic(**CYCLE), max_grad_norm=max_grad_norm)
    torch_optimizer = torch.optim.Adam(reference.parameters())
    scheduler = torch.optim.lr_scheduler.CyclicLR(torch_optimizer, **CYCLE)
    scalers = [torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=4) for _ in range(2)]

    def step(batch: torch.Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch).float().square().mean()
        scalers[0].scale(loss).backward()
        scalers[0].step(optimizer)
        scalers[0].update()

    graphed = GraphedStep(step, optimizer, warmup=2)
    skipped = 0
    for index, batch in enumerate(batches(30)):
        if index % 7 == 5:
            batch = batch.clone()
            batch[0, 0] = torch.inf
        graphed(batch)
        torch_optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = reference(batch).float().square().mean()
        scale = scalers[1].get_scale()
        scalers[1].scale(loss).backward()
        scalers[1].unscale_(torch_optimizer)
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(reference.parameters(), max_grad_norm)
        scalers[1].step(torch_optimizer)
        scalers[1].update()
        if scalers[1].get_scale() < scale:
            skipped += 1
        else:
            scheduler.step()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(torch_optimizer.param_groups[0]["lr"], rel=1e-12)
    assert skipped == 4
    assert (int(optimizer.applied_steps), int(optimizer.skipped_steps)) == (26, 4)
    assert optimizer.history(30).skipped.tolist() == [index % 7 == 5 for index in range(30)]
    assert_same_models(model, reference)


# -- what torch's pair does --------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("emulated_cuda")
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float-lr", "tensor-lr"])
def test_torchs_pair_freezes_where_ours_follows(tensor_lr: bool) -> None:
    """A captured torch step keeps beta1, and a float learning rate; the same loop captured with ours follows both."""
    torch_lr = torch.tensor(1e-3) if tensor_lr else 1e-3
    pairs = [make_pair(True), make_pair(False, fused=True, lr=torch_lr)]
    graphs, eager = [], make_pair(False, fused=True)
    for pair in (*pairs, eager):
        set_gradients(pair, 0, EVERYTHING)
        pair.optimizer.step()
        pair.scheduler.step()
    applied = [(float(group["lr"]), group["betas"][0]) for group in pairs[1].optimizer.param_groups]
    for pair in pairs:
        graphs.append(EmulatedGraph())
        with capture(graphs[-1]):
            pair.optimizer.step()
    frozen = make_pair(False, fused=True)
    for mine, torchs in zip(frozen.params, pairs[1].params, strict=True):
        mine.data.copy_(torchs)
    frozen.optimizer.load_state_dict(copy.deepcopy(pairs[1].optimizer.state_dict()))
    for step in range(1, 12):
        for pair, graph in zip(pairs, graphs, strict=True):
            set_gradients(pair, step, EVERYTHING)
            graph.replay()
            pair.scheduler.step()
        set_gradients(eager, step, EVERYTHING)
        eager.optimizer.step()
        eager.scheduler.step()
        # What a captured torch step does: the numbers of the capture for ever.
        set_gradients(frozen, step, EVERYTHING)
        for group, (lr, beta1) in zip(frozen.optimizer.param_groups, applied, strict=True):
            group["lr"], group["betas"] = lr, (beta1, 0.999)
        if not tensor_lr:
            frozen.optimizer.step()
            assert_same_params(pairs[1], frozen, 1e-6, 1e-7)
        assert_same_params(pairs[0], eager, 1e-5, 1e-6)
    differs = [not torch.allclose(a, b, rtol=1e-4) for a, b in zip(pairs[1].params, eager.params, strict=True)]
    assert all(differs)
