"""The demo: what it prints and draws, and that its trainings are torch's."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from fused_clr import _captured_demo, cli, demo, plotting
from fused_clr._captured_demo import WARMUP
from fused_clr._demo_page import TORCH
from tests.helpers.pictures import width_drawn


def test_demo_prints_a_table_and_draws(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "CLASSIC_EPOCH", 500)
    monkeypatch.setattr(demo, "TIMED_BLOCKS", 1)
    monkeypatch.setattr(demo, "CAPTURED_STEPS", 8)
    before = dict(os.environ)
    assert cli.main(["demo", "--schedule-epochs", "3", "--epochs", "2", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert dict(os.environ) == before
    table = capsys.readouterr().out
    for row in (
        "1,500 steps",
        "500 optimizer steps",
        "test accuracy",
        "training steps per second",
        "optimizer + scheduler",
        "range test, ",
        "bounds of the learning rate",
        "digits between them",
        "a loop of 8 steps, captured, emulated",
    ):
        assert row in table
    assert width_drawn(tmp_path / "range-test.png", plotting.OURS) > 0.5
    assert width_drawn(tmp_path / "classic.png", plotting.OURS) > 0.5
    for colour in (plotting.OURS, TORCH):
        assert width_drawn(tmp_path / "captured.png", colour) > 0.2
    for colour in (plotting.OURS, plotting.TORCH_PALE, TORCH):
        assert width_drawn(tmp_path / "demo.png", colour) > 0.2
    for colour in (plotting.OURS, plotting.TORCH_PALE):
        assert width_drawn(tmp_path / "digits.png", colour) > 0.5


def test_classic_example_equals_torch():
    """Tolerance: our 4 ulp, and torch's rounding of cycle and position (below 2), 2 ulp(1) * (max_lr - base_lr)."""
    tolerance = 4 * np.spacing(demo.CLASSIC.max_lr) + 2 * np.spacing(1.0) * (demo.CLASSIC.max_lr - demo.CLASSIC.base_lr)
    curve, curve_difference = demo.classic_curve(2000)
    assert curve_difference <= tolerance
    assert curve[0] == demo.CLASSIC.base_lr
    assert np.all(np.diff(curve) > 0)

    steps = 300
    lr_difference, parameter_difference = demo.classic_loop(steps, torch.device("cpu"))
    assert lr_difference <= tolerance
    # Each of the updates, about max_lr / 4 in size, is rounded to float32 where the parameter stands.
    travelled = np.float32(curve[:steps].sum())
    assert parameter_difference <= steps * np.spacing(travelled)


def test_digits_train_as_with_torch():
    epochs = 4
    theirs, ours = demo.train_digits(epochs, torch.device("cpu"), seed=1)
    assert len(ours.losses) == len(theirs.losses) == epochs * 45
    np.testing.assert_allclose(ours.lrs, theirs.lrs, rtol=1e-14)
    np.testing.assert_allclose(ours.momenta, theirs.momenta, rtol=1e-14)
    # The weights agree to float32's resolution; 180 steps are too few for that to grow a thousandfold.
    np.testing.assert_allclose(ours.losses, theirs.losses, rtol=1e-4)
    assert ours.losses[-1] < ours.losses[0] / 2
    # One image on the border between two classes may fall to either side.
    np.testing.assert_allclose(ours.accuracies, theirs.accuracies, atol=1 / demo.TEST_IMAGES)


def test_a_captured_loop_freezes_torchs_learning_rate_and_not_ours(triton_backend, monkeypatch):
    """Tolerance: the parameter that shows the learning rate is float32, and has moved by less than 0.25."""
    steps = 12
    # This process has the interpreter.
    monkeypatch.setattr(demo, "captured_loops", _captured_demo._run_all)
    loops = demo.digits_captured(steps, torch.device("cpu"), seed=0)
    wanted = demo.CAPTURED.lr(np.arange(steps))
    np.testing.assert_allclose(loops["fused-clr"].applied_lrs, wanted, rtol=0, atol=2 * np.spacing(np.float32(0.25)))
    frozen = np.minimum(wanted, wanted[WARMUP])
    np.testing.assert_allclose(loops["torch"].applied_lrs, frozen, rtol=0, atol=2 * np.spacing(np.float32(0.25)))
    assert loops["torch"].losses[: WARMUP + 2] == pytest.approx(loops["fused-clr"].losses[: WARMUP + 2], rel=1e-5)


def test_without_bounds_the_demo_trains_between_usual_ones():
    schedule = demo.digits_schedule(None)
    assert (schedule.base_lr, schedule.max_lr, schedule.step_size_up) == (2.5e-4, 2e-3, 4 * 45)
