"""fuse() and unfuse() in the middle of a training: what goes on equals the pair that was never converted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch.optim import lr_scheduler

from fused_clr import CyclicLR, FusedAdam, fuse, schedules, unfuse
from tests.cases import CYCLES as ALL_CYCLES
from tests.cases import OPTIMIZERS, OptimizerCase, ScheduleCase, by_optimizer, cyclic
from tests.helpers.pairs import Pair, assert_same_params, make_pair, train
from tests.helpers.tolerances import AFTER_STEPS, SCHEDULED

# Each of two values was rounded to float32.
FLOAT32_ROUNDINGS = 2 * 2.0**-24

# tests/api/test_torch_schedulers.py has the other schedulers.
CYCLES: dict[str, ScheduleCase] = ALL_CYCLES | {
    "scale_fn": cyclic("scale_fn", 23, 7, 4, scale_fn=lambda cycle: 1 / cycle, scale_mode="cycle"),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "amsgrad-maximize": {"amsgrad": True, "maximize": True},
    "fused": {"fused": True},
    "decoupled": {"decoupled_weight_decay": True, "weight_decay": 0.3, "eps": 1e-6},
    "tensor-lr": {"lr": torch.tensor(1e-3), "foreach": False},
}


def assert_same_run(first: Pair, second: Pair, steps: int, lr_rtol: float = SCHEDULED.rtol) -> None:
    """Both go on; learning rates, beta1, parameters and steps stay the same."""
    for (lr, beta1), (other_lr, other_beta1) in zip(train(first, steps, seed=2), train(second, steps, 2), strict=True):
        assert lr == pytest.approx(other_lr, rel=lr_rtol)
        assert beta1 == pytest.approx(other_beta1, rel=SCHEDULED.rtol)
    tolerance = AFTER_STEPS[torch.float32]
    assert_same_params(first, second, tolerance.rtol, tolerance.atol)
    for a, b in zip(first.params, second.params, strict=True):
        assert float(first.optimizer.state[a].get("step", 0)) == float(second.optimizer.state[b].get("step", 0))


def converted(pair: Pair, convert: Callable[..., Any], **arguments: Any) -> Pair:
    return Pair(pair.params, *convert(pair.optimizer, pair.scheduler, **arguments))


# Every cycle with some option, every option with some cycle, and every optimizer.
PAIRED = [("Adam", cycle, "plain") for cycle in CYCLES]
PAIRED += [("Adam", "triangular2", option) for option in OPTIONS if option != "plain"]
PAIRED += [(name, "triangular2", "plain") for name in OPTIMIZERS if name != "Adam"]


@pytest.mark.parametrize(("optimizer", "cycle", "option"), PAIRED)
def test_torch_to_ours_and_back(backend: str, optimizer: str, cycle: str, option: str) -> None:
    changes: dict[str, Any] = {}
    lr_rtol = SCHEDULED.rtol
    if option == "tensor-lr":
        # Torch's groups share the tensor, and the last one's scheduler writes it.
        changes, lr_rtol = {"base_lr": 1e-3, "max_lr": 2e-2}, FLOAT32_ROUNDINGS
    cases: dict[str, Any] = {"optimizer_case": OPTIMIZERS[optimizer], "schedule_case": CYCLES[cycle]}
    straight, pair = (make_pair(False, cyclic=changes, **cases, **copy.deepcopy(OPTIONS[option])) for _ in range(2))
    train(straight, 9)
    train(pair, 9)
    fused = converted(pair, fuse)
    assert fused.scheduler.last_epoch == 9
    assert_same_run(straight, fused, 15, lr_rtol)
    back = converted(fused, unfuse)
    assert type(back.optimizer) is OPTIMIZERS[optimizer].torch_peer
    assert type(back.scheduler) is type(straight.scheduler)
    assert_same_run(straight, back, 15, lr_rtol)


@by_optimizer
def test_classes_and_settings_are_carried(optimizer_case: OptimizerCase) -> None:
    named = [("a", torch.nn.Parameter(torch.ones(3))), ("b", torch.nn.Parameter(torch.ones(2)))]
    plain = optimizer_case.torch_peer(named, lr=0.3, **optimizer_case.settings)
    plain.param_groups[0]["note"] = "mine"
    scheduler = lr_scheduler.CyclicLR(plain, 0.1, 0.4, 3, base_momentum=0.7, max_momentum=0.95)
    fused, fused_scheduler = fuse(plain, scheduler, max_grad_norm=2.0, history_size=7)
    assert type(fused) is optimizer_case.ours
    assert (fused.max_grad_norm, fused._engines.options.history_size) == (2.0, 7)
    back, back_scheduler = unfuse(fused, fused_scheduler, drop_clipping=True)
    assert type(back) is optimizer_case.torch_peer
    want, got = plain.state_dict()["param_groups"], back.state_dict()["param_groups"]
    assert want == got
    # Torch's constructor takes a first step of its own, which these attributes tell.
    ignored = ("_is_initial", "_scale_fn_custom")
    want, got = scheduler.state_dict(), back_scheduler.state_dict()
    assert {k: v for k, v in want.items() if k not in ignored} == {k: v for k, v in got.items() if k not in ignored}


@by_optimizer
def test_nothing_is_copied_and_torchs_pair_is_left_as_it_was(backend: str, optimizer_case: OptimizerCase) -> None:
    pair = make_pair(False, optimizer_case=optimizer_case)
    train(pair, 3)
    before = copy.deepcopy((pair.optimizer.state_dict(), pair.scheduler.state_dict()))
    fused = converted(pair, fuse)
    for param in pair.params:
        for key in pair.optimizer.state[param].keys() - {"step"}:
            assert fused.optimizer.state[param][key] is pair.optimizer.state[param][key]
    optimizer_state, scheduler_state = before
    assert pair.scheduler.state_dict() == scheduler_state
    assert pair.optimizer.state_dict()["param_groups"] == optimizer_state["param_groups"]
    torch.testing.assert_close(pair.optimizer.state_dict()["state"], optimizer_state["state"], rtol=0, atol=0)
    back = converted(fused, unfuse)
    for param in pair.params:
        for key in pair.optimizer.state[param].keys() - {"step"}:
            assert back.optimizer.state[param][key] is pair.optimizer.state[param][key]


def test_between_the_optimizers_step_and_the_schedulers(backend: str) -> None:
    straight, pair = make_pair(False), make_pair(False)
    train(straight, 5)
    train(pair, 4)
    # The gradients of the fifth step.
    for param, other in zip(pair.params, straight.params, strict=True):
        param.grad = other.grad.clone()
    pair.optimizer.step()
    fused = converted(pair, fuse)
    fused.scheduler.step()
    assert_same_run(straight, fused, 6)
    for param in fused.params:
        param.grad = torch.ones_like(param)
    fused.optimizer.step()
    lr = [group["lr"] for group in fused.optimizer.param_groups]
    back = converted(fused, unfuse)
    assert [group["lr"] for group in back.optimizer.param_groups] == pytest.approx(lr)
    assert back.scheduler.last_epoch == fused.scheduler.last_epoch


def test_hooks_are_carried_and_their_handles_still_remove_them() -> None:
    pair = make_pair(False)
    called: list[type] = []
    handle = pair.optimizer.register_step_post_hook(lambda optimizer, args, kwargs: called.append(type(optimizer)))
    fused = converted(pair, fuse)
    train(fused, 1)
    assert called == [FusedAdam]
    handle.remove()
    train(fused, 1)
    assert called == [FusedAdam]


def test_unfuse_without_a_scheduler() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = FusedAdam([param], schedule=schedules.Cyclic(0.1, 0.5, 4))
    for _ in range(3):
        param.grad = torch.ones(3)
        optimizer.step()
    plain, scheduler = unfuse(optimizer)
    assert (scheduler.last_epoch, plain.param_groups[0]["lr"]) == (3, pytest.approx(0.4))
    assert plain.param_groups[0]["betas"][0] == pytest.approx(optimizer.param_groups[0]["betas"][0])


def test_a_triton_scale_fn_of_plain_arithmetic_is_carried_back(triton_backend: None) -> None:
    @triton.jit
    def inverse(cycle):
        return 1 / cycle

    @triton.jit
    def rooted(cycle):
        return 1 / tl.sqrt(cycle)

    optimizer = FusedAdam([torch.nn.Parameter(torch.ones(3))])
    scheduler = CyclicLR(optimizer, 0.1, 0.5, 4, scale_fn=inverse)
    assert unfuse(optimizer, scheduler)[1].scale_fn(4.0) == 0.25
    optimizer = FusedAdam([torch.nn.Parameter(torch.ones(3))], schedule=schedules.Cyclic(0.1, 0.5, 4, scale_fn=rooted))
    with pytest.raises(ValueError, match="rooted.*cannot be converted"):
        unfuse(optimizer)


def torch_pair(**cyclic: Any) -> tuple[torch.optim.Adam, lr_scheduler.CyclicLR]:
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(3))])
    return optimizer, lr_scheduler.CyclicLR(optimizer, 0.1, 0.5, 4, **cyclic)


def test_fuse_names_what_it_cannot_carry() -> None:
    optimizer, scheduler = torch_pair()
    other, other_scheduler = torch_pair()
    radam = torch.optim.RAdam([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(TypeError, match="optimizer must be a torch.optim.Adam, AdamW or SGD, got torch.optim.radam"):
        fuse(radam, scheduler)
    with pytest.raises(TypeError, match=r"scheduler must be .*CyclicLR, .*SequentialLR, .*, got .*StepLR"):
        fuse(optimizer, lr_scheduler.StepLR(other, 5))
    with pytest.raises(ValueError, match="got the scheduler of another one"):
        fuse(optimizer, torch_pair()[1])
    optimizer.param_groups[0]["lr"] = 0.3
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['lr'\] is 0.3, and the scheduler says 0.1 at step 0"):
        fuse(optimizer, scheduler)
    optimizer, scheduler = torch_pair()
    optimizer.param_groups[0]["betas"] = 0.5, 0.999
    with pytest.raises(ValueError, match=r"\['betas'\] is 0.5, and the scheduler says 0.9"):
        fuse(optimizer, scheduler)
    optimizer, scheduler = torch_pair()
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    with pytest.raises(ValueError, match="drives 1 param groups, and the optimizer has 2"):
        fuse(optimizer, scheduler)
    optimizer, scheduler = torch_pair()
    optimizer.step = lambda closure=None: None
    with pytest.raises(ValueError, match="optimizer.step was replaced by .*lambda"):
        fuse(optimizer, scheduler)
    optimizer, scheduler = torch_pair(base_momentum=1.5, max_momentum=1.5)
    with pytest.raises(ValueError, match="base_momentum"):
        fuse(optimizer, scheduler)
    differentiable = torch.optim.Adam([torch.ones(3, requires_grad=True).clone()], differentiable=True)
    with pytest.raises(ValueError, match="differentiable"):
        fuse(differentiable, lr_scheduler.CyclicLR(differentiable, 0.1, 0.5))
    del other_scheduler


def test_unfuse_names_what_it_cannot_carry() -> None:
    def optimizer(*group_schedules: Any, **arguments: Any) -> FusedAdam:
        groups = [{"params": [torch.nn.Parameter(torch.ones(3))], "schedule": s} for s in group_schedules]
        return FusedAdam(groups, **arguments)

    cyclic = schedules.Cyclic(0.1, 0.5, 4)
    with pytest.raises(TypeError, match="optimizer must be a FusedAdam, FusedAdamW or FusedSGD, got torch.optim.adam"):
        unfuse(torch_pair()[0])
    with pytest.raises(TypeError, match=r"scheduler must be a scheduler of fused_clr or None, got torch"):
        unfuse(optimizer(cyclic), torch_pair()[1])
    with pytest.raises(ValueError, match="got the scheduler of another one"):
        unfuse(optimizer(cyclic), CyclicLR(optimizer(cyclic), 0.1, 0.5))
    with pytest.raises(ValueError, match=r"param_groups\[1\] has no schedule"):
        unfuse(optimizer(cyclic, None))
    with pytest.raises(ValueError, match=r"param_groups\[1\] has step_size_up=5 and param_groups\[0\] 4"):
        unfuse(optimizer(cyclic, schedules.Cyclic(0.1, 0.5, 5)))
    with pytest.raises(ValueError, match="max_grad_norm=1.0 cannot be converted"):
        unfuse(optimizer(cyclic, max_grad_norm=1.0))
    with pytest.raises(ValueError, match="drop_clipping must be True or False, got 'max_grad_norm'"):
        unfuse(optimizer(cyclic, max_grad_norm=1.0), drop_clipping="max_grad_norm")
    late = optimizer(schedules.Cyclic(0.1, 0.5, 4, mode="triangular2"))
    late.set_schedule_step(9000)
    with pytest.raises(ValueError, match="schedule step 9000 cannot be converted: torch's CyclicLR overflows"):
        unfuse(late)


def test_fuse_refuses_what_is_no_option() -> None:
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))])
    scheduler = lr_scheduler.CyclicLR(optimizer, 0.1, 0.5)
    for name in ("schedule", "lr"):
        with pytest.raises(
            TypeError, match=rf"fuse\(\) got unexpected arguments \['{name}'\]; its own options are max_"
        ):
            fuse(optimizer, scheduler, **{name: None})
