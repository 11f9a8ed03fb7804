"""`CyclicLR` with torch's signature, whose schedule runs inside the optimizer's step."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import EPOCH_DEPRECATION_WARNING, LRScheduler

from ._checks import check_bool, check_integer, check_number
from ._host.hyperparameters import MAX_SCHEDULE_STEP, check_schedule_step
from ._host.optimizer import FusedOptimizer
from ._torch_internals import uncompiled
from ._warnings import warn
from .schedules import Cyclic
from .schedules.base import function_name
from .schedules.cyclic import SCALE_MODES
from .schedules.parts import host_function, is_triton_function

# Optimizer steps per scheduler step from which a loop looks like one that steps its scheduler once an epoch.
STEPS_PER_CALL_LIMIT = 8


class CyclicLR(LRScheduler):
    """Cyclical learning rate policy (Smith 2017, arXiv:1506.01186); `torch.optim.lr_scheduler.CyclicLR`'s arguments.

    The optimizer's step advances the schedule. Calling ``scheduler.step()`` is optional: after an ``optimizer.step()``
    it does no work on the device; without one it advances the schedule. The learning rates are torch's in both cases.
    While the optimizer has captured steps, ``scheduler.step()`` never advances the schedule. For a schedule per epoch,
    multiply the step sizes by the number of batches in an epoch.

    Torch's attributes (``base_lrs``, ``max_lrs``, ``mode`` and so on) read the schedules of the optimizer's groups. The
    four lists of bounds can be assigned, whole or by entry. ``last_epoch`` can be assigned too: as in torch, the next
    ``scheduler.step()`` goes to the step after it. The others cannot be assigned.

    Args:
        optimizer: A `FusedAdam` or `FusedAdamW`.
        base_lr: Lower bound of the learning rate, or a list with one per group.
        max_lr: Upper bound, or a list; it may be below ``base_lr``.
        step_size_up: Steps of the rising half, > 0.
        step_size_down: Steps of the falling half; ``step_size_up`` if None.
        mode: "triangular", "triangular2" or "exp_range".
        gamma: Base of exp_range.
        scale_fn: Overrides ``mode``; see `fused_clr.schedules.Cyclic`.
        scale_mode: "cycle" or "iterations".
        cycle_momentum: Cycle beta1 against the learning rate.
        base_momentum: Lower bound of beta1, or a list.
        max_momentum: Upper bound of beta1, or a list.
        last_epoch: The last step when resuming, or -1.
        total_steps: See `fused_clr.schedules.Cyclic`; not one of torch's.

    Raises:
        TypeError: ``optimizer`` is not a fused optimizer.
        ValueError: An argument is not allowed, or a list's length is not the number of groups.
        KeyError: ``last_epoch`` is given and a group has no ``initial_lr``.

    Example:
        >>> import fused_clr, torch
        >>> optimizer = fused_clr.FusedAdam([torch.nn.Parameter(torch.ones(2))])
        >>> scheduler = CyclicLR(optimizer, 0.1, 0.5, step_size_up=2, cycle_momentum=False)
        >>> scheduler.get_last_lr()
        [0.1]
        >>> optimizer.step(); scheduler.step(); scheduler.get_last_lr()
        [0.30000000000000004]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        base_lr: float | Sequence[float],
        max_lr: float | Sequence[float],
        step_size_up: float = 2000,
        step_size_down: float | None = None,
        mode: str = "triangular",
        gamma: float = 1.0,
        scale_fn: Callable[[Any], Any] | None = None,
        scale_mode: str = "cycle",
        cycle_momentum: bool = True,
        base_momentum: float | Sequence[float] = 0.8,
        max_momentum: float | Sequence[float] = 0.9,
        last_epoch: int = -1,
        total_steps: int | None = None,
    ) -> None:
        if not isinstance(optimizer, FusedOptimizer):
            raise TypeError(
                f"optimizer must be a FusedAdam or FusedAdamW, got {type(optimizer).__name__}; "
                "torch.optim.lr_scheduler.CyclicLR drives torch's optimizers"
            )
        last_epoch = _check_last_epoch("last_epoch", last_epoch)
        if last_epoch != -1:
            for index, group in enumerate(optimizer.param_groups):
                if "initial_lr" not in group:
                    raise KeyError(
                        f"param_groups[{index}] has no 'initial_lr', which last_epoch={last_epoch} needs: load the "
                        "optimizer's checkpoint first"
                    )
        num_groups = len(optimizer.param_groups)
        per_group = {
            name: _per_group(name, value, num_groups)
            for name, value in (
                ("base_lr", base_lr),
                ("max_lr", max_lr),
                ("base_momentum", base_momentum),
                ("max_momentum", max_momentum),
            )
        }
        schedules = [
            Cyclic(
                step_size_up=step_size_up,
                step_size_down=step_size_down,
                mode=mode,
                gamma=gamma,
                scale_fn=scale_fn,
                scale_mode=scale_mode,
                cycle_momentum=cycle_momentum,
                total_steps=total_steps,
                **{name: values[index] for name, values in per_group.items()},
            )
            for index in range(num_groups)
        ]
        self._attach(optimizer, schedules, last_epoch + 1)

    @classmethod
    def _of_schedules(cls, optimizer: FusedOptimizer, schedules: Sequence[Cyclic], step: int) -> CyclicLR:
        """A scheduler with the given schedules, one per group, at the given schedule step."""
        scheduler = cls.__new__(cls)
        scheduler._attach(optimizer, schedules, step)
        return scheduler

    def _attach(self, optimizer: FusedOptimizer, schedules: Sequence[Cyclic], step: int) -> None:
        self.optimizer = optimizer
        self._step_count = 1
        self._warned = False
        self._num_groups = len(schedules)
        self._token = optimizer._attach_scheduler(schedules, step)

    @property
    def _fused(self) -> FusedOptimizer:
        optimizer = self.optimizer
        assert isinstance(optimizer, FusedOptimizer)
        if optimizer._scheduler_token != self._token:
            raise RuntimeError("this CyclicLR no longer drives its optimizer: a later one was created for it")
        return optimizer

    @property
    def schedules(self) -> list[Cyclic]:
        """The schedules of the groups that this scheduler drives.

        Raises:
            RuntimeError: A group has been given another kind of schedule, or none.
        """
        schedules = [group.schedule for group in self._fused._adopt_groups()[: self._num_groups]]
        for index, schedule in enumerate(schedules):
            if not isinstance(schedule, Cyclic):
                raise RuntimeError(
                    f"CyclicLR no longer drives param_groups[{index}]: its schedule is now {schedule!r}, and must be a "
                    "Cyclic"
                )
        return schedules  # type: ignore[return-value]

    def _replace(self, **columns: Any) -> None:
        """Replaces fields of all schedules: lists with one value per group, checked before any is replaced."""
        per_group = {name: _per_group(name + "s", value, self._num_groups) for name, value in columns.items()}
        self._set_schedules(
            [
                dataclasses.replace(schedule, **{name: values[index] for name, values in per_group.items()})
                for index, schedule in enumerate(self.schedules)
            ]
        )

    def _set_schedules(self, schedules: Sequence[Cyclic]) -> None:
        # The scheduler does not drive groups added after it was created.
        others = [group.schedule for group in self._fused._adopt_groups()[self._num_groups :]]
        self._fused.set_schedule([*schedules, *others])

    @property
    def _common(self) -> Cyclic:
        """The first schedule, for what all groups have in common."""
        return check_common(self.schedules)

    # -- torch's attributes -------------------------------------------------------------------------------------------
    @property  # type: ignore[override]
    def base_lrs(self) -> list[float]:
        """Lower bound of each group's learning rate."""
        return _Bounds(self, "base_lr")

    @base_lrs.setter
    def base_lrs(self, value: Sequence[Any]) -> None:
        self._replace(base_lr=value)

    @property
    def max_lrs(self) -> list[float]:
        """Upper bound of each group's learning rate."""
        return _Bounds(self, "max_lr")

    @max_lrs.setter
    def max_lrs(self, value: Sequence[float]) -> None:
        self._replace(max_lr=value)

    @property
    def base_momentums(self) -> list[float]:
        """Lower bound of each group's momentum."""
        return _Bounds(self, "base_momentum")

    @base_momentums.setter
    def base_momentums(self, value: Sequence[float]) -> None:
        self._replace(base_momentum=value)

    @property
    def max_momentums(self) -> list[float]:
        """Upper bound of each group's momentum."""
        return _Bounds(self, "max_momentum")

    @max_momentums.setter
    def max_momentums(self, value: Sequence[float]) -> None:
        self._replace(max_momentum=value)

    @property
    def mode(self) -> str:
        """One of "triangular", "triangular2" and "exp_range"."""
        return self._common.mode

    @property
    def gamma(self) -> float:
        """Base of exp_range."""
        return self._common.gamma

    @property
    def scale_mode(self) -> str:
        """What ``scale_fn`` is given: "cycle" or "iterations"."""
        return self._common.scale_mode

    @property
    def cycle_momentum(self) -> bool:
        """Whether the momentum cycles."""
        return self._common.cycle_momentum

    @property
    def use_beta1(self) -> bool:
        """Whether the momentum that cycles is ``betas[0]``."""
        return self._fused.rule.momentum_key == "betas"

    @property
    def total_size(self) -> float:
        """Steps of a cycle."""
        return float(self._common.step_size_up) + float(self._common.step_size_down or 0)

    @property
    def step_ratio(self) -> float:
        """Share of a cycle in which the learning rate rises."""
        return float(self._common.step_size_up) / self.total_size

    @property
    def scale_fn(self) -> Callable[[float], float]:
        """What the height of the wave is multiplied by: a function of the cycle, counted from 1, or of the step."""
        schedule = self._common
        if schedule.scale_fn is not None:
            function = host_function(schedule.scale_fn)
            return lambda x: float(function(x))
        if schedule.mode == "exp_range":
            return lambda x: float(schedule.gamma**x)
        return (lambda x: float(0.5 ** (x - 1))) if schedule.mode == "triangular2" else (lambda x: 1.0)

    @property
    def last_epoch(self) -> int:
        """Steps of the schedule so far, as torch counts them. Waits for the device.

        Assigning it changes nothing before the next ``scheduler.step()``, which goes to the step after it, as in torch.
        `FusedAdam.set_schedule_step` changes the schedule step at once.
        """
        optimizer = self._fused
        if optimizer._assigned_epoch is not None:
            return optimizer._assigned_epoch
        return max(optimizer._read_schedule_step() - optimizer._awaits_scheduler, 0)

    @last_epoch.setter
    def last_epoch(self, value: int) -> None:
        self._fused._assigned_epoch = _check_last_epoch("last_epoch", value)

    @uncompiled
    def step(self, epoch: int | None = None) -> None:
        """Advances the schedule, unless the optimizer's step has done so already.

        Args:
            epoch: Deprecated, as in torch: sets ``last_epoch``.

        Raises:
            RuntimeError: A newer `CyclicLR` was created for the optimizer.
            ValueError: ``epoch`` is not an integer in [0, 2**53].
        """
        optimizer = self._fused
        if epoch is not None:
            epoch = check_schedule_step("epoch", epoch)
            warn(EPOCH_DEPRECATION_WARNING)
            optimizer.set_schedule_step(epoch)
            self._step_count += 1
            return
        if optimizer._steps_since_scheduler >= STEPS_PER_CALL_LIMIT and not self._warned:
            self._warned = True
            warn(
                f"scheduler.step() was called after {optimizer._steps_since_scheduler} optimizer steps. The schedule "
                "advances with every optimizer.step(), not with scheduler.step(): its step sizes count optimizer steps"
            )
        optimizer._steps_since_scheduler = 0
        # Plain dicts among the groups would not show the new values.
        optimizer._adopt_groups()
        if optimizer._assigned_epoch is not None:
            optimizer.set_schedule_step(optimizer._assigned_epoch + 1)
        elif optimizer._awaits_scheduler:
            optimizer._awaits_scheduler = False
        else:
            optimizer._tick()
        self._step_count += 1

    @uncompiled
    def get_last_lr(self) -> list[float]:  # type: ignore[override]
        """The groups' learning rates, as floats. One copy from the device, for all groups."""
        optimizer = self._fused
        with optimizer._one_copy():
            return [group["lr"] for group in optimizer.param_groups]

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """The learning rates of ``last_epoch``: the same as `get_last_lr` unless it was assigned."""
        epoch = self._fused._assigned_epoch
        return self.get_last_lr() if epoch is None else [schedule.lr(epoch) for schedule in self.schedules]

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's state with torch's keys, loadable by torch's CyclicLR."""
        first = self._common
        saved_function = None
        if first.scale_fn is not None:
            # Torch saves the attributes of a callable object. Of a function it saves nothing.
            is_function = isinstance(first.scale_fn, types.FunctionType) or is_triton_function(first.scale_fn)
            if is_function or not hasattr(first.scale_fn, "__dict__"):
                first.to_dict()
            else:
                saved_function = dict(first.scale_fn.__dict__)
        state = {
            "max_lrs": list(self.max_lrs),
            "total_size": self.total_size,
            "step_ratio": self.step_ratio,
            "mode": first.mode,
            "gamma": first.gamma,
            "scale_mode": first.scale_mode,
            "cycle_momentum": first.cycle_momentum,
            "base_lrs": list(self.base_lrs),
            "last_epoch": self.last_epoch,
            "_step_count": self._step_count,
            "_is_initial": False,
            "_get_lr_called_within_step": False,
            "_last_lr": self.get_last_lr(),
            "_scale_fn_custom": saved_function,
            # Not torch's: the exact step sizes, which total_size and step_ratio round.
            "step_sizes": (first.step_size_up, first.step_size_down),
            # Likewise: it is one ahead of last_epoch between optimizer.step() and scheduler.step().
            "schedule_step": (int(self._fused.live.schedule_step), self._fused._awaits_scheduler),
            "scale_fn_name": None if first.scale_fn is None else function_name(first.scale_fn),
        }
        if first.cycle_momentum:
            state["use_beta1"] = self.use_beta1
            state["base_momentums"] = list(self.base_momentums)
            state["max_momentums"] = list(self.max_momentums)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads a state_dict of this class or of torch's CyclicLR: bounds, step sizes, mode and ``last_epoch``.

        Args:
            state_dict: What ``state_dict()`` returned. Not changed.

        Raises:
            ValueError: It is corrupt, has another number of groups, or needs a ``scale_fn`` that this scheduler does
                not have. Nothing has been loaded.
        """
        optimizer, present = self._fused, self.schedules
        _check_saved(state_dict)
        scale_fn = present[0].scale_fn
        for key in ("scale_fn_name", "_scale_fn_custom"):
            if scale_fn is None and state_dict.get(key) is not None:
                raise ValueError(
                    f"state_dict was saved with the scale_fn {state_dict[key]!r} ({key}), which a checkpoint cannot "
                    "hold: create this CyclicLR with that scale_fn before loading"
                )
        step_size_up, step_size_down = _loaded_step_sizes(state_dict, present[0])
        columns = {"base_lr": "base_lrs", "max_lr": "max_lrs"}
        if state_dict["cycle_momentum"]:
            columns |= {"base_momentum": "base_momentums", "max_momentum": "max_momentums"}
        per_group = {
            name: _per_group(f"state_dict[{key!r}]", state_dict.get(key), len(present)) for name, key in columns.items()
        }
        schedules = [
            dataclasses.replace(
                schedule,
                step_size_up=step_size_up,
                step_size_down=step_size_down,
                mode=state_dict["mode"],
                gamma=state_dict["gamma"],
                scale_mode=state_dict["scale_mode"],
                cycle_momentum=state_dict["cycle_momentum"],
                **{name: values[index] for name, values in per_group.items()},
            )
            for index, schedule in enumerate(present)
        ]
        last_epoch = state_dict["last_epoch"]
        step, is_ahead = state_dict.get("schedule_step", (last_epoch, False))
        if max(step - is_ahead, 0) != last_epoch:
            # Torch trained on, and carried our key along as it was; or a user changed last_epoch.
            step, is_ahead = last_epoch, False
        optimizer._check_schedules(schedules)
        if state_dict.get("_scale_fn_custom") is not None and scale_fn is not None:
            scale_fn.__dict__.update(state_dict["_scale_fn_custom"])
        self._step_count = state_dict.get("_step_count", self._step_count)
        self._set_schedules(schedules)
        optimizer._set_schedule_step(step, is_ahead)


# What torch's CyclicLR has once for all groups, and our schedules for each.
COMMON_FIELDS = ("step_size_up", "step_size_down", "mode", "gamma", "scale_fn", "scale_mode", "cycle_momentum")


def check_common(schedules: Sequence[Cyclic]) -> Cyclic:
    """The first of some schedules that differ in their bounds alone.

    Raises:
        ValueError: They differ in something else, which a CyclicLR of torch cannot express; the message names it.
    """
    first = schedules[0]
    for index, schedule in enumerate(schedules):
        for field in COMMON_FIELDS:
            if getattr(schedule, field) != getattr(first, field):
                raise ValueError(
                    f"param_groups[{index}] has {field}={getattr(schedule, field)!r} and param_groups[0] "
                    f"{getattr(first, field)!r}: torch's CyclicLR has one for all groups"
                )
    return first


class _Bounds(list[Any]):
    """One bound of each group. Assigning an entry replaces the group's schedule."""

    def __init__(self, scheduler: CyclicLR, field: str) -> None:
        super().__init__(getattr(schedule, field) for schedule in scheduler.schedules)
        self._scheduler, self._field = scheduler, field

    def __setitem__(self, index: Any, value: Any) -> None:
        changed = list(self)
        changed[index] = value
        self._scheduler._replace(**{self._field: changed})
        super().__setitem__(index, value)

    def __reduce__(self) -> Any:
        return list, (list(self),)


