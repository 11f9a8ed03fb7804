"""The command line: what it writes, what it says, and how it fails."""

import runpy
import sys

import pytest
from matplotlib.image import imread

import fused_clr
from fused_clr import cli, plotting
from tests.helpers.pictures import width_drawn


@pytest.mark.parametrize("mode", ["triangular", "triangular2", "exp_range"])
def test_plot_draws_the_schedule(mode, tmp_path, capsys):
    out = tmp_path / "new folder" / "curve.png"
    arguments = ["plot", "--mode", mode, "--base-lr", "0", "--max-lr", "1", "--step-size-up", "30", "--steps", "180"]
    assert cli.main([*arguments, "--gamma", "0.99", "--out", str(out)]) == 0
    assert width_drawn(out, plotting.OURS) > 0.5
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
        (["plot", "--mode", "exp_range", "--gamma", "2"], "gamma must"),
        (["plot", "--mode", "exp_range", "--gamma", "1.1"], "gamma=1.1 overflows within 12,000 steps"),
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


def test_module_runs_the_command_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fused_clr", "--help"])
    with pytest.raises(SystemExit) as leaving:
        runpy.run_module("fused_clr", run_name="__main__")
    assert leaving.value.code == 0
    shown = capsys.readouterr().out
    assert "demo" in shown
    assert "plot" in shown
