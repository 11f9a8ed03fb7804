"""`CyclicLR` with torch's signature, whose schedule runs inside the optimizer's step."""

from __future__ import annotations

import dataclasses
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import EPOCH_DEPRECATION_WARNING, LRScheduler

from .checkpoint import function_name, warn_unsaved
from .hyperparameters import check_schedule_step
from .optim import FusedAdam
from .schedules import Cyclic, is_triton_function
from .uncompiled import uncompiled

# Optimizer steps per scheduler step from which a loop looks like one that steps its scheduler once an epoch.
STEPS_PER_CALL_LIMIT = 8


class CyclicLR(LRScheduler):
    """Cyclical learning rate policy (Smith 2017, arXiv:1506.01186); `torch.optim.lr_scheduler.CyclicLR`'s arguments.

    The optimizer ticks the schedule in its own step. ``scheduler.step()`` is for loops that have it: after an
    ``optimizer.step()`` it is free, and without one it ticks, so the learning rates are torch's either way. Once a step
    has been captured in a CUDA graph, the device drives and it never ticks. For a per-epoch schedule, multiply the step
    sizes by the batches of an epoch.

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
        horizon: See `fused_clr.schedules.Cyclic`; not one of torch's.

    Raises:
        TypeError: ``optimizer`` is no `FusedAdam`.
        ValueError: An argument is not allowed, or a list's length is not the number of groups.
        KeyError: ``last_epoch`` is given and a group has no ``initial_lr``.

    Example:
        >>> import torch
        >>> optimizer = FusedAdam([torch.nn.Parameter(torch.ones(2))])
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
        horizon: int | None = None,
    ) -> None:
        if not isinstance(optimizer, FusedAdam):
            raise TypeError(
                f"optimizer must be a FusedAdam or FusedAdamW, got {type(optimizer).__name__}; "
                "torch.optim.lr_scheduler.CyclicLR drives torch's optimizers"
            )
        if last_epoch < -1:
            raise ValueError(f"last_epoch must be >= -1, got {last_epoch}")
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
        self._schedules = [
            Cyclic(
                step_size_up=step_size_up,
                step_size_down=step_size_down,
                mode=mode,
                gamma=gamma,
                scale_fn=scale_fn,
                scale_mode=scale_mode,
                cycle_momentum=cycle_momentum,
                horizon=horizon,
                **{name: values[index] for name, values in per_group.items()},
            )
            for index in range(num_groups)
        ]
        self._attach(optimizer, last_epoch + 1)

    @classmethod
    def _of_schedules(cls, optimizer: FusedAdam, schedules: Sequence[Cyclic], step: int) -> CyclicLR:
        """A scheduler of given schedules, one per group, at a step of theirs."""
        scheduler = cls.__new__(cls)
        scheduler._schedules = list(schedules)
        scheduler._attach(optimizer, step)
        return scheduler

    def _attach(self, optimizer: FusedAdam, step: int) -> None:
        self.optimizer = optimizer
        self._step_count = 1
        self._warned = False
        self._token = optimizer._attach_schedules(self._schedules, step)

    @property
    def _fused(self) -> FusedAdam:
        optimizer = self.optimizer
        assert isinstance(optimizer, FusedAdam)
        if optimizer._scheduler_token != self._token:
            raise RuntimeError("this CyclicLR no longer drives its optimizer: a later one was made for it")
        return optimizer

    @property
    def schedules(self) -> list[Cyclic]:
        """One schedule per group."""
        return list(self._schedules)

    @property
    def last_epoch(self) -> int:  # type: ignore[override]
        """Steps of the schedule so far, as torch counts them. Waits for the device."""
        optimizer = self._fused
        return optimizer.schedule_step - optimizer._awaits_scheduler

    @uncompiled("the schedule runs inside the optimizer's step")
    def step(self, epoch: int | None = None) -> None:
        """Ticks the schedule, unless the optimizer's step has done so already.

        Args:
            epoch: Deprecated, as in torch: sets ``last_epoch``.

        Raises:
            RuntimeError: Another `CyclicLR` was made for the optimizer since.
        """
        optimizer = self._fused
        self._step_count += 1
        if epoch is not None:
            warnings.warn(EPOCH_DEPRECATION_WARNING, UserWarning, stacklevel=2)
            optimizer.set_schedule_step(epoch)
            return
        if optimizer._steps_since_scheduler >= STEPS_PER_CALL_LIMIT and not self._warned:
            self._warned = True
            warnings.warn(
                f"scheduler.step() was called after {optimizer._steps_since_scheduler} optimizer steps. The schedule "
                "advances with every optimizer.step(), not with scheduler.step(): its step sizes count optimizer steps",
                stacklevel=2,
            )
        optimizer._steps_since_scheduler = 0
        if optimizer._awaits_scheduler:
            optimizer._awaits_scheduler = False
        else:
            optimizer._tick()

    @uncompiled("a learning rate is read from where the schedule runs")
    def get_last_lr(self) -> list[float]:  # type: ignore[override]
        """The groups' learning rates, as plain floats. Waits for the device."""
        return [group["lr"] for group in self._fused.param_groups]

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """As `get_last_lr`: the device has worked out what is asked for."""
        return self.get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's state with torch's keys, loadable by torch's CyclicLR."""
        first = self._schedules[0]
        up, down = float(first.step_size_up), float(first.step_size_down or 0)
        saved_function = None
        if first.scale_fn is not None:
            # Torch saves the attributes of a callable object, and nothing of a function.
            is_function = isinstance(first.scale_fn, types.FunctionType) or is_triton_function(first.scale_fn)
            if is_function or not hasattr(first.scale_fn, "__dict__"):
                warn_unsaved(first.scale_fn)
            else:
                saved_function = dict(first.scale_fn.__dict__)
        state = {
            "max_lrs": [schedule.max_lr for schedule in self._schedules],
            "total_size": up + down,
            "step_ratio": up / (up + down),
            "mode": first.mode,
            "gamma": first.gamma,
            "scale_mode": first.scale_mode,
            "cycle_momentum": first.cycle_momentum,
            "base_lrs": [schedule.base_lr for schedule in self._schedules],
            "last_epoch": self.last_epoch,
            "_step_count": self._step_count,
            "_is_initial": False,
            "_get_lr_called_within_step": False,
            "_last_lr": self.get_last_lr(),
            "_scale_fn_custom": saved_function,
            # Not torch's: the exact step sizes, which total_size and step_ratio round.
            "step_sizes": (first.step_size_up, first.step_size_down),
            "scale_fn_name": None if first.scale_fn is None else function_name(first.scale_fn),
        }
        if first.cycle_momentum:
            state["use_beta1"] = True
            state["base_momentums"] = [schedule.base_momentum for schedule in self._schedules]
            state["max_momentums"] = [schedule.max_momentum for schedule in self._schedules]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads a state of this class or of torch's CyclicLR: bounds, step sizes, mode and ``last_epoch``.

        Args:
            state_dict: What ``state_dict()`` gave. Not changed.

        Raises:
            ValueError: It is corrupt, of another number of groups, or needs a ``scale_fn`` that is not here. Nothing
                has been loaded.
        """
        optimizer = self._fused
        needed = {"base_lrs", "max_lrs", "total_size", "step_ratio", "mode", "gamma", "scale_mode", "last_epoch"}
        missing = needed - set(state_dict)
        if missing:
            raise ValueError(f"state_dict is not that of a CyclicLR: it has no {sorted(missing)}")
        scale_fn = self._schedules[0].scale_fn
        saved_name = state_dict.get("scale_fn_name")
        if (saved_name is not None or state_dict.get("_scale_fn_custom") is not None) and scale_fn is None:
            raise ValueError(
                f"state_dict was saved with the scale_fn {saved_name!r}, which a checkpoint cannot hold: construct "
                "this CyclicLR with that scale_fn before loading"
            )
        step_size_up, step_size_down = self._loaded_step_sizes(state_dict)
        num_groups = len(self._schedules)
        columns = {"base_lr": "base_lrs", "max_lr": "max_lrs"}
        if state_dict.get("cycle_momentum"):
            columns |= {"base_momentum": "base_momentums", "max_momentum": "max_momentums"}
        per_group = {
            name: _per_group(f"state_dict[{key!r}]", state_dict.get(key), num_groups) for name, key in columns.items()
        }
        schedules = [
            dataclasses.replace(
                schedule,
                step_size_up=step_size_up,
                step_size_down=step_size_down,
                mode=state_dict["mode"],
                gamma=state_dict["gamma"],
                scale_mode=state_dict["scale_mode"],
                cycle_momentum=state_dict.get("cycle_momentum", False),
                **{name: values[index] for name, values in per_group.items()},
            )
            for index, schedule in enumerate(self._schedules)
        ]
        last_epoch = check_schedule_step("state_dict['last_epoch']", state_dict["last_epoch"])
        optimizer.set_schedule_step(last_epoch)
        if state_dict.get("_scale_fn_custom") is not None and scale_fn is not None:
            scale_fn.__dict__.update(state_dict["_scale_fn_custom"])
        self._schedules = schedules
        self._step_count = state_dict.get("_step_count", self._step_count)
        # Groups added after the scheduler was made are not its own.
        others = [group.schedule for group in optimizer.param_groups[num_groups:]]
        optimizer.set_schedule([*schedules, *others])

    def _loaded_step_sizes(self, state_dict: Mapping[str, Any]) -> tuple[float, float]:
        """The step sizes that a state means. Torch's keeps a rounded ratio, from which whole steps are recovered."""
        if "step_sizes" in state_dict:
            up, down = state_dict["step_sizes"]
            return up, down
        total, ratio = float(state_dict["total_size"]), float(state_dict["step_ratio"])
        own = self._schedules[0]
        own_up, own_down = float(own.step_size_up), float(own.step_size_down or 0)
        if (own_up + own_down, own_up / (own_up + own_down)) == (total, ratio):
            return own_up, own_down
        return recover_step_sizes(total, ratio)


def recover_step_sizes(total_size: float, step_ratio: float) -> tuple[float, float]:
    """The step sizes up and down of which torch's CyclicLR keeps the sum and a rounded ratio."""
    up = total_size * step_ratio
    if abs(up - round(up)) <= 1e-9 * total_size:
        up = round(up)
    return up, total_size - up


def _per_group(name: str, value: Any, num_groups: int) -> list[Any]:
    """One value per group, from one for all or a list."""
    if not isinstance(value, (list, tuple)):
        return [value] * num_groups
    if len(value) != num_groups:
        raise ValueError(f"{name} must have {num_groups} entries, one per param group, got {len(value)}: {value}")
    return list(value)
