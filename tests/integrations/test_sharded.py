"""Two processes: sharded and replicated training equals torch's pair in one process."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from fused_clr import Averaging, CyclicLR, FusedAdam, schedules
from tests.cases import ADAM, SGD, OptimizerCase, by_rows
from tests.helpers.ranks import Ranks
from tests.helpers.sharded import (
    CYCLE,
    STEPS,
    assert_same,
    batches,
    loss_of,
    make_model,
    own_half,
    results_of,
    sharded,
    torch_run,
    train,
    whole,
)
from tests.helpers.tolerances import AFTER_STEPS


# -- FSDP2 ------------------------------------------------------------------------------------------------------------
def run_fsdp(max_norm: float | None, optimizer_case: OptimizerCase) -> tuple[dict[str, torch.Tensor], float]:
    model, optimizer, scheduler = sharded(max_norm, optimizer_case=optimizer_case)
    local_sizes = {name: param.to_local().numel() for name, param in model.named_parameters()}
    assert (local_sizes["last.bias"], local_sizes["first.bias"]) == ((1, 4), (0, 3))[dist.get_rank()]
    train(model, optimizer, scheduler, 2)
    engine = optimizer._ready().first
    plans = engine._plans.plans()
    train(model, optimizer, scheduler, STEPS - 2, skip=2)
    # Gradients are new DTensors at every step, and the plan stays.
    assert optimizer._ready().first is engine
    assert engine._plans.plans() == plans
    for state in optimizer.state.values():
        assert all(isinstance(state[key], DTensor) for key in state if key != "step")
    return results_of(model, optimizer), float(optimizer.live.grad_norm)


@by_rows("max_norm optimizer_case", [(None, ADAM), (0.5, ADAM), (0.5, SGD)])
def test_fully_shard_equals_torch_in_one_process(
    ranks: Ranks, backend: str, max_norm: float | None, optimizer_case: OptimizerCase
) -> None:
    wanted = torch_run(max_norm=max_norm, optimizer_case=optimizer_case)
    norms = []
    for results, norm in ranks.run(run_fsdp, max_norm, optimizer_case):
        assert_same(results, wanted)
        norms.append(norm)
    if max_norm is not None:
        assert norms[0] == norms[1] > 0


def run_averaged() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The averages seen in the body, and the mean of the parameters after the cycles' last steps."""
    model, optimizer, scheduler = sharded(None, averaging=Averaging.swa())
    stored = []
    for number, batch in enumerate(batches(17)):
        optimizer.zero_grad()
        loss_of(model, own_half(batch)).backward()
        optimizer.step()
        scheduler.step()
        if number % 8 == 7:
            stored.append([whole(param).clone() for param in model.parameters()])
    assert all(isinstance(entry["average"], DTensor) for entry in optimizer.state.values())
    assert optimizer.n_averaged == [2]
    last = [whole(param).clone() for param in model.parameters()]
    with optimizer.averaged_parameters():
        seen = [whole(param).clone() for param in model.parameters()]
    assert all(torch.equal(whole(param), own) for param, own in zip(model.parameters(), last, strict=True))
    return seen, [(first + second) / 2 for first, second in zip(*stored, strict=True)]


def test_averages_of_shards(ranks: Ranks, backend: str) -> None:
    for seen, wanted in ranks.run(run_averaged):
        for average, mean in zip(seen, wanted, strict=True):
            torch.testing.assert_close(average, mean, rtol=1e-6, atol=1e-6)


def run_swapped() -> dict[str, torch.Tensor]:
    """As accelerate does: the pair is made first, and the groups' parameters become DTensors afterwards."""
    model = make_model()
    optimizer = FusedAdam(model.parameters(), weight_decay=0.01)
    scheduler = CyclicLR(optimizer, **CYCLE)
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        for index, param in enumerate(group["params"]):
            group["params"][index] = torch.empty(1, dtype=param.dtype)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    for group in optimizer.param_groups:
        group["params"] = list(model.parameters())
    train(model, optimizer, scheduler, STEPS)
    return results_of(model, optimizer)


def test_parameters_that_are_swapped_for_sharded_ones(ranks: Ranks, backend: str) -> None:
    wanted = torch_run()
    for results in ranks.run(run_swapped):
        assert_same(results, wanted)


