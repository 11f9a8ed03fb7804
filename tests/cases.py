"""Every optimizer and every schedule, each with its peer in torch. A new one is tested by adding its entry here."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import combinations, product
from typing import Any, NamedTuple

import pytest
import torch
from torch.optim import lr_scheduler

import fused_clr
from fused_clr import CyclicLR, FusedAdam, FusedAdamW, FusedSGD


class OptimizerCase(NamedTuple):
    """An optimizer class and its peer.

    Attributes:
        name: As in torch's database of optimizer tests.
        ours: The class.
        torch_peer: torch's class of the same arguments.
        flags: Arguments that switch on one of two things that a step computes; each is tried on and off, with all other
            factors.
        settings: A value other than the default for each hyperparameter.
        float16: Arguments that float16 needs, in torch too.
    """

    name: str
    ours: type[Any]
    torch_peer: type[Any]
    flags: tuple[dict[str, Any], dict[str, Any]]
    settings: dict[str, Any]
    float16: dict[str, Any]

    def options(self, *is_on: bool) -> dict[str, Any]:
        """The arguments of the flags that are on."""
        return {key: value for flag, on in zip(self.flags, is_on, strict=False) if on for key, value in flag.items()}


class ScheduleCase(NamedTuple):
    """A scheduler class with arguments, and its peer.

    Attributes:
        name: The test id.
        ours: The scheduler class, or a function that makes several on one optimizer.
        torch_peer: torch's class of the same arguments.
        arguments: Of both schedulers, for two param groups: a list has an entry for each.
        steps: Two whole cycles, or what else shows all of the schedule, and a step more.
        end: The last step at which both are to agree. After it ours holds its learning rate, and torch's does not.
        jumps: The next learning rate of torch's does not follow from the present one.
    """

    name: str
    ours: Callable[..., Any]
    torch_peer: Callable[..., Any]
    arguments: dict[str, Any]
    steps: int
    end: int = 10**6
    jumps: bool = True

    def of_group(self, index: int) -> dict[str, Any]:
        """The arguments for one param group alone."""
        return {key: value[index] if isinstance(value, list) else value for key, value in self.arguments.items()}

    def schedule(self, index: int = 0) -> Any:
        """The schedule of a param group, as a value."""
        optimizer = FusedAdam([torch.nn.Parameter(torch.ones(1))])
        return self.ours(optimizer, **self.of_group(index)).schedules[0]


def cyclic(name: str, steps: int, up: float, down: float, **arguments: Any) -> ScheduleCase:
    bounds = {"base_lr": [1e-4, 1e-3], "max_lr": [1e-2, 2e-2], "step_size_up": up, "step_size_down": down}
    return ScheduleCase(name, CyclicLR, lr_scheduler.CyclicLR, bounds | arguments, steps)


def family(name: str, kind: str, steps: int, end: int = 10**6, **arguments: Any) -> ScheduleCase:
    closed_form = getattr(fused_clr, kind).CLOSED_FORM
    peers = getattr(fused_clr, kind), getattr(lr_scheduler, kind)
    return ScheduleCase(name, *peers, arguments, steps, end, closed_form)


def sequential(name: str, steps: int, end: int, milestones: tuple[int, ...], **kinds: dict[str, Any]) -> ScheduleCase:
    """A SequentialLR of some classes with their arguments."""

    def made(module: Any) -> Callable[..., Any]:
        def make(optimizer: Any, milestones: tuple[int, ...], last_epoch: int = -1) -> Any:
            each = [getattr(module, kind)(optimizer, **arguments) for kind, arguments in kinds.items()]
            return module.SequentialLR(optimizer, each, milestones, last_epoch)

        return make

    return ScheduleCase(name, made(fused_clr), made(lr_scheduler), {"milestones": milestones}, steps, end, jumps=False)


def in_turn(*factors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """As many rows as the longest factor has values; those of the others take turns."""
    return [tuple(own[index % len(own)] for own in factors) for index in range(max(map(len, factors)))]


# Small second moments underflow in float16, and the default eps with them: a division by 0, in torch too.
ADAM_FLOAT16 = {"eps": 1e-3}
ADAM_SETTINGS = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.03}
ADAM_FLAGS = ({"amsgrad": True}, {"maximize": True})
ADAM = OptimizerCase("Adam", FusedAdam, torch.optim.Adam, ADAM_FLAGS, ADAM_SETTINGS, ADAM_FLOAT16)
ADAMW = OptimizerCase("AdamW", FusedAdamW, torch.optim.AdamW, ADAM_FLAGS, ADAM_SETTINGS, ADAM_FLOAT16)
SGD_SETTINGS = {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.03}
SGD_FLAGS = ({"nesterov": True, "momentum": 0.9}, {"maximize": True})
SGD = OptimizerCase("SGD", FusedSGD, torch.optim.SGD, SGD_FLAGS, SGD_SETTINGS, {})
TRIANGULAR2 = cyclic("triangular2", 23, 7, 4, mode="triangular2")

OPTIMIZERS = {case.name: case for case in (ADAM, ADAMW, SGD)}
CYCLES = {
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
# Those of the other schedulers.
FAMILIES = {
    case.name: case
    for case in (
        family("one-cycle", "OneCycleLR", 13, 79, max_lr=[1e-2, 2e-2], total_steps=80, pct_start=0.11),
        family(
            "one-cycle-three-phases",
            "OneCycleLR",
            15,
            79,
            max_lr=[1e-2, 2e-2],
            epochs=8,
            steps_per_epoch=10,
            pct_start=0.09,
            anneal_strategy="linear",
            cycle_momentum=False,
            div_factor=7.0,
            final_div_factor=30.0,
            three_phase=True,
        ),
        family("cosine", "CosineAnnealingLR", 13, 80, T_max=80, eta_min=1e-4),
        family("restarts", "CosineAnnealingWarmRestarts", 17, T_0=5, T_mult=2, eta_min=1e-5),
        family("linear", "LinearLR", 11, start_factor=0.1, total_iters=9),
        family("exponential", "ExponentialLR", 11, gamma=0.97),
        family("polynomial", "PolynomialLR", 11, total_iters=9, power=2.0),
        family("constant", "ConstantLR", 11, factor=0.25, total_iters=7),
        sequential(
            "sequence",
            15,
            10**6,
            (4, 7, 12),
            ConstantLR={"factor": 0.25, "total_iters": 2},
            LinearLR={"start_factor": 0.1, "total_iters": 3},
            CosineAnnealingWarmRestarts={"T_0": 3},
            ExponentialLR={"gamma": 0.97},
        ),
    )
}
SCHEDULES = CYCLES | FAMILIES

# Every schedule with one optimizer, and every optimizer with one schedule, at least.
IN_TURN = in_turn(list(OPTIMIZERS.values()), list(SCHEDULES.values()))

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
