"""Adam and AdamW whose learning rate schedule runs where the update runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import checkpoint
from .backends.engine_set import EngineSet
from .hyperparameters import DEFAULT_BETAS, check_hyperparameter, check_parameter, check_schedule_step
from .param_group import ParamGroup
from .schedules import Cyclic
from .step_hooks import call_with_hooks, hooks_wanted
from .watched import OptimizerState

T = TypeVar("T")


class FusedAdam(torch.optim.Optimizer):
    r"""Adam with the learning rate schedule inside the step: one kernel launch updates every parameter and ticks.

    The algorithm of Kingma & Ba 2015 (arXiv:1412.6980, algorithm 1), with the arguments of `torch.optim.Adam`.

    Args:
        params: Parameters, named parameters or dicts of param groups, as torch takes them. Dense tensors of dtype
            float16, bfloat16, float32, float64 or complex.
        lr: Learning rate, >= 0; a 1-element tensor is read at every step. Without effect in a scheduled group.
        betas: Decay rates of the moments, each in [0, 1). A schedule that cycles momentum drives the first.
            1-element tensors are read when they are set.
        eps: Added to the denominator, >= 0.
        weight_decay: L2 penalty, >= 0; decoupled (arXiv:1711.05101) with ``decoupled_weight_decay``.
        amsgrad: Divide by the largest second moment so far (Reddi et al. 2018).
        foreach: Accepted and without effect: there is one implementation.
        maximize: Ascend instead of descend.
        capturable: Accepted and without effect: every step can be captured.
        differentiable: Must be False.
        fused: Accepted and without effect: every step is fused.
        decoupled_weight_decay: Decay the parameter and not the gradient, as AdamW does.
        schedule: A value from `fused_clr.schedules` for every group without one of its own; None keeps ``lr``
            constant. A param group may hold a ``schedule`` too. Each step advances all schedules by one.

    Raises:
        ValueError: An argument is outside what is stated above; the message names it, its value and what is allowed.
        TypeError: ``schedule`` is no schedule, or ``params`` no iterable of tensors.

    Example:
        >>> from fused_clr.schedules import Cyclic
        >>> weight = torch.nn.Parameter(torch.ones(2, 2))
        >>> optimizer = FusedAdam([weight], schedule=Cyclic(0.1, 0.5, step_size_up=4, cycle_momentum=False))
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.param_groups[0]["lr"]
        0.2
    """

    # GradScaler leaves scale and overflow to the step, which then neither updates nor ticks.
    _step_supports_amp_scaling = True

    param_groups: list[ParamGroup]  # type: ignore[assignment]

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = DEFAULT_BETAS,
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        schedule: Cyclic | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
            "schedule": schedule,
        }
        for name, value in defaults.items():
            defaults[name] = check_hyperparameter(name, value)
        self._start_fresh()
        super().__init__(params, defaults)

    def _start_fresh(self, schedule_step: int = 0, update_steps: dict[Tensor, int] | None = None) -> None:
        """Everything that is never copied or pickled."""
        self._engines = EngineSet(self, schedule_step, update_steps)
        # Between optimizer.step() and scheduler.step(), torch's param groups show what was just applied.
        self._awaits_scheduler = False
        # Counts the CyclicLRs made for this optimizer; the last one drives.
        self._scheduler_token = 0
        self._steps_since_scheduler = 0

    # -- param groups and state ---------------------------------------------------------------------------------------
    @property
    def state(self) -> OptimizerState:
        """Parameter -> its state tensors, ``step``, ``exp_avg``, ``exp_avg_sq`` and ``max_exp_avg_sq``."""
        return self._state

    @state.setter
    def state(self, value: dict[Any, Any]) -> None:
        self._state = OptimizerState(self._on_state_change)
        for key, entry in value.items():
            self._state[key] = entry
        self._engines.restructure()

    def _on_state_change(self, _key: Any) -> None:
        self._engines.state_changed = True

    def _on_group_change(self, key: Any) -> None:
        self._engines.hyperparameters_changed = True
        if key == "params":
            self._engines.restructure()

    def _make_group(self, values: dict[str, Any]) -> ParamGroup:
        return ParamGroup(values, self._on_group_change, self._read_live)

    def _read_live(self, group: ParamGroup) -> tuple[float, float] | None:
        index = next((i for i, own in enumerate(self.param_groups) if own is group), None)
        if index is None:
            return None
        return self._engines.ready()[0].read_lr_and_beta1(index, applied=self._awaits_scheduler)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group; see `torch.optim.Optimizer.add_param_group`.

        A group with no ``schedule`` of its own takes the constructor's. Under `CyclicLR`, which drives the groups that
        exist when it is made, a later group without a ``schedule`` keeps its constant ``lr``.

        Args:
            param_group: ``params``, and hyperparameters that differ from the constructor's. Not changed.

        Raises:
            ValueError: A hyperparameter or parameter is not allowed; nothing has been added.
        """
        # A copy: torch writes its defaults into what it is given.
        super().add_param_group(dict(param_group))
        plain: dict[str, Any] = self.param_groups.pop()
        index = len(self.param_groups)
        for name in list(plain):
            plain[name] = check_hyperparameter(name, plain[name])
        for position, param in enumerate(plain["params"]):
            check_parameter(f"param_groups[{index}]['params'][{position}]", param)
        if len({id(param) for param in plain["params"]}) != len(plain["params"]):
            raise ValueError(f"param_groups[{index}]['params'] must not hold a parameter twice")
        schedule = plain.pop("schedule")
        group = self._make_group({**plain, "schedule": None})
        group.set_schedule(schedule)
        self.param_groups.append(group)
        self._engines.restructure()

    # -- the step -----------------------------------------------------------------------------------------------------
    def step(self, closure: Callable[[], T] | None = None) -> T | None:  # type: ignore[override]
        """Updates all parameters that have a gradient, and advances the schedule by one.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError: A gradient is sparse, or on another device, or of another shape or kind than its parameter.
                The message names the parameter; nothing has been updated.
        """
        if hooks_wanted(self):
            out: T | None = call_with_hooks(FusedAdam._step, self, (self,) if closure is None else (self, closure))
            return out
        return self._step(closure)

    # Torch would wrap a step that does not say it runs the hooks itself, at 5.7 us a call.
    step.hooked = True  # type: ignore[attr-defined]

    def _step(self, closure: Callable[[], T] | None = None) -> T | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            engines = self._engines.prepared()
            grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
            for engine in engines:
                engine.launch(grad_scale, found_inf)
        finally:
            torch._C._set_grad_enabled(grad_enabled)
        if self._scheduler_token:
            self._awaits_scheduler = True
            self._steps_since_scheduler += 1
        return loss

    # -- the schedule -------------------------------------------------------------------------------------------------
    @property
    def live_lr(self) -> Tensor:
        """float64[num_groups] on the device of the first parameter: the learning rates that the next step applies.

        A live tensor: steps and graph replays write it. Reading it on the device needs no sync.
        """
        return self._engines.ready()[0].live_lr

    @property
    def live_beta1(self) -> Tensor:
        """float64[num_groups], live as `live_lr` is: the beta1 that the next step applies."""
        return self._engines.ready()[0].live_beta1

    @property
    def schedule_step(self) -> int:
        """How often the schedule has ticked: torch's ``last_epoch``. Waits for the device."""
        return self._engines.ready()[0].get_schedule_step()

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
        for engine in self._engines.ready():
            if not engine.captured:
                engine.tick()

    # -- checkpoints, copies and pickles ------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state in torch's format, loadable by `torch.optim.Adam`; see `fused_clr.checkpoint`."""
        return checkpoint.optimizer_state_dict(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class or of `torch.optim.Adam`, in place.

        Args:
            state_dict: What ``state_dict()`` gave. Not changed.

        Raises:
            ValueError: It is corrupt or of other parameters; nothing has been loaded.
        """
        checkpoint.load_optimizer_state_dict(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "defaults": self.defaults,
            "state": {param: {**entry, "step": entry["step"].clone()} for param, entry in self.state.items() if entry},
            "param_groups": [{key: group.stored(key) for key in group} for group in self.param_groups],
            "schedule_step": self.schedule_step,
            "update_steps": list(self._engines.update_steps().items()),
            "scheduler_token": self._scheduler_token,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._start_fresh(state.pop("schedule_step"), dict(state.pop("update_steps")))
        self._scheduler_token = state.pop("scheduler_token")
        self.state = state.pop("state")
        groups = state.pop("param_groups")
        super().__setstate__(state)
        self.param_groups = [self._make_group(group) for group in groups]


class FusedAdamW(FusedAdam):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101): `FusedAdam` with decoupled weight decay.

    Args:
        params: See `FusedAdam`; so are the arguments not listed here.
        weight_decay: Decoupled weight decay, >= 0.

    Example:
        >>> optimizer = FusedAdamW([torch.nn.Parameter(torch.ones(3))], lr=1e-3, weight_decay=0.1)
        >>> optimizer.param_groups[0]["decoupled_weight_decay"]
        True
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = DEFAULT_BETAS,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        schedule: Cyclic | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            schedule=schedule,
        )
