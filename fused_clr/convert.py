"""Converts a running torch optimizer and CyclicLR to a fused pair, and back."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import lr_scheduler
from typing_extensions import Unpack

from ._checks import check_bool
from ._host.hyperparameters import OWN_KEYS, check_options, check_schedule_step
from .optim import FusedAdam, FusedAdamW, StepOptions
from .scheduler import CyclicLR
from .scheduler.cyclic import recover_step_sizes
from .schedules import Cyclic
from .schedules.base import function_name
from .schedules.parts import host_function, is_triton_function

# Allowed difference of a param group's value from its schedule: torch's formula drifts, a tensor lr is float32.
DRIFT = 1e-6

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
) -> tuple[FusedAdam, CyclicLR]:
    """Converts a torch optimizer and its CyclicLR to a fused pair that continues from them.

    Param groups, state, hooks and the schedule are converted. The parameters are the same objects and the moments the
    same tensors: nothing is copied, so stop using torch's pair.

    Args:
        optimizer: A `torch.optim.Adam` or `torch.optim.AdamW`. Not changed.
        scheduler: Its `torch.optim.lr_scheduler.CyclicLR`. Not changed.
        total_steps: See `fused_clr.schedules.Cyclic`.
        options: See `fused_clr.optim.StepOptions`. In torch's loop, ``scheduler.step()`` advances the schedule after a
            skipped step too: ``advance_schedule_on_skip=True`` keeps that.

    Returns:
        A `FusedAdam`, or `FusedAdamW` for an AdamW, and its `CyclicLR`.

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
    if type(scheduler) is not lr_scheduler.CyclicLR:
        raise TypeError(f"scheduler must be a torch.optim.lr_scheduler.CyclicLR, got {_class_name(scheduler)}")
    if scheduler.optimizer is not optimizer:
        raise ValueError("scheduler must drive this optimizer, and is another one's")
    own_step = vars(optimizer).get("step")
    if own_step is not None and not hasattr(own_step, "_wrapped_by_lr_sched"):
        raise ValueError(f"optimizer.step was replaced by {function_name(own_step)!r}, which cannot be converted")

    step = check_schedule_step("scheduler.last_epoch", scheduler.last_epoch)
    schedules = _read_schedules(scheduler, total_steps)
    _check_in_place(optimizer, schedules, step)
    defaults = dict(optimizer.defaults)
    kind: type[FusedAdam] = FusedAdam
    if isinstance(optimizer, torch.optim.AdamW):
        kind = FusedAdamW
        defaults.pop("decoupled_weight_decay")
    # A checkpoint of a fused optimizer leaves its own keys in torch's groups, as they were.
    groups = [{k: v for k, v in group.items() if k not in FUSED_KEYS} for group in optimizer.param_groups]
    for group, schedule in zip(groups, schedules, strict=True):
        if schedule.cycle_momentum:
            # The scheduler wrote the present value.
            group["betas"] = schedule.max_momentum, group["betas"][1]
    fused = kind(
        groups,
        **defaults,
        **options,
    )
    for param, entry in optimizer.state.items():
        fused.state[param] = dict(entry)
    _carry_hooks(optimizer, fused)
    fused_scheduler = CyclicLR.of_schedules(fused, schedules, step)
    fused_scheduler._step_count = scheduler._step_count
    # Raises here, and not at the next step, if no backend supports the parameters.
    fused._ready()
    return fused, fused_scheduler


