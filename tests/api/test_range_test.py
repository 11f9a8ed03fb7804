"""The range test: its learning rates, that it leaves nothing behind, and what it says of bad arguments."""

from __future__ import annotations

import csv
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fused_clr import (
    CyclicLR,
    FusedAdam,
    FusedAdamW,
    FusedSGD,
    GraphedStep,
    RangeTest,
    plotting,
    range_test,
    suggest_step_size,
)
from fused_clr.schedules import Cyclic, Exponential, Linear
from tests.helpers.pictures import width_drawn
from tests.helpers.snapshots import everything

SWEEP: dict[str, Any] = {"start_lr": 1e-3, "end_lr": 1.0, "num_steps": 12, "progress": False}


class RunningMean(nn.Module):
    """A buffer that forwards write in place."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return x - self.mean


class Training:
    """A small network with everything that a step may change, and its step."""

    def __init__(
        self, *, graphed: bool = False, scheduled: bool = True, scaled: bool = False, kind: Any = FusedAdam
    ) -> None:
        torch.manual_seed(1)
        # The emulated graph knows neither a generator nor what native_batch_norm writes in place.
        middle = [RunningMean(6)] if graphed else [nn.BatchNorm1d(6), nn.Dropout(0.3)]
        self.model = nn.Sequential(nn.Linear(4, 6), *middle, nn.Tanh(), nn.Linear(6, 2))
        groups = [{"params": list(self.model[0].parameters()), "lr": 1e-2}, {"params": [*self.model[1:].parameters()]}]
        self.optimizer = kind(groups, lr=2e-3, max_grad_norm=1.0, history_size=32)
        self.scheduler = CyclicLR(self.optimizer, 1e-3, [1e-2, 2e-2], step_size_up=5) if scheduled else None
        self.scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=4.0, growth_interval=3)
        self.calls = 0
        self.on_call: Callable[[int], None] = lambda call: None
        self.run = GraphedStep(self._step, self.optimizer, num_warmup_iters=2) if graphed else self._step
        generator = torch.Generator().manual_seed(3)
        self.batches = [torch.randn(5, 4, generator=generator) for _ in range(40)]

    def _step(self, batch: Tensor) -> Tensor:
        loss = self.model(batch).square().mean()
        if not isinstance(self.run, GraphedStep):
            self.optimizer.zero_grad(set_to_none=False)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def step(self, batch: Tensor) -> Tensor:
        self.calls += 1
        self.on_call(self.calls)
        random.random(), np.random.rand()
        loss = self.run(batch)
        if self.scheduler is not None and self.calls % 2:
            self.scheduler.step()
        return loss

    def train(self, first: int, last: int) -> None:
        for batch in self.batches[first:last]:
            self.step(batch)

    def everything(self) -> Any:
        return everything(self.model, self.optimizer, self.scaler, *filter(None, [self.scheduler]))

    def range_test(self, **arguments: Any) -> RangeTest:
        restore = [self.model, self.scaler, *filter(None, [self.scheduler])]
        return range_test(self.step, self.optimizer, self.batches, **{**SWEEP, "restore": restore, **arguments})


class Stopped(Exception):
    pass


def interfere(training: Training, ending: str, call: int) -> None:
    """Lets a training's step end the range test at its ``call``-th call from now."""
    first = training.calls

    def on_call(now: int) -> None:
        if now - first != call:
            return
        if ending == "diverged":
            with torch.no_grad():
                training.model[-1].weight.fill_(1e4)
        training.model.eval()
        if ending == "error":
            raise Stopped
        if ending == "interrupt":
            raise KeyboardInterrupt

    training.on_call = on_call


@pytest.fixture(params=["cpu", "triton", "graph"])
def how(request: pytest.FixtureRequest) -> str:
    """A backend, or a captured step on the triton backend."""
    if request.param == "graph":
        request.getfixturevalue("emulated_cuda")
    else:
        request.getfixturevalue("monkeypatch").setenv("FUSED_CLR_BACKEND", request.param)
    return request.param