NEEDED_KEYS = frozenset(
    ("base_lrs", "max_lrs", "total_size", "step_ratio", "mode", "gamma", "scale_mode", "cycle_momentum", "last_epoch")
)


def _check_saved(state_dict: Mapping[str, Any]) -> None:
    """Checks what is in a state_dict and becomes no argument of a schedule.

    Raises:
        ValueError: Something is missing or not allowed; the message names it.
    """
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"state_dict must be that of a CyclicLR, got {state_dict!r}")
    missing = NEEDED_KEYS - set(state_dict)
    if missing:
        raise ValueError(f"state_dict is not that of a CyclicLR: it has no {sorted(missing)}")

    def check(key: str, allowed: str, is_allowed: Callable[[Any], bool]) -> None:
        if key in state_dict and not is_allowed(state_dict[key]):
            raise ValueError(f"state_dict[{key!r}] must be {allowed}, got {state_dict[key]!r}")

    name = "state_dict[{!r}]".format
    check_schedule_step(name("last_epoch"), state_dict["last_epoch"])
    check_integer(name("_step_count"), state_dict.get("_step_count", 0), "an integer >= 0", lambda n: n >= 0)
    check_number(name("total_size"), state_dict["total_size"], "a finite number > 0", lambda x: 0 < x < math.inf)
    check_number(name("step_ratio"), state_dict["step_ratio"], "a number in (0, 1)", lambda x: 0 < x < 1)
    check_bool(name("cycle_momentum"), state_dict["cycle_momentum"])
    check_bool(name("use_beta1"), state_dict.get("use_beta1", True))
    check("scale_mode", f"one of {SCALE_MODES}", lambda value: value in SCALE_MODES)
    check("_scale_fn_custom", "a dict of attributes or None", lambda value: isinstance(value, Mapping | None))
    check("scale_fn_name", "a string or None", lambda value: isinstance(value, str | None))
    for key in ("step_sizes", "schedule_step"):
        check(key, "a pair", lambda value: isinstance(value, (list, tuple)) and len(value) == 2)
    if "schedule_step" in state_dict:
        check_schedule_step(name("schedule_step") + "[0]", state_dict["schedule_step"][0])
        check_bool(name("schedule_step") + "[1]", state_dict["schedule_step"][1])


