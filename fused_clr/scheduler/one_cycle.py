"""`OneCycleLR`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, final

from torch.optim import Optimizer, lr_scheduler

from .._checks import check_bool, check_number
from ..schedules import OneCycle, Schedule
from .base import Argument, FusedScheduler
from .base_lr import check_count, saved_lrs
from .checks import check_optimizer, common, needed_key, pack_frame, per_group

# What torch's OneCycleLR has once for all groups. It also has div_factor and final_div_factor, which become keys of the
# groups.
COMMON_FIELDS = ("total_steps", "pct_start", "anneal_strategy", "cycle_momentum", "three_phase")
LEARNING_RATES = ("initial_lr", "max_lr", "min_lr")
MOMENTA = ("base_momentum", "max_momentum")
# Two roundings and more, between a group's initial_lr and max_lr / div_factor.
ROUNDING = 1e-12


@final
class OneCycleLR(FusedScheduler):
    """One rise to ``max_lr`` and one fall to almost nothing; `torch.optim.lr_scheduler.OneCycleLR`'s arguments.

    Smith & Topin 2018, "Super-Convergence" (arXiv:1708.07120, sec. 3); see `fused_clr.schedules.OneCycle` for the
    formula, and `FusedScheduler` for what all schedulers have in common. From step ``total_steps - 1`` on it holds the
    last learning rate, also in replays; torch's rises a little at step ``total_steps`` and then raises an error.

    As in torch, the param groups have ``initial_lr``, ``max_lr``, ``min_lr``, ``base_momentum`` and ``max_momentum``,
    which count when it is resumed with ``last_epoch`` or a state_dict: load the optimizer's state_dict first.

    Args:
        optimizer: A `FusedAdam`, `FusedAdamW` or `FusedSGD`.
        max_lr: Learning rate at the peak, or a list with one per group.
        total_steps: Steps of the training; ``epochs * steps_per_epoch`` if None.
        epochs: Epochs of the training.
        steps_per_epoch: Steps of each epoch.
        pct_start: Share of the steps that rises. No phase may be empty: ``pct_start * total_steps`` must exceed 1.
        anneal_strategy: "cos" or "linear".
        cycle_momentum: Cycle the momentum, Adam's beta1, against the learning rate.
        base_momentum: Momentum at the peak, or a list.
        max_momentum: Momentum at the start and the end, or a list.
        div_factor: ``max_lr`` over the initial learning rate.
        final_div_factor: The initial learning rate over the last.
        three_phase: Fall to the initial learning rate first, then to the last.
        last_epoch: The last step when resuming, or -1.

    Raises:
        TypeError: ``optimizer`` is not a fused optimizer.
        ValueError: An argument is not allowed, or a list's length is not the number of groups.
        KeyError: ``last_epoch`` is given and a group lacks a key.

    Example:
        >>> import fused_clr, torch
        >>> optimizer = fused_clr.FusedAdam([torch.nn.Parameter(torch.ones(2))])
        >>> scheduler = OneCycleLR(optimizer, max_lr=1.0, total_steps=11, anneal_strategy="linear", div_factor=2.0)
        >>> optimizer.param_groups[0]["initial_lr"], scheduler.get_last_lr()
        (0.5, [0.5])
    """

    TORCH = lr_scheduler.OneCycleLR
    CLOSED_FORM = True
    NEEDED_KEYS = frozenset(
        ("base_lrs", "last_epoch", "total_steps", "_schedule_phases", "_anneal_func_type", "cycle_momentum")
    )

    total_steps: Argument[int] = Argument("Steps of the training.")
    cycle_momentum: Argument[bool] = Argument("Whether the momentum cycles.")

    def __init__(
        self,
        optimizer: Optimizer,
        max_lr: float | Sequence[float],
        total_steps: int | None = None,
        epochs: int | None = None,
        steps_per_epoch: int | None = None,
        pct_start: float = 0.3,
        anneal_strategy: Literal["cos", "linear"] = "cos",
        cycle_momentum: bool = True,
        base_momentum: float | Sequence[float] = 0.85,
        max_momentum: float | Sequence[float] = 0.95,
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
        three_phase: bool = False,
        last_epoch: int = -1,
    ) -> None:
        fused, step = check_optimizer(optimizer, "OneCycleLR", last_epoch)
        if total_steps is None:
            if epochs is None or steps_per_epoch is None:
                raise ValueError("total_steps must be given, or both epochs and steps_per_epoch")
            total_steps = check_count("epochs", epochs) * check_count("steps_per_epoch", steps_per_epoch)
        num_groups = len(fused.param_groups)
        given = {"max_lr": max_lr, "base_momentum": base_momentum, "max_momentum": max_momentum}
        columns = {name: per_group(name, value, num_groups) for name, value in given.items()}
        schedules = [
            OneCycle(
                total_steps=total_steps,
                pct_start=pct_start,
                anneal_strategy=anneal_strategy,
                cycle_momentum=cycle_momentum,
                div_factor=div_factor,
                final_div_factor=final_div_factor,
                three_phase=three_phase,
                **{name: values[index] for name, values in columns.items()},
            )
            for index in range(num_groups)
        ]
        if step > 0:
            for index, (group, schedule) in enumerate(zip(fused.param_groups, schedules, strict=True)):
                keys = {key: needed_key(group, index, key, last_epoch) for key in _keys(schedule)}
                schedules[index] = _with_keys(schedule, keys)
        self._attach(fused, schedules, step)

    @property
    def base_lrs(self) -> list[float]:  # type: ignore[override]
        """The initial learning rate of each group."""
        return [schedule.initial_lr for schedule in self.schedules]

    # -- what `FusedScheduler` asks ------------------------------------------------------------------------------------
    @classmethod
    def recognises(cls, schedule: Schedule | None) -> bool:
        """See `FusedScheduler.recognises`."""
        return isinstance(schedule, OneCycle)

    @classmethod
    def arguments_of(cls, schedules: Sequence[OneCycle]) -> dict[str, Any]:
        """See `FusedScheduler.arguments_of`: without the factors, which torch needs only for the keys of the groups."""
        fields = common(
            cls.__name__, [{field: getattr(schedule, field) for field in COMMON_FIELDS} for schedule in schedules]
        )
        return fields | {name: [getattr(schedule, name) for schedule in schedules] for name in ("max_lr", *MOMENTA)}

    @classmethod
    def pack(
        cls,
        schedules: Sequence[OneCycle],
        last_epoch: int,
        step_count: int,
        last_lrs: Sequence[float],
        use_beta1: bool,
    ) -> dict[str, Any]:
        """See `FusedScheduler.pack`."""
        fields = cls.arguments_of(schedules)
        state = {
            "total_steps": fields["total_steps"],
            "_schedule_phases": _torch_phases(fields["total_steps"], fields["pct_start"], fields["three_phase"]),
            "_anneal_func_type": fields["anneal_strategy"],
            "cycle_momentum": fields["cycle_momentum"],
        }
        if fields["cycle_momentum"]:
            state["use_beta1"] = use_beta1
        return state | pack_frame([own.initial_lr for own in schedules], last_epoch, step_count, last_lrs)

    @classmethod
    def unpack(
        cls,
        name: str,
        state: Mapping[str, Any],
        groups: Sequence[dict[str, Any]],
        present: Sequence[OneCycle | None],
    ) -> list[OneCycle]:
        """See `FusedScheduler.unpack`."""
        check_bool(f"{name}['use_beta1']", state.get("use_beta1", True))
        total_steps = check_count(f"{name}['total_steps']", state["total_steps"])
        strategy = state["_anneal_func_type"]
        if strategy not in ("cos", "linear"):
            raise ValueError(f"{name}['_anneal_func_type'] must be 'cos' or 'linear', got {strategy!r}")
        pct_start, three_phase = _read_phases(f"{name}['_schedule_phases']", state["_schedule_phases"], total_steps)
        fields = {
            "total_steps": total_steps,
            "pct_start": pct_start,
            "anneal_strategy": strategy,
            "cycle_momentum": check_bool(f"{name}['cycle_momentum']", state["cycle_momentum"]),
            "three_phase": three_phase,
        }
        names = [*LEARNING_RATES, *(MOMENTA if fields["cycle_momentum"] else ())]
        schedules = []
        for index, base_lr in enumerate(saved_lrs(name, state, len(groups))):
            own, group = present[index], groups[index]
            if own is not None and _torch_phases(total_steps, own.pct_start, three_phase) == state["_schedule_phases"]:
                # Without the rounding of torch's phases.
                fields["pct_start"] = own.pct_start
            candidates = [] if own is None else [dataclasses.replace(own, **fields)]
            # As written, not as a schedule drives them.
            keys = {key: dict.get(group, key) for key in names}
            if None not in keys.values():
                candidates.insert(0, _with_keys((*candidates, OneCycle(1.0, **fields))[0], keys))
            # Two in a sequence share the keys of the group: for one of them, the present schedule counts.
            agreeing = [each for each in candidates if math.isclose(each.initial_lr, base_lr, rel_tol=ROUNDING)]
            if not agreeing:
                raise ValueError(
                    f"{name}['base_lrs'][{index}] must be the initial_lr of param_groups[{index}], "
                    f"{dict.get(group, 'initial_lr')}, got {base_lr}: load the optimizer's state_dict first"
                )
            schedules.append(agreeing[0])
        return schedules


def _keys(schedule: OneCycle) -> dict[str, float]:
    """What torch's OneCycleLR reads in a param group."""
    momenta = {name: getattr(schedule, name) for name in MOMENTA} if schedule.cycle_momentum else {}
    return schedule.group_keys | momenta


