"""CapturedTraining: a captured Lightning run trains, logs and counts as torch's eager one."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch.optim import lr_scheduler

from fused_clr import CyclicLR, FusedAdam, GraphedStep
from fused_clr.integrations.lightning import CapturedTraining

pytestmark = pytest.mark.filterwarnings("default")

CYCLE: dict[str, Any] = {"base_lr": 1e-3, "max_lr": 2e-2, "step_size_up": 5, "mode": "triangular2"}
# Losses and parameters of some 20 float32 steps.
TOLERANCES = {"rtol": 2e-5, "atol": 2e-6}


class Regression(lightning.LightningModule):
    def __init__(self, fused: bool = True) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        self.fused = fused
        self.calls = Calls()

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        return (self.layers(batch) - batch.sum(1, keepdim=True)).square().mean()

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> Any:
        self.calls.training += 1
        loss = self.loss(batch[0])
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"largest": batch[0].max()})
        self.log("smallest", batch[0].min(), False, True)
        return {"loss": loss, "first": batch[0][0]}

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("validation", self.loss(batch[0]))

    def on_train_batch_end(self, outputs: Any, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.calls.outputs.append((outputs["loss"], outputs["first"], batch[0][0]))

    def configure_optimizers(self) -> Any:
        optimizer_class, scheduler_class = (
            (FusedAdam, CyclicLR) if self.fused else (torch.optim.Adam, lr_scheduler.CyclicLR)
        )
        optimizer = optimizer_class(self.parameters())
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler_class(optimizer, **CYCLE), "interval": "step"},
        }


class Calls:
    """What hooks count, in an object that the module does not change."""

    def __init__(self) -> None:
        self.training = 0
        self.outputs: list[Any] = []


def fit(
    model: lightning.LightningModule, folder: Path, *callbacks: Callback, resume: Any = None, **options: Any
) -> Any:
    """The trainer after 3 epochs of 6 batches, of which the last is smaller, and the logged rows."""
    torch.manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.reset_parameters()
    data = torch.utils.data.TensorDataset(torch.randn(22, 4))
    trainer = lightning.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 3,
            "logger": CSVLogger(folder),
            "callbacks": [
                LearningRateMonitor(logging_interval="step", log_momentum=True),
                ModelCheckpoint(dirpath=folder, save_last=True),
                *callbacks,
            ],
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
        }
    )
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    trainer.fit(model, loader, loader, ckpt_path=resume)
    return trainer, rows(trainer)


def rows(trainer: lightning.Trainer) -> list[dict[str, float]]:
    with open(Path(trainer.logger.log_dir) / "metrics.csv") as file:  # type: ignore[union-attr, arg-type]
        return [
            {key.replace("FusedAdam", "Adam"): float(value) for key, value in row.items() if value}
            for row in csv.DictReader(file)
        ]


def assert_same_rows(found: list[dict[str, float]], wanted: list[dict[str, float]]) -> None:
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5, abs=2e-6)


def assert_same_parameters(first: torch.nn.Module, second: torch.nn.Module) -> None:
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCES)


class CountGraphs(Callback):
    """Graphs at the end: the callback frees them."""

    def __init__(self, captured: CapturedTraining) -> None:
        self.captured = captured
        self.graphs = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.graphs = self.captured.num_graphs


@pytest.mark.usefixtures("emulated_cuda")
@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_captured_training_is_torchs(tmp_path: Path, clip: float | None) -> None:
    theirs, model = Regression(fused=False), Regression()
    reference, wanted = fit(theirs, tmp_path / "torch", gradient_clip_val=clip)
    captured = CapturedTraining(num_warmup_iters=1)
    counted = CountGraphs(captured)
    trainer, logged = fit(model, tmp_path / "ours", captured, counted, gradient_clip_val=clip)
    assert_same_rows(logged, wanted)
    assert sum("lr-Adam" in row for row in logged) == 18
    assert_same_parameters(model, theirs)
    # Two shapes, with a warmup and a capture each; everything else is replays.
    assert (counted.graphs, model.calls.training) == (2, 4)
    assert trainer.global_step == reference.global_step == 18
    states = [t.fit_loop.epoch_loop.automatic_optimization.optim_progress.state_dict() for t in (trainer, reference)]
    assert states[0] == states[1]
    for ours, other in zip(model.calls.outputs, theirs.calls.outputs, strict=True):
        torch.testing.assert_close(ours, other, **TOLERANCES)
        assert not ours[0].requires_grad
    assert captured.num_graphs == 0
    assert trainer.optimizers[0].captures == []


@pytest.mark.usefixtures("emulated_cuda")
def test_a_captured_training_resumes_and_is_resumed(tmp_path: Path) -> None:
    straight = Regression()
    _, wanted = fit(straight, tmp_path / "straight", CapturedTraining(num_warmup_iters=1))
    fit(Regression(), tmp_path / "half", CapturedTraining(num_warmup_iters=1), max_epochs=2)
    for callbacks in ([CapturedTraining(num_warmup_iters=1)], []):
        rest = Regression()
        _, logged = fit(rest, tmp_path / f"rest{len(callbacks)}", *callbacks, resume=tmp_path / "half" / "last.ckpt")
        assert_same_rows(logged, wanted[-len(logged) :])
        assert_same_parameters(rest, straight)


def test_without_cuda_the_step_runs_eagerly(tmp_path: Path, backend: str) -> None:
    theirs, model = Regression(fused=False), Regression()
    _, wanted = fit(theirs, tmp_path / "torch")
    _, logged = fit(model, tmp_path / "ours", CapturedTraining())
    assert_same_rows(logged, wanted)
    assert_same_parameters(model, theirs)
    assert model.calls.training == 18


@pytest.mark.usefixtures("emulated_cuda")
def test_attributes_and_training_modes_have_graphs_of_their_own(tmp_path: Path) -> None:
    class Annealed(Regression):
        weight = 1.0

        def __init__(self, fused: bool = True) -> None:
            super().__init__(fused)
            # Nothing in training, everything in evaluation.
            self.drop = torch.nn.Dropout(1.0)

        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> Any:
            return self.loss(batch[0]) * self.weight + self.drop(self.layers(batch[0])).mean()

        def on_train_batch_end(self, *_: Any) -> None:
            pass

        def on_train_epoch_start(self) -> None:
            # One thing an epoch.
            if self.current_epoch == 1:
                self.layers[0].requires_grad_(False)
            if self.current_epoch == 2:
                self.drop.eval()
            if self.current_epoch == 3:
                self.weight = 2.0

    theirs, model = Annealed(fused=False), Annealed()
    fit(theirs, tmp_path / "torch", max_epochs=4)
    captured = CapturedTraining(num_warmup_iters=1)
    counted = CountGraphs(captured)
    fit(model, tmp_path / "ours", captured, counted, max_epochs=4)
    assert_same_parameters(model, theirs)
    assert counted.graphs == 4


class Hooked(Regression):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        pass


class Manual(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class InnerCallback(Callback):
    def on_after_backward(self, *_: Any) -> None:
        pass


class OwnPrecision(MixedPrecision):
    pass


def scaled(cls: type[MixedPrecision] = MixedPrecision) -> MixedPrecision:
    return cls("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (Manual, {}, "manual optimization; wrap what training_step does in a fused_clr.GraphedStep"),
        (Regression, {"accumulate_grad_batches": 2}, r"accumulates gradients \(accumulate_grad_batches=2\)"),
        (Regression, {"callback": lambda: GradientAccumulationScheduler({1: 3})}, "accumulates gradients"),
        (Regression, {"detect_anomaly": True}, "detect_anomaly=True waits for the device"),
        (Regression, {"plugins": lambda: scaled(OwnPrecision)}, "precision plugin is OwnPrecision"),
        (Regression, {"plugins": scaled, "gradient_clip_val": 1.0}, "give the optimizer max_grad_norm instead"),
        (Hooked, {}, "Hooked.on_before_optimizer_step runs inside of the step"),
        (Regression, {"callback": InnerCallback}, "InnerCallback.on_after_backward runs inside of the step"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_what_cannot_be_captured_is_refused_before_training(
    make: Callable[[], Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    options = {key: value() if callable(value) else value for key, value in options.items()}
    others = [options.pop("callback")] if "callback" in options else []
    model = make()
    if isinstance(model, Manual):
        options["max_steps"] = 1
    with pytest.raises(RuntimeError, match=f"CapturedTraining cannot capture this training: .*{message}"):
        fit(model, tmp_path, CapturedTraining(), *others, **options)
    assert model.calls.training == 0


def test_another_strategy_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_clr.integrations.lightning.STRATEGIES", (DDPStrategy,))
    with pytest.raises(RuntimeError, match="its strategy is SingleDeviceStrategy; only one device and DDP"):
        fit(Regression(), tmp_path, CapturedTraining())


def test_torchs_optimizer_is_refused_before_training(tmp_path: Path) -> None:
    model = Regression(fused=False)
    with pytest.raises(TypeError, match="must be a FusedAdam, FusedAdamW or FusedSGD, got Adam: return a fused"):
        fit(model, tmp_path, CapturedTraining())
    assert model.calls.training == 0
    with pytest.raises(ValueError, match="num_warmup_iters must be an integer >= 1, got 0"):
        fit(Regression(), tmp_path, CapturedTraining(num_warmup_iters=0))


def test_the_package_of_the_old_name_is_refused() -> None:
    old = pytest.importorskip("pytorch_lightning")
    trainer = old.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[CapturedTraining()])
    with pytest.raises(TypeError, match=r"needs lightning.pytorch, got a Trainer of pytorch_lightning"):
        next(c for c in trainer.callbacks if isinstance(c, CapturedTraining)).on_fit_start(trainer, Regression())


def step_that(body: Callable[[Any, torch.Tensor, int], Any]) -> type[Regression]:
    class Wrong(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Any] = []
            self.count = 0
            self.accuracy = torchmetrics.MeanMetric()

        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> Any:
            return body(self, batch[0], batch_idx) if self.calls is not None else None

        def on_train_batch_end(self, *_: Any) -> None:
            pass

    return Wrong


def logs_a_number(module: Any, batch: torch.Tensor, _: int) -> Any:
    module.log("count", 3.0)
    return module.loss(batch)


def logs_a_metric(module: Any, batch: torch.Tensor, _: int) -> Any:
    module.log("accuracy", module.accuracy)
    return module.loss(batch)


def updates_a_metric(module: Any, batch: torch.Tensor, _: int) -> Any:
    module.accuracy.update(batch.detach())
    return module.loss(batch)


def counts(module: Any, batch: torch.Tensor, _: int) -> Any:
    module.count += 1
    return module.loss(batch)


def appends(module: Any, batch: torch.Tensor, _: int) -> Any:
    module.seen.append(batch)
    return module.loss(batch)


def returns_none(module: Any, batch: torch.Tensor, _: int) -> Any:
    return None


def reads_the_index(module: Any, batch: torch.Tensor, index: int) -> Any:
    return module.loss(batch) * (2 if index % 10 == 0 else 1)


def formats_the_index(module: Any, batch: torch.Tensor, index: int) -> Any:
    print(f"batch {index}")
    return module.loss(batch)


def reads_the_step(module: Any, batch: torch.Tensor, _: int) -> Any:
    return module.loss(batch) * (module.global_step + 1)


def reads_the_epoch(module: Any, batch: torch.Tensor, _: int) -> Any:
    return module.loss(batch) * (module.current_epoch + 1)


@pytest.mark.usefixtures("emulated_cuda")
@pytest.mark.parametrize(
    ("body", "message"),
    [
        (logs_a_number, r"self.log\('count', ...\) in a captured step must be given a tensor, got float"),
        (logs_a_metric, r"self.log\('accuracy', ...\) in a captured step must be given a tensor, got MeanMetric"),
        (updates_a_metric, "updated a torchmetrics.Metric, and a replay would not"),
        (counts, "the captured step changed Wrong.count"),
        (appends, "the captured step changed Wrong.seen"),
        (returns_none, "training_step returned None"),
        (reads_the_index, "the captured step read batch_idx"),
        (formats_the_index, "the captured step read batch_idx"),
        (reads_the_step, "the captured step read global_step"),
        (reads_the_epoch, "the captured step read current_epoch"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_a_replay_would_leave_out_is_refused(body: Callable[..., Any], message: str, tmp_path: Path) -> None:
    model = step_that(body)()
    with pytest.raises(RuntimeError, match=message):
        fit(model, tmp_path, CapturedTraining(num_warmup_iters=1))
    # The module is as it was.
    assert "log" not in vars(model)
    assert model.global_step <= 3


@pytest.mark.usefixtures("emulated_cuda")
def test_manual_optimization_captures_several_optimizers_itself(tmp_path: Path) -> None:
    class Two(lightning.LightningModule):
        def __init__(self, fused: bool) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.first, self.second, self.fused = torch.nn.Linear(4, 3), torch.nn.Linear(3, 1), fused
            self.calls = Calls()
            self.graphed: Any = None

        def configure_optimizers(self) -> Any:
            make = FusedAdam if self.fused else torch.optim.Adam
            return [make(part.parameters(), lr=lr) for part, lr in ((self.first, 0.01), (self.second, 0.02))]

        def update(self, batch: torch.Tensor) -> torch.Tensor:
            self.calls.training += 1
            optimizers = self.optimizers(use_pl_optimizer=False)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = self.second(self.first(batch).tanh()).square().mean()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            return loss.detach()

        def on_train_start(self) -> None:
            if self.fused:
                optimizers = self.optimizers(use_pl_optimizer=False)
                self.graphed = GraphedStep(self.update, optimizers, num_warmup_iters=1)

        def training_step(self, batch: list[torch.Tensor]) -> None:
            self.log("loss", (self.graphed or self.update)(batch[0]))

    models = Two(fused=False), Two(fused=True)
    logs = [fit(model, tmp_path / str(model.fused), limit_val_batches=0)[1] for model in models]
    assert_same_parameters(*models)
    assert [row["loss"] for row in logs[1] if "loss" in row] == pytest.approx(
        [row["loss"] for row in logs[0] if "loss" in row], rel=2e-5
    )
    assert models[1].calls.training == 4


@pytest.mark.usefixtures("emulated_cuda")
def test_batches_of_other_objects_are_refused(tmp_path: Path) -> None:
    class Wrapped(Regression):
        def transfer_batch_to_device(self, batch: Any, *_: Any) -> Any:
            return object()

    with pytest.raises(TypeError, match="must hold tensors, .* got object; convert it in collate_fn"):
        fit(Wrapped(), tmp_path, CapturedTraining(), num_sanity_val_steps=0)


@pytest.mark.usefixtures("emulated_cuda")
def test_a_training_that_is_never_replayed_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_clr.integrations import _step

    class Counting(Regression):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.number = max(self.global_step - 3, 0)

    monkeypatch.setattr(_step, "EAGER_STEPS_LIMIT", 5)
    with pytest.warns(UserWarning, match="no replay in 5 steps"):
        fit(Counting(), tmp_path, CapturedTraining(num_warmup_iters=1))
