"""Weight decay on the learning rate's schedule, and on one of its own: against its formulas, on both backends."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fused_clr import FusedAdam, FusedAdamW, FusedSGD, OneCycleLR, fuse, testing, unfuse
from fused_clr.schedules import Constant, Cosine, Cyclic, Linear, Schedule, sequence

CYCLE = Cyclic(1e-3, 1e-2, step_size_up=4, step_size_down=3, cycle_momentum=False)
DECAYING = Linear(0.2, 0.05, steps=9)
STEPS = 20
MODES: dict[str, Callable[[float, float, float], float]] = {
    "lr": lambda lr, max_lr, decay: 1 - lr * decay,
    "lr_ratio": lambda lr, max_lr, decay: 1 - lr / max_lr * decay,
    "constant": lambda lr, max_lr, decay: 1 - decay,
    "corrected": lambda lr, max_lr, decay: 1 - lr**2 / max_lr * decay,
}
by_mode = pytest.mark.parametrize("mode", MODES)
pytestmark = pytest.mark.usefixtures("backend")


def new_params(dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((3,), (70,), (2, 5))
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params:
        value = torch.randn(param.shape, generator=generator).to(param.dtype)
        param.grad = value if param.grad is None else param.grad.copy_(value)


def oracle(mode: str, decay: Schedule | float, steps: int = STEPS, max_lr: float = 1e-2) -> list[torch.nn.Parameter]:
    """torch's AdamW without its decay, and the formula before each step."""
    params = new_params()
    optimizer = torch.optim.AdamW(params, weight_decay=0.0)
    for step in range(steps):
        set_gradients(params, step)
        lr = CYCLE.lr(step)
        optimizer.param_groups[0]["lr"] = lr
        value = decay if isinstance(decay, float) else decay.lr(step)
        with torch.no_grad():
            for param in params:
                param *= MODES[mode](lr, max_lr, value)
        optimizer.step()
    return params


def train(optimizer: Any, params: list[torch.nn.Parameter], steps: range = range(STEPS)) -> None:
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