def _with_keys(schedule: OneCycle, keys: Mapping[str, Any]) -> OneCycle:
    """A schedule with the learning rates and momenta that a group's keys say.

    Raises:
        ValueError: They are not those of a OneCycle.
    """
    if all(keys[key] == value for key, value in _keys(schedule).items()):
        return schedule
    numbers = {key: float(check_number(key, value, "a finite number >= 0", _is_lr)) for key, value in keys.items()}
    initial_lr, max_lr, min_lr = (numbers.pop(key) for key in LEARNING_RATES)
    factors: dict[str, Any] = {}
    if max_lr != 0:
        if not min_lr > 0 or not initial_lr > 0:
            raise ValueError(f"initial_lr and min_lr must be > 0 where max_lr is {max_lr}, got {initial_lr}, {min_lr}")
        factors["div_factor"] = _recovered(max_lr / initial_lr, lambda factor: max_lr / factor == initial_lr)
        factors["final_div_factor"] = _recovered(initial_lr / min_lr, lambda factor: initial_lr / factor == min_lr)
    return dataclasses.replace(schedule, max_lr=max_lr, **(factors | numbers))


def _torch_phases(total_steps: int, pct_start: float, three_phase: bool) -> list[dict[str, Any]]:
    """Torch's list of phases."""
    rise = {
        "end_step": float(pct_start * total_steps) - 1,
        "start_lr": "initial_lr",
        "end_lr": "max_lr",
        "start_momentum": "max_momentum",
        "end_momentum": "base_momentum",
    }
    fall = {
        "end_step": float(2 * pct_start * total_steps) - 2 if three_phase else total_steps - 1,
        "start_lr": "max_lr",
        "end_lr": "initial_lr" if three_phase else "min_lr",
        "start_momentum": "base_momentum",
        "end_momentum": "max_momentum",
    }
    rest = {
        "end_step": total_steps - 1,
        "start_lr": "initial_lr",
        "end_lr": "min_lr",
        "start_momentum": "max_momentum",
        "end_momentum": "max_momentum",
    }
    return [rise, fall, rest] if three_phase else [rise, fall]


