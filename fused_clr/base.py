"""What a fused optimizer has besides its step: param groups that read live, the schedule, telemetry, captured steps."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backends.engine import Engine
from .backends.engine_set import EngineSet
from .captured import CapturedStep
from .hyperparameters import (
    StepOptions,
    check_hyperparameter,
    check_max_grad_norm,
    check_parameter,
    check_schedule_step,
)
from .param_group import ParamGroup
from .schedules import Cyclic
from .sharding import local_tensor
from .telemetry import History
from .uncompiled import uncompiled
from .watched import OptimizerState


class FusedOptimizer(torch.optim.Optimizer):
    """Base of the optimizers whose step ticks their schedule. Not to be made by itself."""

    param_groups: list[ParamGroup]  # type: ignore[assignment]
    _options: StepOptions

    def _start_fresh(
        self,
        schedule_step: int = 0,
        update_steps: dict[Tensor, int] | None = None,
        counts: tuple[int, int] = (0, 0),
    ) -> None:
        """Everything that is never copied or pickled."""
        self._engines = EngineSet(self, schedule_step, update_steps, counts)
        # Between optimizer.step() and scheduler.step(), torch's param groups show what was just applied.
        self._awaits_scheduler = False
        # Counts the CyclicLRs made for this optimizer; the last one drives.
        self._scheduler_token = 0
        self._steps_since_scheduler = 0

    # -- param groups and state ---------------------------------------------------------------------------------------
    @property
    def state(self) -> OptimizerState:
        """Parameter -> its state tensors, ``step``, ``exp_avg``, ``exp_avg_sq`` and ``max_exp_avg_sq``."""
        if not self._state and _asked_by_distributed_checkpoint():
            self._create_state()
        return self._state

    @state.setter
    def state(self, value: dict[Any, Any]) -> None:
        self._state = OptimizerState(self._on_state_change)
        for key, entry in value.items():
            self._state[key] = entry
        self._engines.restructure()

    def _create_state(self) -> None:
        """State as before a first step, of all parameters that may get a gradient."""
        for engine in self._engines.ready():
            for index, record in enumerate(engine.records):
                if record.param.requires_grad:
                    engine.prepare_state(index)

    def _on_state_change(self, _key: Any) -> None:
        self._engines.state_changed = True
        self._engines.refresh_captured()

    def _on_group_change(self, key: Any) -> None:
        self._engines.hyperparameters_changed = True
        if key == "params":
            self._engines.restructure()
        self._engines.refresh_captured()

    def _make_group(self, values: dict[str, Any]) -> ParamGroup:
        return ParamGroup(values, self._on_group_change, self._read_live)

    @uncompiled("a scheduled value is read from where the schedule runs, and not compiled in")
    def _read_live(self, group: ParamGroup) -> tuple[float, float] | None:
        index = next((i for i, own in enumerate(self.param_groups) if own is group), None)
        if index is None:
            return None
        return self._engine.read_lr_and_beta1(index, applied=self._awaits_scheduler)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group; see `torch.optim.Optimizer.add_param_group`.

        A group with no ``schedule`` of its own takes the constructor's. Under `CyclicLR`, which drives the groups that
        exist when it is made, a later group without a ``schedule`` keeps its constant ``lr``.

        Args:
            param_group: ``params``, and hyperparameters that differ from the constructor's. Not changed.

        Raises:
            ValueError: A hyperparameter or parameter is not allowed; nothing has been added.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("add_param_group() during CUDA graph capture; add groups before")
        for name in StepOptions._fields:
            if name in param_group:
                raise ValueError(f"{name} holds for all groups: give it to the optimizer and not to a param group")
        # A copy: torch writes its defaults into what it is given.
        super().add_param_group(dict(param_group))
        plain: dict[str, Any] = self.param_groups.pop()
        index = len(self.param_groups)
        for name in list(plain):
            plain[name] = check_hyperparameter(name, plain[name])
        for position, param in enumerate(plain["params"]):
            check_parameter(f"param_groups[{index}]['params'][{position}]", local_tensor(param))
        if len({id(param) for param in plain["params"]}) != len(plain["params"]):
            raise ValueError(f"param_groups[{index}]['params'] must not hold a parameter twice")
        schedule = plain.pop("schedule")
        group = self._make_group({**plain, "schedule": None})
        group.set_schedule(schedule)
        self.param_groups.append(group)
        self._engines.restructure()

    @property
    def _engine(self) -> Engine[Any]:
        """The engine that tells of all, since engines tick together."""
        return self._ready_engine()

    @uncompiled("live tensors are read by compiled code, and not found by it")
    def _ready_engine(self) -> Engine[Any]:
        return self._engines.ready()[0]

    # -- the schedule -------------------------------------------------------------------------------------------------
    @property
    def live_lr(self) -> Tensor:
        """float64[num_groups] on the device of the first parameter: the learning rates that the next step applies.

        A live tensor: steps and graph replays write it. Reading it on the device needs no sync.
        """
        return self._engine.live_lr

    @property
    def live_beta1(self) -> Tensor:
        """float64[num_groups], live as `live_lr` is: the beta1 that the next step applies."""
        return self._engine.live_beta1

    # -- telemetry ----------------------------------------------------------------------------------------------------
    @property
    def grad_norm(self) -> Tensor:
        """float64[] on the device of the first parameter, live: the norm of the last step's unscaled gradients.

        Over all groups, dtypes and devices; NaN without ``max_grad_norm``.
        """
        return self._engine.grad_norm

    @property
    def applied_steps(self) -> Tensor:
        """int64[] on the device of the first parameter, live: how many steps were applied, replays too."""
        return self._engine.applied_steps

    @property
    def skipped_steps(self) -> Tensor:
        """int64[], live as `applied_steps` is: how many steps were skipped, for an overflow or a norm not finite."""
        return self._engine.skipped_steps

    def history(self, n: int | None = None) -> History:
        """The latest steps as the step itself recorded them, replays and skipped steps too; one copy from the device.

        Args:
            n: How many; None: all of the ``history_size`` that are kept.

        Returns:
            A `History` of at most ``n`` steps. Adding a param group starts it anew.

        Raises:
            ValueError: ``n`` is negative, or beyond ``history_size``.
        """
        size = self._options.history_size
        if n is None:
            n = size
        if n not in range(size + 1):
            raise ValueError(f"n must be an integer in [0, history_size = {size}], got {n!r}")
        return self._engine.read_history(n)

    @property
    def max_grad_norm(self) -> float | None:
        """Norm that gradients are clipped to; None: they are not. A new number holds from the next step or replay."""
        return self._options.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        current = self._options.max_grad_norm
        if (value is None) != (current is None):
            raise ValueError(
                f"max_grad_norm is {current} and cannot become {value!r}: whether steps have a norm launch is settled "
                "when the optimizer is made; math.inf measures without clipping"
            )
        if value is None:
            return
        value = check_max_grad_norm(value)
        for engine in self._engines.ready():
            engine.set_max_grad_norm(value)
        self._options = self._options._replace(max_grad_norm=value)

    # -- captured steps -----------------------------------------------------------------------------------------------
    @property
    def captured_steps(self) -> list[CapturedStep]:
        """The captured or recorded steps that may still be replayed, oldest first."""
        steps = self._engines.captured_steps
        if any(step.released for step in steps):
            steps[:] = [step for step in steps if not step.released]
        return list(steps)

    @property
    def stale_replay(self) -> bool:
        """Whether a graph was replayed that no longer fits: that replay did nothing. Waits for the device."""
        return self._engines.has_stale_replay()

    def check_replay(self, captured: CapturedStep | None = None, *, step_only: bool = False) -> None:
        """Checks that replaying a captured step does what its graph was captured for. Reads nothing from the device.

        Compares addresses, shapes, strides and dtypes of parameters, gradients and state, and which gradients exist,
        with those at capture. A gradient that is None now is fine, since the graph's own backward writes it.
        Hyperparameters and schedules need no check: captured steps follow them.

        Args:
            captured: One of `captured_steps`; None: the newest.
            step_only: The graph holds ``optimizer.step()`` alone and no forward or backward. Moved tensors are then no
                error: their addresses are written into the graph's tables. A gradient that is None now is one.

        Raises:
            RuntimeError: A replay would be wrong or do nothing; the message names the tensor. Or nothing was captured.
            TypeError: ``captured`` is no captured step.
        """
        engines = self._engines.ready()
        for engine in engines:
            engine.refresh()
        if captured is None:
            if not self.captured_steps:
                raise RuntimeError("check_replay() found no captured step: capture optimizer.step() first")
            captured = self.captured_steps[-1]
        if not isinstance(captured, CapturedStep):
            raise TypeError(f"captured must be one of optimizer.captured_steps or None, got {type(captured).__name__}")
        captured.check(step_only)

    # -- the clock ----------------------------------------------------------------------------------------------------
    @property
    def schedule_step(self) -> int:
        """How often the schedule has ticked: torch's ``last_epoch``. Waits for the device."""
        return self._engine.get_schedule_step()

    @property
    def schedule_exhausted(self) -> bool:
        """Whether a tabulated ``scale_fn`` has no value left, so that replays keep its last. Waits for the device."""
        return any(engine.get_schedule_exhausted() for engine in self._engines.ready())

    def set_schedule_step(self, step: int) -> None:
        """Sets the clock of the schedule, in place: what ``last_epoch`` is in torch.

        Args:
            step: int in [0, 2**53).

        Raises:
            ValueError: ``step`` is outside that.
        """
        step = check_schedule_step("step", step)
        for engine in self._engines.ready():
            engine.set_schedule_step(step)
        self._awaits_scheduler = False

    def set_schedule(self, schedule: Cyclic | Sequence[Cyclic | None] | None) -> None:
        """Gives every group a schedule. The clock goes on; see `set_schedule_step`.

        Args:
            schedule: One for all groups, or a list with one per group. None: the group keeps a constant ``lr``,
                starting from what the schedule it loses would apply next.

        Raises:
            ValueError: The list's length is not the number of groups.
            TypeError: An entry is no schedule.
        """
        schedules = schedule if isinstance(schedule, (list, tuple)) else [schedule] * len(self.param_groups)
        if len(schedules) != len(self.param_groups):
            raise ValueError(
                f"schedule must have {len(self.param_groups)} entries, one per group, got {len(schedules)}"
            )
        for value in schedules:
            check_hyperparameter("schedule", value)
        self._awaits_scheduler = False
        for group, value in zip(self.param_groups, schedules, strict=True):
            group.set_schedule(value)

    def _attach_schedules(self, schedules: Sequence[Cyclic], step: int) -> int:
        """What `fused_clr.CyclicLR` does to its optimizer.

        Returns:
            A token: the scheduler is this optimizer's as long as ``_scheduler_token`` equals it.
        """
        self.set_schedule(schedules)
        self.set_schedule_step(step)
        self._scheduler_token += 1
        self._steps_since_scheduler = 0
        return self._scheduler_token

    def _tick(self) -> None:
        """Advances the schedule without an update, unless a captured step does that."""
        if not self.captured_steps:
            for engine in self._engines.ready():
                engine.tick()


def _asked_by_distributed_checkpoint() -> bool:
    """Whether `torch.distributed.checkpoint` asks for state in order to load into it.

    Where there is none, it writes ``lr`` = 0 and takes a step; a schedule refuses the one and would tick in the other.
    """
    frame = sys._getframe(2)
    # A wrapper of the optimizer may stand between.
    for _ in range(2):
        code_name, module = frame.f_code.co_name, frame.f_globals.get("__name__")
        if (code_name, module) == ("_init_optim_state", "torch.distributed.checkpoint.state_dict"):
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False
