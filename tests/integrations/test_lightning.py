"""Lightning: the learning rate that its monitor logs, checkpoints and resumed runs, beside torch's pair."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from fused_clr import CyclicLR, FusedAdam

pytestmark = pytest.mark.filterwarnings("default")

KINDS: dict[str, Any] = {"torch": (torch.optim.Adam, lr_scheduler.CyclicLR), "ours": (FusedAdam, CyclicLR)}
CYCLE: dict[str, Any] = {"base_lr": 1e-3, "max_lr": 1e-2, "step_size_up": 4, "mode": "triangular2"}


def fit(kind: str, folder: Path, steps: int, resume: Path | None = None, clip: float | None = None) -> Any:
    """Logged learning rates and beta1s by step, and the parameters."""
    import lightning
    from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger

    class Regression(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))

        def training_step(self, batch: list[torch.Tensor], batch_index: int) -> torch.Tensor:
            return (self.layers(batch[0]) - batch[0].sum(1, keepdim=True)).square().mean()

        def configure_optimizers(self) -> Any:
            optimizer_class, scheduler_class = KINDS[kind]
            optimizer = optimizer_class(self.parameters())
            scheduler = scheduler_class(optimizer, **CYCLE)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    torch.manual_seed(0)
    model = Regression()
    # An epoch is as long as what lies between checkpoints: Lightning resumes whole epochs exactly.
    data = torch.utils.data.TensorDataset(torch.randn(24, 4))
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        gradient_clip_val=clip,
        logger=CSVLogger(folder),
        callbacks=[
            LearningRateMonitor(logging_interval="step", log_momentum=True),
            ModelCheckpoint(dirpath=folder, save_last=True, every_n_train_steps=6),
        ],
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=4), ckpt_path=resume)
    with open(Path(trainer.logger.log_dir) / "metrics.csv") as file:
        rows = list(csv.reader(file))
    columns = {name.replace("FusedAdam", "Adam"): index for index, name in enumerate(rows[0])}
    logged = [(float(row[columns["lr-Adam"]]), float(row[columns["lr-Adam-momentum"]])) for row in rows[1:]]
    return logged, {name: param.detach().clone() for name, param in model.named_parameters()}


def flat(rows: list[tuple[float, float]]) -> list[float]:
    return [value for row in rows for value in row]


@pytest.mark.parametrize("clip", [None, 0.5])
def test_lightning_logs_and_trains_as_with_torch_and_resumes(tmp_path: Path, clip: float | None) -> None:
    wanted_logged, wanted = fit("torch", tmp_path / "torch", 12, clip=clip)
    logged, params = fit("ours", tmp_path / "ours", 12, clip=clip)
    assert len(logged) == 12
    assert [value for row in logged for value in row] == pytest.approx(
        [value for row in wanted_logged for value in row]
    )
    for name, value in wanted.items():
        torch.testing.assert_close(params[name], value, rtol=2e-5, atol=2e-6)

    fit("ours", tmp_path / "half", 6, clip=clip)
    resumed_logged, resumed = fit("ours", tmp_path / "rest", 12, tmp_path / "half" / "last.ckpt", clip=clip)
    assert resumed_logged == logged[6:]
    for name, value in params.items():
        assert torch.equal(resumed[name], value), name


@pytest.mark.parametrize(("saved", "loaded"), [("torch", "ours"), ("ours", "torch")])
def test_lightning_resumes_across_the_pairs(tmp_path: Path, saved: str, loaded: str) -> None:
    wanted_logged, wanted = fit(saved, tmp_path / "straight", 12)
    fit(saved, tmp_path / "half", 6)
    logged, params = fit(loaded, tmp_path / "rest", 12, tmp_path / "half" / "last.ckpt")
    assert flat(logged) == pytest.approx(flat(wanted_logged[6:]))
    for name, value in wanted.items():
        torch.testing.assert_close(params[name], value, rtol=2e-5, atol=2e-6)
