"""`CyclicLR`."""

from __future__ import annotations

import copy
import dataclasses
import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

from torch.optim import Optimizer, lr_scheduler

from .._checks import check_bool, check_number
from ..schedules import Cyclic, Schedule
from ..schedules.base import function_name
from ..schedules.cyclic import SCALE_MODES
from ..schedules.parts import host_function, is_triton_function
from .base import Argument, FusedScheduler
from .checks import check_optimizer, common, pack_frame, per_group

# What torch's CyclicLR has once for all groups, and our schedules for each.
COMMON_FIELDS = ("step_size_up", "step_size_down", "mode", "gamma", "scale_fn", "scale_mode", "cycle_momentum")
BOUNDS = ("base_lr", "max_lr", "base_momentum", "max_momentum")


@final
class CyclicLR(FusedScheduler):
    """Cyclical learning rate policy (Smith 2017, arXiv:1506.01186); `torch.optim.lr_scheduler.CyclicLR`'s arguments.

    See `FusedScheduler` for what all schedulers have in common. The four lists of bounds (``base_lrs``, ``max_lrs``,
    ``base_momentums``, ``max_momentums``) can be assigned, whole or by entry.

    Args:
        optimizer: A `FusedAdam`, `FusedAdamW` or `FusedSGD`.
        base_lr: Lower bound of the learning rate, or a list with one per group.
        max_lr: Upper bound, or a list; it may be below ``base_lr``.
        step_size_up: Steps of the rising half, > 0.
        step_size_down: Steps of the falling half; ``step_size_up`` if None.
        mode: "triangular", "triangular2" or "exp_range".
        gamma: Base of exp_range.
        scale_fn: Overrides ``mode``; see `fused_clr.schedules.Cyclic`.
        scale_mode: "cycle" or "iterations".
        cycle_momentum: Cycle the momentum, Adam's beta1, against the learning rate.
        base_momentum: Lower bound of the momentum, or a list.
        max_momentum: Upper bound of the momentum, or a list.
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

    TORCH = lr_scheduler.CyclicLR
    CLOSED_FORM = True
    NEEDED_KEYS = frozenset(
        [
            "base_lrs",
            "max_lrs",
            "total_size",
            "step_ratio",
            "mode",
            "gamma",
            "scale_mode",
            "cycle_momentum",
            "last_epoch",
        ]
    )

    mode: Argument[str] = Argument('One of "triangular", "triangular2" and "exp_range".')
    gamma: Argument[float] = Argument("Base of exp_range.")
    scale_mode: Argument[str] = Argument('What ``scale_fn`` is given: "cycle" or "iterations".')
    cycle_momentum: Argument[bool] = Argument("Whether the momentum cycles.")

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
        fused, step = check_optimizer(optimizer, "CyclicLR", last_epoch)
        num_groups = len(fused.param_groups)
        given = zip(BOUNDS, (base_lr, max_lr, base_momentum, max_momentum), strict=True)
        bounds = {name: per_group(name, value, num_groups) for name, value in given}
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
                **{name: values[index] for name, values in bounds.items()},
            )
            for index in range(num_groups)
        ]
        self._attach(fused, schedules, step)

    def _replace(self, **columns: Any) -> None:
        """Replaces fields of all schedules: lists with one value per group, checked before any is replaced."""
        bounds = {name: per_group(name + "s", value, self._num_groups) for name, value in columns.items()}
        self._set_schedules(
            [
                dataclasses.replace(schedule, **{name: values[index] for name, values in bounds.items()})
                for index, schedule in enumerate(self.schedules)
            ]
        )

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
    def total_size(self) -> float:
        """Steps of a cycle."""
        return _torch_sizes(_first(self.schedules))[0]

    @property
    def step_ratio(self) -> float:
        """Share of a cycle in which the learning rate rises."""
        return _torch_sizes(_first(self.schedules))[1]

    @property
    def scale_fn(self) -> Callable[[float], float]:
        """What the height of the wave is multiplied by: a function of the cycle, counted from 1, or of the step."""
        schedule = _first(self.schedules)
        if schedule.scale_fn is not None:
            function = host_function(schedule.scale_fn)
            return lambda x: float(function(x))
        if schedule.mode == "exp_range":
            return lambda x: float(schedule.gamma**x)
        return (lambda x: float(0.5 ** (x - 1))) if schedule.mode == "triangular2" else (lambda x: 1.0)

    # -- what `FusedScheduler` asks ------------------------------------------------------------------------------------
    @classmethod
    def recognises(cls, schedule: Schedule | None) -> bool:
        """See `FusedScheduler.recognises`."""
        return isinstance(schedule, Cyclic)

    @classmethod
    def arguments_of(cls, schedules: Sequence[Cyclic]) -> dict[str, Any]:
        """See `FusedScheduler.arguments_of`."""
        fields = common(
            cls.__name__, [{field: getattr(schedule, field) for field in COMMON_FIELDS} for schedule in schedules]
        )
        return fields | {field: [getattr(schedule, field) for schedule in schedules] for field in BOUNDS}

    @classmethod
    def pack(
        cls,
        schedules: Sequence[Cyclic],
        last_epoch: int,
        step_count: int,
        last_lrs: Sequence[float],
        use_beta1: bool,
    ) -> dict[str, Any]:
        """See `FusedScheduler.pack`."""
        first = _first(schedules)
        saved_function = None
        if first.scale_fn is not None:
            # Torch saves the attributes of a callable object. Of a function it saves nothing.
            is_function = isinstance(first.scale_fn, types.FunctionType) or is_triton_function(first.scale_fn)
            if is_function or not hasattr(first.scale_fn, "__dict__"):
                # Warns.
                first.to_dict()
            else:
                saved_function = dict(first.scale_fn.__dict__)
        total_size, step_ratio = _torch_sizes(first)
        state = {
            "max_lrs": [schedule.max_lr for schedule in schedules],
            "total_size": total_size,
            "step_ratio": step_ratio,
            "mode": first.mode,
            "gamma": first.gamma,
            "scale_mode": first.scale_mode,
            "cycle_momentum": first.cycle_momentum,
            **pack_frame([schedule.base_lr for schedule in schedules], last_epoch, step_count, last_lrs),
            "_scale_fn_custom": saved_function,
            # Not torch's: the exact step sizes, which total_size and step_ratio round.
            "step_sizes": (first.step_size_up, first.step_size_down),
            "scale_fn_name": None if first.scale_fn is None else function_name(first.scale_fn),
        }
        if first.cycle_momentum:
            state["use_beta1"] = use_beta1
            state["base_momentums"] = [schedule.base_momentum for schedule in schedules]
            state["max_momentums"] = [schedule.max_momentum for schedule in schedules]
        return state

    @classmethod
    def unpack(
        cls, name: str, state: Mapping[str, Any], groups: Sequence[dict[str, Any]], present: Sequence[Cyclic]
    ) -> list[Cyclic]:
        """See `FusedScheduler.unpack`."""
        _check_saved(name, state)
        scale_fn = present[0].scale_fn
        for key in ("scale_fn_name", "_scale_fn_custom"):
            if scale_fn is None and state.get(key) is not None:
                raise ValueError(
                    f"{name} was saved with the scale_fn {state[key]!r} ({key}), which a checkpoint cannot hold: "
                    "create this CyclicLR with that scale_fn before loading"
                )
        if state.get("_scale_fn_custom") is not None:
            scale_fn = copy.copy(scale_fn)
            vars(scale_fn).update(state["_scale_fn_custom"])
        step_size_up, step_size_down = _loaded_step_sizes(name, state, present[0])
        columns = {"base_lr": "base_lrs", "max_lr": "max_lrs"}
        if state["cycle_momentum"]:
            columns |= {"base_momentum": "base_momentums", "max_momentum": "max_momentums"}
        bounds = {field: per_group(f"{name}[{key!r}]", state.get(key), len(present)) for field, key in columns.items()}
        return [
            dataclasses.replace(
                schedule,
                step_size_up=step_size_up,
                step_size_down=step_size_down,
                mode=state["mode"],
                gamma=state["gamma"],
                scale_fn=schedule.scale_fn if scale_fn is None else scale_fn,
                scale_mode=state["scale_mode"],
                cycle_momentum=state["cycle_momentum"],
                **{field: values[index] for field, values in bounds.items()},
            )
            for index, schedule in enumerate(present)
        ]


def _first(schedules: Sequence[Cyclic]) -> Cyclic:
    """The first of some schedules that differ in their bounds alone."""
    CyclicLR.arguments_of(schedules)
    return schedules[0]


def _torch_sizes(schedule: Cyclic) -> tuple[float, float]:
    """Torch's ``total_size`` and ``step_ratio``."""
    up, down = float(schedule.step_size_up), float(schedule.step_size_down or 0)
    return up + down, up / (up + down)


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


