"""Random programs of what users do to an optimizer and its scheduler leave ours equal to torch's pair.

`python -m tests.parity.test_random_programs cpu 20000` runs that many, and names the seed of one that fails.
"""

from __future__ import annotations

import copy
import os
import pickle
import random
import sys
import warnings
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch

from fused_clr import testing
from tests.cases import OPTIMIZERS, SCHEDULES, momenta_of
from tests.helpers.pairs import SHAPES, Pair, gradients, make_pair

Operation = Callable[["Program"], None]
# What may happen at any time, and what may also happen between optimizer.step() and scheduler.step().
anywhere: list[Operation] = []
between: list[Operation] = []


def at_any_time(operation: Operation) -> Operation:
    anywhere.append(operation)
    return operation


def also_between(operation: Operation) -> Operation:
    between.append(operation)
    return at_any_time(operation)


class Program:
    """A random program over our pair and torch's, both in float64: a difference is no rounding.

    Attributes:
        log: The operations so far.
        graph: A recorded step, whose launches are replayed in the place of steps; None on the cpu backend.
    """

    def __init__(self, seed: int, backend: str) -> None:
        self.random = random.Random(seed)
        self.seeds = count(1000 * seed)
        self.backend = backend
        optimizer, schedule = (self.random.choice(list(cases.values())) for cases in (OPTIMIZERS, SCHEDULES))
        flags = optimizer.options(*(self.random.random() < 0.2 for _ in optimizer.flags))
        self.make = lambda ours: make_pair(
            ours, seed, optimizer_case=optimizer, schedule_case=schedule, dtype=torch.float64, **flags
        )
        self.ours, self.theirs = self.make(True), self.make(False)
        self.end = schedule.end
        self.log = [f"{optimizer.name}, {schedule.name}, {flags}"]
        self.graph: testing.RecordedGraph | None = None
        self.static: list[torch.Tensor] = []

    def run(self, length: int) -> None:
        for _ in range(length):
            if self.is_over:
                return
            self.do(self.random.choice([take_step, take_step, replay, *anywhere]))
        self.do(take_step)

    @property
    def is_over(self) -> bool:
        """Whether torch's scheduler may soon do something else than ours: the next operations are up to 6 steps."""
        return bool(self.theirs.scheduler.last_epoch > self.end - 6)

    def do(self, operation: Operation) -> None:
        self.log.append(operation.__name__)
        operation(self)
        self.compare()

    def each(self, change: Callable[[Pair], Any]) -> None:
        change(self.ours)
        change(self.theirs)

    def replace_ours(self, pair: Pair) -> None:
        self.ours, self.graph = pair, None

    def set_gradients(self, for_all: bool = False) -> None:
        """New gradients, in the same memory or not, for some parameters or all."""
        values: list[Any] = list(gradients(self.ours.params, next(self.seeds)))
        if not for_all and self.random.random() < 0.3:
            values[self.random.randrange(len(values))] = None
        in_place = self.random.random() < 0.5
        for pair in (self.ours, self.theirs):
            for param, value in zip(pair.params, values, strict=True):
                if value is not None and in_place and param.grad is not None:
                    param.grad.copy_(value)
                else:
                    param.grad = None if value is None else value.clone()

    def compare(self) -> None:
        """Parameters, param groups and state are equal."""
        for mine, torchs in zip(self.ours.optimizer.param_groups, self.theirs.optimizer.param_groups, strict=True):
            assert float(mine["lr"]) == pytest.approx(float(torchs["lr"]), rel=1e-11), (mine["lr"], torchs["lr"])
            assert momenta_of(mine) == pytest.approx(momenta_of(torchs), rel=1e-11)
            assert mine["weight_decay"] == torchs["weight_decay"]
            assert len(mine["params"]) == len(torchs["params"])
        for mine, torchs in zip(self.ours.params, self.theirs.params, strict=True):
            torch.testing.assert_close(mine, torchs, rtol=1e-9, atol=1e-10)
            own, expected = (pair.optimizer.state.get(p, {}) for pair, p in ((self.ours, mine), (self.theirs, torchs)))
            for key in set(own) | set(expected):
                # An entry of ours may exist before the first step.
                if key in expected or own.get("step", own[key]).any():
                    torch.testing.assert_close(own[key].detach(), expected[key], rtol=1e-9, atol=1e-12)


# -- steps -------------------------------------------------------------------------------------------------------------
def take_step(program: Program) -> None:
    program.set_gradients()
    program.each(lambda pair: pair.optimizer.step())
    program.compare()
    while program.random.random() < 0.3:
        program.do(program.random.choice(between))
    program.each(lambda pair: pair.scheduler.step())


