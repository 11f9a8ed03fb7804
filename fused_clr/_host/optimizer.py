"""The base class of the fused optimizers: param groups, state, the step, the schedule, checkpoints."""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from operator import is_not
from typing import Any, ClassVar, Literal, TypeVar, cast, overload

import torch
from torch import Tensor

from .._checks import check_bool, check_integer, check_number
from .._device.capture import CapturedStep
from .._device.engines import Engines
from .._device.parameters import ParametersMovedError
from .._device.rules import UpdateRule
from .._device.rules.adam import largest_lr
from .._device.settings import GroupSettings, Options, TensorRecord
from .._device.sharding import local_tensor
from .._device.tensors import check_parameter, has_memory
from .._torch_internals import asked_by_distributed_checkpoint, call_with_hooks, hooks_wanted, uncompiled
from ..averaging import Averaging
from ..schedules import Constant, Decay, Schedule, sequence
from ..telemetry import History, Live, Status
from . import checkpoint
from .averages import check_averaging, check_module, copied_state_dict, exchanged, pairs_of
from .hyperparameters import (
    MAX_SCHEDULE_STEP,
    N_AVERAGED,
    OWN_KEYS,
    check_count,
    check_has_decay_schedule,
    check_hyperparameter,
    check_max_grad_norm,
    check_options,
)
from .param_group import ParamGroup
from .watched import OptimizerState

T = TypeVar("T")

# The host's closed form of a learning rate and the device's agree within that.
CLOSED_FORM_TOLERANCE = 1e-12


