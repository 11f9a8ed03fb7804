"""Plain accelerate: a captured step between ``prepare`` and the loop; logs the learning rate.

    python examples/accelerate_loop.py --steps 60
    accelerate launch examples/accelerate_loop.py --steps 60

Without CUDA the step runs eagerly.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator

from fused_clr import CyclicLR, FusedAdam, GraphedStep
from fused_clr.integrations.accelerate import report_skips


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    if steps < 1:
        parser.error(f"--steps must be 1 or more, got {steps}")

    # "fp16" scales the loss, on a GPU; steps that overflow are skipped in the graph, and the schedule stands still.
    accelerator = Accelerator(mixed_precision="fp16" if torch.cuda.is_available() else "no")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    optimizer = FusedAdam(model.parameters(), max_grad_norm=1.0)
    scheduler = CyclicLR(optimizer, base_lr=1e-3, max_lr=1e-2, step_size_up=20, mode="triangular2")
    inputs = torch.randn(256, 8)
    loader = torch.utils.data.DataLoader(inputs, batch_size=16, drop_last=True)
    # The scheduler is not prepared: the optimizer's step advances the schedule.
    model, wrapped, loader = accelerator.prepare(model, optimizer, loader)
    report_skips(accelerator)

    def step(batch: torch.Tensor) -> torch.Tensor:
        loss = torch.nn.functional.mse_loss(model(batch).float(), batch.sum(1, keepdim=True))
        accelerator.backward(loss)
        wrapped.step()
        return loss.detach()

    graphed = GraphedStep(step, optimizer)
    done = 0
    while done < steps:
        for batch in loader:
            loss = graphed(batch)
            done += 1
            if done % 20 == 0:
                skipped = " (skipped)" if accelerator.optimizer_step_was_skipped else ""
                accelerator.print(f"step {done}, loss {float(loss):.4f}, lr {scheduler.get_last_lr()[0]:.6g}{skipped}")
            if done == steps:
                break
    accelerator.end_training()


if __name__ == "__main__":
    main()