def replay(program: Program) -> None:
    """Records a step, or replays the one that was."""
    if program.backend == "cpu":
        take_step(program)
        return
    if program.graph is None:
        # A capture refuses a parameter that requires a gradient and has none.
        program.set_gradients(for_all=True)
        program.static = [param.grad for param in program.ours.params]
        with testing.record_launches() as program.graph:
            program.ours.optimizer.step()
    else:
        values = gradients(program.ours.params, next(program.seeds))
        for mine, torchs, static, value in zip(
            program.ours.params, program.theirs.params, program.static, values, strict=True
        ):
            torchs.grad, mine.grad = value, static.copy_(value)
        program.ours.optimizer.check_replay(optimizer_only=True)
        program.graph.replay()
    program.theirs.optimizer.step()
    program.each(lambda pair: pair.scheduler.step())


@at_any_time
def extra_scheduler_step(program: Program) -> None:
    # After a capture the device drives: the scheduler no longer ticks.
    if program.ours.optimizer.captures:
        return
    program.each(lambda pair: pair.scheduler.step())


# -- memory ------------------------------------------------------------------------------------------------------------
@also_between
def move_parameter(program: Program) -> None:
    index = program.random.randrange(len(SHAPES))

    def move(pair: Pair) -> None:
        param = pair.params[index]
        old = param.data
        param.data = old.clone()
        # Whoever still writes here is seen.
        old.fill_(torch.nan)

    program.each(move)


@also_between
def move_state(program: Program) -> None:
    index, way = program.random.randrange(len(SHAPES)), program.random.randrange(3)

    def move(pair: Pair) -> None:
        for key, value in pair.optimizer.state.get(pair.params[index], {}).items():
            if key == "step":
                continue
            old = value.data
            if way == 0:
                value.data = old.clone()
                old.fill_(torch.nan)
            elif way == 1:
                torch.utils.swap_tensors(value, value.clone())
            else:
                pair.optimizer.state[pair.params[index]][key] = value.clone()

    program.each(move)


@also_between
def write_step(program: Program) -> None:
    index, value, way = program.random.randrange(len(SHAPES)), program.random.randrange(50), program.random.randrange(2)

    def write(pair: Pair) -> None:
        entry = pair.optimizer.state.get(pair.params[index])
        if not entry or "step" not in entry:
            return
        if way:
            entry["step"].fill_(value)
        else:
            entry["step"] = torch.tensor(float(value))

    program.each(write)


# -- lists and hyperparameters -----------------------------------------------------------------------------------------
@also_between
def edit_lists(program: Program) -> None:
    way = program.random.randrange(4)

    def edit(pair: Pair) -> None:
        groups = pair.optimizer.param_groups
        first, second = (group["params"] for group in groups)
        if way == 0:
            first[0], second[-1] = second[-1], first[0]
        elif way == 1:
            first.append(second.pop(0))
            second.append(first.pop(0))
        elif way == 2:
            groups[1] = dict(groups[1])
        else:
            pair.optimizer.param_groups = [dict(group) for group in groups]

    program.each(edit)
    # Captures of other groups no longer fit.
    program.graph = None


@also_between
def write_hyperparameter(program: Program) -> None:
    group, number = program.random.randrange(2), program.random.choice([0.0, 0.01, 0.1])
    make = program.random.choice([float, np.float64, np.float32, lambda x: np.float64(x).reshape(())[()]])
    value = make(number)

    def write(pair: Pair) -> None:
        pair.optimizer.param_groups[group]["weight_decay"] = float(value) if pair is program.theirs else value

    program.each(write)


REFUSED: list[Callable[[Pair], Any]] = [
    lambda pair: pair.optimizer.param_groups[0].update(weight_decay="0.1"),
    lambda pair: pair.optimizer.param_groups[1].update(lr=0.5),
    lambda pair: pair.optimizer.param_groups[0].update(eps=float("nan")),
    lambda pair: pair.optimizer.param_groups[0].__delitem__("lr"),
    lambda pair: pair.optimizer.set_schedule_step("3"),
    lambda pair: pair.optimizer.set_schedule([None]),
    lambda pair: pair.optimizer.load_state_dict({"state": {}, "param_groups": []}),
    lambda pair: pair.optimizer.add_param_group({"params": [pair.params[0]]}),
    lambda pair: pair.scheduler.load_state_dict({"last_epoch": "3"}),
]