def _check_saved(name: str, state: Mapping[str, Any]) -> None:
    """Checks what is in a state_dict and becomes no argument of a schedule.

    Raises:
        ValueError: Something is not allowed; the message names it.
    """

    def check(key: str, allowed: str, is_allowed: Callable[[Any], bool]) -> None:
        if key in state and not is_allowed(state[key]):
            raise ValueError(f"{name}[{key!r}] must be {allowed}, got {state[key]!r}")

    check_number(f"{name}['total_size']", state["total_size"], "a finite number > 0", lambda x: 0 < x < math.inf)
    check_number(f"{name}['step_ratio']", state["step_ratio"], "a number in (0, 1)", lambda x: 0 < x < 1)
    check_bool(f"{name}['cycle_momentum']", state["cycle_momentum"])
    check_bool(f"{name}['use_beta1']", state.get("use_beta1", True))
    check("scale_mode", f"one of {SCALE_MODES}", lambda value: value in SCALE_MODES)
    check("_scale_fn_custom", "a dict of attributes or None", lambda value: isinstance(value, Mapping | None))
    check("scale_fn_name", "a string or None", lambda value: isinstance(value, str | None))
    check("step_sizes", "a pair", lambda value: isinstance(value, (list, tuple)) and len(value) == 2)


def _loaded_step_sizes(name: str, state: Mapping[str, Any], present: Cyclic) -> tuple[float, float]:
    """The step sizes in a state_dict. Torch saves a rounded ratio; integer step sizes are recovered from it."""
    total, ratio = float(state["total_size"]), float(state["step_ratio"])
    if "step_sizes" in state:
        name, sizes = f"{name}['step_sizes']", state["step_sizes"]
        up, down = (check_number(name, size, "two finite numbers > 0", lambda x: 0 < x < math.inf) for size in sizes)
        if (float(up) + down, up / (float(up) + down)) != (total, ratio):
            raise ValueError(
                f"{name} must agree with its total_size={total} and step_ratio={ratio}, got {sizes!r}: change all three"
            )
        return up, down
    if _torch_sizes(present) == (total, ratio):
        return present.step_size_up, float(present.step_size_down or 0)
    return recover_step_sizes(total, ratio)


def recover_step_sizes(total_size: float, step_ratio: float) -> tuple[float, float]:
    """The step sizes up and down; torch's CyclicLR stores only their sum and a rounded ratio."""
    up = total_size * step_ratio
    if abs(up - round(up)) <= 1e-9 * total_size:
        up = round(up)
    return up, total_size - up
