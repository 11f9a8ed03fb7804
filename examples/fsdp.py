"""FSDP2: sharded parameters and Adam state, a norm over all processes, a checkpoint for any number of processes.

torchrun --nproc-per-node 2 examples/fsdp.py --steps 60 --folder out/fsdp
torchrun --nproc-per-node 1 examples/fsdp.py --steps 120 --folder out/fsdp     # resumes, with one process
"""

from __future__ import annotations

import argparse
import gc
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from fused_clr import CyclicLR, FusedAdam

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def train(steps: int, folder: Path) -> None:
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1)).to(DEVICE)
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = FusedAdam(model.parameters(), max_grad_norm=1.0)
    scheduler = CyclicLR(optimizer, base_lr=1e-3, max_lr=1e-2, step_size_up=20, mode="triangular2")

    def state() -> dict[str, object]:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        return {"model": model_state, "optimizer": optimizer_state}

    # The optimizer's checkpoint holds the schedule and its step.
    if (folder / ".metadata").exists():
        loaded = state()
        dcp.load(loaded, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    for step in range(scheduler.last_epoch, steps):
        # The whole batch is the same for any number of processes.
        inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(step))
        inputs = inputs.chunk(dist.get_world_size())[dist.get_rank()].to(DEVICE)
        optimizer.zero_grad()
        (model(inputs) - inputs.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        scheduler.step()
    dcp.save(state(), storage_writer=dcp.FileSystemWriter(folder, overwrite=True))
    norm = float(optimizer.live.grad_norm)
    if dist.get_rank() == 0:
        print(f"step {scheduler.last_epoch}, lr {scheduler.get_last_lr()[0]:.6g}, gradient norm {norm:.6g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--folder", type=Path, default=Path("out/fsdp"))
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps must be 1 or more, got {arguments.steps}")

    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
    train(arguments.steps, arguments.folder)
    # With nothing left that refers to it, the group ends its threads: a thread of gloo that still frees a tensor while
    # the interpreter ends aborts the process (torch 2.13). DTensor's caches refer to it too.
    _clear_sharding_prop_cache()
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