@also_between
def refused(program: Program) -> None:
    """Bad input is an error, and changes nothing."""
    change = program.random.choice(REFUSED)
    # Plain dicts that were put into the list become groups, which check what is written.
    program.ours.optimizer.status()
    with pytest.raises((ValueError, TypeError, KeyError, RuntimeError)):
        change(program.ours)


# -- copies and checkpoints --------------------------------------------------------------------------------------------
@also_between
def deep_copy(program: Program) -> None:
    program.replace_ours(copy.deepcopy(program.ours))


@also_between
def pickled(program: Program) -> None:
    program.replace_ours(pickle.loads(pickle.dumps(program.ours)))


@also_between
def set_the_same_schedule(program: Program) -> None:
    optimizer = program.ours.optimizer
    if program.random.random() < 0.5:
        optimizer.set_schedule([group["schedule"] for group in optimizer.param_groups])
    else:
        for group in optimizer.param_groups:
            group["schedule"] = copy.copy(group["schedule"])


def load(program: Program, target: Pair, optimizer_state: Any, scheduler_state: Any) -> None:
    """Loads both, in any order; ours needs the optimizer's alone.

    SGD's state has no step counts. What torch trained on is then known by the learning rate, which may be the same as
    before: the scheduler's state must be loaded last.
    """
    loads = [
        lambda: target.optimizer.load_state_dict(optimizer_state),
        lambda: target.scheduler.load_state_dict(scheduler_state),
    ]
    if type(target.optimizer).__name__ not in ("SGD", "FusedSGD"):
        program.random.shuffle(loads)
    for each in loads:
        each()


@also_between
def save_and_load(program: Program) -> None:
    """Into itself, or into a new pair with the parameters of this one."""
    states = copy.deepcopy((program.ours.optimizer.state_dict(), program.ours.scheduler.state_dict()))
    if program.random.random() < 0.5:
        load(program, program.ours, *states)
    elif [len(group["params"]) for group in program.ours.optimizer.param_groups] == [2, 2]:
        fresh = with_parameters_of(program.ours, program.make(True))
        load(program, fresh, *states)
        program.replace_ours(fresh)


@at_any_time
def through_torch(program: Program) -> None:
    """Our checkpoint, loaded into a pair of torch's, which saves one that ours loads."""
    carrier = with_parameters_of(program.ours, program.make(False))
    load(program, carrier, program.ours.optimizer.state_dict(), program.ours.scheduler.state_dict())
    for _ in range(program.random.choice([0, 0, 1, 3])):
        # Torch trains on; so does the reference.
        for mine, torchs, value in zip(
            carrier.params, program.theirs.params, gradients(carrier.params, next(program.seeds)), strict=True
        ):
            mine.grad, torchs.grad = value.clone(), value
        for pair in (carrier, program.theirs):
            pair.optimizer.step()
            pair.scheduler.step()
    fresh = with_parameters_of(carrier, program.make(True))
    load(program, fresh, carrier.optimizer.state_dict(), carrier.scheduler.state_dict())
    program.replace_ours(fresh)


def with_parameters_of(source: Pair, target: Pair) -> Pair:
    """``target``, whose groups hold copies of the parameters that the groups of ``source`` hold."""
    position = {id(param): index for index, param in enumerate(source.params)}
    for own, group in zip(target.optimizer.param_groups, source.optimizer.param_groups, strict=True):
        own["params"][:] = [target.params[position[id(param)]] for param in group["params"]]
    with torch.no_grad():
        for param, value in zip(target.params, source.params, strict=True):
            param.copy_(value)
    return target


def run_program(seed: int, backend: str, length: int = 35) -> None:
    program = Program(seed, backend)
    try:
        with warnings.catch_warnings():
            # Loading what torch trained on says at which step it goes on.
            warnings.filterwarnings("ignore", "state_dict has old schedules")
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            program.run(length)
    except BaseException:
        print(f"random program {seed} on {backend}: {' '.join(program.log)}")
        raise


@pytest.mark.parametrize("seed", range(40))
def test_on_the_cpu_backend(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_CLR_BACKEND", "cpu")
    run_program(seed, "cpu")


@pytest.mark.parametrize("seed", range(4))
def test_on_the_triton_backend(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_CLR_BACKEND", "triton")
    run_program(seed, "triton")


if __name__ == "__main__":
    os.environ["FUSED_CLR_BACKEND"] = name = sys.argv[1]
    torch.set_num_threads(1)
    first = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    for number in range(first, first + int(sys.argv[2])):
        run_program(number, name)
    print(f"{number - first + 1:,} programs on {name}: none differs from torch's pair")
