"""The command line: what it writes, what it says, and how it fails."""

import os
import platform
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.image import imread

import fused_clr
from fused_clr import cli, plotting, schedules
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
        ["Constant(1e-3)"],
        ["Linear(0, 1e-3, steps=900)"],
        ["Exponential(1e-3, 1e-5, 900)"],
        ["Polynomial(1e-3, 0, 900, power=2)"],
        ["Cosine(1e-3, 0, 900)"],
        ["OneCycle(max_lr=1e-3, total_steps=900)"],
        ["CosineRestarts(1e-3, 900, T_mult=2)"],
        ["InverseSqrt(1e-3, 900)"],
        ["WarmupStableDecay(1e-3, 90, 600, 210, decay='cosine')"],
        ["Cyclic(1e-4, 1e-3, 90)", "--steps", "900"],
        ["warmup(90, then=Cosine(1e-3, 0, 900))"],
        ["sequence(Linear(0, 1e-3, 90), Constant(1e-3), milestones=[90])"],
        ["sequence(Linear(0, 1e-3, 90), CosineRestarts(1e-3, 900).scaled(0.5))"],
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
        (
            ["plot", "OneCycle(1e-3)"],
            "OneCycle.__init__() missing 1 required positional argument: 'total_steps'",
        ),
        (["plot", "OneCycle(1e-3, 0)"], "schedule: total_steps must be an integer"),
        (["plot", "OneCycle(1e-3, n)"], "schedule: n is neither a value nor a schedule"),
        (["plot", "OneCycle(1e-3"], "schedule: '(' was never closed"),
        (["plot", "Sine(1e-3, 10)"], "schedule: Sine is not one of Constant, Cosine, "),
        (["plot", "3"], "schedule: 3 is not a call of one of Constant, Cosine, "),
        (["plot", "3 .scaled(2)"], "schedule: 3 is not a call of one of Constant, Cosine, "),
        (["plot", "open('x')"], "schedule: open is not one of Constant, Cosine, "),
        (["plot", "Constant(1e-3)", "--max-lr", "2e-3"], "--max-lr is not allowed with a schedule"),
        (["plot", "--steps", "0"], "--steps"),
        (["plot", "--steps", "1e3"], "--steps"),
        (["plot", "--steps", "10000000000"], "--steps"),
        (["plot", "--out", "curve.doc"], "--out"),
        (["plot", "--colour", "red"], "--colour"),
        (["range-test", "--start-lr", "20"], "end_lr must be > start_lr=20.0, got 10.0"),
        (["range-test", "--num-steps", "9"], "num_steps must be an integer in [10, 2**53), got 9"),
        (["range-test", "--mode", "cosine"], "--mode"),
        (["range-test", "--rule", "best"], "--rule"),
        (["range-test", "--out", "curve.doc"], "--out"),
        (["demo", "--epochs", "-1"], "--epochs"),
        (["demo", "--schedule-epochs", "none"], "--schedule-epochs"),
        (["demo", "--seed", "x"], "--seed"),
        (["demo", "--seed", "-1"], "--seed"),
        (["demo", "--seed", "99999999999999999999"], "--seed"),
        (["demo", "--seed", "9" * 5000], "--seed"),
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
    ("command", "module", "packages"),
    [
        ("plot", "matplotlib", "matplotlib"),
        ("demo", "matplotlib", "matplotlib scikit-learn tqdm"),
        ("range-test", "sklearn", "matplotlib scikit-learn tqdm"),
        ("demo", "sklearn", "matplotlib scikit-learn tqdm"),
        ("demo", "tqdm", "matplotlib scikit-learn tqdm"),
    ],
)
def test_missing_package_names_what_to_install(command, module, packages, capsys, monkeypatch):
    # As on a machine without it: not even what this process imported from it earlier can be found.
    for loaded in [name for name in sys.modules if name.partition(".")[0] == module] + [module]:
        monkeypatch.setitem(sys.modules, loaded, None)
    for ours in ("demo", "plotting"):
        monkeypatch.delitem(sys.modules, f"fused_clr.{ours}", raising=False)
        monkeypatch.delattr(fused_clr, ours, raising=False)
    assert cli.main([command]) == 1
    # The package itself may be a checkout that no index has.
    assert capsys.readouterr().err == f"fused-clr: {module} is not installed; pip install {packages}\n"


