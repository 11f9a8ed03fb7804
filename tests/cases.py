"""Every optimizer and every schedule, each with its peer in torch. A new one is tested by adding its entry here."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import combinations, product
from typing import Any, NamedTuple

import pytest
import torch
from torch.optim import lr_scheduler

from fused_clr import CyclicLR, FusedAdam, FusedAdamW, schedules


class OptimizerCase(NamedTuple):
    """An optimizer class and its peer.

    Attributes:
        name: As in torch's database of optimizer tests.
        ours: The class.
        torch_peer: torch's class of the same arguments.
        flags: Two boolean arguments that change what a step computes; each is tried on and off, with all other factors.
        settings: A value other than the default for each hyperparameter.
        float16: Arguments that float16 needs, in torch too.
    """

    name: str
    ours: type[Any]
    torch_peer: type[Any]
    flags: tuple[str, str]
    settings: dict[str, Any]
    float16: dict[str, Any]


class ScheduleCase(NamedTuple):
    """A scheduler class with arguments, and its peer.

    Attributes:
        name: The test id.
        ours: The scheduler class.
        torch_peer: torch's class of the same arguments.
        value: The schedule's class.
        arguments: Of both schedulers, for two param groups: a list has an entry for each.
        steps: Two whole cycles, or what else shows all of the schedule, and a step more.
    """

    name: str
    ours: type[Any]
    torch_peer: type[Any]
    value: type[Any]
    arguments: dict[str, Any]
    steps: int

    def of_group(self, index: int) -> dict[str, Any]:
        """The arguments for one param group alone."""
        return {key: value[index] if isinstance(value, list) else value for key, value in self.arguments.items()}

    def schedule(self, index: int = 0) -> Any:
        """The schedule of a param group, as a value."""
        return self.value(**self.of_group(index))


def cyclic(name: str, steps: int, up: float, down: float, **arguments: Any) -> ScheduleCase:
    bounds = {"base_lr": [1e-4, 1e-3], "max_lr": [1e-2, 2e-2], "step_size_up": up, "step_size_down": down}
    return ScheduleCase(name, CyclicLR, lr_scheduler.CyclicLR, schedules.Cyclic, bounds | arguments, steps)


# Small second moments underflow in float16, and the default eps with them: a division by 0, in torch too.
ADAM_FLOAT16 = {"eps": 1e-3}
ADAM_SETTINGS = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.03}
ADAM_FLAGS = ("amsgrad", "maximize")
ADAM = OptimizerCase("Adam", FusedAdam, torch.optim.Adam, ADAM_FLAGS, ADAM_SETTINGS, ADAM_FLOAT16)
ADAMW = OptimizerCase("AdamW", FusedAdamW, torch.optim.AdamW, ADAM_FLAGS, ADAM_SETTINGS, ADAM_FLOAT16)
TRIANGULAR2 = cyclic("triangular2", 23, 7, 4, mode="triangular2")

OPTIMIZERS = {case.name: case for case in (ADAM, ADAMW)}
SCHEDULES = {
    case.name: case
    for case in (
        TRIANGULAR2,
        cyclic("triangular", 14, 4, 2.5, mode="triangular"),
        cyclic("exp_range", 15, 2.5, 4.25, mode="exp_range", gamma=0.97),
        cyclic("triangular-constant-momentum", 13, 2, 4, mode="triangular", cycle_momentum=False),
        cyclic("triangular2-constant-momentum", 14, 4, 2.5, mode="triangular2", cycle_momentum=False),
        cyclic("exp_range-constant-momentum", 13, 3, 3, mode="exp_range", gamma=0.97, cycle_momentum=False),
    )
}

# Every schedule with one optimizer, and every optimizer with one schedule, at least.
IN_TURN = [
    (list(OPTIMIZERS.values())[index % len(OPTIMIZERS)], list(SCHEDULES.values())[index % len(SCHEDULES)])
    for index in range(max(len(OPTIMIZERS), len(SCHEDULES)))
]

by_optimizer = pytest.mark.parametrize("optimizer_case", OPTIMIZERS.values(), ids=OPTIMIZERS)
by_schedule = pytest.mark.parametrize("schedule_case", SCHEDULES.values(), ids=SCHEDULES)


def momenta_of(group: dict[str, Any]) -> tuple[float, ...]:
    """What a param group says beside its learning rate: betas, or the momentum. The first one is what cycles."""
    return tuple(group["betas"]) if "betas" in group else (group["momentum"],)


def covering(*factors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Few rows in which any two values of different factors meet: each takes the most pairs that are still missing."""

    def pairs(row: Sequence[int]) -> set[tuple[tuple[int, int], ...]]:
        return set(combinations(enumerate(row), 2))

    every = list(product(*(range(len(factor)) for factor in factors)))
    # Where several are as good, not the first: rows differ in more than they must.
    random.Random(0).shuffle(every)
    candidates = {row: pairs(row) for row in every}
    missing, rows = set[Any]().union(*candidates.values()), []
    while missing:
        best = max(candidates, key=lambda row: len(candidates[row] & missing))
        missing -= candidates[best]
        rows.append(tuple(factor[index] for factor, index in zip(factors, best, strict=True)))
    return rows


def row_id(row: Sequence[Any]) -> str:
    """The values of a row, as a test id."""
    return "-".join(str(getattr(value, "name", value)).removeprefix("torch.") for value in row)


def by_rows(names: str, rows: Sequence[tuple[Any, ...]]) -> Callable[..., Any]:
    """Parametrises a test by rows of cases and other values."""
    return pytest.mark.parametrize(names.split(), rows, ids=map(row_id, rows))
