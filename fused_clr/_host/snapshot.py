"""A copy of everything that training steps change, which can be put back in place."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from .._device.tensors import has_memory
from .._torch_internals import save_scaler_stages, writes_overlap
from . import checkpoint
from .optimizer import FusedOptimizer


class Snapshot:
    """A copy of objects and of the random states, for `restore`, which keeps every tensor's address.

    Random states are those of torch on the CPU and all CUDA devices, of `random` and of numpy.

    Args:
        objects: Each with its name in messages. A module: parameters, buffers, gradients, training flags. A fused
            optimizer: parameters, gradients, state, groups, schedule, counters, history. Another optimizer of torch's:
            parameters, gradients, ``state_dict``. A `torch.Generator`. Anything else with ``state_dict`` and
            ``load_state_dict``.

    Raises:
        TypeError: An object is none of these.
        ValueError: A parameter or buffer has no memory yet, so that it could not be restored.
        RuntimeError: Called during CUDA graph capture.
    """

    def __init__(self, objects: Iterable[tuple[str, Any]]) -> None:
        self._undo: list[Callable[[], Any]] = []
        self._seen: set[int] = set()
        with torch.no_grad():
            for name, value in objects:
                self._save(name, value)
            self._save_random_states()

    @torch.no_grad()
    def restore(self) -> None:
        """Puts everything back. May be called several times."""
        for undo in self._undo:
            undo()

    def _save(self, name: str, value: Any) -> None:
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, nn.Module):
            self._save_module(name, value)
        elif isinstance(value, FusedOptimizer):
            self._save_fused_optimizer(name, value)
        elif isinstance(value, LRScheduler) and isinstance(value.optimizer, FusedOptimizer):
            # The optimizer has the schedule; load_state_dict would set its step again.
            self._save(name, value.optimizer)
            self._undo.append(partial(vars(value).update, vars(value).copy()))
        elif isinstance(value, torch.Generator):
            self._undo.append(partial(value.set_state, value.get_state()))
        elif hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
            if isinstance(value, torch.optim.Optimizer):
                self._save_params(name, (param for group in value.param_groups for param in group["params"]))
            saved = deepcopy(value.state_dict())
            # A copy: torch's optimizers keep the tensors that they load.
            self._undo.append(lambda: value.load_state_dict(deepcopy(saved)))
            if isinstance(value, torch.amp.GradScaler):
                self._undo.append(save_scaler_stages(value))
        else:
            raise TypeError(
                f"{name} must be a module, a torch.Generator, or have state_dict and load_state_dict, got "
                f"{type(value).__name__}"
            )

    def _save_module(self, name: str, root: nn.Module) -> None:
        for module in root.modules():
            self._undo.append(partial(setattr, module, "training", module.training))
            for table in (module._parameters, module._buffers):
                tensors = {key: tensor for key, tensor in table.items() if tensor is not None}
                self._save_params(name, tensors.values())
                # A forward may assign a new tensor instead of writing into the old one.
                self._undo.append(partial(table.update, tensors))

    def _save_params(self, name: str, params: Iterable[Tensor]) -> None:
        for param in params:
            if not has_memory(param):
                raise ValueError(
                    f"{name} has a tensor without memory (a lazy module's, or on meta), which cannot be restored: run "
                    "the model once before"
                )
            self._save_tensor(param)
            grad = param.grad if param.is_leaf else None
            if grad is not None:
                self._save_tensor(grad)
            self._undo.append(partial(setattr, param, "grad", grad))

    def _save_tensor(self, tensor: Tensor) -> None:
        # What cannot be written in place has not been.
        if id(tensor) not in self._seen and not writes_overlap(tensor):
            self._seen.add(id(tensor))
            saved = tensor.detach().clone()
            self._undo.append(lambda: tensor.detach().copy_(saved))

    def _save_fused_optimizer(self, name: str, optimizer: FusedOptimizer) -> None:
        readings, counts = optimizer._take_readings()
        groups = [dict(dict.items(group)) for group in optimizer.param_groups]
        params = [param for group in groups for param in group["params"]]
        self._save_params(name, params)
        state = optimizer._state
        entries: dict[Tensor, Any] = {param: dict(state[param]) for param in params if state.get(param)}
        for param, entry in entries.items():
            entry.update({key: value.clone() for key, value in entry.items() if isinstance(value, Tensor)})
            entry["step"] = readings.update_steps[param]
        others = {key: value for key, value in state.items() if key not in set(params)}
        loaded = checkpoint.Loaded([], entries, others, [], None, False, readings.average_counts)
        states = [engine.state for engine in optimizer._engines]
        telemetry = [state.save_telemetry() for state in states]
        names = ("_awaits_scheduler", "_assigned_epoch", "_steps_since_scheduler")
        attributes = {name: getattr(optimizer, name) for name in names}

        def undo() -> None:
            del optimizer.param_groups[len(groups) :]
            for group, values in zip(optimizer.param_groups, groups, strict=True):
                group.replace_all(values)
            optimizer._load_state(loaded)
            optimizer._set_schedule_step(readings.schedule_step, attributes["_awaits_scheduler"])
            vars(optimizer).update(attributes)
            for engine in optimizer._engines:
                engine.state.set_counts(*counts)
            for state, saved in zip(states, telemetry, strict=True):
                state.load_telemetry(saved)

        self._undo.append(undo)

    def _save_random_states(self) -> None:
        states: list[tuple[Callable[[Any], Any], Any]] = [
            (random.setstate, random.getstate()),
            (np.random.set_state, np.random.get_state()),
            (torch.set_rng_state, torch.get_rng_state()),
        ]
        if torch.cuda.is_initialized():
            states.append((torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
        for restore, state in states:
            self._undo.append(partial(restore, state))