def test_range_test_prints_bounds_and_writes_the_curve(tmp_path, capsys):
    out, curve = tmp_path / "new folder" / "curve.png", tmp_path / "curve.csv"
    assert cli.main(["range-test", "--out", str(out), "--csv", str(curve), "--num-steps", "60"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith(f"drawn to {out}")
    assert printed[1].startswith("base_lr=")
    assert "max_lr=" in printed[1]
    assert width_drawn(out, plotting.OURS) > 0.5
    assert len(curve.read_text().splitlines()) == 1 + int(printed[0].partition(" ")[0])
    # Too short a way to see anything.
    assert cli.main(["range-test", "--out", str(out), "--end-lr", "1e-5", "--rule", "valley", "--mode", "linear"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("no bounds: the loss does not fall")


def test_every_seed_that_the_parser_takes_is_one_for_torch(capsys):
    options = cli._parser().parse_args(["demo", "--seed", str(2**64 - 1)])
    torch.Generator().manual_seed(options.seed)


def test_plot_draws_a_schedule_to_its_end(tmp_path, capsys):
    out = str(tmp_path / "curve.png")
    for schedule, steps in (
        ("Linear(0, 1e-3, 70)", "71"),
        ("CosineRestarts(1e-3, 70)", "12,000"),
        ("Constant(1e-3)", "2"),
    ):
        assert cli.main(["plot", schedule, "--out", out]) == 0
        assert f"{steps} steps drawn" in capsys.readouterr().out


def test_the_gallery_is_drawn(tmp_path):
    out = tmp_path / "schedules.png"
    plotting.main([str(out)])
    assert width_drawn(out, plotting.OURS) > 0.5
    assert width_drawn(out, plotting.MOMENTUM) > 0.3
    titles = " ".join(plotting.gallery())
    for name in set(schedules.__all__) - {"Part", "Scaling", "Schedule", "Segment", "Shape"}:
        assert name in titles, name


@pytest.mark.parametrize("command", ["plot", "demo"])
def test_a_folder_that_cannot_be_made_is_named(command, tmp_path, capsys):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "below"
    assert cli.main([command, "--out", str(folder / "curve.png" if command == "plot" else folder)]) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"fused-clr: cannot write {tmp_path / 'file'}")
    assert message.count("\n") == 1


def test_a_picture_in_the_place_of_a_folder_is_named(tmp_path, capsys):
    out = tmp_path / "folder.png"
    out.mkdir()
    assert cli.main(["plot", "--out", str(out)]) == 1
    assert capsys.readouterr().err == f"fused-clr: cannot write {out}: Is a directory\n"


def test_suffixes_in_capitals(tmp_path):
    out = tmp_path / "curve.PNG"
    assert cli.main(["plot", "--steps", "10", "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_full_disk_is_named(suffix, tmp_path, capsys):
    out = tmp_path / f"curve.{suffix}"
    out.symlink_to("/dev/full")
    assert cli.main(["plot", "--steps", "10", "--out", str(out)]) == 1
    assert capsys.readouterr().err == f"fused-clr: cannot write {out}: No space left on device\n"


def full_disk():
    return open("/dev/full", "w")


def broken_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize(
    ("stdout", "reason"), [(full_disk, "No space left on device"), (broken_pipe, "Broken pipe")], ids=["full", "pipe"]
)
@pytest.mark.parametrize("command", ["plot", "--help"])
def test_output_that_nobody_takes_is_one_line_and_an_exit_code(command, stdout, reason, tmp_path, capsys, monkeypatch):
    options = ["--steps", "10", "--out", str(tmp_path / "curve.png")] if command == "plot" else []
    # Closing it flushes once more, as Python does when it ends.
    with stdout() as taken:
        monkeypatch.setattr(sys, "stdout", taken)
        assert cli.main([command, *options]) == 1
    assert capsys.readouterr().err == f"fused-clr: cannot write the output: {reason}\n"


def test_ctrl_c_ends_with_130_and_no_traceback(capsys, monkeypatch):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run_plot", interrupted)
    assert cli.main(["plot"]) == 130
    assert capsys.readouterr().err == ""


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as leaving:
        cli.main(["--version"])
    assert leaving.value.code == 0
    assert capsys.readouterr().out == f"fused-clr {fused_clr.__version__}\n"


def test_env_prints_what_a_bug_report_needs(capsys, monkeypatch):
    monkeypatch.setenv("FUSED_CLR_BACKEND", "cpu")
    monkeypatch.setattr(cli, "PACKAGES", (*cli.PACKAGES, "no-such-package"))
    assert cli.main(["env"]) == 0
    printed = dict(re.split(r":\s*", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert printed["fused-clr"] == fused_clr.__version__
    assert printed["torch"] == torch.__version__
    assert printed["python"].startswith(platform.python_version())
    assert printed["no-such-package"] == "not installed"
    assert printed["FUSED_CLR_BACKEND"] == "cpu"
    assert printed["GPU"] == "none that torch sees"

    # What a machine with two would print.
    gpu = SimpleNamespace(name="H200", major=9, minor=0, total_memory=139 * 2**30, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    assert dict(cli.environment())["GPU 1"] == "H200, sm_90, 139 GiB, 132 multiprocessors"


def test_module_runs_the_command_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fused_clr", "--help"])
    with pytest.raises(SystemExit) as leaving:
        runpy.run_module("fused_clr", run_name="__main__")
    assert leaving.value.code == 0
    shown = capsys.readouterr().out
    assert "demo" in shown
    assert "plot" in shown