def _read_phases(name: str, phases: Any, total_steps: int) -> tuple[float, bool]:
    """``pct_start`` and ``three_phase`` of torch's list of phases."""
    allowed = f"torch's phases of a OneCycleLR with total_steps={total_steps}"
    try:
        three_phase = len(phases) == 3
        end = float(check_number("end_step", phases[0]["end_step"], "a finite number"))
        share = _recovered((end + 1) / total_steps, lambda pct: float(pct * total_steps) - 1 == end)
        expected = _torch_phases(total_steps, share, three_phase)
        second = phases[1]["end_step"]
        # It is rounded twice.
        is_second = not three_phase or math.isclose(second, expected[1]["end_step"], rel_tol=ROUNDING, abs_tol=ROUNDING)
        same = is_second and [dict(own, end_step=0) for own in phases] == [dict(own, end_step=0) for own in expected]
        same = same and phases[-1]["end_step"] == total_steps - 1
    except (TypeError, ValueError, LookupError, AttributeError):
        same = False
    if not same:
        raise ValueError(f"{name} must be {allowed}, got {phases!r}")
    return share, three_phase


def _recovered(guess: float, is_exact: Callable[[float], bool]) -> float:
    """The operand of a rounded operation: ``guess`` or a neighbour for which it gives exactly the result."""
    candidates = [guess, math.nextafter(guess, math.inf), math.nextafter(guess, 0.0)]
    return next((own for own in candidates if is_exact(own)), guess)


def _is_lr(number: float) -> bool:
    return 0 <= number < math.inf
