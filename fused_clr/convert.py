"""Converts a running torch optimizer and scheduler to a fused pair, and back."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import lr_scheduler
from typing_extensions import Unpack

from ._checks import check_bool
from ._device.moments import AVERAGE
from ._device.rules import UpdateRule
from ._host.hyperparameters import N_AVERAGED, OWN_KEYS, check_count, check_options
from ._host.optimizer import FusedOptimizer
from .optim import FusedAdam, FusedAdamW, FusedSGD, StepOptions
from .scheduler import CyclicLR, FusedScheduler
from .scheduler.checks import is_close, turns_in_torch
from .scheduler.torchs import class_name, kind_of_ours, kind_of_torchs, make_torchs, read_schedules, torchs_keys
from .schedules import Schedule
from .schedules.base import function_name

FUSED_KEYS = ("schedule", *OWN_KEYS)
# The first one that fits decides.
OPTIMIZERS: dict[type[torch.optim.Optimizer], type[FusedOptimizer]] = {
    torch.optim.AdamW: FusedAdamW,
    torch.optim.Adam: FusedAdam,
    torch.optim.SGD: FusedSGD,
}
HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


def fuse(
    optimizer: torch.optim.Optimizer,
    scheduler: lr_scheduler.LRScheduler,
    *,
    total_steps: int | None = None,
    **options: Unpack[StepOptions],
) -> tuple[FusedOptimizer, FusedScheduler]:
    """Converts a torch optimizer and its scheduler to a fused pair that continues from them.

    Param groups, state, hooks and the schedule are converted. The parameters are the same objects and the moments the
    same tensors: nothing is copied, so stop using torch's pair.

    Args:
        optimizer: A `torch.optim.Adam`, `torch.optim.AdamW` or `torch.optim.SGD`. Not changed.
        scheduler: Its scheduler, of a class of torch that fused_clr has too, or a SequentialLR of such. Not changed.
        total_steps: See `fused_clr.schedules.Cyclic`; for a CyclicLR only.
        options: See `fused_clr.optim.StepOptions`. In torch's loop, ``scheduler.step()`` advances the schedule after a
            skipped step too: ``advance_schedule_on_skip=True`` keeps that.

    Returns:
        A `FusedAdam`, `FusedAdamW` or `FusedSGD`, and its scheduler.

    Raises:
        TypeError: ``optimizer`` or ``scheduler`` is of another class.
        ValueError: Something cannot be converted; the message names it.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.Adam([weight])
        >>> scheduler = torch.optim.lr_scheduler.CyclicLR(optimizer, 0.1, 0.5, step_size_up=4, cycle_momentum=False)
        >>> weight.grad = torch.ones(2)
        >>> optimizer.step(); scheduler.step()
        >>> optimizer, scheduler = fuse(optimizer, scheduler)
        >>> scheduler.last_epoch, scheduler.get_last_lr(), float(optimizer.state[weight]["step"])
        (1, [0.2], 1.0)
    """
    check_options("fuse()", options)
    if type(optimizer) not in OPTIMIZERS:
        raise TypeError(f"optimizer must be a torch.optim.Adam, AdamW or SGD, got {class_name(optimizer)}")
    kind = kind_of_torchs("scheduler", scheduler)
    if total_steps is not None and kind is not CyclicLR:
        raise ValueError(f"total_steps must be None unless the scheduler is a CyclicLR, got {total_steps}")
    if scheduler.optimizer is not optimizer:
        raise ValueError("scheduler must drive this optimizer, got the scheduler of another one")
    own_step = vars(optimizer).get("step")
    if own_step is not None and not hasattr(own_step, "_wrapped_by_lr_sched"):
        raise ValueError(f"optimizer.step was replaced by {function_name(own_step)!r}, which cannot be converted")

    step = check_count("scheduler.last_epoch", scheduler.last_epoch)
    schedules = read_schedules("scheduler", scheduler, optimizer.param_groups, total_steps)
    fused_class: Any = OPTIMIZERS[type(optimizer)]
    rule: UpdateRule = fused_class.RULE
    _check_in_place(optimizer, schedules, step, rule)
    defaults = dict(optimizer.defaults)
    if fused_class is FusedAdamW:
        defaults.pop("decoupled_weight_decay")
    # A checkpoint of a fused optimizer leaves its own keys in torch's groups, as they were.
    groups = [_without_own_keys(group) for group in optimizer.param_groups]
    for group, schedule in zip(groups, schedules, strict=True):
        if not isinstance(group["lr"], Tensor):
            # Torch's may have drifted below 0, which a constructor refuses.
            group["lr"] = schedule.lr(step)
        if schedule.drives_momentum:
            # The scheduler wrote the present value.
            key = rule.momentum_key
            group[key] = rule.with_momentum(group[key], schedule.momentum_bounds[1])
    fused: FusedOptimizer = fused_class(groups, **defaults, **options)
    for param, entry in optimizer.state.items():
        fused.state[param] = dict(entry)
    _carry_hooks(optimizer, fused)
    fused_scheduler = kind.of_schedules(fused, schedules, step)
    # Torch's SequentialLR does not count.
    fused_scheduler._step_count = getattr(scheduler, "_step_count", 1)
    # Raises here, and not at the next step, if no backend supports the parameters.
    fused._ready()
    if fused.averaging is not None:
        for fused_group, group in zip(fused.param_groups, groups, strict=True):
            # With the averages, from a checkpoint of a fused optimizer.
            fused_group[N_AVERAGED] = group.get(N_AVERAGED, 0)
    return fused, fused_scheduler


def unfuse(
    optimizer: FusedOptimizer,
    scheduler: FusedScheduler | None = None,
    *,
    drop_clipping: bool = False,
    drop_averages: bool = False,
) -> tuple[torch.optim.Optimizer, lr_scheduler.LRScheduler]:
    """Converts a fused pair to a torch optimizer and scheduler that continue from it: the reverse of `fuse`.

    Waits for the device.

    The parameters are the same objects and the moments the same tensors: stop using the fused pair, and do not replay
    graphs captured from it. Torch's pair does not count steps and keeps no history, and in torch's loop the schedule
    advances after a step that `torch.amp.GradScaler` skips.

    Args:
        optimizer: A `FusedAdam`, `FusedAdamW` or `FusedSGD`. Not changed.
        scheduler: Its scheduler; None if the schedules were given to the optimizer or its groups.
        drop_clipping: Leave out ``max_grad_norm``: torch's step does not clip.
        drop_averages: Leave out the averages, which ``optimizer.averaged_state_dict()`` saves: torch's step has none.

    Returns:
        A `torch.optim.Adam`, AdamW or SGD, and torch's scheduler of the same schedules.

    Raises:
        TypeError: ``optimizer`` or ``scheduler`` is of another class.
        ValueError: Something cannot be converted; the message names it.

    Example:
        >>> from fused_clr.schedules import Cyclic
        >>> optimizer = FusedAdam([torch.nn.Parameter(torch.ones(2))], schedule=Cyclic(0.1, 0.5, 4))
        >>> optimizer.step()
        >>> optimizer, scheduler = unfuse(optimizer)
        >>> type(optimizer).__name__, scheduler.last_epoch, optimizer.param_groups[0]["lr"]
        ('Adam', 1, 0.2)
    """
    torch_class: Any = next((own for own, fused in OPTIMIZERS.items() if isinstance(optimizer, fused)), None)
    if torch_class is None:
        raise TypeError(f"optimizer must be a FusedAdam, FusedAdamW or FusedSGD, got {class_name(optimizer)}")
    if scheduler is not None and not isinstance(scheduler, FusedScheduler):
        raise TypeError(f"scheduler must be a scheduler of fused_clr or None, got {class_name(scheduler)}")
    if scheduler is not None and scheduler.optimizer is not optimizer:
        raise ValueError("scheduler must drive this optimizer, got the scheduler of another one")
    check_bool("drop_clipping", drop_clipping)
    if optimizer.max_grad_norm is not None and not drop_clipping:
        raise ValueError(
            f"max_grad_norm={optimizer.max_grad_norm} cannot be converted: torch's step does not clip. Call "
            "torch.nn.utils.clip_grad_norm_ in the loop, and pass drop_clipping=True"
        )
    check_bool("drop_averages", drop_averages)
    if optimizer.averaging is not None and not drop_averages:
        raise ValueError(
            f"averaging={optimizer.averaging} cannot be converted: torch's step does not average. Save "
            "optimizer.averaged_state_dict(), use torch.optim.swa_utils.AveragedModel, and pass drop_averages=True"
        )
    step = optimizer.status().schedule_step - optimizer._awaits_scheduler if scheduler is None else scheduler.last_epoch
    schedules = [group.schedule for group in optimizer.param_groups]
    kind = kind_of_ours(schedules, step)
    last_lrs = [group["lr"] for group in optimizer.param_groups]
    with warnings.catch_warnings():
        # The constructor is given a scale_fn, which no state_dict holds.
        warnings.filterwarnings("ignore", "scale_fn .* cannot be saved")
        step_count = 1 if scheduler is None else scheduler._step_count
        packed = kind.pack(schedules, step, step_count, last_lrs, optimizer.rule.momentum_key == "betas")

    groups = []
    for index, group in enumerate(optimizer.param_groups):
        for key, of_torch in (("weight_decay_mode", "lr"), ("weight_decay_schedule", None)):
            if group.get(key, of_torch) != of_torch:
                raise ValueError(
                    f"param_groups[{index}] has {key}={group[key]!r}, which cannot be converted: torch's AdamW has none"
                )
        values = _without_own_keys(group)
        values.pop(N_AVERAGED, None)
        stored_lr = group.stored("lr")
        if isinstance(stored_lr, Tensor):
            values["lr"] = stored_lr
        groups.append(values | {"params": list(values["params"])})
    defaults = {key: value for key, value in optimizer.defaults.items() if key not in FUSED_KEYS}
    if torch_class is torch.optim.AdamW:
        defaults.pop("decoupled_weight_decay")
    plain: torch.optim.Optimizer = torch_class([dict(group) for group in groups], **defaults)
    updates = optimizer._ready().update_steps()
    for group in optimizer.param_groups:
        steps_on_device = bool(group.stored("fused") or group.stored("capturable"))
        for param in group.stored("params"):
            entry = optimizer.state.get(param)
            if entry and not optimizer.rule.has_step:
                if updates[param]:
                    plain.state[param] = dict(entry)
            elif entry:
                count = entry["step"].detach().clone()
                plain.state[param] = {**entry, "step": count if steps_on_device else count.cpu()}
            plain.state.get(param, {}).pop(AVERAGE, None)
    _carry_hooks(optimizer, plain)
    plain_scheduler = make_torchs(kind, plain, schedules, step)
    plain_scheduler.load_state_dict(torchs_keys(packed, plain_scheduler.state_dict()))
    # Torch's constructor took a first step.
    for plain_group, values, lr in zip(plain.param_groups, groups, last_lrs, strict=True):
        plain_group.update({key: value for key, value in values.items() if key != "params"})
        if isinstance(plain_group["lr"], Tensor):
            plain_group["lr"].fill_(lr)
    return plain, plain_scheduler


def _without_own_keys(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in FUSED_KEYS}


def _carry_hooks(source: torch.optim.Optimizer, target: torch.optim.Optimizer) -> None:
    """Shares the dicts of hooks: handles that remove hooks stay valid after the conversion."""
    for name in HOOKS:
        setattr(target, name, getattr(source, name))


def _check_in_place(
    optimizer: torch.optim.Optimizer, schedules: Sequence[Schedule], step: int, rule: UpdateRule
) -> None:
    """Checks that the groups hold the values of their schedules. Values that something else wrote would be lost."""
    for index, (group, schedule) in enumerate(zip(optimizer.param_groups, schedules, strict=True)):
        if turns_in_torch(schedule, step):
            raise ValueError(
                f"scheduler is at step {step}, past the end of {schedule}, which cannot be converted: torch's does not "
                "hold its last learning rate there, and ours does"
            )
        lr, momentum = schedule.lr_and_momentum(step)
        found = {"lr": (group["lr"], lr, schedule.largest_lr)}
        if not math.isnan(momentum):
            found[rule.momentum_key] = rule.momentum_in(group[rule.momentum_key]), momentum, 1.0
        for key, (present, scheduled, scale) in found.items():
            if not is_close(present, scheduled, scale, step):
                raise ValueError(
                    f"param_groups[{index}][{key!r}] is {float(present)}, and the scheduler says {scheduled} at step "
                    f"{step}: something else wrote it, which cannot be converted"
                )
