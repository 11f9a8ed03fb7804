"""Adam and AdamW whose learning rate schedule runs where the update runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from . import checkpoint
from .backends import Engine, TensorRecord, engine_class
from .backends.engine import DevicesChanged
from .hyperparameters import Hyperparameters, check_hyperparameter, check_parameter
from .param_group import ParamGroup
from .schedules import Cyclic
from .step_hooks import call_with_hooks, hooks_wanted
from .watched import OptimizerState

T = TypeVar("T")

DEFAULT_BETAS = (0.9, 0.999)


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

    def _start_fresh(self) -> None:
        """Everything that is never copied or pickled."""
        self._engines: list[Engine[Any]] = []
        # Engines that a rebuild replaced; a graph captured from one may still be replayed and must find its memory.
        self._retired: list[Engine[Any]] = []
        self._structure_changed = True
        self._state_changed = False
        self._hyperparameters_changed = False
        # Between optimizer.step() and scheduler.step(), torch's param groups show what was just applied.
        self._awaits_scheduler = False
        self._scheduler_attached = 0
        self._steps_since_scheduler = 0
        self._schedule_step = 0
        self._update_steps: dict[Tensor, int] = {}
        # Torch lets users append to group["params"].
        self._param_lists: list[list[Tensor]] = []
        self._param_counts: list[int] = []

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
        self._structure_changed = True

    def _on_state_change(self) -> None:
        self._state_changed = True

    def _on_group_change(self) -> None:
        self._hyperparameters_changed = True

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
        group = ParamGroup(plain, self._on_group_change, self._read_group, self._check_group)
        self.param_groups.append(group)
        self._note_schedule(group)
        self._structure_changed = True

    @staticmethod
    def _note_schedule(group: ParamGroup, previous: Cyclic | None = None) -> None:
        """Leaves in a scheduled group what torch's CyclicLR leaves there; warns of a beta1 that is overridden."""
        schedule = group.schedule
        if schedule is None:
            return
        dict.setdefault(group, "initial_lr", schedule.base_lr)
        if schedule.cycle_momentum:
            group.store("max_momentum", schedule.max_momentum)
            group.store("base_momentum", schedule.base_momentum)
            beta1 = float(group.stored("betas")[0])
            overridden_before = previous is not None and previous.cycle_momentum
            if not overridden_before and beta1 not in (schedule.max_momentum, DEFAULT_BETAS[0]):
                warnings.warn(
                    f"cycle_momentum=True overrides the optimizer's beta1={beta1} by {schedule.base_momentum} to "
                    f"{schedule.max_momentum}; cycle_momentum=False would keep it",
                    stacklevel=4,
                )

    def _read_group(self, group: ParamGroup, key: str, stored: Any) -> Any:
        if key not in ("lr", "betas") or group.schedule is None:
            return stored
        index = next((i for i, g in enumerate(self.param_groups) if g is group), None)
        if index is None or (key == "betas" and not group.schedule.cycle_momentum):
            return stored
        lr, beta1 = self._ready_engines()[0].read_lr_and_beta1(index, applied=self._awaits_scheduler)
        return lr if key == "lr" else (beta1, stored[1])

    def _check_group(self, group: ParamGroup, key: str, value: Any) -> Any:
        value = check_hyperparameter(key, value)
        if key == "params":
            self._structure_changed = True
        schedule = group.schedule
        if schedule is None:
            return value
        if key == "lr":
            raise RuntimeError(
                f"param_group['lr'] cannot be set{_naming_scheduler()}: the group follows {schedule}; give it another "
                "with optimizer.set_schedule(), or a constant lr with optimizer.set_schedule(None)"
            )
        if key == "betas" and schedule.cycle_momentum and float(value[0]) != group["betas"][0]:
            raise RuntimeError(
                f"param_group['betas'][0] cannot be set to {value[0]}{_naming_scheduler()}: the group follows "
                f"{schedule}; cycle_momentum=False would leave beta1 alone"
            )
        return value

    def _hyperparameters(self) -> list[Hyperparameters]:
        return [
            Hyperparameters(
                beta1=float(group.stored("betas")[0]),
                beta2=float(group.stored("betas")[1]),
                **{name: group.stored(name) for name in Hyperparameters._fields if name not in ("beta1", "beta2")},
            )
            for group in self.param_groups
        ]

    # -- engines ------------------------------------------------------------------------------------------------------
    def _ready_engines(self) -> list[Engine[Any]]:
        """The engines, with everything written since the last step taken over."""
        if self._structure_changed:
            self._rebuild_engines()
        if self._state_changed:
            for engine in self._engines:
                engine.adopt_state()
            self._state_changed = False
        if self._hyperparameters_changed:
            hyperparameters = self._hyperparameters()
            for engine in self._engines:
                engine.set_hyperparameters(hyperparameters)
            self._hyperparameters_changed = False
        return self._engines

    def _rebuild_engines(self) -> None:
        """Sorts the parameters by device, and gives each device an engine that goes on where the old one was."""
        if self._engines:
            self._schedule_step = self._engines[0].get_schedule_step()
            for engine in self._engines:
                if self._state_changed:
                    engine.adopt_state()
                self._update_steps.update(zip(engine.params, engine.get_update_steps(), strict=True))
        by_device: dict[torch.device, list[TensorRecord]] = {}
        for index, group in enumerate(self.param_groups):
            for position, param in enumerate(group.stored("params")):
                name = f"param_groups[{index}]['params'][{position}]"
                names = group.stored("param_names")
                record = TensorRecord(f"{name} ({names[position]})" if names else name, param, index)
                by_device.setdefault(param.device, []).append(record)
        hyperparameters = self._hyperparameters()
        engines = [
            engine_class(device)(
                device,
                records,
                self.state,
                hyperparameters,
                self._schedule_step,
                [self._initial_update_step(record.param) for record in records],
            )
            for device, records in (by_device or {torch.device("cpu"): []}).items()
        ]
        for engine in self._engines:
            engine.retire()
        self._retired += [engine for engine in self._engines if engine.captured]
        self._engines = engines
        self._param_lists = [group.stored("params") for group in self.param_groups]
        self._param_counts = [len(params) for params in self._param_lists]
        self._structure_changed = self._state_changed = self._hyperparameters_changed = False

    def _initial_update_step(self, param: Tensor) -> int:
        state = self.state.get(param)
        if not state:
            return 0
        return self._update_steps.get(param, int(state.get("step", 0)))

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
            engines = self._prepared_engines()
            grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
            for engine in engines:
                engine.launch(grad_scale, found_inf)
        finally:
            torch._C._set_grad_enabled(grad_enabled)
        if self._scheduler_attached:
            self._awaits_scheduler = True
            self._steps_since_scheduler += 1
        return loss

    def _prepared_engines(self) -> list[Engine[Any]]:
        if [len(params) for params in self._param_lists] != self._param_counts:
            self._structure_changed = True
        changed = self._structure_changed or self._state_changed or self._hyperparameters_changed
        engines = self._ready_engines() if changed else self._engines
        try:
            for engine in engines:
                engine.prepare()
        except DevicesChanged:
            self._structure_changed = True
            engines = self._ready_engines()
            for engine in engines:
                engine.prepare()
        return engines

    # -- the schedule -------------------------------------------------------------------------------------------------
    @property
    def live_lr(self) -> Tensor:
        """float64[num_groups] on the device of the first parameter: the learning rates that the next step applies.

        A live tensor: steps and graph replays write it. Reading it on the device needs no sync.
        """
        return self._ready_engines()[0].live_lr

    @property
    def live_beta1(self) -> Tensor:
        """float64[num_groups], live as `live_lr` is: the beta1 that the next step applies."""
        return self._ready_engines()[0].live_beta1

    @property
    def schedule_step(self) -> int:
        """How often the schedule has ticked: torch's ``last_epoch``. Waits for the device."""
        return self._ready_engines()[0].get_schedule_step()

    @property
    def schedule_exhausted(self) -> bool:
        """Whether a tabulated ``scale_fn`` has no value left, so that replays go on with its last. Waits for the device."""
        return any(engine.get_schedule_exhausted() for engine in self._ready_engines())

    def set_schedule_step(self, step: int) -> None:
        """Sets the clock of the schedule, in place: what ``last_epoch`` is in torch.

        Args:
            step: int in [0, 2**53).

        Raises:
            ValueError: ``step`` is outside that.
        """
        if isinstance(step, bool) or int(step) != step or not 0 <= step < 2**53:
            raise ValueError(f"step must be an integer in [0, 2**53), got {step}")
        for engine in self._ready_engines():
            engine.set_schedule_step(int(step))
        self._awaits_scheduler = False

    def set_schedule(self, schedule: Cyclic | None | Sequence[Cyclic | None]) -> None:
        """Gives every group a schedule. The clock goes on; see `set_schedule_step`.

        Args:
            schedule: One for all groups, or a list with one per group. None: the group keeps a constant ``lr``,
                starting from what the schedule it loses would apply next.

        Raises:
            ValueError: The list's length is not the number of groups.
            TypeError: An entry is no schedule.
        """
        schedules = (
            [schedule] * len(self.param_groups) if schedule is None or isinstance(schedule, Cyclic) else schedule
        )
        if len(schedules) != len(self.param_groups):
            raise ValueError(
                f"schedule must have {len(self.param_groups)} entries, one per group, got {len(schedules)}"
            )
        for value in schedules:
            check_hyperparameter("schedule", value)
        self._awaits_scheduler = False
        for group, value in zip(self.param_groups, schedules, strict=True):
            previous = group.schedule
            if value is None:
                lr, betas = group["lr"], group["betas"]
                group.store("lr", lr)
                group.store("betas", betas)
            group.store("schedule", value)
            self._note_schedule(group, previous)

    def _attach_schedules(self, schedules: Sequence[Cyclic], step: int) -> int:
        """What `fused_clr.CyclicLR` does to its optimizer.

        Returns:
            A token: the scheduler is this optimizer's as long as ``_scheduler_attached`` equals it.
        """
        self.set_schedule(schedules)
        self.set_schedule_step(step)
        self._scheduler_attached += 1
        self._steps_since_scheduler = 0
        return self._scheduler_attached

    def _tick(self) -> None:
        """Advances the schedule without an update, unless a captured step does that."""
        for engine in self._ready_engines():
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
        engines = self._ready_engines()
        update_steps = {p: s for e in engines for p, s in zip(e.params, e.get_update_steps(), strict=True)}
        return {
            "defaults": self.defaults,
            "state": {
                param: {key: v.clone() if key == "step" else v for key, v in entry.items()}
                for param, entry in self.state.items()
            },
            "param_groups": [{key: group.stored(key) for key in group} for group in self.param_groups],
            "schedule_step": engines[0].get_schedule_step(),
            "update_steps": list(update_steps.items()),
            "scheduler_attached": self._scheduler_attached,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._start_fresh()
        groups = state.pop("param_groups")
        self._schedule_step = state.pop("schedule_step")
        self._update_steps = dict(state.pop("update_steps"))
        self._scheduler_attached = state.pop("scheduler_attached")
        self.state = state.pop("state")
        super().__setstate__(state)
        self.param_groups = [
            ParamGroup(group, self._on_group_change, self._read_group, self._check_group) for group in groups
        ]


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


def _naming_scheduler() -> str:
    """`` by ClassName``, if a torch scheduler is what is writing."""
    import inspect

    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, LRScheduler):
            return f" by {type(owner).__name__}"
        frame = frame.f_back
    return ""
