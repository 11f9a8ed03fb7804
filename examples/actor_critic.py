"""A TD3-like update in one captured step: two optimizers, target networks that follow slowly, as in torchrl.

    python examples/actor_critic.py --steps 500

What torchrl's losses and ``SoftUpdate`` do, in plain torch: its modules go into the step in the same way. A count kept
in Python does not: ``HardUpdate`` would count once, at the capture. Without CUDA the step runs eagerly.
"""

from __future__ import annotations

import argparse
from copy import deepcopy

import torch
from torch import Tensor, nn

from fused_clr import FusedAdam, GraphedStep, schedules

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DISCOUNT, FOLLOW = 0.9, 0.05


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 32), nn.Tanh(), nn.Linear(32, outputs)).to(DEVICE)


class Update:
    """The networks, their optimizers, and one update of all of them."""

    def __init__(self) -> None:
        self.actor, self.critic = mlp(3, 1), mlp(4, 1)
        self.target_actor, self.target_critic = deepcopy(self.actor), deepcopy(self.critic)
        for target in (self.target_actor, self.target_critic):
            target.requires_grad_(False)
        # The actor has a schedule of its own, and is clipped.
        fast = schedules.Cyclic(base_lr=1e-3, max_lr=1e-2, step_size_up=50)
        slow = schedules.Cyclic(base_lr=1e-4, max_lr=1e-3, step_size_up=100)
        self.critic_optimizer = FusedAdam(self.critic.parameters(), schedule=fast)
        self.actor_optimizer = FusedAdam(self.actor.parameters(), schedule=slow, max_grad_norm=1.0)

    def __call__(self, state: Tensor, action: Tensor, reward: Tensor, next_state: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            next_action = self.target_actor(next_state).tanh()
            target = reward + DISCOUNT * self.target_critic(torch.cat([next_state, next_action], 1))
        critic_loss = nn.functional.mse_loss(self.critic(torch.cat([state, action], 1)), target)
        self.critic_optimizer.zero_grad()
        critic_loss.backward()
        self.critic_optimizer.step()

        actor_loss = -self.critic(torch.cat([state, self.actor(state).tanh()], 1)).mean()
        self.actor_optimizer.zero_grad()
        # The critic is not updated by it.
        actor_loss.backward(inputs=list(self.actor.parameters()))
        self.actor_optimizer.step()

        with torch.no_grad():
            for network, follower in ((self.actor, self.target_actor), (self.critic, self.target_critic)):
                torch._foreach_lerp_(list(follower.parameters()), list(network.parameters()), FOLLOW)
        return critic_loss.detach(), actor_loss.detach()


def transitions(number: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As drawn from a replay buffer: an action is rewarded for meeting the first coordinate of the state."""
    state, next_state = torch.randn(2, number, 3, generator=generator)
    action = torch.rand(number, 1, generator=generator) * 2 - 1
    return state, action, -(action - state[:, :1].tanh()).square(), next_state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    steps = parser.parse_args().steps
    if steps < 1:
        parser.error(f"--steps must be 1 or more, got {steps}")

    torch.manual_seed(0)
    update = Update()
    graphed = GraphedStep(update, [update.critic_optimizer, update.actor_optimizer])
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        critic_loss, _ = graphed(*transitions(64, generator))
    lrs = [optimizer.param_groups[0]["lr"] for optimizer in (update.critic_optimizer, update.actor_optimizer)]
    print(f"step {steps}, critic loss {float(critic_loss):.4f}, lr of critic {lrs[0]:.6g}, of actor {lrs[1]:.6g}")


if __name__ == "__main__":
    main()
