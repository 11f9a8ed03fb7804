"""The state tensors of the parameters of one device: checked, created, converted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from .._torch_internals import hold, storage_users
from .fingerprint import Fingerprint
from .parameters import Parameters
from .rules import UpdateRule
from .settings import GroupSettings, TensorRecord
from .sharding import local_tensor, placement_of, sharded_like
from .tensors import average_dtype, same_layout

# The key of a parameter's average in its state.
AVERAGE = "average"


class Moments:
    """Reads and writes ``optimizer.state`` on behalf of the engine of one device.

    Attributes:
        keys_by_group: Keys of the state tensors, by group.
        handed_out: The user may hold state tensors; see `hand_out`.

    Args:
        parameters: The parameters.
        state: Parameter -> dict of its state tensors. Own writes are not reported to the optimizer.
        rule: Names the state tensors.
        groups: Settings of all groups.
        step_mirror: float32[num_tensors]: what ``state[p]["step"]`` are views of.
        has_averages: Each parameter's state has its average too.
    """

    def __init__(
        self,
        parameters: Parameters,
        state: MutableMapping[Tensor, Any],
        rule: UpdateRule,
        groups: Sequence[GroupSettings],
        step_mirror: Tensor,
        has_averages: bool,
    ) -> None:
        self._own_keys = (AVERAGE,) if has_averages else ()
        self._parameters = parameters
        self._state = state
        self._rule = rule
        self.handed_out = False
        # Of state tensors that were handed out; the others are held in C++ instead.
        self._fingerprint: Fingerprint | None = None
        self._held: object = None
        self.set_groups(groups)
        self._step_mirror = step_mirror
        self._steps = list(step_mirror.unbind())
        self._step_users = 0
        for view, record in zip(self._steps, parameters.records, strict=True):
            if rule.has_step and state.get(record.param):
                dict.__setitem__(state[record.param], "step", view)

    def set_groups(self, groups: Sequence[GroupSettings]) -> None:
        """Takes new settings, which may ask for other state tensors."""
        self.keys_by_group = [self._rule.states[: self._rule.num_states(group.values)] for group in groups]

    def keys(self, index: int) -> tuple[str, ...]:
        """Keys of a parameter's state tensors."""
        return self.keys_by_group[self._parameters.records[index].group_index]

    def all_keys(self, index: int) -> tuple[str, ...]:
        """Those, and the average's."""
        return self.keys(index) + self._own_keys

    def of(self, index: int) -> list[Tensor]:
        """A parameter's state tensors, in the order of the rule; of a sharded one, the shards in this process."""
        entry, keys = self._state.get(self._record(index).param), self.keys(index)
        return [local_tensor(entry[key]) for key in keys] if entry else []

    def average(self, index: int) -> Tensor | None:
        """A parameter's average; None if it has none yet."""
        entry = self._state.get(self._record(index).param) or {}
        return local_tensor(entry[AVERAGE]) if self._own_keys and AVERAGE in entry else None

    def named(self, index: int) -> list[tuple[str, Tensor]]:
        """A parameter's state tensors, each with its name in messages.

        Raises:
            RuntimeError: One was removed.
        """
        record = self._parameters.records[index]
        entry = self._state.get(record.param) or {}
        for key in self.all_keys(index):
            if key not in entry:
                raise RuntimeError(f"state[{key!r}] of {record.name} was removed since the capture")
        return [(f"state[{key!r}] of {record.name}", local_tensor(entry[key])) for key in self.all_keys(index)]

    def entry(self, index: int) -> dict[str, Any]:
        """A copy of a parameter's dict, to keep its tensors alive."""
        return dict(self._state.get(self._record(index).param) or {})

    def missing(self, indices: Iterable[int]) -> list[int]:
        """The parameters that lack a state tensor."""
        return self._lacking(indices, self.all_keys)

    def _lacking(self, indices: Iterable[int], keys: Callable[[int], tuple[str, ...]]) -> list[int]:
        entries = ((i, self._state.get(self._record(i).param) or {}) for i in indices)
        return [i for i, entry in entries if any(entry.get(key) is None for key in keys(i))]

    def uncounted(self, indices: Iterable[int]) -> list[int]:
        """The parameters of them whose updates count from now on: they get their first state tensor."""
        return [] if self._rule.has_step else self._lacking(indices, self.keys)

    def check_all(self, active: Iterable[int]) -> list[int]:
        """Checks the state tensors that a step uses; see `check`.

        Args:
            active: The parameters that it updates.

        Returns:
            The other parameters that have an average, which the step may average.
        """
        others = sorted(set(range(len(self._parameters))) - set(active)) if self._own_keys else []
        idle = [index for index in others if self.average(index) is not None]
        for index in (*active, *idle):
            self.check(index)
        return idle

    def check(self, index: int) -> None:
        """Checks state tensors that a user may have put in place.

        Raises:
            ValueError: One cannot be used; the message names it.
        """
        record = self._record(index)
        entry = self._state.get(record.param) or {}
        for key in self.all_keys(index):
            value = entry.get(key)
            if value is not None and getattr(value, "shape", None) != record.param.shape:
                raise ValueError(
                    f"state[{key!r}] of {record.name} must be a tensor of shape {tuple(record.param.shape)}, got "
                    f"{tuple(value.shape) if isinstance(value, Tensor) else repr(value)}"
                )
            if value is not None and placement_of(value) != placement_of(record.param):
                raise ValueError(
                    f"state[{key!r}] of {record.name} must be sharded as the parameter is, "
                    f"{placement_of(record.param)}, got {placement_of(value)}"
                )

    def hand_out(self) -> None:
        """Lets the user have state tensors, whose memory and layout may then change without a write to the state.

        Until then nobody else can reach them, and no step need look at them.
        """
        if not self.handed_out:
            self.handed_out = True
            self._watch()

    def _watch(self) -> None:
        """Remembers the layout of all state tensors, or, as long as nobody else has them, holds them."""
        entries = ((i, self._state.get(record.param) or {}) for i, record in enumerate(self._parameters.records))
        values = [entry.get(key) for index, entry in entries for key in self.all_keys(index)]
        tensors = [local_tensor(value) for value in values if isinstance(value, Tensor)]
        self._fingerprint = Fingerprint([], tensors) if self.handed_out else None
        # Torch's swap_tensors refuses tensors that are held.
        self._held = None if self.handed_out else hold(tensors)

    def layouts_changed(self) -> bool:
        """Whether a state tensor that was handed out has another layout than at the last `create_all`."""
        fingerprint = self._fingerprint
        return fingerprint is not None and not (fingerprint.matches([]) or fingerprint.matches_slowly([]))

    def create_all(self, indices: Iterable[int]) -> bool:
        """`create` for each of the parameters."""
        replaced = [self.create(index) for index in indices]
        self._watch()
        return any(replaced)

    def create(self, index: int) -> bool:
        """Creates the state tensors that a parameter lacks; gives the others its dtype, device and layout.

        Returns:
            Whether plans do not have the present tensors: one was replaced, or there is a new average.
        """
        replaced = False
        param = self._record(index).param
        if not (self._rule.has_step or self.all_keys(index)):
            return False
        entry, local = self._state[param], self._parameters.tensors[index]
        # `dict.__setitem__` does not report the write: it is the engine's own.
        if self._rule.has_step and "step" not in entry:
            dict.__setitem__(entry, "step", self._steps[index])
        for key in self.all_keys(index):
            value = entry.get(key)
            dtype = average_dtype(param.dtype) if key == AVERAGE else param.dtype
            if value is None:
                value = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
                if key == AVERAGE:
                    # As if it had always been averaged: it did not change before.
                    value.copy_(param)
                    replaced = True
            elif value.dtype != dtype or value.device != param.device or not same_layout(local_tensor(value), local):
                value = torch.empty_like(param, dtype=dtype, requires_grad=False).copy_(value)
                replaced = True
            dict.__setitem__(entry, key, value)
        return replaced

    def load(self, index: int, saved: Mapping[str, Any]) -> None:
        """Makes a parameter's entry equal to a checked saved one: state tensors in use in place, the rest as copies."""
        self.create(index)
        param = self._record(index).param
        own, used = self._state[param], self.all_keys(index)
        for key in set(own) - {"step", *used, *saved}:
            dict.__delitem__(own, key)
        for key in used:
            value = saved.get(key)
            if value is not None:
                own[key].copy_(sharded_like(value, param))
            elif key == AVERAGE:
                own[key].copy_(param)
            else:
                own[key].zero_()
        for key in [key for key in saved if key not in ("step", *used)]:
            value = deepcopy(saved[key])
            if isinstance(value, Tensor):
                # As torch does, but for an average that another optimizer may continue.
                casts = param.is_floating_point() and key != AVERAGE
                value = value.to(param.device, param.dtype if casts else value.dtype)
            dict.__setitem__(own, key, value)

    def steps_moved(self) -> bool:
        """Whether ``.data`` of a ``step`` was replaced: the user's memory is then not the mirror's.

        Asks each of them only when another number of tensors uses the mirror's memory, which takes 1 us and not 0.5 us
        for each. As many new tensors in the old memory as were moved out of it hide a move.
        """
        users = storage_users(self._step_mirror)
        if users == self._step_users:
            return False
        self._step_users = users
        return [view.data_ptr() for view in self._steps] != self._step_addresses()

    def _step_addresses(self) -> list[int]:
        first, size = self._step_mirror.data_ptr(), self._step_mirror.element_size()
        return [first + index * size for index in range(len(self._steps))]

    def adopt_steps(self, counted: Sequence[int]) -> list[int]:
        """Reads each ``step`` that a user put into the state, and puts our own view back.

        Args:
            counted: Number of updates of each parameter.

        Returns:
            The same, with the user's values where there are any.
        """
        steps = list(counted)
        for index, (address, record) in enumerate(zip(self._step_addresses(), self._parameters.records, strict=True)):
            if self._steps[index].data_ptr() != address:
                self._steps[index] = self._step_mirror[index]
            entry = self._state.get(record.param)
            if not self._rule.has_step:
                steps[index] = self.steps_told(index, counted[index])
                continue
            step = entry.get("step") if entry else None
            if entry is None or step is None:
                steps[index] = 0
            elif not (isinstance(step, Tensor) and step.data_ptr() == address):
                steps[index] = int(step)
                dict.__setitem__(entry, "step", self._steps[index])
        return steps

    def steps_told(self, index: int, counted: int) -> int:
        """Number of updates where the state has no ``step``: the counted one, unless the state shows another.

        A buffer of zeros that no update has written is still the engine's own, which a skipped step leaves.
        """
        entry = self._state.get(self._record(index).param)
        told = self._rule.saved_step(entry)
        if not told or counted:
            return counted * told
        assert entry is not None
        return int(local_tensor(entry[self._rule.states[0]]).any())

    def _record(self, index: int) -> TensorRecord:
        return self._parameters.records[index]
