"""A corrupt value under any key of ours is an error that names the key and the value, and nothing is loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch

from tests.cases import FAMILIES, TRIANGULAR2, ScheduleCase
from tests.helpers.pairs import Pair, all_equal, copies, make_pair, train

NAN = float("nan")
MISSING = object()
CORRUPT = {"text": "3", "nan": NAN, "none": None, "negative": -1, "list": [1, 2, 3], "missing": MISSING}

# Torch does not read these either.
UNREAD = {"_last_lr", "_is_initial", "_get_lr_called_within_step"}
# Torch's checkpoints, or those of some schedules, are like that.
ALLOWED = {
    # They are milestones.
    ("_milestones", "list"),
    *((key, "missing") for key in ("step_sizes", "schedule_step", "scale_fn_name", "_scale_fn_custom")),
    *((key, "missing") for key in ("_step_count", "use_beta1")),
    *((key, "none") for key in ("scale_fn", "total_steps", "scale_fn_name", "_scale_fn_custom")),
}


def stepped_pair(schedule_case: ScheduleCase = TRIANGULAR2) -> Pair:
    pair = make_pair(True, schedule_case=schedule_case)
    train(pair, 3)
    # Between the two steps: one flag more to lose.
    pair.optimizer.step()
    return pair


def everything(pair: Pair) -> list[Any]:
    """All that a load could change; the tensors are copies."""
    states = pair.optimizer.state_dict(), pair.scheduler.state_dict()
    moments = [value for entry in states[0]["state"].values() for value in entry.values()]
    groups = [{key: value for key, value in group.items() if key != "params"} for group in pair.optimizer.param_groups]
    return [copies([*pair.params, *moments]), str(states[0]["param_groups"]), str(states[1]), str(groups)]


def assert_refused(pair: Pair, load: Callable[[Any], None], saved: Any, named: str, value: Any) -> None:
    before = everything(pair)
    try:
        load(saved)
    except ValueError as error:
        message = str(error)
    else:
        pytest.fail(f"{named} = {value!r} was loaded")
    after = everything(pair)
    assert all_equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert named in message
    if value is not MISSING:
        # A list in a schedule has become a tuple.
        assert repr(value).strip("[]") in message


def corrupted(saved: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    result = dict(saved)
    if value is MISSING:
        del result[key]
    else:
        result[key] = value
    return result


def corruptions(saved: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key in saved:
        for name, value in CORRUPT.items():
            if key not in UNREAD and (key, name) not in ALLOWED:
                yield key, value


def test_the_optimizers_schedules(backend: str) -> None:
    pair = stepped_pair()
    saved = copy.deepcopy(pair.optimizer.state_dict())
    group = saved["param_groups"][1]
    own = group["schedule"]
    assert {"step", "is_ahead", "updates", "momentum", "type", "gamma"} <= set(own)
    for key, value in corruptions(own):
        group["schedule"] = corrupted(own, key, value)
        assert_refused(pair, pair.optimizer.load_state_dict, saved, key, value)
    for whole in ("3", NAN, -1, [1, 2]):
        group["schedule"] = whole
        assert_refused(pair, pair.optimizer.load_state_dict, saved, "['param_groups'][1]['schedule']", whole)
    group["schedule"] = own
    pair.optimizer.load_state_dict(saved)


@pytest.mark.parametrize("value", ["3", NAN, None, -1, 1.5, 2**60, [1], True, torch.tensor([1.0, 2.0])], ids=str)
def test_the_steps_of_parameters(backend: str, value: Any) -> None:
    pair = stepped_pair()
    saved = copy.deepcopy(pair.optimizer.state_dict())
    saved["state"][1]["step"] = value
    assert_refused(pair, pair.optimizer.load_state_dict, saved, "state_dict['state'][1]['step']", MISSING)


def test_the_scheduler(backend: str) -> None:
    pair = stepped_pair()
    own = copy.deepcopy(pair.scheduler.state_dict())
    assert {"step_sizes", "schedule_step", "scale_fn_name", "last_epoch", "max_lrs", "use_beta1"} <= set(own)
    for key, value in corruptions(own):
        # An error of one entry names it in the singular.
        assert_refused(pair, pair.scheduler.load_state_dict, corrupted(own, key, value), key.removesuffix("s"), value)
    for key, value in (
        ("step_sizes", ("7", 4)),
        ("step_sizes", (7, NAN)),
        ("step_sizes", (7, 0)),
        ("step_sizes", (4, 7)),
        ("schedule_step", (1.5, False)),
        ("schedule_step", (-1, False)),
        ("schedule_step", (4, "no")),
        ("schedule_step", (4, 1)),
        ("step_ratio", 1.0),
        ("last_epoch", True),
        ("_scale_fn_custom", {"a": 1}),
    ):
        assert_refused(pair, pair.scheduler.load_state_dict, own | {key: value}, key, MISSING)
    for whole in ("3", None, [1]):
        assert_refused(pair, pair.scheduler.load_state_dict, whole, "state_dict", whole)
    pair.scheduler.load_state_dict(own)


@pytest.mark.parametrize("case", FAMILIES.values(), ids=FAMILIES)
def test_the_other_schedulers(monkeypatch: pytest.MonkeyPatch, case: ScheduleCase) -> None:
    monkeypatch.setenv("FUSED_CLR_BACKEND", "cpu")
    pair = stepped_pair(case)
    own = copy.deepcopy(pair.scheduler.state_dict())
    for key, value in corruptions(own):
        assert_refused(pair, pair.scheduler.load_state_dict, corrupted(own, key, value), key, value)
    for index, each in enumerate(own.get("_schedulers", [])):
        for key, value in corruptions(each):
            if each[key] == value:
                # A scheduler that has not begun.
                continue
            states = [*own["_schedulers"][:index], corrupted(each, key, value), *own["_schedulers"][index + 1 :]]
            assert_refused(pair, pair.scheduler.load_state_dict, own | {"_schedulers": states}, key, value)
    pair.scheduler.load_state_dict(own)
