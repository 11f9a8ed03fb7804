"""Lightning: FusedAdam and CyclicLR in ``configure_optimizers``; logs the learning rate, saves checkpoints, resumes.

python examples/lightning_fit.py --steps 60 --folder out/lightning
python examples/lightning_fit.py --steps 120 --folder out/lightning     # resumes
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from fused_clr import CyclicLR, FusedAdam


class Regression(lightning.LightningModule):
    """A small MLP that learns a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_index: int) -> torch.Tensor:
        inputs, targets = batch
        return torch.nn.functional.mse_loss(self.layers(inputs), targets)

    def configure_optimizers(self) -> Any:
        optimizer = FusedAdam(self.parameters())
        scheduler = CyclicLR(optimizer, base_lr=1e-3, max_lr=1e-2, step_size_up=20, mode="triangular2")
        # interval="step": the step sizes of the schedule count optimizer steps.
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--folder", type=Path, default=Path("out/lightning"))
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps must be 1 or more, got {arguments.steps}")

    lightning.seed_everything(0, verbose=False)
    inputs = torch.randn(256, 8)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=16
    )
    trainer = lightning.Trainer(
        max_steps=arguments.steps,
        logger=CSVLogger(arguments.folder),
        callbacks=[
            LearningRateMonitor(logging_interval="step", log_momentum=True),
            ModelCheckpoint(dirpath=arguments.folder, save_last=True, save_top_k=0, every_n_train_steps=20),
        ],
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = arguments.folder / "last.ckpt"
    trainer.fit(Regression(), loader, ckpt_path=last if last.exists() else None)
    optimizer = trainer.optimizers[0]
    print(f"step {trainer.global_step}, lr {optimizer.param_groups[0]['lr']:.6g}")


if __name__ == "__main__":
    main()