def _loaded_step_sizes(state_dict: Mapping[str, Any], present: Cyclic) -> tuple[float, float]:
    """The step sizes in a state_dict. Torch saves a rounded ratio; integer step sizes are recovered from it."""
    total, ratio = float(state_dict["total_size"]), float(state_dict["step_ratio"])
    if "step_sizes" in state_dict:
        name, sizes = "state_dict['step_sizes']", state_dict["step_sizes"]
        up, down = (check_number(name, size, "two finite numbers > 0", lambda x: 0 < x < math.inf) for size in sizes)
        if (float(up) + down, up / (float(up) + down)) != (total, ratio):
            raise ValueError(
                f"{name} must agree with its total_size={total} and step_ratio={ratio}, got {sizes!r}: change all three"
            )
        return up, down
    own_up, own_down = float(present.step_size_up), float(present.step_size_down or 0)
    if (own_up + own_down, own_up / (own_up + own_down)) == (total, ratio):
        return own_up, own_down
    return recover_step_sizes(total, ratio)


def recover_step_sizes(total_size: float, step_ratio: float) -> tuple[float, float]:
    """The step sizes up and down; torch's CyclicLR stores only their sum and a rounded ratio."""
    up = total_size * step_ratio
    if abs(up - round(up)) <= 1e-9 * total_size:
        up = round(up)
    return up, total_size - up


def _check_last_epoch(name: str, value: Any) -> int:
    allowed = ">= -1, and an integer below 2**53"
    return check_integer(name, value, allowed, lambda n: -1 <= n < MAX_SCHEDULE_STEP)


def _per_group(name: str, value: Any, num_groups: int) -> list[Any]:
    """One value per group, from one for all or a list."""
    if not isinstance(value, (list, tuple)):
        return [value] * num_groups
    if len(value) != num_groups:
        raise ValueError(f"{name} must have {num_groups} entries, one per param group, got {len(value)}: {value}")
    return list(value)
