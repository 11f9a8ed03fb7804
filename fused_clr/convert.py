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
from ._host.hyperparameters import OWN_KEYS, check_options, check_schedule_step
from .optim import FusedAdam, FusedAdamW, StepOptions
from .scheduler import KINDS, CyclicLR, FusedScheduler, OneCycleLR, SequentialLR, check_epoch, kind_of
from .scheduler.base import check_frame, is_close, turns_in_torch
from .scheduler.cyclic import recover_step_sizes
from .schedules import Cyclic, Schedule
from .schedules.base import function_name
from .schedules.parts import host_function, is_triton_function
from .schedules.sequence import ScheduleSequence

FUSED_KEYS = ("schedule", *OWN_KEYS)
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
) -> tuple[FusedAdam, FusedScheduler]:
    """Converts a torch optimizer and its scheduler to a fused pair that continues from them.

    Param groups, state, hooks and the schedule are converted. The parameters are the same objects and the moments the
    same tensors: nothing is copied, so stop using torch's pair.

    Args:
        optimizer: A `torch.optim.Adam` or `torch.optim.AdamW`. Not changed.
        scheduler: Its scheduler, of a class of torch that fused_clr has too, or a SequentialLR of such. Not changed.
        total_steps: See `fused_clr.schedules.Cyclic`; for a CyclicLR only.
        options: See `fused_clr.optim.StepOptions`. In torch's loop, ``scheduler.step()`` advances the schedule after a
            skipped step too: ``advance_schedule_on_skip=True`` keeps that.

    Returns:
        A `FusedAdam`, or `FusedAdamW` for an AdamW, and its scheduler.

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
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        raise TypeError(f"optimizer must be a torch.optim.Adam or AdamW, got {_class_name(optimizer)}")
    kind = _kind_of_torchs("scheduler", scheduler)
    if total_steps is not None and kind is not CyclicLR:
        raise ValueError(f"total_steps must be None where the scheduler is no CyclicLR, got {total_steps}")
    if scheduler.optimizer is not optimizer:
        raise ValueError("scheduler must drive this optimizer, and is another one's")
    own_step = vars(optimizer).get("step")
    if own_step is not None and not hasattr(own_step, "_wrapped_by_lr_sched"):
        raise ValueError(f"optimizer.step was replaced by {function_name(own_step)!r}, which cannot be converted")

    step = check_schedule_step("scheduler.last_epoch", scheduler.last_epoch)
    schedules = _read_schedules("scheduler", scheduler, optimizer.param_groups, total_steps)
    _check_in_place(optimizer, schedules, step)
    defaults = dict(optimizer.defaults)
    fused_class: type[FusedAdam] = FusedAdam
    if isinstance(optimizer, torch.optim.AdamW):
        fused_class = FusedAdamW
        defaults.pop("decoupled_weight_decay")
    # A checkpoint of a fused optimizer leaves its own keys in torch's groups, as they were.
    groups = [_without_own_keys(group) for group in optimizer.param_groups]
    for group, schedule in zip(groups, schedules, strict=True):
        if not isinstance(group["lr"], Tensor):
            # Torch's may have drifted below 0, which a constructor refuses.
            group["lr"] = schedule.lr(step)
        if schedule.drives_momentum:
            # The scheduler wrote the present value.
            group["betas"] = schedule.momentum_bounds[1], group["betas"][1]
    fused = fused_class(groups, **defaults, **options)
    for param, entry in optimizer.state.items():
        fused.state[param] = dict(entry)
    _carry_hooks(optimizer, fused)
    fused_scheduler = kind.of_schedules(fused, schedules, step)
    # Torch's SequentialLR does not count.
    fused_scheduler._step_count = getattr(scheduler, "_step_count", 1)
    # Raises here, and not at the next step, if no backend supports the parameters.
    fused._ready()
    return fused, fused_scheduler


def unfuse(
    optimizer: FusedAdam, scheduler: FusedScheduler | None = None, *, drop_clipping: bool = False
) -> tuple[torch.optim.Adam, lr_scheduler.LRScheduler]:
    """Converts a fused pair to a torch optimizer and scheduler that continue from it: the reverse of `fuse`.

    Waits for the device.

    The parameters are the same objects and the moments the same tensors: stop using the fused pair, and do not replay
    graphs captured from it. Torch's pair does not count steps and keeps no history, and in torch's loop the schedule
    advances after a step that `torch.amp.GradScaler` skips.

    Args:
        optimizer: A `FusedAdam` or `FusedAdamW`. Not changed.
        scheduler: Its scheduler; None if the schedules were given to the optimizer or its groups.
        drop_clipping: Leave out ``max_grad_norm``: torch's step does not clip.

    Returns:
        A `torch.optim.Adam`, or AdamW for a `FusedAdamW`, and torch's scheduler of the same schedules.

    Raises:
        TypeError: ``optimizer`` or ``scheduler`` is of another class.
        ValueError: Something cannot be converted; the message names it.

    Example:
        >>> optimizer = FusedAdam([torch.nn.Parameter(torch.ones(2))], schedule=Cyclic(0.1, 0.5, 4))
        >>> optimizer.step()
        >>> optimizer, scheduler = unfuse(optimizer)
        >>> type(optimizer).__name__, scheduler.last_epoch, optimizer.param_groups[0]["lr"]
        ('Adam', 1, 0.2)
    """
    if not isinstance(optimizer, FusedAdam):
        raise TypeError(f"optimizer must be a FusedAdam or FusedAdamW, got {_class_name(optimizer)}")
    if scheduler is not None and not isinstance(scheduler, FusedScheduler):
        raise TypeError(f"scheduler must be a scheduler of fused_clr or None, got {_class_name(scheduler)}")
    if scheduler is not None and scheduler.optimizer is not optimizer:
        raise ValueError("scheduler must drive this optimizer, and is another one's")
    check_bool("drop_clipping", drop_clipping)
    if optimizer.max_grad_norm is not None and not drop_clipping:
        raise ValueError(
            f"max_grad_norm={optimizer.max_grad_norm} cannot be converted: torch's step does not clip. Call "
            "torch.nn.utils.clip_grad_norm_ in the loop, and pass drop_clipping=True"
        )
    step = optimizer.status().schedule_step - optimizer._awaits_scheduler if scheduler is None else scheduler.last_epoch
    schedules = [group.schedule for group in optimizer.param_groups]
    kind = _kind_of_ours(schedules, step)
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
        stored_lr = group.stored("lr")
        if isinstance(stored_lr, Tensor):
            values["lr"] = stored_lr
        groups.append(values | {"params": list(values["params"])})
    defaults = {key: value for key, value in optimizer.defaults.items() if key not in FUSED_KEYS}
    torch_class: type[torch.optim.Adam] = torch.optim.Adam
    if isinstance(optimizer, FusedAdamW):
        torch_class = torch.optim.AdamW
        defaults.pop("decoupled_weight_decay")
    plain = torch_class([dict(group) for group in groups], **defaults)
    for group in optimizer.param_groups:
        steps_on_device = bool(group.stored("fused") or group.stored("capturable"))
        for param in group.stored("params"):
            entry = optimizer.state.get(param)
            if entry:
                count = entry["step"].detach().clone()
                plain.state[param] = {**entry, "step": count if steps_on_device else count.cpu()}
    _carry_hooks(optimizer, plain)
    plain_scheduler = _make_torchs(kind, plain, schedules, step)
    plain_scheduler.load_state_dict(_torchs_keys(packed, plain_scheduler.state_dict()))
    # Torch's constructor took a first step.
    for plain_group, values, lr in zip(plain.param_groups, groups, last_lrs, strict=True):
        plain_group.update({key: value for key, value in values.items() if key != "params"})
        if isinstance(plain_group["lr"], Tensor):
            plain_group["lr"].fill_(lr)
    return plain, plain_scheduler


def _without_own_keys(group: Mapping[str, Any]) -> dict[str, Any]:
    # The groups of torch's OneCycleLR hold ``max_lr`` too.
    return {key: group[key] for key in group if key not in FUSED_KEYS or (key == "max_lr" and group[key] is not None)}


def _class_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _carry_hooks(source: torch.optim.Optimizer, target: torch.optim.Optimizer) -> None:
    """Shares the dicts of hooks: handles that remove hooks stay valid after the conversion."""
    for name in HOOKS:
        setattr(target, name, getattr(source, name))


def _kind_of_torchs(name: str, scheduler: lr_scheduler.LRScheduler) -> type[FusedScheduler]:
    """Our class for a scheduler of torch.

    Raises:
        TypeError: There is none.
    """
    kind = next((kind for kind in KINDS.values() if type(scheduler) is kind.TORCH), None)
    if kind is None:
        raise TypeError(
            f"{name} must be one of torch's {', '.join(KINDS)}, from torch.optim.lr_scheduler, got "
            f"{_class_name(scheduler)}"
        )
    return kind


def _read_schedules(
    name: str, scheduler: Any, groups: Sequence[dict[str, Any]], total_steps: int | None = None
) -> list[Any]:
    """The schedules of a scheduler of torch, one per group."""
    kind = _kind_of_torchs(name, scheduler)
    if kind is SequentialLR:
        columns = []
        for index, own in enumerate(scheduler._schedulers):
            own_name = f"{name}._schedulers[{index}]"
            own_kind = _kind_of_torchs(own_name, own)
            check_epoch(own_name, own.last_epoch, own_kind, scheduler._milestones, index, scheduler.last_epoch)
            columns.append(_read_schedules(own_name, own, groups))
        schedules = [ScheduleSequence(own, scheduler._milestones) for own in zip(*columns, strict=True)]
        _check_sequences(name, schedules)
        return schedules
    if len(scheduler.base_lrs) != len(groups):
        raise ValueError(
            f"{name} drives {len(scheduler.base_lrs)} param groups, and the optimizer has {len(groups)}: one added "
            "after the scheduler was created cannot be converted"
        )
    if getattr(scheduler, "cycle_momentum", False) and not scheduler.use_beta1:
        raise ValueError(f"{name} cycles 'momentum', which Adam does not have")
    if kind is CyclicLR:
        return _read_cyclic(scheduler, total_steps)
    state = scheduler.state_dict()
    check_frame(f"{name}.state_dict()", state, kind)
    return kind.unpack(f"{name}.state_dict()", state, groups, [None] * len(groups))


def _read_cyclic(scheduler: lr_scheduler.CyclicLR, total_steps: int | None) -> list[Cyclic]:
    up, down = recover_step_sizes(scheduler.total_size, scheduler.step_ratio)
    schedules = []
    for index in range(len(scheduler.base_lrs)):
        momenta = {}
        if scheduler.cycle_momentum:
            momenta = {
                "base_momentum": scheduler.base_momentums[index],
                "max_momentum": scheduler.max_momentums[index],
            }
        schedules.append(
            Cyclic(
                float(scheduler.base_lrs[index]),
                float(scheduler.max_lrs[index]),
                up,
                down,
                scheduler.mode,
                scheduler.gamma,
                scheduler._scale_fn_custom,
                scheduler.scale_mode,
                scheduler.cycle_momentum,
                **momenta,
                total_steps=total_steps,
            )
        )
    return schedules


def _check_sequences(name: str, schedules: Sequence[ScheduleSequence]) -> None:
    """Checks that ours and torch's SequentialLR do the same, also later.

    Raises:
        ValueError: They do not.
    """
    if any(kind is SequentialLR for kind, _ in SequentialLR.columns_of(schedules)[1:]):
        raise ValueError(f"{name} has a SequentialLR after a milestone, where torch's raises an error")
    for schedule in schedules:
        if len({own.drives_momentum for own in schedule.schedules}) > 1:
            raise ValueError(
                f"{name} drives the momentum in some of its phases alone, which cannot be converted: torch's keeps its "
                f"last value in the others, and ours the group's own, in {schedule}"
            )
        if len([own for own in schedule.schedules if OneCycleLR.recognises(own)]) > 1:
            raise ValueError(f"{name} has more than one OneCycleLR: torch's share one max_lr, in {schedule}")


def _check_in_place(optimizer: torch.optim.Optimizer, schedules: Sequence[Schedule], step: int) -> None:
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
            found["betas"] = group["betas"][0], momentum, 1.0
        for key, (present, scheduled, scale) in found.items():
            if not is_close(present, scheduled, scale, step):
                raise ValueError(
                    f"param_groups[{index}][{key!r}] is {float(present)}, and the scheduler says {scheduled} at step "
                    f"{step}: something else wrote it, which cannot be converted"
                )


def _kind_of_ours(schedules: Sequence[Schedule | None], step: int) -> type[FusedScheduler]:
    """The scheduler class for the groups' schedules.

    Raises:
        ValueError: Torch has no scheduler that continues from them.
    """
    for index, schedule in enumerate(schedules):
        if schedule is None or kind_of([schedule]) is None:
            what = "no schedule" if schedule is None else f"the schedule {schedule}"
            raise ValueError(
                f"param_groups[{index}] has {what}, which cannot be converted: torch has {', '.join(KINDS)}, one for "
                "all groups"
            )
        if turns_in_torch(schedule, step):
            raise ValueError(
                f"schedule step {step} cannot be converted: it is past the end of {schedule}, where torch's scheduler "
                "does not hold its last learning rate, as this one does"
            )
    kind = kind_of(schedules)
    if kind is None:
        raise ValueError(
            f"param_groups have the schedules {schedules}, which cannot be converted: torch has one scheduler for all "
            "groups"
        )
    return kind


def _make_torchs(
    kind: type[FusedScheduler], plain: torch.optim.Optimizer, schedules: Sequence[Any], step: int = 0
) -> lr_scheduler.LRScheduler:
    """A new scheduler of torch's class, without its state. Changes the learning rates of ``plain``."""
    arguments: dict[str, Any] = kind.arguments_of(schedules)
    if kind is SequentialLR:
        _check_sequences("the sequence", schedules)
        arguments["schedulers"] = [_make_torchs(own, plain, column) for own, column in kind.columns_of(schedules)]
    if kind is CyclicLR:
        arguments |= {"scale_fn": _host_scale_fn(schedules[0], step), "last_epoch": step - 1}
    try:
        scheduler: lr_scheduler.LRScheduler = kind.TORCH(plain, **arguments)
    except OverflowError as error:
        raise ValueError(
            f"schedule step {step} cannot be converted: torch's CyclicLR overflows there, in mode {arguments['mode']!r}"
        ) from error
    return scheduler


def _torchs_keys(packed: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """What is in a packed state_dict and torch's own has too."""
    state = {key: packed[key] for key in own if key in packed}
    if "_schedulers" in state:
        pairs = zip(packed["_schedulers"], own["_schedulers"], strict=True)
        state["_schedulers"] = [_torchs_keys(*pair) for pair in pairs]
    return state


def _host_scale_fn(schedule: Cyclic, step: int) -> Any:
    """The ``scale_fn`` of a schedule, as torch's CyclicLR can call it; None if it has none."""
    if schedule.scale_fn is None or not is_triton_function(schedule.scale_fn):
        return schedule.scale_fn
    try:
        schedule.lr(step)
    # Triton's functions raise what they like outside of a kernel.
    except Exception as error:
        raise ValueError(
            f"scale_fn {function_name(schedule.scale_fn)!r} calls Triton functions, which the host cannot "
            "call: it cannot be converted"
        ) from error
    return host_function(schedule.scale_fn)
