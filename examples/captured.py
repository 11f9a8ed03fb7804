"""A whole training step, captured once and replayed; replays follow the schedule. Without CUDA it runs eagerly.

python examples/captured.py --steps 500
"""

from __future__ import annotations

import argparse

import torch

from fused_clr import FusedAdam, GraphedStep, schedules

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    steps = parser.parse_args().steps
    if steps < 1:
        parser.error(f"--steps must be 1 or more, got {steps}")

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1)).to(DEVICE)
    schedule = schedules.Cyclic(base_lr=2.5e-4, max_lr=1e-2, step_size_up=100)
    optimizer = FusedAdam(model.parameters(), schedule=schedule, max_grad_norm=1.0)

    def step(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    graphed = GraphedStep(step, optimizer)
    for number in range(steps):
        inputs = torch.randn(64, 8)
        loss = graphed(inputs, inputs.sum(1, keepdim=True))
        status = optimizer.status(wait=False)
        if status is not None and number % 100 == 0:
            print(f"step {status.schedule_step}: lr {status.lr[0]:.6g}, gradient norm {status.grad_norm:.3g}")
    lr = optimizer.param_groups[0]["lr"]
    print(f"step {optimizer.status().schedule_step}, {graphed.num_graphs} graph, loss {float(loss):.4f}, lr {lr:.6g}")


if __name__ == "__main__":
    main()