@pytest.mark.parametrize(
    ("ending", "before"), [("end", 0), ("end", 6), ("diverged", 6), ("error", 0), ("interrupt", 6)]
)
def test_everything_is_restored_and_training_continues(how: str, ending: str, before: int) -> None:
    """Bit for bit, and as a twin that had no range test; with grads or without, with a capture before it or in it."""
    # SGD's first update of a parameter is another one than its later ones.
    kind = {"end": FusedAdam, "diverged": FusedSGD, "error": FusedSGD, "interrupt": FusedAdamW}[ending]
    scaled = before == 6 and how != "graph"
    training, twin = (Training(graphed=how == "graph", scaled=scaled, kind=kind) for _ in range(2))
    for one in (twin, training):
        torch.manual_seed(4)
        one.train(0, before)
    saved = training.everything()
    captures = list(training.optimizer.captures)
    assert not (before == 6 and how == "graph" and not captures)
    interfere(training, ending, random.Random(before).randrange(3, 10))
    errors = {"error": Stopped, "interrupt": KeyboardInterrupt}
    if ending in errors:
        with pytest.raises(errors[ending]):
            training.range_test()
    else:
        result = training.range_test()
        assert result.stopped_by == ending
        assert len(result.lr) == 12 if ending == "end" else 2 <= len(result.lr) < 12
    if not (how == "graph" and before == 0):
        # A step that is captured in the range test creates state, which stays.
        assert training.everything() == saved
    assert training.optimizer.captures[: len(captures)] == captures
    assert all(capture.fits for capture in captures)

    training.on_call = lambda call: None
    training.calls = twin.calls
    random_state = torch.get_rng_state()
    training.train(before, before + 4)
    torch.set_rng_state(random_state)
    twin.train(before, before + 4)
    for ours, theirs in zip(training.model.state_dict().values(), twin.model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert str(training.optimizer.status()) == str(twin.optimizer.status())
    assert str(training.optimizer.history()) == str(twin.optimizer.history())
    if captures:
        assert training.run.num_graphs == 1
        assert training.optimizer.captures == captures


@pytest.mark.parametrize("scheduler_too", [False, True])
def test_what_was_assigned_to_last_epoch_waits_for_the_scheduler(backend: str, scheduler_too: bool) -> None:
    training = Training()
    training.train(0, 3)
    assert training.scheduler is not None
    training.scheduler.last_epoch = 7
    saved = training.everything()
    training.range_test(restore=[training.model, *[training.scheduler][: int(scheduler_too)]], num_steps=20)
    assert training.scheduler.last_epoch == 7
    if scheduler_too:
        assert training.everything() == saved
    # No warning of the many steps of the range test either.
    training.scheduler.step()
    assert training.optimizer.status().schedule_step == 8


def test_a_momentum_that_a_schedule_drives_stays(backend: str) -> None:
    for kind, key in ((FusedSGD, "momentum"), (FusedAdam, "betas")):
        training = Training(kind=kind)
        training.train(0, 2)
        before = [group[key] for group in training.optimizer.param_groups]
        seen: list[Any] = []
        groups, on_call = training.optimizer.param_groups, seen.append
        training.on_call = lambda call, groups=groups, on_call=on_call, key=key: on_call([g[key] for g in groups])
        training.range_test()
        # Two calls, of which the second one waits for its scheduler: the next step's.
        expected = [group.schedule.momentum(2) for group in training.optimizer.param_groups]
        assert seen == [[(value, 0.999) if key == "betas" else value for value in expected]] * 12
        assert [group[key] for group in training.optimizer.param_groups] == before


def test_an_error_between_unscale_and_update_leaves_the_scaler_usable(backend: str) -> None:
    training = Training(scaled=True)

    def step(batch: Tensor) -> Tensor:
        training.optimizer.zero_grad()
        training.scaler.scale(training.model(batch).square().mean()).backward()
        training.scaler.unscale_(training.optimizer)
        raise Stopped

    with pytest.raises(Stopped):
        range_test(step, training.optimizer, training.batches, restore=[training.model, training.scaler], **SWEEP)
    # Torch raises an error if unscale_() was called already.
    training.scaler.unscale_(training.optimizer)


def test_what_else_can_be_restored(backend: str) -> None:
    training = Training()
    other = nn.Linear(2, 2)
    others: list[Any] = [
        FusedAdam(other.parameters(), schedule=Linear(0.1, 0.2, 5)),
        torch.optim.SGD(other.parameters()),
    ]
    generator = torch.Generator().manual_seed(5)
    # Its elements share memory: torch refuses to write it in place.
    other.register_buffer("expanded", torch.zeros(1).expand(3))
    other.register_buffer("replaced", torch.zeros(2))

    def step(batch: Tensor) -> Tensor:
        other(torch.rand(1, 2, generator=generator)).sum().backward()
        other.replaced = other.replaced + 1
        for optimizer in others:
            optimizer.step()
        return training.step(batch)

    def state() -> Any:
        return [everything(other, others[0], others[1]), training.everything(), generator.get_state().tolist()]

    saved, buffer = state(), other.replaced
    restore = [training.model, training.scheduler, *others, generator, other]
    result = range_test(step, training.optimizer, training.batches, restore=restore, **SWEEP)
    assert len(result.lr) == 12
    assert state() == saved
    assert other.replaced is buffer


def test_groups_added_by_the_step_are_removed(backend: str) -> None:
    training = Training()
    saved = training.everything()
    extra = nn.Parameter(torch.ones(2))
    training.on_call = lambda call: training.optimizer.add_param_group({"params": [extra]}) if call == 4 else None
    training.range_test()
    after = training.everything()
    # Its documentation says that adding a param group clears it.
    del saved["history"], after["history"]
    assert after == saved


@pytest.mark.parametrize("mode", ["exponential", "linear"])
@pytest.mark.parametrize("optimizer_class", [FusedAdam, FusedSGD])
def test_the_learning_rate_rises_with_applied_updates(backend: str, mode: str, optimizer_class: Any) -> None:
    """Three micro-batches an update, some updates skipped for an overflow: neither advances the sweep."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = optimizer_class([weight], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    overflows = {2, 5, 6, 11}
    applied: list[float] = []
    updates = itertools.count()
    losses: dict[float, list[float]] = {}

    def step(batch: tuple[int, Tensor]) -> float:
        index, values = batch
        lr = optimizer.param_groups[0]["lr"]
        loss = (weight * values).square().mean()
        losses.setdefault(lr, []).append(loss.item())
        scaler.scale(loss).backward()
        if index % 3 == 2:
            if next(updates) in overflows:
                weight.grad[0] = torch.inf
            else:
                applied.append(lr)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return losses[lr][-1]

    batches = ((index, torch.full((3,), 0.1 + 0.1 * (index % 7))) for index in itertools.count())
    arguments = {**SWEEP, "mode": mode, "smoothing": 0.0, "stop_factor": 1e6}
    result = range_test(step, optimizer, batches, restore=[scaler], check_every=4, **arguments)
    family = {"exponential": Exponential, "linear": Linear}[mode]
    theory = [family(1e-3, 1.0, steps=11).lr(index) for index in range(12)]
    assert theory[0] == 1e-3
    assert theory[-1] == 1.0
    assert result.stopped_by == "end"
    np.testing.assert_array_equal(result.lr, theory)
    np.testing.assert_allclose(applied, theory, rtol=1e-12)
    np.testing.assert_allclose(result.loss, [np.mean(losses[lr]) for lr in applied], rtol=1e-12)
    np.testing.assert_array_equal(result.smoothed, result.loss)
    assert [len(losses[lr]) for lr in applied] == [3, 3, 6, 3, 9, 3, 3, 3, 6, 3, 3, 3]


@pytest.mark.parametrize("stop_factor", [1.5, 4.0, float("inf")])
def test_the_result_does_not_depend_on_check_every(stop_factor: float) -> None:
    results, counts = [], []
    for check_every in (1, 7, 1000):
        reads = 0
        training = Training()
        with pytest.MonkeyPatch.context() as patch:

            def count(name: str, patch: pytest.MonkeyPatch = patch) -> None:
                method = getattr(Tensor, name)

                def read(tensor: Tensor, *args: Any) -> Any:
                    nonlocal reads
                    reads += 1
                    return method(tensor, *args)

                patch.setattr(Tensor, name, read)

            for name in ("item", "tolist", "cpu", "__float__", "__int__", "__bool__", "numpy"):
                count(name)
            arguments = {"num_steps": 30, "end_lr": 1e4, "smoothing": 0.5, "stop_factor": stop_factor}
            results.append(training.range_test(restore=[training.model], check_every=check_every, **arguments))
        counts.append(reads)
    if stop_factor > 1e9:
        # One read a check: 30, 5 and 1. The rest are the snapshot's and the cpu backend's steps'.
        assert [count - counts[2] for count in counts] == [29, 4, 0]
    assert results[0].stopped_by == ("end" if stop_factor > 1e9 else "diverged")
    assert len(results[0].lr) == 30 if stop_factor > 1e9 else len(results[0].lr) < 30
    assert str(results[0]) == str(results[1]) == str(results[2])
    # What the averages are, by their definition.
    for index, smoothed in enumerate(results[0].smoothed):
        weights = 0.5 ** np.arange(index, -1, -1)
        np.testing.assert_allclose(smoothed, np.average(results[0].loss[: index + 1], weights=weights))


def test_it_stops_at_a_loss_that_is_not_finite_and_takes_negative_ones() -> None:
    losses = [-1.0, -2.0, -3.0, -2.5, 1.0, 6.5, float("nan"), 0.0, 0.0, 0.0]
    weight = nn.Parameter(torch.ones(1))
    # Beyond the smallest, -3, by more than (stop_factor - 1) * 3. The loss beyond it is kept, a NaN is not.
    for stop_factor, count in ((float("inf"), 6), (4.0, 6), (3.0, 6), (2.0, 5), (1.1, 4)):
        optimizer, returned = FusedAdam([weight]), iter(losses)

        def step(_: int, optimizer: FusedAdam = optimizer, returned: Iterator[float] = returned) -> float:
            weight.grad = torch.ones(1)
            optimizer.step()
            return next(returned)

        arguments = {"num_steps": 10, "smoothing": 0.0, "stop_factor": stop_factor, "progress": False}
        result = range_test(step, optimizer, range(10), **arguments)
        assert result.stopped_by == "diverged"
        assert len(result.loss) == count


def test_divergence_is_from_the_smallest_loss_and_not_from_the_last() -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer, returned = FusedAdam([weight]), iter([1.0, 0.5, 0.6, 0.9, 1.3, 1.9, 2.7, 4.0, 6.0, 9.0])

    def step(_: int) -> float:
        weight.grad = torch.ones(1)
        optimizer.step()
        return next(returned)

    result = range_test(step, optimizer, range(10), num_steps=10, smoothing=0.0, stop_factor=2.0, progress=False)
    assert result.loss.tolist() == [1.0, 0.5, 0.6, 0.9, 1.3]


def test_sweeps_that_cannot_go_on(backend: str) -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = FusedAdam([weight])
    calls = 0

    def idle(_: int) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.zeros(())

    with pytest.raises(
        RuntimeError, match=r"step applied no update in 1,000 calls: it never called optimizer.step\(\)"
    ):
        range_test(idle, optimizer, itertools.count(), progress=False, check_every=50)
    assert calls == 1000

    def stops(index: int) -> Tensor:
        weight.grad = torch.ones(2)
        if index < 3:
            optimizer.step()
        return torch.zeros(())

    result = range_test(stops, optimizer, itertools.count(), progress=False, check_every=50)
    assert (result.stopped_by, len(result.lr)) == ("stalled", 3)
    assert result.suggest().reason == "the curve has 3 steps, and 10 are needed: lower start_lr"


def test_batches_are_used_again_with_a_warning() -> None:
    training = Training()
    training.batches = training.batches[:5]
    with pytest.warns(
        UserWarning, match="batches has only 5 entries, fewer than the range test needs: it uses them again"
    ) as got:
        result = training.range_test()
    assert len(got) == 1
    assert got[0].filename == __file__
    assert len(result.lr) == 12
    training.batches = iter(training.batches)  # type: ignore[assignment]
    with (
        pytest.warns(UserWarning, match="only 5"),
        pytest.raises(RuntimeError, match="batches ended after 5 .* because it is an iterator"),
    ):
        training.range_test()


def returns(value: Any) -> Any:
    return lambda batch: value


BAD: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "a step that is none": (TypeError, "step must be callable, got int", {"step": 3}),
    "no loss": (TypeError, "step must return the loss, .*, got NoneType", {"step": returns(None)}),
    "many losses": (TypeError, r"a torch.float32 tensor of shape \(2,\)", {"step": returns(torch.ones(2))}),
    "a complex loss": (TypeError, "a torch.complex64 tensor", {"step": returns(torch.ones((), dtype=torch.complex64))}),
    "a boolean": (TypeError, "got bool", {"step": returns(True)}),
    "a tuple": (TypeError, "got tuple", {"step": returns((torch.ones(()), 1))}),
    "equal rates": (ValueError, "end_lr must be > start_lr=0.1, got 0.1", {"start_lr": 0.1, "end_lr": 0.1}),
    "falling rates": (ValueError, "end_lr must be > start_lr=1.0, got 0.5", {"start_lr": 1.0, "end_lr": 0.5}),
    "no first rate": (ValueError, "start_lr must be", {"start_lr": 0.0}),
    "a rate without end": (ValueError, "end_lr must be", {"end_lr": float("inf")}),
    "text": (ValueError, "start_lr must be", {"start_lr": "1e-3"}),
    "no batches": (ValueError, "batches must not be empty", {"batches": []}),
    "one batch": (TypeError, "batches must be iterable, got int", {"batches": 3}),
    "nine steps": (ValueError, "num_steps must be an integer in .10, .*, got 9", {"num_steps": 9}),
    "half a step": (ValueError, "num_steps must be", {"num_steps": 10.5}),
    "another mode": (ValueError, "mode must be one of .*, got 'cosine'", {"mode": "cosine"}),
    "a factor of 1": (ValueError, "stop_factor must be a number > 1, got 1", {"stop_factor": 1}),
    "smoothing of 1": (ValueError, "smoothing must be a number in .*, got 1", {"smoothing": 1}),
    "no checks": (ValueError, "check_every must be an integer >= 1, got 0", {"check_every": 0}),
    "progress": (ValueError, "progress must be True or False, got 1", {"progress": 1}),
    "no list": (TypeError, "restore must be a list of objects, got Linear", {"restore": nn.Linear(1, 1)}),
    "a number": (TypeError, r"restore\[0\] must be a module, .*, got int", {"restore": [3]}),
    "a lazy module": (ValueError, r"restore\[0\] has a tensor without memory", {"restore": [nn.LazyLinear(2)]}),
}


@pytest.mark.parametrize(("error", "message", "arguments"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named_and_change_nothing(
    backend: str, error: type[Exception], message: str, arguments: dict[str, Any]
) -> None:
    training = Training()
    training.train(0, 3)
    saved = training.everything()
    given = {"step": training.step, "batches": training.batches, **SWEEP, "restore": [training.model], **arguments}
    with pytest.raises(error, match=message):
        range_test(given.pop("step"), training.optimizer, given.pop("batches"), **given)
    assert training.everything() == saved


def test_other_optimizers_are_refused() -> None:
    optimizer: Any = torch.optim.Adam([nn.Parameter(torch.ones(1))])
    with pytest.raises(TypeError, match="optimizer must be a FusedAdam, FusedAdamW or FusedSGD, got Adam"):
        range_test(returns(1.0), optimizer, [1])
    with pytest.raises(ValueError, match="optimizer has a tensor without memory"):
        range_test(returns(1.0), FusedAdam(nn.LazyLinear(2).parameters()), [1], progress=False)


def test_a_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    Training().range_test(progress=True)
    assert "range test: 100%" in capsys.readouterr().err


def curve(stop: int = 100) -> RangeTest:
    """A plateau at 2.3, a fall from 1e-3 to 0.03, and a rise."""
    lr = np.geomspace(1e-7, 10, 100)
    loss = 2.3 - 2 / (1 + (8e-3 / lr) ** 1.5) + (lr / 0.1) ** 2 + 0.02 * np.random.default_rng(0).standard_normal(100)
    return RangeTest(lr[:stop], loss[:stop], loss[:stop], "end")


def test_schedule_csv_and_picture(tmp_path: Any) -> None:
    result = curve()
    base_lr, max_lr, rule, reason = result.suggest()
    assert base_lr is not None
    assert max_lr is not None
    assert result.schedule(100, mode="triangular2") == Cyclic(base_lr, max_lr, 100, mode="triangular2")
    steepest = result.suggest("steepest")
    options: dict[str, Any] = {"cycle_momentum": False, "step_size_down": 50}
    assert result.schedule(100, rule="steepest", **options) == Cyclic(*steepest[:2], 100, **options)  # type: ignore[arg-type]
    assert (rule, reason) == ("smith", "base_lr: where the loss starts to fall; max_lr: where it turns")

    result.to_csv(tmp_path / "curve.csv")
    with open(tmp_path / "curve.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "lr", "loss", "smoothed"]
    for name in ("lr", "loss", "smoothed"):
        np.testing.assert_array_equal([float(row[name]) for row in rows], getattr(result, name))
    figure = result.plot(tmp_path / "curve.png")
    assert width_drawn(tmp_path / "curve.png", plotting.OURS) > 0.5
    assert f"max_lr {max_lr:.1e}" in [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    # Without bounds, and without steps.
    curve(40).plot(tmp_path / "none.png")
    RangeTest(*np.zeros((3, 0)), "diverged").plot(tmp_path / "empty.png")
    with pytest.raises(ValueError, match="rule='smith' suggests no bounds: the loss does not fall"):
        curve(40).schedule(10)


@pytest.mark.parametrize("epochs", [1.9, 11, "2", float("nan")], ids=str)
def test_step_size(epochs: Any) -> None:
    assert suggest_step_size(45) == 180
    assert suggest_step_size(3, 2.5) == 8
    with pytest.raises(ValueError, match="epochs_per_half_cycle must be in"):
        suggest_step_size(45, epochs)
    with pytest.raises(ValueError, match="batches_per_epoch must be an integer >= 1, got 0"):
        suggest_step_size(0)
