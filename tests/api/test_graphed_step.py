"""GraphedStep: every call is one step, captured or not, and equals torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fused_clr
from fused_clr import FusedAdam, GraphedStep
from fused_clr.schedules import Cyclic
from tests.helpers.graphed import CYCLE, assert_same_models, batches, eager_torch, graphed_model, make_model


def test_a_graphed_step_runs_eagerly_without_cuda(backend: str) -> None:
    model, optimizer, graphed = graphed_model()
    losses = [graphed(batch).item() for batch in batches(20)]
    theirs, expected = eager_torch(20)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert_same_models(model, theirs)
    assert graphed.num_graphs == 0
    assert optimizer.captures == []


@pytest.mark.parametrize("check", ["first", "always", "never"])
@pytest.mark.usefixtures("emulated_cuda")
def test_every_call_is_one_step_captured_or_not(check: Any) -> None:
    steps = 3 * 8 + 2
    model, optimizer, graphed = graphed_model(check=check, num_warmup_iters=2)
    losses = [graphed(batch).item() for batch in batches(steps)]
    theirs, expected = eager_torch(steps)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert_same_models(model, theirs)
    assert graphed.num_graphs == 1
    assert optimizer.status().schedule_step == int(optimizer.live.applied_steps) == steps


@pytest.mark.usefixtures("emulated_cuda")
def test_shapes_have_graphs_of_their_own() -> None:
    steps = 30
    model, optimizer, graphed = graphed_model(check="always", num_warmup_iters=1, max_graphs=2)
    sizes = [5, 3, 5, 5, 3, 2]

    def size(index: int) -> int:
        return sizes[index % len(sizes)]

    losses = [graphed(batch[: size(index)]).item() for index, batch in enumerate(batches(steps))]
    theirs, expected = eager_torch(steps, size)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert_same_models(model, theirs)
    assert graphed.num_graphs == len(optimizer.captures) == 2


@pytest.mark.usefixtures("emulated_cuda")
def test_a_group_added_later_is_captured_anew() -> None:
    model, optimizer, graphed = graphed_model(num_warmup_iters=1)
    for batch in batches(5):
        graphed(batch)
    extra = torch.nn.Parameter(torch.ones(4))
    optimizer.add_param_group({"params": [extra], "lr": 0.5, "schedule": None})
    model.register_forward_pre_hook(lambda _, args: (args[0] * extra,))
    before = int(optimizer.live.applied_steps)
    for batch in batches(5):
        graphed(batch)
    assert graphed.num_graphs == 1
    assert int(optimizer.live.applied_steps) == before + 5
    assert optimizer.state[extra]["step"] == 5
    assert not optimizer.status().stale_replay


@pytest.mark.usefixtures("emulated_cuda")
def test_a_scheduler_in_the_loop_never_ticks_twice() -> None:
    model, optimizer, graphed = graphed_model(num_warmup_iters=1)
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
    model, optimizer, graphed = graphed_model(num_warmup_iters=1)
    for index, batch in enumerate(batches(12)):
        graphed(batch)
        if index == 5:
            graphed.release()
            assert graphed.num_graphs == 0
            assert optimizer.captures == []
    assert graphed.num_graphs == 1
    assert_same_models(model, eager_torch(12)[0])


@pytest.mark.usefixtures("emulated_cuda")
@pytest.mark.parametrize("check", ["first", "always"])
def test_a_moved_parameter_stops_a_graphed_step(check: Any) -> None:
    model, _, graphed = graphed_model(check=check, num_warmup_iters=1)
    for batch in batches(4):
        graphed(batch)
    weight = next(model.parameters())
    memory = weight.data
    weight.data = memory.clone()
    with pytest.raises(RuntimeError, match="has moved in memory"):
        graphed(batches(1)[0])
    # The same memory, read in another order.
    weight.data = memory.view(memory.shape[::-1]).t()
    with pytest.raises(RuntimeError, match="was captured with shape .* capture the step again"):
        graphed(batches(1)[0])
    weight.data = memory
    graphed(batches(1)[0])


@pytest.mark.usefixtures("emulated_cuda")
def test_arguments_of_other_types_have_graphs_of_their_own() -> None:
    model, optimizer, _ = graphed_model()

    def step(batch: torch.Tensor, value: Any) -> torch.Tensor:
        loss = model(batch).square().mean() * (2.0 if isinstance(value, bool) else 1.0)
        loss.backward()
        optimizer.step()
        return loss.detach() * 0 + (2.0 if isinstance(value, bool) else 3.0 if isinstance(value, float) else 4.0)

    graphed = GraphedStep(step, optimizer, num_warmup_iters=1)
    batch = batches(1)[0]
    for _ in range(3):
        assert [float(graphed(batch, value)) for value in (True, 1.0, 1)] == [2.0, 3.0, 4.0]
    assert graphed.num_graphs == 3
    for _ in range(3):
        for value in (0.0, -0.0, float("nan")):
            graphed(batch, value)
    assert graphed.num_graphs == 6


@pytest.mark.usefixtures("emulated_cuda")
def test_inputs_keep_requires_grad_and_get_their_gradients() -> None:
    """A penalty on the gradient of the loss by the inputs, in the same step."""
    trained, seen, given = [], [], []
    for warmup in (1, 100):
        model, optimizer, _ = graphed_model()

        def step(batch: torch.Tensor, model: Any = model, optimizer: Any = optimizer) -> torch.Tensor:
            (slope,) = torch.autograd.grad(model(batch).sum(), batch, create_graph=True)
            loss = model(batch).square().mean() + slope.square().mean()
            loss.backward()
            optimizer.step()
            return slope.detach().clone()

        graphed = GraphedStep(step, optimizer, num_warmup_iters=warmup)
        data = [batch.requires_grad_() for batch in batches(4)]
        seen.append([graphed(batch).clone() for batch in [*data, data[0]]])
        trained.append(model)
        given.append([batch.grad for batch in data])
        # Without requires_grad, it is another kind of input.
        with pytest.raises(RuntimeError, match="does not require grad"):
            graphed(batches(1)[0])
    assert_same_models(*trained)
    torch.testing.assert_close(*seen, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*given, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("backend")
def test_inputs_computed_with_autograd_are_refused() -> None:
    _, optimizer, graphed = graphed_model()
    batch = batches(1)[0].requires_grad_() * 2
    with pytest.raises(ValueError, match=r"computed with autograd, .*; detach\(\) it, or compute it in the step"):
        graphed(batch)
    graphed(batch.detach())
    assert optimizer.status().schedule_step == 1


@pytest.mark.usefixtures("emulated_cuda")
def test_what_a_step_writes_into_its_arguments_reaches_the_caller() -> None:
    model, optimizer, _ = graphed_model()

    def step(batch: torch.Tensor, total: torch.Tensor) -> None:
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        total += 1

    graphed = GraphedStep(step, optimizer, num_warmup_iters=1)
    total, data = torch.zeros(2), batches(6)
    before = [batch.clone() for batch in data]
    for batch in data:
        graphed(batch, total)
    assert graphed.num_graphs == 1
    assert total.tolist() == [6.0, 6.0]
    assert all(torch.equal(a, b) for a, b in zip(data, before, strict=True))


@pytest.mark.usefixtures("emulated_cuda")
def test_a_step_that_fails_leaves_no_graph() -> None:
    model, optimizer, _ = graphed_model()
    fail = False

    def step(batch: torch.Tensor) -> None:
        model(batch).square().mean().backward()
        optimizer.step()
        if fail:
            raise ValueError("the user's")

    graphed = GraphedStep(step, optimizer, num_warmup_iters=1)
    graphed(batches(1)[0])
    fail = True
    with pytest.raises(ValueError, match="the user's"):
        graphed(batches(1)[0])
    assert graphed.num_graphs == 0
    assert optimizer.captures == []


@pytest.mark.usefixtures("emulated_cuda")
@pytest.mark.parametrize(
    "read",
    [torch.Tensor.item, float, bool, lambda loss: torch.equal(loss, loss), lambda loss: loss[None][loss[None] > 0]],
    ids=["item", "float", "bool", "equal", "mask"],
)
def test_an_emulated_graph_refuses_to_wait_as_a_real_one_does(read: Any) -> None:
    model, optimizer, _ = graphed_model()

    def step(batch: torch.Tensor) -> None:
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        read(loss.detach())

    graphed = GraphedStep(step, optimizer, num_warmup_iters=1)
    graphed(batches(1)[0])
    with pytest.raises(RuntimeError, match="would wait for the device, and a capture forbids that"):
        graphed(batches(1)[0])


@pytest.mark.usefixtures("emulated_cuda")
def test_a_step_without_an_optimizer_step_is_refused() -> None:
    model, optimizer, _ = graphed_model()
    graphed = GraphedStep(lambda batch: model(batch).sum().backward(), optimizer, num_warmup_iters=1)
    graphed(batches(1)[0])
    with pytest.raises(RuntimeError, match=r"called no optimizer\.step\(\)"):
        graphed(batches(1)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_warmup_iters": 0}, "num_warmup_iters must be an integer >= 1, got 0"),
        ({"num_warmup_iters": "3"}, "num_warmup_iters must be an integer >= 1, got '3'"),
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

    graphed = GraphedStep(step, optimizer, num_warmup_iters=1)
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

    graphed = GraphedStep(step, optimizer, num_warmup_iters=1)
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

    graphed = GraphedStep(step, optimizer, num_warmup_iters=2)
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
    assert (int(optimizer.live.applied_steps), int(optimizer.live.skipped_steps)) == (26, 4)
    assert optimizer.history(30).skipped.tolist() == [index % 7 == 5 for index in range(30)]
    assert_same_models(model, reference)