def unfuse(
    optimizer: FusedAdam, scheduler: CyclicLR | None = None, *, drop_clipping: bool = False
) -> tuple[torch.optim.Adam, lr_scheduler.CyclicLR]:
    """Converts a fused pair to a torch optimizer and CyclicLR that continue from it: the reverse of `fuse`.

    Waits for the device.

    The parameters are the same objects and the moments the same tensors: stop using the fused pair, and do not replay
    graphs captured from it. Torch's pair does not count steps and keeps no history, and in torch's loop the schedule
    advances after a step that `torch.amp.GradScaler` skips.

    Args:
        optimizer: A `FusedAdam` or `FusedAdamW`. Not changed.
        scheduler: Its `CyclicLR`; None if the schedules were given to the optimizer or its groups.
        drop_clipping: Leave out ``max_grad_norm``: torch's step does not clip.

    Returns:
        A `torch.optim.Adam`, or AdamW for a `FusedAdamW`, and its CyclicLR.

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
    if scheduler is not None and not isinstance(scheduler, CyclicLR):
        raise TypeError(f"scheduler must be a fused_clr.CyclicLR or None, got {_class_name(scheduler)}")
    if scheduler is not None and scheduler.optimizer is not optimizer:
        raise ValueError("scheduler must drive this optimizer, and is another one's")
    check_bool("drop_clipping", drop_clipping)
    if optimizer.max_grad_norm is not None and not drop_clipping:
        raise ValueError(
            f"max_grad_norm={optimizer.max_grad_norm} cannot be converted: torch's step does not clip. Call "
            "torch.nn.utils.clip_grad_norm_ in the loop, and pass drop_clipping=True"
        )
    step = optimizer.status().schedule_step - optimizer._awaits_scheduler if scheduler is None else scheduler.last_epoch
    cyclic_arguments = _torch_cyclic(optimizer, step)

    groups = []
    for index, group in enumerate(optimizer.param_groups):
        for key, of_torch in (("weight_decay_mode", "lr"), ("weight_decay_schedule", None)):
            if group.get(key, of_torch) != of_torch:
                raise ValueError(
                    f"param_groups[{index}] has {key}={group[key]!r}, which cannot be converted: torch's AdamW has none"
                )
        values = {key: value for key, value in group.items() if key not in FUSED_KEYS}
        stored_lr = group.stored("lr")
        if isinstance(stored_lr, Tensor):
            values["lr"] = stored_lr
        groups.append(values | {"params": list(values["params"])})
    defaults = {key: value for key, value in optimizer.defaults.items() if key not in FUSED_KEYS}
    kind: type[torch.optim.Adam] = torch.optim.Adam
    if isinstance(optimizer, FusedAdamW):
        kind = torch.optim.AdamW
        defaults.pop("decoupled_weight_decay")
    plain = kind(groups, **defaults)
    for group in optimizer.param_groups:
        steps_on_device = bool(group.stored("fused") or group.stored("capturable"))
        for param in group.stored("params"):
            entry = optimizer.state.get(param)
            if entry:
                count = entry["step"].detach().clone()
                plain.state[param] = {**entry, "step": count if steps_on_device else count.cpu()}
    _carry_hooks(optimizer, plain)
    # Torch's constructor takes a first step.
    try:
        plain_scheduler = lr_scheduler.CyclicLR(plain, **cyclic_arguments, last_epoch=step - 1)
    except OverflowError as error:
        raise ValueError(
            f"schedule step {step} cannot be converted: torch's CyclicLR overflows there, in mode "
            f"{cyclic_arguments['mode']!r}"
        ) from error
    if scheduler is not None:
        plain_scheduler._step_count = scheduler._step_count
    return plain, plain_scheduler


def _class_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _carry_hooks(source: torch.optim.Optimizer, target: torch.optim.Optimizer) -> None:
    """Shares the dicts of hooks: handles that remove hooks stay valid after the conversion."""
    for name in HOOKS:
        setattr(target, name, getattr(source, name))


def _read_schedules(scheduler: lr_scheduler.CyclicLR, total_steps: int | None) -> list[Cyclic]:
    """The schedules of a torch CyclicLR, one per group."""
    num_groups = len(scheduler.optimizer.param_groups)
    if len(scheduler.base_lrs) != num_groups:
        raise ValueError(
            f"scheduler drives {len(scheduler.base_lrs)} param groups, and the optimizer has {num_groups}: one added "
            "after the scheduler was created cannot be converted"
        )
    if scheduler.cycle_momentum and not scheduler.use_beta1:
        raise ValueError("scheduler cycles 'momentum', which Adam does not have")
    up, down = recover_step_sizes(scheduler.total_size, scheduler.step_ratio)
    schedules = []
    for index in range(num_groups):
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


def _check_in_place(optimizer: torch.optim.Optimizer, schedules: list[Cyclic], step: int) -> None:
    """Checks that the groups hold the values of their schedules. Values that something else wrote would be lost."""
    for index, (group, schedule) in enumerate(zip(optimizer.param_groups, schedules, strict=True)):
        lr, momentum = schedule.lr_and_momentum(step)
        found = {"lr": (float(group["lr"]), lr)}
        if schedule.cycle_momentum:
            found["betas"] = float(group["betas"][0]), momentum
        for key, (present, scheduled) in found.items():
            scale = max(schedule.base_lr, schedule.max_lr) if key == "lr" else 1.0
            if not math.isclose(present, scheduled, rel_tol=DRIFT, abs_tol=DRIFT * scale):
                raise ValueError(
                    f"param_groups[{index}][{key!r}] is {present}, and the scheduler says {scheduled} at step {step}: "
                    "something else wrote it, which cannot be converted"
                )


def _torch_cyclic(optimizer: FusedAdam, step: int) -> dict[str, Any]:
    """The arguments of the torch CyclicLR that is equal to the groups' schedules."""
    schedules = []
    for index, group in enumerate(optimizer.param_groups):
        if not isinstance(group.schedule, Cyclic):
            what = "no schedule" if group.schedule is None else f"the schedule {group.schedule}"
            raise ValueError(
                f"param_groups[{index}] has {what}, which cannot be converted: torch's CyclicLR needs a Cyclic "
                "schedule in every group"
            )
        schedules.append(group.schedule)
    arguments, first = CyclicLR.arguments_of(schedules), schedules[0]
    if first.scale_fn is not None and is_triton_function(first.scale_fn):
        try:
            first.lr(step)
        # Triton's functions raise what they like outside of a kernel.
        except Exception as error:
            raise ValueError(
                f"scale_fn {function_name(first.scale_fn)!r} calls Triton functions, which the host cannot "
                "call: it cannot be converted"
            ) from error
        arguments["scale_fn"] = host_function(first.scale_fn)
    return arguments
