"""The command line: what it writes, what it says, and how it fails."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.image import imread

import fused_clr
from fused_clr import _plots, cli, demo


def width_drawn(path, colour):
    """The share of a picture's columns in which ``colour`` occurs: a curve crosses most, a legend's sample does not."""
    rgb = np.round(255 * imread(path)[..., :3]).astype(int)
    return np.all(rgb == np.round(255 * np.array(to_rgb(colour))), axis=-1).any(axis=0).mean()


@pytest.mark.parametrize("mode", ["triangular", "triangular2", "exp_range"])
def test_plot_draws_the_schedule(mode, tmp_path, capsys):
    out = tmp_path / "new folder" / "curve.png"
    arguments = ["plot", "--mode", mode, "--base-lr", "0", "--max-lr", "1", "--step-size-up", "30", "--steps", "180"]
    assert cli.main([*arguments, "--gamma", "0.99", "--out", str(out)]) == 0
    assert width_drawn(out, _plots.OURS) > 0.5
    assert str(out) in capsys.readouterr().out


def test_plot_draws_what_was_asked(tmp_path):
    """Each option changes the picture: none is parsed and then forgotten."""
    options = [
        [],
        ["--mode", "triangular2"],
        ["--mode", "exp_range", "--gamma", "0.999"],
        ["--base-lr", "1e-5"],
        ["--max-lr", "0.1"],
        ["--step-size-up", "700"],
        ["--step-size-down", "300"],
        ["--steps", "5000"],
        ["--cycle-momentum"],
        ["--cycle-momentum", "--base-momentum", "0.5"],
        ["--cycle-momentum", "--max-momentum", "0.99"],
    ]
    pictures = set()
    for number, option in enumerate(options):
        out = tmp_path / f"{number}.png"
        assert cli.main(["plot", *option, "--out", str(out)]) == 0
        pictures.add(imread(out).tobytes())
    assert len(pictures) == len(options)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "command"),
        (["paint"], "paint"),
        (["plot", "--mode", "square"], "--mode"),
        (["plot", "--base-lr", "-1"], "base_lr"),
        (["plot", "--max-lr", "nan"], "max_lr"),
        (["plot", "--max-lr", "fast"], "--max-lr"),
        (["plot", "--step-size-up", "0"], "step_size_up"),
        (["plot", "--step-size-down", "inf"], "step_size_down"),
        (["plot", "--gamma", "-1"], "gamma must"),
        (["plot", "--mode", "exp_range", "--gamma", "2"], "gamma=2"),
        (["plot", "--base-momentum", "-0.1"], "base_momentum"),
        (["plot", "--max-momentum", "1"], "max_momentum"),
        (["plot", "--steps", "0"], "--steps"),
        (["plot", "--steps", "1e3"], "--steps"),
        (["plot", "--steps", "10000000000"], "--steps"),
        (["plot", "--out", "curve.doc"], "--out"),
        (["plot", "--colour", "red"], "--colour"),
        (["demo", "--epochs", "-1"], "--epochs"),
        (["demo", "--schedule-epochs", "none"], "--schedule-epochs"),
        (["demo", "--seed", "x"], "--seed"),
        (["demo", "--device", "abacus"], "--device"),
        (["demo", "--device", "cuda:99"], "--device"),
        (["demo", "--device", "meta"], "--device"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_bad_argument_is_named(arguments, named, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as leaving:
        cli.main(arguments)
    assert leaving.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "module", "extra"),
    [
        ("plot", "matplotlib", "plot"),
        ("demo", "matplotlib", "demo"),
        ("demo", "sklearn", "demo"),
        ("demo", "tqdm", "demo"),
    ],
)
def test_missing_package_names_the_extra(command, module, extra, capsys, monkeypatch):
    # As on a machine without it: not even what this process imported from it earlier can be found.
    for loaded in [name for name in sys.modules if name.partition(".")[0] == module] + [module]:
        monkeypatch.setitem(sys.modules, loaded, None)
    for ours in ("demo", "_plots"):
        monkeypatch.delitem(sys.modules, f"fused_clr.{ours}", raising=False)
        monkeypatch.delattr(fused_clr, ours, raising=False)
    assert cli.main([command]) == 1
    message = capsys.readouterr().err
    assert module in message
    assert f"fused-clr[{extra}]" in message


def test_unwritable_picture_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["plot", "--out", str(tmp_path / "file" / "curve.png")]) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_demo_prints_a_table_and_draws(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "CLASSIC_EPOCH", 500)
    monkeypatch.setattr(demo, "TIMED_BLOCKS", 1)
    assert cli.main(["demo", "--schedule-epochs", "3", "--epochs", "2", "--device", "cpu", "--out", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    for row in (
        "1,500 steps",
        "500 optimizer steps",
        "test accuracy",
        "training steps per second",
        "optimizer + scheduler",
    ):
        assert row in table
    assert width_drawn(tmp_path / "classic.png", _plots.OURS) > 0.5
    for colour in (_plots.OURS, _plots.TORCH_PALE):
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


def test_module_runs_the_command_line():
    shown = subprocess.run([sys.executable, "-m", "fused_clr", "--help"], capture_output=True, text=True, check=True)
    assert "demo" in shown.stdout
    assert "plot" in shown.stdout
