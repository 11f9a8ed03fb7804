"""A plain training loop with two changed imports: logs without a sync, saves checkpoints, resumes.

    python examples/plain.py --steps 200 --folder out/plain
    python examples/plain.py --steps 400 --folder out/plain     # resumes

Writes ``checkpoint.pt``, ``lr.csv`` and, if tensorboard is installed, its event files.
"""

from __future__ import annotations

import argparse
import csv
import os
from pathlib import Path
from typing import Any

import torch

from fused_clr import CyclicLR, FusedAdam

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch that depends only on the step: a resumed run gets the same batches."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(64, 8, generator=generator)
    return inputs.to(DEVICE), inputs.prod(1, keepdim=True).sign().to(DEVICE)


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint to another file, then renames it: a killed run keeps the old checkpoint or the new one."""
    unfinished = path.with_suffix(".unfinished")
    torch.save(state, unfinished)
    os.replace(unfinished, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="train to this step")
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--folder", type=Path, default=Path("out/plain"))
    arguments = parser.parse_args()
    for option in ("steps", "save_every"):
        if getattr(arguments, option) < 1:
            parser.error(f"--{option.replace('_', '-')} must be 1 or more, got {getattr(arguments, option)}")
    arguments.folder.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1)).to(DEVICE)
    optimizer = FusedAdam(model.parameters(), max_grad_norm=1.0)
    scheduler = CyclicLR(optimizer, base_lr=2.5e-4, max_lr=1e-2, step_size_up=40, mode="triangular2")

    first = 0
    path = arguments.folder / "checkpoint.pt"
    if path.exists():
        checkpoint = torch.load(path, weights_only=True)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
        first = checkpoint["step"]
        print(f"resumed at step {first}, lr {scheduler.get_last_lr()[0]:.6g}")

    writer = make_summary_writer(arguments.folder)
    for step in range(first, arguments.steps):
        inputs, targets = make_batch(step)
        optimizer.zero_grad()
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        # The newest status that has arrived from the device: no sync.
        status = optimizer.status(wait=False)
        if writer is not None and status is not None:
            for name, value in status.scalars().items():
                writer.add_scalar(name, value, status.schedule_step)
        if (step + 1) % arguments.save_every == 0 or step + 1 == arguments.steps:
            save(
                path,
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scheduler": scheduler.state_dict(),
                    "step": step + 1,
                },
            )
    if writer is not None:
        writer.close()

    # The last steps as the kernel recorded them, in one copy.
    rows = list(optimizer.history().rows())
    if rows:
        with open(arguments.folder / "lr.csv", "w", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
    print(f"step {max(first, arguments.steps)}, lr {scheduler.get_last_lr()[0]:.6g}")


def make_summary_writer(folder: Path) -> Any:
    """A tensorboard writer; None if tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder)


if __name__ == "__main__":
    main()
