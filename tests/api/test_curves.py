"""The bounds that curves of range tests show: on made-up curves, and on the digits by training between them."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fused_clr import FusedAdam, FusedSGD, demo
from fused_clr._curves import RULES, centred_trend, suggest
from fused_clr.schedules import Schedule

LR = np.geomspace(1e-7, 10, 100)


def noise(scale: float, seed: int = 0) -> Any:
    return scale * np.random.default_rng(seed).standard_normal(len(LR))


def plateau_fall_rise(fall_at: float, rise_at: float, seed: int, steepness: float = 1.5) -> Any:
    return 2.3 - 2 / (1 + (fall_at / LR) ** steepness) + (LR / rise_at) ** 2 + noise(0.02, seed)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shift", [1e-3, 1e-2, 1e-1])
def test_bounds_follow_the_curve(shift: float, seed: int) -> None:
    """The fall is half done at ``shift``, and the rise has reached 1 at ten times that."""
    loss = plateau_fall_rise(shift, 10 * shift, seed)
    found = {rule: suggest(rule, LR, loss, loss) for rule in RULES}
    base_lr, max_lr = found["smith"][:2]
    assert base_lr is not None
    assert max_lr is not None
    # 5 % of the fall are done at 0.14 * shift, 90 % at 4.3 * shift, where the rise is 0.18.
    assert 0.05 * shift < base_lr < 0.4 * shift
    assert 1.5 * shift < max_lr < 6 * shift
    for rule in ("valley", "steepest"):
        assert found[rule].max_lr == 4 * (found[rule].base_lr or 0)
        assert 0.05 * shift < (found[rule].max_lr or 0) < 4 * shift


def test_a_spike_ends_the_range_where_the_trend_still_falls() -> None:
    loss = plateau_fall_rise(1e-2, 1.0, seed=0)
    calm = suggest("smith", LR, loss, loss)
    assert "turns" in calm.reason
    spike = int(np.searchsorted(LR, 2e-2))
    loss[spike] += 1.0
    ragged = suggest("smith", LR, loss, loss)
    assert "becomes ragged" in ragged.reason
    assert ragged.max_lr == LR[spike - 1] < (calm.max_lr or 0)


@pytest.mark.parametrize("rule", RULES)
def test_curves_that_show_nothing_say_why(rule: str) -> None:
    curves = [
        *(2.3 + noise(0.1, seed) for seed in range(50)),
        *(np.linspace(2, 4, 100) + noise(0.1, seed) for seed in range(50)),
        np.full(100, 2.3),
    ]
    for loss in curves:
        base_lr, max_lr, _, reason = suggest(rule, LR, loss, loss)
        assert base_lr is None
        assert max_lr is None
        assert "the loss does not fall: by" in reason
    assert suggest(rule, LR[:9], LR[:9], LR[:9]).reason == "the curve has 9 steps, and 10 are needed: lower start_lr"


def test_smith_needs_the_turn_and_does_without_the_start() -> None:
    falling = np.linspace(2, 1, 100) + noise(0.01)
    assert suggest("smith", LR, falling, falling)[0] is None
    assert (
        suggest("smith", LR, falling, falling).reason
        == "the loss still falls at the last learning rate, 10: raise end_lr"
    )
    turning = np.abs(np.linspace(-1, 1, 100)) + noise(0.01)
    base_lr, max_lr, _, reason = suggest("smith", LR, turning, turning)
    assert max_lr == 4 * (base_lr or 0)
    assert 1e-4 < (max_lr or 0) < 1e-2
    assert reason.endswith("base_lr: a quarter of it, since the loss falls from the start")


def test_another_rule_is_named() -> None:
    with pytest.raises(ValueError, match="rule must be one of .*'smith', 'valley', 'steepest'.*, got 'best'"):
        suggest("best", LR, LR, LR)


def fastai_valley(lrs: Any, losses: Any) -> float:
    """`fastai.callback.schedule.valley` (2.8), as `Learner.lr_find` calls it."""
    lrs, losses = lrs[len(lrs) // 10 : -5], losses[len(losses) // 10 : -5]
    max_start, max_end, lds = 0, 0, [1] * len(losses)
    for i in range(1, len(losses)):
        for j in range(i):
            if losses[i] < losses[j] and lds[i] < lds[j] + 1:
                lds[i] = lds[j] + 1
            if lds[max_end] < lds[i]:
                max_end = i
                max_start = max_end - lds[max_end]
    sections = (max_end - max_start) / 3
    return float(lrs[max_start + int(sections) + int(sections / 2)])


@pytest.mark.parametrize("seed", range(10))
def test_valley_is_that_of_fastai(seed: int) -> None:
    loss = plateau_fall_rise(1e-2, 1e-1, seed)
    assert suggest("valley", LR, loss, loss).max_lr == fastai_valley(LR, loss)


def test_the_trend_does_not_lag() -> None:
    ramp = np.linspace(5, 1, 100)
    np.testing.assert_allclose(centred_trend(ramp)[4:-4], ramp[4:-4])
    spiked = ramp.copy()
    spiked[50] = 1e9
    assert np.abs(centred_trend(spiked) - ramp).max() < 0.2


def make_cnn(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *layers, nn.Flatten(), nn.Linear(128, 10))


@pytest.mark.parametrize(
    ("make", "kind"),
    [(demo.make_model, FusedAdam), (make_cnn, FusedAdam), (demo.make_model, partial(FusedSGD, momentum=0.9))],
    ids=["mlp", "cnn", "mlp-sgd"],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_digits_train_between_the_bounds_and_not_above_or_below(
    make: Any, kind: Any, seed: int, monkeypatch: Any
) -> None:
    """Four epochs: seen were 94 % and more between the bounds, 84 % with SGD, and 39 % at most above and below."""
    monkeypatch.setenv("FUSED_CLR_BACKEND", "cpu")
    cpu = torch.device("cpu")
    result = demo.digits_range_test(
        cpu, seed, make, kind, end_lr=100.0 if kind is not FusedAdam else 10.0, progress=False
    )
    schedule = result.schedule(45, mode="triangular2", cycle_momentum=False)

    def accuracy(schedule: Schedule) -> float:
        generator = torch.Generator().manual_seed(seed)
        data, model = demo.load_data(cpu, generator), make(seed)
        optimizer, batches = kind(model.parameters(), schedule=schedule), data.batches(generator)
        for _ in range(180):
            batch = next(batches)
            optimizer.zero_grad()
            F.cross_entropy(model(data.images[batch]), data.labels[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            return float((model.eval()(data.test_images).argmax(1) == data.test_labels).double().mean())

    assert accuracy(schedule) > 0.75
    assert accuracy(schedule.scaled(30)) < 0.5
    assert accuracy(schedule.scaled(0.002)) < 0.6