def run_hybrid(mesh_shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    model, optimizer, scheduler = sharded(0.5, mesh_shape)
    train(model, optimizer, scheduler, STEPS)
    return results_of(model, optimizer)


@pytest.mark.parametrize("mesh_shape", [(2, 1), (1, 2)], ids=["replicated", "sharded"])
def test_hybrid_sharding_counts_replicas_once(ranks: Ranks, backend: str, mesh_shape: tuple[int, ...]) -> None:
    wanted = torch_run(max_norm=0.5)
    for results in ranks.run(run_hybrid, mesh_shape):
        assert_same(results, wanted)


def run_overflow() -> list[Any]:
    """A loss scale too large for one process alone."""
    model, optimizer, scheduler = sharded()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    found = []
    for step, batch in enumerate(batches(4)):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, own_half(batch))).backward()
        if step == 2 and dist.get_rank() == 0:
            next(model.parameters()).grad.to_local().fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        found.append(
            (int(optimizer.live.applied_steps), int(optimizer.live.skipped_steps), optimizer.status().schedule_step)
        )
    return found


def test_processes_skip_together(ranks: Ranks, backend: str) -> None:
    first, second = ranks.run(run_overflow)
    assert first == second
    assert [counts[:2] for counts in first] == [(1, 0), (2, 0), (2, 1), (3, 1)]


def run_nonfinite_norm() -> tuple[int, int]:
    model, optimizer, _ = sharded(1.0, skip_if_nonfinite=True)
    loss_of(model, own_half(batches(1)[0])).backward()
    if dist.get_rank() == 1:
        next(model.parameters()).grad.to_local().fill_(torch.nan)
    optimizer.step()
    return int(optimizer.live.applied_steps), int(optimizer.live.skipped_steps)


def test_a_norm_that_is_not_finite_in_one_process_skips_in_both(ranks: Ranks, backend: str) -> None:
    assert ranks.run(run_nonfinite_norm) == [(0, 1), (0, 1)]


# -- DTensors of several placements -----------------------------------------------------------------------------------
def run_placements() -> None:
    """Sharded, replicated and plain parameters together; one replicated one with a gradient of partial sums."""
    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(3)
    placements = [Shard(0), Shard(1), Replicate(), Replicate(), None]
    values = [torch.randn(5, 3, generator=generator) for _ in placements]
    params = [
        torch.nn.Parameter(value.clone() if placement is None else distribute_tensor(value, mesh, [placement]))
        for value, placement in zip(values, placements, strict=True)
    ]
    twins = [torch.nn.Parameter(value.clone()) for value in values]
    optimizer = FusedAdam(params, lr=0.1, max_grad_norm=0.7)
    twin = torch.optim.Adam(twins, lr=0.1)
    for _ in range(4):
        for index, (param, other, placement) in enumerate(zip(params, twins, placements, strict=True)):
            other.grad = torch.randn(5, 3, generator=generator)
            if placement is None:
                param.grad = other.grad.clone()
            elif index == 3:
                param.grad = DTensor.from_local(other.grad / 2, mesh, [Partial()])
            else:
                param.grad = distribute_tensor(other.grad.clone(), mesh, [placement])
        norm = torch.nn.utils.clip_grad_norm_(twins, 0.7)
        twin.step()
        optimizer.step()
        assert float(optimizer.live.grad_norm) == pytest.approx(float(norm), rel=1e-6)
    for param, other in zip(params, twins, strict=True):
        torch.testing.assert_close(whole(param), other.detach(), rtol=2e-5, atol=2e-6)


def test_placements_of_all_kinds(ranks: Ranks, backend: str) -> None:
    ranks.run(run_placements)


# -- DistributedDataParallel and ZeRO ---------------------------------------------------------------------------------
def run_ddp(bucket_views: bool) -> dict[str, torch.Tensor]:
    model = make_model()
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=bucket_views)
    optimizer = FusedAdam(model.parameters(), weight_decay=0.01)
    train(parallel, optimizer, CyclicLR(optimizer, **CYCLE), STEPS)
    return results_of(model, optimizer)


@pytest.mark.parametrize("bucket_views", [False, True])
def test_ddp_equals_torch_in_one_process(ranks: Ranks, backend: str, bucket_views: bool) -> None:
    wanted = torch_run()
    for results in ranks.run(run_ddp, bucket_views):
        assert_same(results, wanted)


