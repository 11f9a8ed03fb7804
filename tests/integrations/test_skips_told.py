"""After an overflow under GradScaler torch's fused pair drifts in the frameworks; ours follows theory, and says so.

A fused optimizer is called on an overflow too, and its kernel skips. accelerate (issue 4242) and Lightning (21339) take
that for a step, and step the scheduler.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.optim import lr_scheduler
from transformers import Trainer, TrainerCallback, TrainingArguments

from fused_clr import CyclicLR, FusedAdam
from fused_clr.integrations.accelerate import report_skips
from fused_clr.integrations.lightning import CapturedTraining
from fused_clr.integrations.transformers import CapturedTrainer
from fused_clr.schedules import Cyclic

pytestmark = pytest.mark.filterwarnings("default")

CYCLE: dict[str, Any] = {"base_lr": 1e-3, "max_lr": 2e-2, "step_size_up": 5, "cycle_momentum": False}
STEPS = 16
OVERFLOWS = (3, 4, 9)
APPLIED = STEPS - len(OVERFLOWS)
THEORY, DRIFTED = (pytest.approx(Cyclic(**CYCLE).lr(step), rel=1e-12) for step in (APPLIED, STEPS))


def make_pair(model: torch.nn.Module, ours: bool, **options: Any) -> tuple[Any, Any]:
    if ours:
        optimizer: Any = FusedAdam(model.parameters(), **options)
        return optimizer, CyclicLR(optimizer, **CYCLE)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    return optimizer, lr_scheduler.CyclicLR(optimizer, **CYCLE)


def make_batches() -> list[torch.Tensor]:
    batches = list(torch.randn(STEPS, 2, 4))
    for step in OVERFLOWS:
        batches[step] = torch.full_like(batches[step], torch.inf)
    return batches


def make_scaler() -> Any:
    return torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1000)


def accelerated(ours: bool, scaled: bool = True, report: bool = True, **options: Any) -> tuple[list[bool], Any, Any]:
    """What accelerate says of each step, the scheduler and the optimizer."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = make_scaler() if scaled else None
    model = torch.nn.Linear(4, 1)
    optimizer, scheduler = make_pair(model, ours, **options)
    model, wrapped, wrapped_scheduler = accelerator.prepare(model, optimizer, scheduler)
    if ours and report:
        report_skips(accelerator)
    told = []
    for batch in make_batches():
        wrapped.zero_grad()
        accelerator.backward(model(batch).square().mean())
        wrapped.step()
        told.append(accelerator.optimizer_step_was_skipped)
        wrapped_scheduler.step()
    return told, scheduler, optimizer


def test_torchs_fused_pair_drifts_under_accelerate() -> None:
    told, scheduler, _ = accelerated(ours=False)
    assert not any(told)
    assert scheduler.get_last_lr()[0] == DRIFTED


@pytest.mark.parametrize("report", [True, False])
def test_ours_follows_theory_under_accelerate(backend: str, report: bool) -> None:
    told, scheduler, optimizer = accelerated(ours=True, report=report)
    assert scheduler.get_last_lr()[0] == THEORY
    assert optimizer.status().skipped_steps == len(OVERFLOWS)
    assert [step for step, skipped in enumerate(told) if skipped] == (list(OVERFLOWS) if report else [])