class FusedOptimizer(torch.optim.Optimizer):
    """An optimizer whose step advances its schedule. A subclass names its update rule and takes torch's arguments.

    Args:
        params: See the subclass.
        defaults: Hyperparameters of a group that does not state them.
        schedule: The schedule of groups without their own.
        options: Options for all groups; see `fused_clr.optim.StepOptions`.
    """

    # The update rule, named by a subclass.
    RULE: ClassVar[UpdateRule]
    # GradScaler then gives its scale and overflow flag to the step, which unscales and skips.
    _step_supports_amp_scaling = True

    # Torch's class has plain dicts.
    param_groups: list[ParamGroup]  # type: ignore[assignment]

    @uncompiled
    def __init__(self, params: Any, defaults: dict[str, Any], schedule: Schedule | None, options: Any) -> None:
        checked = check_options(type(self).__name__, options)
        defaults = {**defaults, "schedule": schedule}
        for name, value in defaults.items():
            defaults[name] = check_hyperparameter(name, value)
        self._start_fresh(checked)
        super().__init__(params, defaults)

    def _start_fresh(
        self,
        options: Options,
        awaits_scheduler: bool = False,
        assigned_epoch: int | None = None,
        **continued: Any,
    ) -> None:
        """Sets the attributes that are never copied or pickled."""
        self._engines = Engines(self.RULE, options, **continued)
        # Changes that the engines do not have yet.
        self._structure_changed = True
        self._state_changed = self._settings_changed = False
        # The groups that the engines know: torch lets users edit the list in place.
        self._known_groups: list[ParamGroup] = []
        # Parameters that no engine knows, since they have no memory yet.
        self._waiting: list[TensorRecord] = []
        # Hyperparameters that are tensors, with the versions that the engines know.
        self._tensor_versions: list[tuple[Tensor, int]] = []
        # Where groups were when last looked at; a group is searched for if it is not there.
        self._group_indices: dict[int, int] = {}
        # Between optimizer.step() and scheduler.step(), torch's param groups show what was just applied.
        self._awaits_scheduler = awaits_scheduler
        # Number of schedulers created for this optimizer; only the last one drives it.
        self._scheduler_token = 0
        self._steps_since_scheduler = 0
        # What a user wrote to ``scheduler.last_epoch``; the next scheduler step starts from there.
        self._assigned_epoch = assigned_epoch
        # Set while reads of all groups share one copy from the device.
        self._readings: list[tuple[float, float]] | None = None
        # The parameters hold their averages, in the body of `averaged_parameters`.
        self._shows_averages = False

    @property
    def rule(self) -> UpdateRule:
        """The update rule."""
        return self.RULE

    # -- param groups and state ---------------------------------------------------------------------------------------
    @property
    def state(self) -> OptimizerState:
        """Parameter -> its state tensors: ``step`` and those of the update rule, Adam's ``exp_avg`` and so on.

        All of them may be assigned, written in place and moved with ``.data =``. Only ``step.data.fill_()`` is not
        noticed by the triton backend: torch does not report it.
        """
        if not self._state and asked_by_distributed_checkpoint():
            self._create_state()
        self._engines.hand_out_state()
        return self._state

    @state.setter
    def state(self, value: dict[Any, Any]) -> None:
        self._state = OptimizerState(weakref.ref(self))
        if value:
            self._engines.hand_out_state()
        for key, entry in value.items():
            self._state[key] = entry
        self._restructure()

    def _create_state(self) -> None:
        """Creates the state of all parameters that require a gradient, as before the first step."""
        for engine in self._ready():
            for index, record in enumerate(engine.parameters.records):
                if record.param.requires_grad:
                    engine.moments.create(index)
            if not self.rule.has_step:
                # Torch's optimizer takes a step with gradients of 0: its buffers have begun.
                engine.state.set_update_steps([max(step, 1) for step in engine.state.get_update_steps()])

    def on_state_change(self) -> None:
        """``state`` was written."""
        self._state_changed = True
        self._refresh_captures()

    def on_group_change(self, key: str) -> None:
        """The value of ``key`` was written in some group."""
        self._settings_changed = True
        if key == "params":
            self._restructure()
        self._refresh_captures()

    def _restructure(self) -> None:
        """Parameters or groups changed: from now on, replays of earlier captures do nothing."""
        self._structure_changed = True
        self._engines.retire()

    def _refresh_captures(self) -> None:
        """Updates the engines at once if steps were captured: their replays run no host code that could do it later."""
        if self._engines.captures and not self._structure_changed:
            self._ready()

    def _ready(self) -> Engines:
        """The engines, after applying all changes made since the last call."""
        groups, known = self.param_groups, self._known_groups
        # By identity: == of groups would compare tensors.
        if not self._structure_changed and (len(groups) != len(known) or any(map(is_not, groups, known))):
            self._restructure()
        if self._waiting and any(has_memory(record.param) for record in self._waiting):
            self._restructure()
        if self._tensor_versions and any(tensor._version != version for tensor, version in self._tensor_versions):
            self._settings_changed = True
        engines = self._engines
        if self._structure_changed:
            self._adopt_groups()
            engines.rebuild(
                self._records(),
                self._settings(),
                self._state,
                adopt=self._state_changed,
                is_ahead=self._awaits_scheduler,
            )
            self._known_groups = list(self.param_groups)
            self._group_indices = {id(group): index for index, group in enumerate(self.param_groups)}
            self._structure_changed = self._state_changed = self._settings_changed = False
        if self._state_changed or engines.steps_moved():
            engines.adopt_state(self._state)
            self._state_changed = False
        if self._settings_changed:
            engines.set_groups(self._settings())
            self._settings_changed = False
        return engines

    def _adopt_groups(self) -> list[ParamGroup]:
        """``param_groups``, after replacing plain dicts that users put there; checks all of them first.

        Raises:
            ValueError: A hyperparameter or parameter is not allowed, or one is missing.
        """
        if set(map(type, self.param_groups)) == {ParamGroup}:
            return self.param_groups
        groups: list[Any] = list(self.param_groups)
        for index, group in enumerate(groups):
            if isinstance(group, ParamGroup):
                continue
            # A group of torch's optimizer does not have ours.
            group = {key: self.defaults[key] for key in OWN_KEYS if key in self.defaults} | dict(group)
            missing = set(self.defaults) - {"schedule"} - set(group)
            if missing:
                raise ValueError(f"param_groups[{index}] has no {sorted(missing)}")
            groups[index] = self._make_group(index, group)
        self.param_groups[:] = groups
        return self.param_groups

    def _settings(self) -> list[GroupSettings]:
        settings = [group.settings() for group in self.param_groups]
        self._tensor_versions = [(tensor, tensor._version) for group in settings for tensor in group.tensors()]
        return settings

    def _records(self) -> dict[torch.device, list[TensorRecord]]:
        """The parameters of all groups, by device; an optimizer without parameters counts as one on the CPU.

        Leaves out, and remembers, those without memory: they may get it, and a gradient, later.

        Raises:
            ValueError: A parameter occurs twice: two updates of the same memory would race.
        """
        records: dict[torch.device, list[TensorRecord]] = {}
        waiting: list[TensorRecord] = []
        places: dict[int, str] = {}
        for index, group in enumerate(self.param_groups):
            names = group.stored("param_names")
            for position, param in enumerate(group.stored("params")):
                name = f"param_groups[{index}]['params'][{position}]"
                if id(param) in places:
                    raise ValueError(f"{name} and {places[id(param)]} are one parameter: groups must hold it once")
                places[id(param)] = name
                record = TensorRecord(f"{name} ({names[position]})" if names else name, param, index)
                own = records.setdefault(param.device, []) if has_memory(param) else waiting
                own.append(record)
        self._waiting = waiting
        return records or {torch.device("cpu"): []}

    @uncompiled
    def read_scheduled(self, group: ParamGroup) -> tuple[float, float] | None:
        """Current learning rate and momentum of ``group``; None if it is not in the optimizer (yet)."""
        index = self._index_of(group)
        return None if index is None else self._read_lr_and_momentum()[index]

    def _index_of(self, group: ParamGroup) -> int | None:
        groups, index = self.param_groups, self._group_indices.get(id(group), -1)
        if 0 <= index < len(groups) and groups[index] is group:
            return index
        return next((i for i, own in enumerate(groups) if own is group), None)

    def accepts_lr(self, group: ParamGroup, value: float) -> bool:
        """Whether ``value`` may be written to a scheduled ``lr``: it is the current one, or an assigned epoch's."""
        if value == group["lr"]:
            return True
        epoch = self._assigned_epoch
        if epoch is None or epoch < 0 or group.schedule is None:
            return False
        # A loop that counts ``last_epoch`` itself, as ignite's does: what it writes is what torch's scheduler would.
        if not math.isclose(value, group.schedule.lr(epoch), rel_tol=CLOSED_FORM_TOLERANCE):
            return False
        self.set_schedule_step(epoch)
        self._assigned_epoch = epoch
        return True

    def _read_lr_and_momentum(self) -> list[tuple[float, float]]:
        """Learning rate and momentum of every group, as the groups show them, in one copy."""
        if self._readings is not None:
            return self._readings
        return self._ready().read_lr_and_momentum(applied=self._awaits_scheduler)

    @contextmanager
    def _one_copy(self, applied: bool | None = None) -> Iterator[None]:
        """In the body, reads of all groups share one copy from the device: of applied values, or of the next ones."""
        applied = self._awaits_scheduler if applied is None else applied
        self._readings = self._ready().read_lr_and_momentum(applied)
        try:
            yield
        finally:
            self._readings = None

    def __repr__(self) -> str:
        with self._one_copy():
            return super().__repr__()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group; see `torch.optim.Optimizer.add_param_group`.

        A group without its own ``schedule`` gets the constructor's. `CyclicLR` drives the groups that exist when it is
        created: a later group without a ``schedule`` keeps its constant ``lr``.

        Args:
            param_group: ``params``, and hyperparameters that differ from the constructor's. Not changed.

        Raises:
            ValueError: A hyperparameter or parameter is not allowed; nothing has been added.
        """
        if self._engines.capturing or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()):
            raise RuntimeError("add_param_group() cannot be called during CUDA graph capture; add groups before it")
        for name in Options._fields:
            if name in param_group:
                raise ValueError(f"{name} applies to all groups: pass it to the optimizer, not in a param group")
        # A copy: torch writes its defaults into the dict.
        super().add_param_group(dict(param_group))
        plain: dict[str, Any] = self.param_groups.pop()
        self.param_groups.append(self._make_group(len(self.param_groups), plain))
        self._restructure()

    def _make_group(self, index: int, values: dict[str, Any]) -> ParamGroup:
        """A checked group of a plain dict."""
        values = {name: check_hyperparameter(name, value) for name, value in values.items()}
        check_has_decay_schedule(self.rule, values)
        self._check_schedules([values.get("schedule"), values.get("weight_decay_schedule")], values["params"])
        for position, param in enumerate(values["params"]):
            if has_memory(param):
                check_parameter(f"param_groups[{index}]['params'][{position}]", local_tensor(param))
        if len({id(param) for param in values["params"]}) != len(values["params"]):
            raise ValueError(f"param_groups[{index}]['params'] must not hold a parameter twice")
        schedule = values.pop("schedule", None)
        if self.averaging is not None:
            values[N_AVERAGED] = 0
        group = ParamGroup({**values, "schedule": None}, weakref.ref(self))
        group.set_schedule(schedule)
        return group

    # -- the step -----------------------------------------------------------------------------------------------------
    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], T]) -> T: ...
    @uncompiled
    def step(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D417 - the overloads have them
        """Updates all parameters that have a gradient, and advances the schedule by one.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError: A gradient is sparse, or on another device, or of another shape or kind than its parameter.
                The message names the parameter; nothing has been updated.
        """
        try:
            if hooks_wanted(self):
                return call_with_hooks(FusedOptimizer._step, self, (self, *args), kwargs)
            return self._step(*args, **kwargs)
        except BaseException:
            # GradScaler set them for this step, and removes them only after one that succeeded.
            for name in ("grad_scale", "found_inf"):
                vars(self).pop(name, None)
            raise

    # Without this mark torch wraps the step to run the hooks, which costs 5.7 us a call.
    cast("Any", step).hooked = True

    def _step(self, closure: Callable[[], T] | None = None) -> T | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
            if not isinstance(found_inf, Tensor):
                # GradScaler adds up one flag per device with gradients: without any, the sum is the number 0.
                found_inf = None
            try:
                self._step_engines(grad_scale, found_inf)
            except ParametersMovedError:
                self._structure_changed = True
                self._step_engines(grad_scale, found_inf)
        finally:
            torch._C._set_grad_enabled(grad_enabled)
        if self._scheduler_token:
            self._awaits_scheduler = True
            self._steps_since_scheduler += 1
        return loss

    # Hooks are given the arguments as the user passed them, by position or by name.
    cast("Any", step).__signature__ = inspect.signature(_step)

    def _step_engines(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        self.refuse_averages("optimizer.step()")
        engines = self._ready()
        for record in self._waiting:
            if record.param.grad is not None:
                raise RuntimeError(f"{record.name} has a gradient but no memory: it is on {record.param.device}")
        engines.step(grad_scale, found_inf)

    # -- telemetry ----------------------------------------------------------------------------------------------------
    @property
    @uncompiled
    def live(self) -> Live:
        """Tensors on the device of the first parameter, which steps and replays update; see `Live`.

        Reading them on the device needs no synchronization. Adding a param group replaces them with new tensors.
        """
        return self._ready().first.state.live

    @overload
    def status(self, wait: Literal[True] = True) -> Status: ...
    @overload
    def status(self, wait: bool) -> Status | None: ...
    def status(self, wait: bool = True) -> Status | None:
        """The current values as plain numbers; see `Status`.

        Args:
            wait: True waits for the device and copies its status. False does not wait: it returns the newest status
                that has arrived (None before the first), and starts another copy. Called at every step, it returns a
                status about one step old. For progress bars and loggers.

        Raises:
            RuntimeError: Called during CUDA graph capture: the graph would copy at every replay.
            ValueError: ``wait`` is not a boolean.
        """
        return self._ready().status(check_bool("wait", wait))

    def history(self, n: int | None = None) -> History:
        """The latest steps, replays and skipped steps too, as the kernel recorded them. One copy from the device.

        Args:
            n: How many; None: all of the ``history_size`` that are kept.

        Returns:
            A `History` of at most ``n`` steps. Adding a param group clears it.

        Raises:
            ValueError: ``n`` is negative, or larger than ``history_size``.
        """
        size = self._engines.options.history_size
        if n is None:
            n = size
        n = check_integer("n", n, f"an integer in [0, history_size = {size}]", lambda n: 0 <= n <= size)
        return self._ready().first.state.read_history(n)

    @property
    def max_grad_norm(self) -> float | None:
        """Norm that gradients are clipped to; None: no clipping. A new number applies from the next step or replay."""
        return self._engines.options.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        current = self.max_grad_norm
        if (value is None) != (current is None):
            raise ValueError(
                f"max_grad_norm is {current} and cannot become {value!r}: clipping can be switched on or off only when "
                "the optimizer is created; math.inf computes the norm without clipping"
            )
        if value is not None:
            value = check_max_grad_norm(value)
            self._ready().set_max_grad_norm(value)

    # -- captured steps -----------------------------------------------------------------------------------------------
    @property
    def captures(self) -> list[CapturedStep]:
        """The captured or recorded steps that may still be replayed, oldest first."""
        captures = self._engines.captures
        if any(capture.released for capture in captures):
            captures[:] = [capture for capture in captures if not capture.released]
        return list(captures)

    def _read_schedule_step(self) -> int:
        """The schedule step. Waits for the device."""
        engines = self._ready()
        engines.refuse_capture("the schedule step was read")
        return int(engines.first.state.live.schedule_step)

    def read_schedule_step(self) -> int:
        """The schedule step of the values that groups show: of what was just applied, before ``scheduler.step()``."""
        return max(self._read_schedule_step() - self._awaits_scheduler, 0)

    def _before_capture(self) -> None:
        """Does what a captured step needs and a capture cannot do, such as applying what was written to groups."""
        with torch.no_grad():
            try:
                self._ready().before_capture()
            except ParametersMovedError:
                self._structure_changed = True
                self._ready().before_capture()

    def check_replay(self, captured: CapturedStep | None = None, *, optimizer_only: bool = False) -> None:
        """Checks that replaying a captured step does what its graph was captured for. Reads nothing from the device.

        Compares addresses, shapes, strides and dtypes of parameters, gradients and state, and which gradients exist,
        with those at capture. A gradient that is None now is fine, since the graph's own backward writes it.
        Captured steps follow hyperparameters and schedules, except what changes the state: amsgrad, and whether an SGD
        group has momentum.

        Args:
            captured: One of `captures`; None: the newest.
            optimizer_only: The graph holds only ``optimizer.step()``, and no forward or backward. Moved tensors are
                then not an error: their addresses are written into the graph's tables. A gradient that is None now is
                an error.

        Raises:
            RuntimeError: A replay would be wrong or do nothing; the message names the tensor. Or nothing was captured.
            TypeError: ``captured`` is not a captured step.
            ValueError: ``optimizer_only`` is not a boolean.
        """
        check_bool("optimizer_only", optimizer_only)
        for engine in self._ready():
            engine.state.refresh()
        if captured is None:
            if not self.captures:
                raise RuntimeError("check_replay() found no captured step: capture optimizer.step() first")
            captured = self.captures[-1]
        if not isinstance(captured, CapturedStep):
            raise TypeError(f"captured must be one of optimizer.captures or None, got {type(captured).__name__}")
        captured.check(optimizer_only)

    # -- averages -----------------------------------------------------------------------------------------------------
    @property
    def averaging(self) -> Averaging | None:
        """Which steps average the parameters, as given to the constructor."""
        return self._engines.options.averaging

    @property
    def n_averaged(self) -> list[int]:
        """How often the parameters of each group were averaged. Waits for the device.

        Raises:
            RuntimeError: The optimizer has no ``averaging``.
        """
        check_averaging(self.averaging)
        return self._ready().average_counts()

    def read_n_averaged(self, group: ParamGroup) -> int | None:
        """How often the parameters of ``group`` were averaged; None if it is not in the optimizer (yet)."""
        index = self._index_of(group)
        return None if index is None else self.n_averaged[index]

    def write_n_averaged(self, group: ParamGroup, count: Any) -> None:
        """``group["n_averaged"] = count``."""
        count, index = check_count(N_AVERAGED, count), self._index_of(group)
        if index is None:
            group.store(N_AVERAGED, count)
            return
        counts = self.n_averaged
        # Wrappers of optimizers write all keys back at every step.
        if counts[index] != count:
            counts[index] = count
            self._engines.set_average_counts(counts)

    @contextmanager
    def averaged_parameters(self) -> Iterator[None]:
        """In the body, the parameters hold their averages. Afterwards, also after an exception, their own values.

        The values are exchanged in place, so that captured graphs stay valid. The body needs memory for a copy of the
        parameters. What else writes to them there is lost. Parameters of a group that has not been averaged yet keep
        their own values.

        Raises:
            RuntimeError: The optimizer has no ``averaging``, or a group will never be averaged since its schedule has
                no cycles, or this is called in the body of another one. A step in the body raises one too.

        Example:
            >>> from fused_clr import Averaging, FusedAdam
            >>> weight = torch.nn.Parameter(torch.zeros(1))
            >>> optimizer = FusedAdam([weight], lr=1.0, averaging=Averaging.swa(every=1))
            >>> for _ in range(2):
            ...     weight.grad = torch.ones(1)
            ...     optimizer.step()
            >>> with optimizer.averaged_parameters():
            ...     print(round(weight.item(), 3))
            -1.5
            >>> round(weight.item(), 3)
            -2.0
        """
        averaging = check_averaging(self.averaging)
        self.refuse_averages("averaged_parameters()")
        pairs = pairs_of(self.param_groups, self._state, self.n_averaged, averaging)
        with exchanged(pairs):
            self._shows_averages = True
            try:
                yield
            finally:
                self._shows_averages = False

    def averaged_state_dict(self, module: torch.nn.Module | None = None) -> dict[str, Any]:
        """The averages by name, as copies in the parameters' dtypes, for ``module.load_state_dict``.

        Args:
            module: The module of the parameters: gives a copy of its ``state_dict()``, with averages in place of the
                parameters. None: gives the parameters alone, by the names that the optimizer was given
                (``FusedAdam(model.named_parameters())``).

        Raises:
            RuntimeError: See `averaged_parameters`.
            TypeError: ``module`` is not a module.
            ValueError: ``module`` has none of the parameters; or it is None, and the parameters have no names.
        """
        check_averaging(self.averaging)
        check_module(self.param_groups, module)
        with self.averaged_parameters():
            return copied_state_dict(self.param_groups, module)

    def refuse_averages(self, what: str) -> None:
        """Raises an error in the body of `averaged_parameters`, where ``what`` was called."""
        if self._shows_averages:
            raise RuntimeError(f"{what} must not be called in the body of averaged_parameters()")

    # -- the schedule -------------------------------------------------------------------------------------------------
    def set_schedule_step(self, step: int) -> None:
        """Sets the schedule step, torch's ``last_epoch``, in place.

        Args:
            step: int in [0, 2**53].

        Raises:
            ValueError: ``step`` is outside that.
        """
        self._set_schedule_step(check_count("step", step))

    def _set_schedule_step(self, step: int, is_ahead: bool = False) -> None:
        """Sets the schedule step; ``is_ahead``: `optimizer.step` has been called, and not yet ``scheduler.step``."""
        # Without a scheduler, nothing would clear the flag.
        is_ahead = is_ahead and bool(self._scheduler_token)
        self._ready().set_schedule_step(step, is_ahead)
        self._awaits_scheduler = is_ahead
        self._assigned_epoch = None

    def set_schedule(self, schedule: Schedule | Sequence[Schedule | None] | None) -> None:
        """Gives every group a schedule. The schedule step does not change; see `set_schedule_step`.

        Args:
            schedule: One for all groups, or a list with one per group. None removes a group's schedule: its ``lr``
                stays at the value that the schedule would apply next.

        Raises:
            ValueError: The list's length is not the number of groups, or a schedule cannot be evaluated; nothing has
                changed.
            TypeError: An entry is not a schedule.
        """
        self._adopt_groups()
        schedules: Sequence[Any] = (
            schedule if isinstance(schedule, (list, tuple)) else [schedule] * len(self.param_groups)
        )
        if len(schedules) != len(self.param_groups):
            raise ValueError(
                f"schedule must have {len(self.param_groups)} entries, one per group, got {len(schedules)}"
            )
        for value in schedules:
            check_hyperparameter("schedule", value)
        self._change_schedules(list(zip(self.param_groups, schedules, strict=True)))

    def begin_decay(
        self, steps: int, shape: Literal["1-sqrt", "linear", "cosine"] = "1-sqrt", final_lr: float = 0.0
    ) -> None:
        """Lets the learning rate of every group fall from its present value, from any schedule.

        Works between the replays of a captured loop, without capturing again. Waits for the device once. A momentum
        that a schedule drives stays at its present value. Past the decay, every group holds ``final_lr``. If the
        weight decay of `FusedAdamW` depends on a ``weight_decay_max_lr`` of None, that is set to its present number.

        Args:
            steps: Steps of the decay, >= 1. The next step is the first, and applies the present learning rate: the one
                that it would have applied, which groups show only after ``scheduler.step()``, if one is called.
            shape: See `fused_clr.schedules.Decay`.
            final_lr: Learning rate at the end, in [0, the smallest present learning rate].

        Raises:
            ValueError: An argument is not allowed; the message names it. Nothing has changed.
            RuntimeError: Called during CUDA graph capture.

        Example:
            >>> from fused_clr import FusedAdam
            >>> from fused_clr.schedules import Constant
            >>> optimizer = FusedAdam([torch.nn.Parameter(torch.ones(3))], schedule=Constant(0.1))
            >>> optimizer.set_schedule_step(1000)
            >>> optimizer.begin_decay(steps=100, shape="linear")
            >>> optimizer.param_groups[0]["schedule"].lr(1050)
            0.05
        """
        steps = check_integer("steps", steps, "an integer in [1, 2**53)", lambda n: 1 <= n < MAX_SCHEDULE_STEP)
        final_lr = check_number("final_lr", final_lr, "a finite number >= 0", lambda x: 0 <= x < math.inf)
        status = self.status()
        schedules = []
        # The decay's own largest learning rate must not change the weight decay.
        max_lrs = [
            (group, largest_lr(group.settings().values))
            for group in self.param_groups
            if group.stored("weight_decay_mode") in ("lr_ratio", "corrected")
        ]
        for index, (group, lr) in enumerate(zip(self.param_groups, status.lr.tolist(), strict=True)):
            if not final_lr <= lr:
                raise ValueError(
                    f"final_lr must not exceed the present learning rate of param_groups[{index}], {lr}, got {final_lr}"
                )
            drives_momentum = group.schedule is not None and group.schedule.drives_momentum
            momentum = float(status.momentum[index]) if drives_momentum else None
            decay: Schedule = Decay(lr, steps, shape, final_lr, momentum)
            if status.schedule_step:
                before = group.schedule or Constant(lr)
                decay = sequence(before, decay, milestones=[status.schedule_step])
            schedules.append(decay)
        self.set_schedule(schedules)
        for group, max_lr in max_lrs:
            group["weight_decay_max_lr"] = max_lr

    def change_schedule(self, group: ParamGroup, schedule: Schedule | None) -> None:
        """``group["schedule"] = schedule``."""
        self._change_schedules([(group, schedule)])

    def _change_schedules(self, changes: Sequence[tuple[ParamGroup, Schedule | None]]) -> None:
        self._check_schedules([schedule for _, schedule in changes])
        loses = any(schedule is None and group.schedule is not None for group, schedule in changes)
        with self._one_copy(applied=False) if loses else nullcontext():
            for group, schedule in changes:
                group.set_schedule(schedule)

    def check_schedule(self, schedule: Schedule | None) -> None:
        """Checks that steps could evaluate a schedule."""
        self._check_schedules([schedule])

    def _check_schedules(self, schedules: Iterable[Schedule | None], params: Iterable[Tensor] = ()) -> None:
        """Checks that steps could evaluate schedules, for the present parameters and ``params``."""
        # A group may be a plain dict that a user has put there.
        devices = {param.device for group in self.param_groups for param in dict.get(group, "params", ())}
        devices |= {param.device for param in params}
        for schedule in {id(schedule): schedule for schedule in schedules if schedule is not None}.values():
            self._engines.check_schedule(schedule, devices)

    def _attach_scheduler(self, schedules: Sequence[Schedule], step: int) -> int:
        """Lets a new `CyclicLR` drive this optimizer.

        Returns:
            A token: the scheduler drives this optimizer as long as ``_scheduler_token`` is equal to it.
        """
        self.set_schedule(schedules)
        self.set_schedule_step(step)
        self._scheduler_token += 1
        self._steps_since_scheduler = 0
        return self._scheduler_token

    def _tick(self) -> None:
        """Advances the schedule without an update, unless there are captured steps, which advance it."""
        if not self.captures:
            self._ready().tick()

    # -- checkpoints, copies and pickles ------------------------------------------------------------------------------
    def _take_readings(self) -> tuple[checkpoint.Readings, tuple[int, int]]:
        """Reads all devices, with one copy from each. Also returns the counts of applied and skipped steps."""
        engines = self._ready()
        for engine in engines:
            engine.state.refresh()
        snapshots = engines.snapshots()
        status = snapshots[0].status
        if self._awaits_scheduler:
            values = snapshots[0].applied_lr, snapshots[0].applied_momentum
        else:
            values = status.lr, status.momentum
        update_steps = {
            record.param: int(step)
            for engine, snapshot in zip(engines, snapshots, strict=True)
            for record, step in zip(engine.parameters.records, snapshot.update_steps, strict=True)
        }
        pairs = list(zip(values[0].tolist(), values[1].tolist(), strict=True))
        average_counts = None
        if engines.options.averaging is not None:
            average_counts = [max(counts) for counts in zip(*(own.average_counts for own in snapshots), strict=True)]
        return checkpoint.Readings(status.schedule_step, pairs, update_steps, average_counts), (
            status.applied_steps,
            status.skipped_steps,
        )

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state in torch's format, which torch's optimizer can load. One copy from each device."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        readings, _ = self._take_readings()
        self._engines.hand_out_state()
        state_dict = checkpoint.pack(self.param_groups, self._state, readings, self.rule, self._awaits_scheduler)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            result = post_hook(self, state_dict)
            state_dict = state_dict if result is None else result
        return state_dict

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads a checkpoint of this class or of torch's optimizer, in place.

        Param groups and state become the saved ones, as in torch; a group that was saved without a schedule keeps its
        present one. Moments keep their memory: an earlier ``state_dict()`` of this optimizer changes with them.

        Args:
            state_dict: What ``state_dict()`` returned. Not changed, and no tensor of it is kept.

        Raises:
            ValueError: It is corrupt, or belongs to other parameters; nothing has been loaded.
        """
        saved: Any = state_dict
        if isinstance(saved, Mapping):
            # Hooks may write into it.
            saved = dict(saved)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = pre_hook(self, saved)
            saved = saved if result is None else result
        loaded = checkpoint.check(saved, self.param_groups, self.rule, self.averaging is not None)
        self._check_schedules([*loaded.schedules, *(group.get("weight_decay_schedule") for group in loaded.groups)])
        self._ready()
        self._load_groups(loaded)
        self._load_state(loaded)
        if loaded.schedule_step is not None:
            self._set_schedule_step(loaded.schedule_step, loaded.is_ahead)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _load_groups(self, loaded: checkpoint.Loaded) -> None:
        key = self.rule.momentum_key
        for group, saved, schedule in zip(self.param_groups, loaded.groups, loaded.schedules, strict=True):
            # Older checkpoints of torch lack newer keys.
            own = {name: group.stored(name) for name in OWN_KEYS if name in group}
            values = {**self.defaults, **own, **saved, "schedule": schedule or group.schedule}
            values |= {name: group.stored(name) for name in ("params", "param_names", N_AVERAGED) if name in group}
            if schedule is None and group.schedule is not None and group.schedule.drives_momentum:
                # A checkpoint of torch's pair, whose momentum is the scheduler's: the group keeps its own.
                values[key] = self.rule.with_momentum(saved[key], self.rule.momentum_in(group.stored(key)))
            if group.stored("decoupled_weight_decay"):
                # The class decides it. Older checkpoints of torch's AdamW do not have it.
                values["decoupled_weight_decay"] = True
            group.replace_all(values)

    def _load_state(self, loaded: checkpoint.Loaded) -> None:
        params = {param for group in self.param_groups for param in group.stored("params")}
        for key in [key for key in self._state if key not in params]:
            dict.__delitem__(self._state, key)
        for key, value in loaded.other_state.items():
            dict.__setitem__(self._state, key, value)
        for engine in self._ready():
            steps = engine.state.get_update_steps()
            for index, record in enumerate(engine.parameters.records):
                entry = loaded.entries.get(record.param)
                if entry is None and not (self._state.get(record.param) and self.captures):
                    steps[index] = 0
                    dict.pop(self._state, record.param, None)
                    continue
                steps[index] = self.rule.saved_step(entry)
                # In place, and zero if nothing was saved: a captured graph may read these tensors.
                engine.moments.load(index, entry or {})
            engine.state.set_update_steps(steps)
            engine.forget_plans()
        if self.averaging is not None:
            self._engines.set_average_counts(loaded.average_counts or [0] * len(self.param_groups))

    def __getstate__(self) -> dict[str, Any]:
        readings, counts = self._take_readings()
        self._engines.hand_out_state()
        return {
            "defaults": self.defaults,
            # Without the steps: views of a tensor that is not pickled. `update_steps` has them.
            "state": {
                key: {
                    name: value for name, value in entry.items() if name != "step" or key not in readings.update_steps
                }
                if isinstance(entry, dict)
                else entry
                for key, entry in self._state.items()
            },
            "param_groups": [{key: group.stored(key) for key in group} for group in self.param_groups],
            "options": self._engines.options,
            "schedule_step": readings.schedule_step,
            "counts": counts,
            "update_steps": list(readings.update_steps.items()),
            "average_counts": list(self._engines.average_counts_by_parameter().items()),
            "scheduler_token": self._scheduler_token,
            "awaits_scheduler": self._awaits_scheduler,
            "assigned_epoch": self._assigned_epoch,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._start_fresh(
            state.pop("options"),
            awaits_scheduler=state.pop("awaits_scheduler", False),
            assigned_epoch=state.pop("assigned_epoch", None),
            schedule_step=state.pop("schedule_step"),
            update_steps=(steps := dict(state.pop("update_steps"))),
            counts=state.pop("counts"),
            average_counts=dict(state.pop("average_counts")),
        )
        self._scheduler_token = state.pop("scheduler_token")
        self.state = {
            key: {"step": torch.tensor(float(steps[key]), dtype=torch.float32, device="cpu"), **entry}
            if self.rule.has_step and key in steps and entry
            else entry
            for key, entry in state.pop("state").items()
        }
        groups = state.pop("param_groups")
        super().__setstate__(state)
        self.param_groups = [ParamGroup(group, weakref.ref(self)) for group in groups]