def run_zero(folder: str) -> tuple[dict[str, torch.Tensor], list[list[float]]]:
    # Its import warns of deprecations, which in the process of the tests is an error.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = make_model()
    parallel = DistributedDataParallel(model)
    schedule = schedules.Cyclic(**CYCLE)

    def make_optimizer() -> Any:
        return ZeroRedundancyOptimizer(
            model.parameters(), optimizer_class=FusedAdam, weight_decay=0.01, schedule=schedule
        )

    optimizer = make_optimizer()
    lrs = []
    for step, batch in enumerate(batches(STEPS)):
        optimizer.zero_grad()
        loss_of(parallel, own_half(batch)).backward()
        optimizer.step()
        lrs.append([group["lr"] for group in optimizer.param_groups])
        if step == 5:
            # Saved and loaded in mid-cycle.
            optimizer.consolidate_state_dict(0)
            schedule_step = optimizer.optim.status().schedule_step
            path = Path(folder) / "zero.pt"
            if dist.get_rank() == 0:
                torch.save(optimizer.state_dict(), path)
            dist.barrier()
            optimizer = make_optimizer()
            # ZeRO writes the saved lr into the groups, which their schedule refuses unless it is where it was.
            optimizer.optim.set_schedule_step(schedule_step)
            optimizer.load_state_dict(torch.load(path, weights_only=False))
    return {name: param.detach() for name, param in model.named_parameters()}, lrs


def test_zero_equals_torch_in_one_process(ranks: Ranks, backend: str, tmp_path: Path) -> None:
    wanted = torch_run()
    tolerance = AFTER_STEPS[torch.float32]
    schedule = schedules.Cyclic(**CYCLE)
    for results, lrs in ranks.run(run_zero, str(tmp_path)):
        assert lrs == [[schedule.lr(step + 1)] for step in range(STEPS)]
        for name, value in results.items():
            torch.testing.assert_close(value, wanted[name], rtol=tolerance.rtol, atol=tolerance.atol)


def run_zero_averaged() -> tuple[int, list[tuple[torch.Tensor, torch.Tensor]]]:
    """How often the own parameters were averaged; each value in the body, and the mean of those at cycles' ends."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = make_model()
    parallel = DistributedDataParallel(model)
    averaged = functools.partial(FusedAdam, averaging=Averaging.swa())
    schedule = schedules.Cyclic(**CYCLE)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=averaged, schedule=schedule)
    own = [param for group in optimizer.optim.param_groups for param in group["params"]]
    stored = []
    for step, batch in enumerate(batches(17)):
        optimizer.zero_grad()
        loss_of(parallel, own_half(batch)).backward()
        optimizer.step()
        if schedule.ends_cycle(step):
            stored.append([param.detach().clone() for param in own])
    with optimizer.optim.averaged_parameters():
        seen = [param.detach().clone() for param in own]
    means = [(first + second) / 2 for first, second in zip(*stored, strict=True)]
    return optimizer.optim.n_averaged[0], list(zip(seen, means, strict=True))


def test_zero_averages_the_parameters_of_each_process(ranks: Ranks, backend: str) -> None:
    for count, pairs in ranks.run(run_zero_averaged):
        assert count == 2
        assert pairs
        for average, mean in pairs:
            torch.testing.assert_close(average, mean, rtol=1e-6, atol=1e-6)


# -- bad input --------------------------------------------------------------------------------------------------------
def run_errors() -> None:
    model, optimizer, _ = sharded()
    param = next(model.parameters())
    optimizer.state[param]["exp_avg"] = torch.zeros(param.shape)
    loss_of(model, own_half(batches(1)[0])).backward()
    with pytest.raises(ValueError, match=r"state\['exp_avg'\] of .*must be sharded as the parameter is"):
        optimizer.step()
    plain = FusedAdam([torch.nn.Parameter(torch.zeros(param.shape))])
    state = plain.state_dict()
    state["state"] = {0: {"step": torch.tensor(1.0), "exp_avg": param.detach(), "exp_avg_sq": param.detach()}}
    with pytest.raises(ValueError, match="is a DTensor and the parameter is not: give its full_tensor"):
        plain.load_state_dict(state)


def test_errors(ranks: Ranks) -> None:
    ranks.run(run_errors)
