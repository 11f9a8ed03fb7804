"""`Schedule`: the base class of all schedules."""

from __future__ import annotations

import dataclasses
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from .._warnings import warn
from .compiled import NEVER
from .fields import END_OF_STEPS, checked_number
from .parts import Part, Segment
from .timeline import Timeline

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
SomeSchedule = TypeVar("SomeSchedule", bound="Schedule")

# Every subclass by its name, for loading saved schedules.
_registry: dict[str, type[Schedule]] = {}


class Schedule(ABC):
    """A learning rate, and for some schedules a momentum (Adam's beta1), as functions of the step.

    A subclass is a frozen dataclass with one method, `parts`. Its fields hold plain values, other schedules, tuples
    of these, or a function in a field named ``scale_fn``; `to_dict` can then save it.

    Example:
        >>> import dataclasses
        >>> from fused_clr.schedules import Part, Schedule, Segment, Shape
        >>> @dataclasses.dataclass(frozen=True)
        ... class Fall(Schedule):
        ...     lr_from: float
        ...     steps: int
        ...
        ...     def parts(self):
        ...         decay = Segment(self.steps, Shape.COSINE, lr=(self.lr_from, 0.0))
        ...         return (Part(segments=(decay,)),)
        >>> Fall(0.1, steps=100).lr(50)
        0.05
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        known = _registry.setdefault(cls.__name__, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(
                f"the class of a schedule must have a unique name, since checkpoints store it, got {cls.__name__!r} in "
                f"{cls.__module__} and in {known.__module__}"
            )
        _registry[cls.__name__] = cls

    @abstractmethod
    def parts(self) -> tuple[Part, ...]:
        """What the schedule does, as data."""

    @cached_property
    def timeline(self) -> Timeline:
        """The parts, compiled."""
        parameters = getattr(type(self), "__dataclass_params__", None)
        if parameters is None or not parameters.frozen:
            raise TypeError(f"a schedule's class must be a frozen dataclass, got {type(self).__name__}")
        return Timeline(self.parts())

    @property
    def drives_momentum(self) -> bool:
        """Whether the schedule sets the momentum, in some of its parts at least."""
        return self.timeline.drives_momentum

    @property
    def initial_lr(self) -> float:
        """The first learning rate of the first segment. Does not evaluate the schedule."""
        return float(self.parts()[0].segments[0].lr[0])

    @property
    def largest_lr(self) -> float:
        """The largest learning rate of any segment, before scaling: the peak of all families here."""
        return max(float(lr) for part in self.parts() for segment in part.segments for lr in segment.lr)

    @property
    def momentum_bounds(self) -> tuple[float, float]:
        """What torch's schedulers call ``base_momentum`` and ``max_momentum``.

        The end and the start of the first segment that changes the momentum; of the first that sets it if none does.

        Raises:
            ValueError: The schedule does not drive the momentum.
        """
        momenta = [segment.momentum for part in self.parts() for segment in part.segments if segment.momentum]
        if not momenta:
            raise ValueError(f"a schedule must drive the momentum to have momentum_bounds, got {self}")
        start, end = next(((start, end) for start, end in momenta if start != end), momenta[0])
        return float(end), float(start)

    def end_step(self) -> float:
        """The first step from which the schedule holds its last value; infinity if it never ends."""
        last = self.timeline.parts[-1]
        end = last.start + last.end
        return end if end < END_OF_STEPS else math.inf

    def scaled(self, factor: float) -> Schedule:
        """The schedule with ``factor`` times the learning rate, and the same momentum.

        Args:
            factor: Finite and >= 0.

        Raises:
            ValueError: ``factor`` is not allowed, or a learning rate would not be.

        Example:
            >>> from fused_clr.schedules import Linear
            >>> Linear(0.0, 1.0, steps=4).scaled(0.5).lr(4)
            0.5
        """
        return ScaledSchedule(self, factor)

    def last_step(self) -> float:
        """The last step at which a tabulated ``scale_fn`` has a value; infinity where nothing is tabulated."""
        return self.timeline.last_step()

    @overload
    def lr(self, step: int) -> float: ...
    @overload
    def lr(self, step: IntArray) -> FloatArray: ...
    def lr(self, step: int | IntArray) -> float | FloatArray:
        """The learning rate at ``step``. Past its end a schedule holds its last value.

        Args:
            step: int, or int64 array of any shape, >= 0. Updates already applied; torch's ``last_epoch``.

        Returns:
            float, or float64 array of the same shape.

        Raises:
            ValueError: ``step`` is negative, 2**62 or more, or not an integer.
        """
        if isinstance(step, np.ndarray):
            return self._over_array(step, 0)
        return self.timeline.values(_checked_step(step))[0]

    @overload
    def momentum(self, step: int) -> float: ...
    @overload
    def momentum(self, step: IntArray) -> FloatArray: ...
    def momentum(self, step: int | IntArray) -> float | FloatArray:
        """The momentum at ``step``; NaN where the schedule does not set it.

        Args:
            step: int, or int64 array of any shape, >= 0.

        Returns:
            float, or float64 array of the same shape.

        Raises:
            ValueError: ``step`` is negative, 2**62 or more, or not an integer.
        """
        if isinstance(step, np.ndarray):
            return self._over_array(step, 1)
        return self.timeline.values(_checked_step(step))[1]

    def lr_and_momentum(self, step: int) -> tuple[float, float]:
        """``lr(step)`` and ``momentum(step)``, evaluated once."""
        return self.timeline.values(_checked_step(step))

    @property
    def has_cycles(self) -> bool:
        """Whether some step ends a cycle."""
        return any(any(part) for part in self.timeline.falls)

    def ends_cycle(self, step: int) -> bool:
        """Whether ``step`` is the last one of a cycle: of a fall of the learning rate.

        That of `Cyclic` is the step before the learning rate is lowest, and that of `CosineRestarts` the step before a
        restart. A fall that is cut off by the next schedule of a sequence does not count.

        Args:
            step: int >= 0.

        Raises:
            ValueError: ``step`` is negative, 2**62 or more, or not an integer.

        Example:
            >>> from fused_clr.schedules import CosineRestarts
            >>> [step for step in range(12) if CosineRestarts(1.0, T_0=4).ends_cycle(step)]
            [3, 7, 11]
        """
        return self.timeline.ends_cycle(_checked_step(step))

    def _over_array(self, steps: NDArray[Any], which: int) -> FloatArray:
        values = self.timeline.values
        if not np.issubdtype(steps.dtype, np.integer):
            raise ValueError(f"step must be an integer or an array of integers, got an array of {steps.dtype}")
        for step in (steps.min(), steps.max()) if steps.size else ():
            _checked_step(step)
        flat = np.fromiter((values(step)[which] for step in steps.ravel().tolist()), np.float64, steps.size)
        return flat.reshape(steps.shape)

    def to_dict(self) -> dict[str, Any]:
        """The schedule as plain values, which ``torch.load(weights_only=True)`` accepts.

        A ``scale_fn`` leaves only its name, with a warning.
        """
        unsaved: list[str] = []
        saved = _encode(self, unsaved)
        for name in unsaved:
            warn(f"scale_fn {name!r} cannot be saved in a checkpoint; give it again before loading")
        return saved  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls: type[SomeSchedule], saved: Any, present: Schedule | None = None) -> SomeSchedule:
        """The schedule that `to_dict` saved.

        Args:
            saved: What `to_dict` returned. Not changed.
            present: A schedule of the same form, for the ``scale_fn`` that the saved one has lost.

        Raises:
            ValueError: It is not a saved schedule, or its ``scale_fn`` is missing.
        """
        schedule = _decode(saved, present) if isinstance(saved, Mapping) else None
        if not isinstance(schedule, cls):
            raise ValueError(f"a saved {cls.__name__} must be what its to_dict() returned, got {saved!r}")
        return schedule

    def __getstate__(self) -> dict[str, Any]:
        # The timeline is computed again from the fields.
        return {name: value for name, value in self.__dict__.items() if name != "timeline"}


@dataclasses.dataclass(frozen=True)
class ScaledSchedule(Schedule):
    """What `Schedule.scaled` returns.

    Attributes:
        schedule: The schedule.
        factor: What its learning rates are multiplied by.
    """

    schedule: Schedule
    factor: float

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Schedule):
            raise ValueError(f"schedule must be a Schedule, got {self.schedule!r}")
        factor = checked_number("factor", self.factor, "a finite number >= 0", lambda x: x >= 0)
        object.__setattr__(self, "factor", factor)
        try:
            _ = self.timeline
        except ValueError as error:
            raise ValueError(f"factor={factor} makes a learning rate too large or too small: {error}") from None

    def parts(self) -> tuple[Part, ...]:
        """See `Schedule.parts`: those of the schedule, with other learning rates."""
        return tuple(
            part._replace(
                segments=tuple(map(self._scaled, part.segments)),
                scaling=part.scaling._replace(about_lr=part.scaling.about_lr * self.factor),
            )
            for part in self.schedule.parts()
        )

    def _scaled(self, segment: Segment) -> Segment:
        first, last = segment.lr
        return segment._replace(lr=(first * self.factor, last * self.factor))


def function_name(function: Any) -> str:
    """The name of a ``scale_fn`` in messages and checkpoints."""
    return getattr(function, "__qualname__", None) or getattr(function, "__name__", None) or type(function).__name__


def _checked_step(step: Any) -> int:
    try:
        # A bool, too, has an index.
        if isinstance(step, (bool, np.bool_)):
            raise TypeError
        number = operator.index(step)
    except TypeError:
        raise ValueError(f"step must be an integer or an array of integers, got {step!r}") from None
    if number < 0:
        raise ValueError(f"step must be >= 0, got {number}")
    if number >= NEVER:
        raise ValueError(f"step must be < 2**62, got {number}")
    return number


def _encode(value: Any, unsaved: list[str]) -> Any:
    if isinstance(value, tuple):
        return [_encode(item, unsaved) for item in value]
    if isinstance(value, np.generic):
        # ``torch.load(weights_only=True)`` refuses numpy's numbers.
        return value.item()
    if not isinstance(value, Schedule):
        return value
    saved: dict[str, Any] = {"type": type(value).__name__}
    for name in (field.name for field in _fields(type(value))):
        field = getattr(value, name)
        if name == "scale_fn" and field is not None:
            unsaved.append(function_name(field))
            field = unsaved[-1]
        saved[name] = _encode(field, unsaved)
    return saved


def _decode(value: Any, present: Any) -> Any:
    if isinstance(value, list | tuple):
        aligned = isinstance(present, tuple) and len(present) == len(value)
        return tuple(_decode(item, present[i] if aligned else None) for i, item in enumerate(value))
    if not isinstance(value, Mapping):
        return value
    kind = value.get("type")
    if not isinstance(kind, str) or kind not in _registry:
        raise ValueError(
            f"the 'type' of a saved schedule must be one of {sorted(_registry)}, got {kind!r}; import the module that "
            "defines it before loading"
        )
    names = [field.name for field in _fields(_registry[kind])]
    if set(value) != {"type", *names}:
        raise ValueError(f"a saved {kind} must have the keys {['type', *names]}, got {list(value)}")
    fields = {}
    for name in names:
        own = getattr(present, name, None)
        if name == "scale_fn" and value[name] is not None:
            if own is None:
                raise ValueError(
                    f"a saved {kind} has the scale_fn {value[name]!r}, which a checkpoint cannot hold: give the group "
                    "a schedule with that scale_fn before loading"
                )
            fields[name] = own
        else:
            fields[name] = _decode(value[name], own)
    keywords = {field.name: fields.pop(field.name) for field in _fields(_registry[kind]) if field.kw_only}
    try:
        # By position where possible: an argument need not have the name of its field.
        schedule = _registry[kind](*fields.values(), **keywords)
    except TypeError as error:
        raise ValueError(f"a saved {kind} has a value of a wrong type: {error}") from error
    for name, value in (fields | keywords).items():
        # What `to_dict` saved is what a schedule keeps.
        if getattr(schedule, name) != value:
            raise ValueError(f"a saved {kind} must have {name}={getattr(schedule, name)!r}, got {value!r}")
    return schedule


def _fields(schedule_type: Callable[..., Schedule]) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(schedule_type)  # type: ignore[arg-type]