def assert_equal(params: list[torch.nn.Parameter], expected: list[torch.nn.Parameter]) -> None:
    for mine, theirs in zip(params, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


@by_mode
@pytest.mark.parametrize("decay", [0.1, DECAYING], ids=["constant", "scheduled"])
def test_every_mode_is_its_formula(backend: str, mode: str, decay: Any) -> None:
    """In eager steps, and on the triton backend in replays of one launch too."""
    params = new_params()
    given = {"weight_decay": decay} if isinstance(decay, float) else {"weight_decay_schedule": decay}
    optimizer = FusedAdamW(params, schedule=CYCLE, weight_decay_mode=mode, **given)
    train(optimizer, params, range(2))
    if backend == "cpu":
        train(optimizer, params, range(2, STEPS))
    else:
        set_gradients(params, 2)
        with testing.record_launches() as graph:
            optimizer.step()
        assert len(graph) == 1
        for step in range(3, STEPS):
            set_gradients(params, step)
            graph.replay()
    assert_equal(params, oracle(mode, decay))


@by_mode
def test_max_lr_can_be_given(mode: str) -> None:
    params = new_params()
    optimizer = FusedAdamW(params, schedule=CYCLE, weight_decay=0.1, weight_decay_mode=mode, weight_decay_max_lr=0.05)
    train(optimizer, params)
    assert_equal(params, oracle(mode, 0.1, max_lr=0.05))


@by_mode
def test_a_learning_rate_of_0_still_decays_as_the_formula_says(mode: str) -> None:
    params = new_params()
    before = [param.detach().clone() for param in params]
    warmup = Linear(0.0, 1.0, steps=4)
    optimizer = FusedAdamW(params, schedule=warmup, weight_decay=0.1, weight_decay_mode=mode)
    train(optimizer, params, range(1))
    for param, old in zip(params, before, strict=True):
        torch.testing.assert_close(param, old * MODES[mode](0.0, 1.0, 0.1), rtol=1e-15, atol=0.0)


@by_mode
def test_without_a_schedule_the_ratio_is_to_the_first_lr(mode: str) -> None:
    """A stock scheduler of torch drives lr, and sets ``initial_lr``."""
    params, expected = new_params(), new_params()
    optimizer = FusedAdamW(params, lr=0.1, weight_decay=0.1, weight_decay_mode=mode)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    reference = torch.optim.AdamW(expected, weight_decay=0.0)
    for step in range(6):
        set_gradients(params, step)
        optimizer.step()
        scheduler.step()
        set_gradients(expected, step)
        reference.param_groups[0]["lr"] = lr = 0.1 * 0.9**step
        with torch.no_grad():
            for param in expected:
                param *= MODES[mode](lr, 0.1, 0.1)
        reference.step()
    assert_equal(params, expected)


@by_mode
@pytest.mark.parametrize("schedule", [None, CYCLE], ids=["torch's scheduler", "first step"])
def test_the_decay_of_lr_begins_with_the_same_weight_decay(mode: str, schedule: Schedule | None) -> None:
    """The schedule of ``begin_decay`` has another largest learning rate than what was before."""
    params, expected = new_params(), new_params()
    for own, begins in ((params, True), (expected, False)):
        optimizer = FusedAdamW(own, lr=0.1, weight_decay=0.1, weight_decay_mode=mode, schedule=schedule)
        if schedule is None:
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
        if begins:
            optimizer.begin_decay(4)
        train(optimizer, own, range(1))
    assert_equal(params, expected)


def test_a_group_without_max_lr_has_the_schedules() -> None:
    params, expected = new_params(), new_params()
    group = {"params": params, "weight_decay_mode": "lr_ratio"}
    train(FusedAdam([group], weight_decay=0.1, decoupled_weight_decay=True), params, range(2))
    train(FusedAdamW(expected, weight_decay=0.1, weight_decay_mode="lr_ratio"), expected, range(2))
    assert_equal(params, expected)


def test_groups_have_modes_and_schedules_of_their_own() -> None:
    """One launch, whatever the mixture."""
    modes = list(MODES)
    every = [new_params() for _ in modes]
    groups = [{"params": own, "weight_decay_mode": mode} for own, mode in zip(every, modes, strict=True)]
    groups[1]["weight_decay_schedule"] = None
    groups[3]["weight_decay_schedule"] = sequence(Linear(0.1, 0.3, steps=5), Cosine(0.3, 0.0, steps=6))
    optimizer = FusedAdamW(groups, schedule=CYCLE, weight_decay=0.1, weight_decay_schedule=DECAYING)
    for step in range(STEPS):
        for own in every:
            set_gradients(own, step)
        optimizer.step()
    decays: list[Any] = [DECAYING, 0.1, DECAYING, groups[3]["weight_decay_schedule"]]
    for own, mode, decay in zip(every, modes, decays, strict=True):
        assert_equal(own, oracle(mode, decay))


def test_l2_and_low_precision_take_the_same_path_as_before() -> None:
    for make, peer in ((FusedAdam, torch.optim.Adam), (FusedAdamW, torch.optim.AdamW)):
        params, expected = new_params(torch.float32), new_params(torch.float32)
        train(make(params, lr=0.01, weight_decay=0.1), params)
        train(peer(expected, lr=0.01, weight_decay=0.1), expected)
        for mine, theirs in zip(params, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    params = new_params(torch.bfloat16)
    train(FusedAdamW(params, schedule=CYCLE, weight_decay=0.1, weight_decay_mode="constant"), params)
    for mine, theirs in zip(params, oracle("constant", 0.1), strict=True):
        torch.testing.assert_close(mine, theirs.bfloat16(), rtol=6e-2, atol=2e-2)


def test_the_group_shows_the_decay_of_its_schedule() -> None:
    params = new_params()
    optimizer = FusedAdamW(params, schedule=CYCLE, weight_decay_schedule=DECAYING)
    group = optimizer.param_groups[0]
    seen = []
    for step in range(12):
        seen.append(group["weight_decay"])
        assert dict(group)["weight_decay"] == seen[-1]
        train(optimizer, params, range(step, step + 1))
    assert seen == [DECAYING.lr(step) for step in range(12)]
    group["weight_decay"] = group["weight_decay"]
    with pytest.raises(RuntimeError, match="'weight_decay'] cannot be set: Linear.* drives it"):
        group["weight_decay"] = 0.3
    group["weight_decay_schedule"] = None
    group["weight_decay"] = 0.3
    assert group["weight_decay"] == 0.3


def test_a_new_mode_or_schedule_takes_effect_at_the_next_step() -> None:
    params = new_params()
    optimizer = FusedAdamW(params, schedule=CYCLE, weight_decay=0.1)
    train(optimizer, params, range(5))
    group = optimizer.param_groups[0]
    group["weight_decay_mode"] = "constant"
    group["weight_decay_schedule"] = DECAYING
    train(optimizer, params, range(5, 10))
    expected = new_params()
    reference = torch.optim.AdamW(expected, weight_decay=0.0)
    for step in range(10):
        set_gradients(expected, step)
        reference.param_groups[0]["lr"] = lr = CYCLE.lr(step)
        with torch.no_grad():
            for param in expected:
                param *= 1 - lr * 0.1 if step < 5 else 1 - DECAYING.lr(step)
        reference.step()
    assert_equal(params, expected)


@by_mode
def test_copies_and_checkpoints_go_on_equal(mode: str) -> None:
    params = new_params()
    options: dict[str, Any] = {"schedule": CYCLE, "weight_decay_mode": mode, "weight_decay_schedule": DECAYING}
    optimizer = FusedAdamW(params, **options)
    train(optimizer, params, range(6))
    state = optimizer.state_dict()
    torch.optim.AdamW(new_params()).load_state_dict(copy.deepcopy(state))
    loaded = new_params()
    # Another mode and schedule: the saved ones are loaded.
    target = FusedAdamW(loaded, schedule=CYCLE, weight_decay=0.5)
    target.load_state_dict(pickle.loads(pickle.dumps(state)))
    with torch.no_grad():
        for mine, source in zip(loaded, params, strict=True):
            mine.copy_(source)
    other, other_params = pickle.loads(pickle.dumps((optimizer, params)))
    for each, own in ((optimizer, params), (target, loaded), (other, other_params)):
        train(each, own, range(6, STEPS))
        assert_equal(own, oracle(mode, DECAYING))


def test_a_checkpoint_holds_plain_values(tmp_path: Any) -> None:
    optimizer = FusedAdamW(new_params(), schedule=CYCLE, weight_decay_schedule=DECAYING, weight_decay_max_lr=0.1)
    torch.save(optimizer.state_dict(), tmp_path / "saved.pt")
    state = torch.load(tmp_path / "saved.pt", weights_only=True)
    assert state["param_groups"][0]["weight_decay"] == DECAYING.lr(0)
    state["param_groups"][0]["weight_decay_schedule"]["steps"] = "9"
    with pytest.raises(ValueError, match=r"\['weight_decay_schedule'\] is not a saved schedule"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["weight_decay_schedule"] == DECAYING


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight_decay_mode": "ratio"}, "weight_decay_mode must be one of 'lr', 'lr_ratio', 'constant', 'corrected'"),
        ({"weight_decay_mode": None}, "weight_decay_mode must be one of"),
        ({"weight_decay_max_lr": -0.1}, "weight_decay_max_lr must be a finite number >= 0 or None, got -0.1"),
        ({"weight_decay_max_lr": "0.1"}, "weight_decay_max_lr must be a finite number >= 0 or None, got '0.1'"),
        ({"weight_decay_max_lr": float("inf")}, "weight_decay_max_lr must be"),
        ({"weight_decay_schedule": 0.1}, "weight_decay_schedule must be a value from fused_clr.schedules or None"),
        ({"weight_decay_schedule": Cyclic(0.1, 0.2, 4)}, "weight_decay_schedule must not drive the momentum"),
        (
            {"weight_decay_schedule": Cyclic(0.1, 0.2, 4, scale_fn=lambda x: 1 / (x - 1), cycle_momentum=False)},
            "weight_decay_schedule must have values on the host",
        ),
    ],
)
def test_bad_values_are_refused(given: dict[str, Any], message: str) -> None:
    params = new_params()
    with pytest.raises((ValueError, TypeError), match=message):
        FusedAdamW(params, **given)
    optimizer = FusedAdamW(params, weight_decay=0.1, schedule=CYCLE)
    with pytest.raises((ValueError, TypeError), match=message):
        optimizer.param_groups[0].update(given)
    train(optimizer, params)
    assert_equal(params, oracle("lr", 0.1))


@pytest.mark.parametrize("given", [None, 0.5])
def test_a_one_cycle_schedule_leaves_the_groups_max_lr_alone(given: float | None) -> None:
    """Torch's OneCycleLR keeps a ``max_lr`` of its own in the group."""
    params = new_params()
    optimizer = FusedAdamW(params, weight_decay=0.1, weight_decay_mode="lr_ratio", weight_decay_max_lr=given)
    OneCycleLR(optimizer, max_lr=0.1, total_steps=20)
    optimizer.set_schedule(Constant(0.01))
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for param, old in zip(params, before, strict=True):
        torch.testing.assert_close(param, old * (1 - 0.01 / (given or 0.01) * 0.1), rtol=1e-14, atol=0.0)


def test_plain_groups_of_adamw_get_the_defaults() -> None:
    params, other = new_params(), new_params()
    optimizer = FusedAdamW(params, weight_decay=0.1, weight_decay_mode="constant", schedule=CYCLE)
    optimizer.param_groups = [dict(torch.optim.AdamW(other, weight_decay=0.1).param_groups[0]) | {"schedule": CYCLE}]
    train(optimizer, other)
    assert_equal(other, oracle("constant", 0.1))


def test_sgd_refuses_a_decay_schedule() -> None:
    optimizer = FusedSGD(new_params(), lr=0.1)
    message = r"weight_decay_schedule must be None in this optimizer: .* got Linear\("
    with pytest.raises(ValueError, match=message):
        optimizer.param_groups[0]["weight_decay_schedule"] = DECAYING
    with pytest.raises(ValueError, match=message):
        FusedSGD([{"params": new_params(), "weight_decay_schedule": DECAYING}])
    state = optimizer.state_dict()
    state["param_groups"][0]["weight_decay_schedule"] = DECAYING.to_dict()
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert "weight_decay_schedule" not in optimizer.param_groups[0]


def test_conversion_to_torch_names_what_torch_has_not() -> None:
    cycle = Cyclic(1e-3, 1e-2, step_size_up=4)
    for given in ({"weight_decay_mode": "constant"}, {"weight_decay_schedule": DECAYING}):
        optimizer = FusedAdamW(new_params(), schedule=cycle, **given)
        with pytest.raises(ValueError, match=f"has {next(iter(given))}=.* cannot be converted"):
            unfuse(optimizer)
    plain, scheduler = unfuse(FusedAdamW(new_params(), schedule=cycle))
    assert not {"weight_decay_mode", "weight_decay_max_lr", "weight_decay_schedule"} & set(plain.param_groups[0])
    fused, _ = fuse(plain, scheduler)
    assert fused.param_groups[0]["weight_decay_mode"] == "lr"