@pytest.mark.parametrize(("report", "steps"), [(True, 2 * APPLIED), (False, 2 * APPLIED + len(OVERFLOWS))])
def test_a_scheduler_that_is_stepped_once_a_process_needs_the_report(
    backend: str, report: bool, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate.scheduler.AcceleratorState", lambda: SimpleNamespace(num_processes=2))
    _, scheduler, _ = accelerated(ours=True, report=report)
    assert scheduler.last_epoch == steps


def test_norms_that_are_not_finite_are_reported_without_a_scaler(backend: str) -> None:
    told, scheduler, _ = accelerated(ours=True, scaled=False, max_grad_norm=1.0, skip_if_nonfinite=True)
    assert [step for step, skipped in enumerate(told) if skipped] == list(OVERFLOWS)
    assert scheduler.get_last_lr()[0] == THEORY


def test_nothing_is_read_where_no_step_can_be_skipped(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FusedAdam, "live", property(lambda _: pytest.fail("read the device")))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(4, 1)
    optimizer = accelerator.prepare(FusedAdam(model.parameters()))
    report_skips(accelerator)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert accelerator.optimizer_step_was_skipped is False


def test_a_report_needs_one_of_ours() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(torch.optim.Adam([torch.nn.Parameter(torch.ones(1))]))
    with pytest.raises(RuntimeError, match=r"found no fused optimizer: call it after accelerator.prepare"):
        report_skips(accelerator)


class Regression(lightning.LightningModule):
    def __init__(self, ours: bool) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.ours = ours

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return self.layer(batch).float().square().mean()

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = make_pair(self, self.ours)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit(ours: bool, folder: Path, *callbacks: Any) -> tuple[Any, torch.Tensor]:
    model = Regression(ours)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        default_root_dir=folder,
        callbacks=list(callbacks),
        plugins=MixedPrecision("16-mixed", "cpu", make_scaler()),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, torch.utils.data.DataLoader(make_batches(), batch_size=None))
    return trainer, model.layer.weight.detach()


def test_torchs_fused_pair_drifts_under_lightning(tmp_path: Path) -> None:
    trainer, _ = fit(False, tmp_path)
    assert trainer.optimizers[0].param_groups[0]["lr"] == DRIFTED


def test_ours_follows_theory_under_lightning(backend: str, tmp_path: Path) -> None:
    trainer, _ = fit(True, tmp_path)
    optimizer = trainer.optimizers[0]
    assert optimizer.param_groups[0]["lr"] == THEORY
    assert optimizer.status().skipped_steps == len(OVERFLOWS)


@pytest.mark.usefixtures("emulated_cuda")
def test_ours_follows_theory_under_lightning_when_captured(tmp_path: Path) -> None:
    torch.manual_seed(0)
    _, wanted = fit(True, tmp_path)
    torch.manual_seed(0)
    trainer, weight = fit(True, tmp_path, CapturedTraining(num_warmup_iters=1))
    optimizer = trainer.optimizers[0]
    assert optimizer.param_groups[0]["lr"] == THEORY
    assert optimizer.status().skipped_steps == len(OVERFLOWS)
    assert trainer.precision_plugin.scaler.get_scale() == 64.0 / 2 ** len(OVERFLOWS)
    torch.testing.assert_close(weight, wanted)


class Line(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def forward(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.layer(inputs).square().mean()}


def trained(trainer_class: type[Trainer], ours: bool, folder: Path) -> tuple[Any, list[int]]:
    """The optimizer, and the steps that accelerate calls skipped."""
    told: list[int] = []

    class Listen(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            # The step that has just been counted.
            told.extend([state.global_step - 1] if trainer.accelerator.optimizer_step_was_skipped else [])

    model = Line()
    optimizers = make_pair(model, ours)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        train_sampling_strategy="sequential",
        save_strategy="no",
        max_grad_norm=0,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{"inputs": row} for batch in make_batches() for row in batch]
    own = {"capture_options": {"num_warmup_iters": 1}} if issubclass(trainer_class, CapturedTrainer) else {}
    trainer = trainer_class(model=model, args=arguments, train_dataset=rows, optimizers=optimizers, **own)
    trainer.add_callback(Listen())
    trainer.accelerator.scaler = make_scaler()
    trainer.train()
    return optimizers[0], told


def test_torchs_fused_pair_drifts_under_the_trainer(tmp_path: Path) -> None:
    optimizer, told = trained(Trainer, False, tmp_path)
    assert optimizer.param_groups[0]["lr"] == DRIFTED
    assert told == []


@pytest.mark.usefixtures("emulated_cuda")
@pytest.mark.parametrize("trainer_class", [Trainer, CapturedTrainer])
def test_ours_follows_theory_under_the_trainer(tmp_path: Path, trainer_class: type[Trainer]) -> None:
    optimizer, told = trained(trainer_class, True, tmp_path)
    assert optimizer.param_groups[0]["lr"] == THEORY
    assert optimizer.status().skipped_steps == len(OVERFLOWS)
    # The captured one calls report_skips.
    assert told == (list(OVERFLOWS) if trainer_class is CapturedTrainer else [])
