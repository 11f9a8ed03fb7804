"""Averages of the parameters: which there are, and exchanging them with the parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from .._device.moments import AVERAGE
from .._device.sharding import local_tensor
from ..averaging import Averaging
from .param_group import ParamGroup


def check_averaging(averaging: Averaging | None) -> Averaging:
    """The averaging of an optimizer.

    Raises:
        RuntimeError: It has none.
    """
    if averaging is None:
        raise RuntimeError("this optimizer keeps no averages: create it with averaging=Averaging.swa() or .ema()")
    return averaging


def pairs_of(
    groups: Sequence[ParamGroup], state: Mapping[Any, Any], counts: Sequence[int], averaging: Averaging
) -> list[tuple[Tensor, Tensor]]:
    """Each parameter that was averaged, with its average; of a sharded one, the average's shard in this process.

    Args:
        groups: The param groups.
        state: ``optimizer.state``.
        counts: How often the parameters of each group were averaged.
        averaging: Which steps average.

    Raises:
        RuntimeError: A group was not averaged and never will be.
    """
    pairs = []
    for index, (group, count) in enumerate(zip(groups, counts, strict=True)):
        if not count:
            if averaging.every == "cycle" and not (group.schedule and group.schedule.has_cycles):
                raise RuntimeError(
                    f"averaging must have every= a number of steps, since param_groups[{index}] has no cycles: its "
                    f"schedule is {group.schedule}"
                )
            continue
        for param in group.stored("params"):
            average = (state.get(param) or {}).get(AVERAGE)
            if average is not None:
                pairs.append((param, local_tensor(average)))
    return pairs


@contextmanager
def exchanged(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """In the body, the parameters hold their averages."""
    saved = [(param, local_tensor(param).detach().clone()) for param, _ in pairs]
    try:
        for param, average in pairs:
            local_tensor(param).detach().copy_(average)
        yield
    finally:
        for param, values in saved:
            # Its present memory: the body may have moved it, as module.to() does.
            local_tensor(param).detach().copy_(values)


def check_module(groups: Sequence[ParamGroup], module: Any) -> None:
    """Checks that averages can be given the names of a module's parameters, or without one the optimizer's.

    Raises:
        TypeError: ``module`` is neither a module nor None.
        ValueError: It has none of the parameters; or it is None, and the parameters have no names.
    """
    if module is None:
        if not all(group.stored("param_names") for group in groups):
            raise ValueError(
                "module must be given, since the parameters have no names; or create the optimizer with "
                "model.named_parameters()"
            )
        return
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module must be a torch.nn.Module or None, got {type(module).__name__}")
    own = {id(param) for group in groups for param in group.stored("params")}
    if own and own.isdisjoint(map(id, module.parameters())):
        raise ValueError(
            f"module must have parameters of this optimizer, got {type(module).__name__} with none of them"
        )


def copied_state_dict(groups: Sequence[ParamGroup], module: torch.nn.Module | None) -> dict[str, Any]:
    """A copy of the module's ``state_dict``, or without one of the parameters by the optimizer's names for them."""
    if module is not None:
        values = module.state_dict()
    else:
        values = {
            name: param
            for group in groups
            for name, param in zip(group.stored("param_names"), group.stored("params"), strict=True)
        }
    return {
        name: value.detach().clone() if isinstance(value, Tensor) else deepcopy(value) for name, value in values.items()
    }
