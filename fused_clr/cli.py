"""The command line: ``fused-clr demo``, ``fused-clr plot``, ``fused-clr range-test`` and ``fused-clr env``."""

from __future__ import annotations

import argparse
import ast
import math
import os
import platform
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fused_clr import __version__, schedules
from fused_clr._curves import RULES
from fused_clr.range_test import MODES
from fused_clr.schedules import Cyclic, Schedule
from fused_clr.schedules.cyclic import MAX_LOG_AMPLITUDE

# One float64 for each step is held in memory and drawn.
MOST_STEPS = 10_000_000
# Of a schedule without an end.
DEFAULT_STEPS = 12_000

# What an expression may call.
SCHEDULES = [name for name in schedules.__all__ if name not in ("Part", "Scaling", "Schedule", "Segment", "Shape")]
# Beside our own, what `env` prints the versions of.
PACKAGES = ("torch", "triton", "numpy", "accelerate", "lightning", "transformers")
# Arguments of `Cyclic`, and options of ``plot``.
CYCLIC_OPTIONS = (
    *("mode", "base_lr", "max_lr", "step_size_up", "step_size_down", "gamma"),
    *("cycle_momentum", "base_momentum", "max_momentum"),
)

# The largest seed that torch's generators take.
MAX_SEED = 2**64 - 1

# What the commands import beyond the package's own dependencies, and the packages that have it.
OPTIONAL_MODULES = {"matplotlib": "matplotlib", "sklearn": "scikit-learn", "tqdm": "tqdm"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: Command-line arguments after the program's name; None: those of the process.

    Returns:
        The exit code: 0; 1 with a message when a needed package is missing or the output cannot be written; 130 when
        interrupted.

    Raises:
        SystemExit: With code 2 and a message that names the argument, when one is wrong.

    Example:
        >>> main(["plot", "--mode", "triangular2", "--step-size-up", "500", "--out", "out/curve.png"])  # doctest: +SKIP
        0
        >>> main(["plot", "warmup(100, then=Cosine(1e-3, 0, steps=900))"])  # doctest: +SKIP
        0
    """
    try:
        try:
            options = _parser().parse_args(arguments)
            options.run(options)
        finally:
            # Here, where an error can still be reported.
            sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in OPTIONAL_MODULES:
            raise
        print(f"fused-clr: {module} is not installed; pip install {options.packages}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"fused-clr: cannot write {error.filename or 'the output'}: {error.strerror or error}", file=sys.stderr)
        _drop_output()
        return 1
    return 0


def _drop_output() -> None:
    """Drops what stdout could not take: Python flushes again when it ends, and would print a second error."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    count, seed = _whole_number(1, MOST_STEPS), _whole_number(0, MAX_SEED)
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(prog="fused-clr", description="Adam and the cyclical learning rate in one launch.")
    parser.add_argument("--version", action="version", version=f"fused-clr {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser("demo", help="torch's Adam and CyclicLR against ours", formatter_class=formatter)
    demo.add_argument("--device", type=_device, default="auto", help="auto, cpu, cuda or cuda:N")
    demo.add_argument("--schedule-epochs", type=count, default=79, help="classic example: epochs of 17,000 steps")
    demo.add_argument("--epochs", type=count, default=48, help="training: passes over the digits")
    demo.add_argument("--seed", type=seed, default=0, help="training: first weights and order of the digits")
    demo.add_argument("--out", type=Path, default=Path("out"), help="folder of the pictures")
    demo.set_defaults(run=_run_demo, packages=" ".join(OPTIONAL_MODULES.values()))

    plot = commands.add_parser("plot", help="draw a schedule", formatter_class=formatter)
    plot.add_argument(
        "schedule", nargs="?", help="as in Python, 'OneCycle(1e-3, 5000)'; without it, Cyclic of the options"
    )
    plot.add_argument("--mode", choices=("triangular", "triangular2", "exp_range"), default="triangular", help="shape")
    plot.add_argument("--base-lr", type=float, default=2.5e-4, help="learning rate at a cycle's ends")
    plot.add_argument("--max-lr", type=float, default=1e-3, help="learning rate at the first peak")
    plot.add_argument("--step-size-up", type=float, default=2000, help="steps from base to max")
    plot.add_argument("--step-size-down", type=float, help="steps from max to base; without it, as many as up")
    plot.add_argument("--gamma", type=float, default=1.0, help="exp_range: factor of each step")
    plot.add_argument("--cycle-momentum", action="store_true", help="draw the momentum (Adam's beta1) too")
    plot.add_argument("--base-momentum", type=float, default=0.8, help="momentum at max learning rate")
    plot.add_argument("--max-momentum", type=float, default=0.9, help="momentum at base learning rate")
    plot.add_argument("--steps", type=count, help=f"steps to draw, at most {MOST_STEPS:,}; without it, all")
    plot.add_argument("--out", type=_picture, default=Path("out/schedule.png"), help="picture to write")
    plot.set_defaults(run=_run_plot, packages="matplotlib", error=plot.error, default_of=plot.get_default)

    test = commands.add_parser("range-test", help="find bounds on the demo's digits", formatter_class=formatter)
    test.add_argument("--device", type=_device, default="auto", help="auto, cpu, cuda or cuda:N")
    test.add_argument("--seed", type=seed, default=0, help="first weights and order of the digits")
    test.add_argument("--start-lr", type=float, default=1e-7, help="first learning rate")
    test.add_argument("--end-lr", type=float, default=10.0, help="last learning rate")
    test.add_argument("--num-steps", type=count, default=100, help="steps from the first to the last, at least 10")
    test.add_argument("--mode", choices=tuple(MODES), default="exponential", help="how the learning rate rises")
    test.add_argument("--rule", choices=RULES, default="smith", help="how bounds are read from the curve")
    test.add_argument("--out", type=_picture, default=Path("out/range-test.png"), help="picture to write")
    test.add_argument("--csv", type=Path, help="file to write the curve to")
    test.set_defaults(run=_run_range_test, packages=" ".join(OPTIONAL_MODULES.values()), error=test.error)

    env = commands.add_parser("env", help="versions and GPUs, for bug reports")
    env.set_defaults(run=_run_env)
    return parser


def _run_env(_: argparse.Namespace) -> None:
    print("\n".join(f"{name + ':':14}{value}" for name, value in environment()))


def environment() -> list[tuple[str, str]]:
    """What a bug report needs: versions, GPUs, and the variables that choose a backend."""
    lines = [("fused-clr", __version__), ("python", f"{platform.python_version()}, {platform.platform()}")]
    for package in PACKAGES:
        try:
            # Not its ``__version__``: importing some of them takes seconds.
            lines.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            lines.append((package, "not installed"))
    lines.append(
        ("torch build", f"CUDA {torch.version.cuda}, ROCm {torch.version.hip}, commit {torch.version.git_version}")
    )
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = getattr(properties, "gcnArchName", f"sm_{properties.major}{properties.minor}")
        memory = f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} multiprocessors"
        lines.append((f"GPU {index}", f"{properties.name}, {capability}, {memory}"))
    if not torch.cuda.device_count():
        lines.append(("GPU", "none that torch sees"))
    lines += [(name, os.environ[name]) for name in ("FUSED_CLR_BACKEND", "TRITON_INTERPRET") if name in os.environ]
    return lines


def _run_demo(options: argparse.Namespace) -> None:
    from fused_clr import demo

    demo.run(options.out, options.device, options.schedule_epochs, options.epochs, options.seed)


def _run_range_test(options: argparse.Namespace) -> None:
    from fused_clr import demo

    names = ("start_lr", "end_lr", "num_steps", "mode")
    try:
        result = demo.digits_range_test(
            options.device, options.seed, **{name: getattr(options, name) for name in names}
        )
    except ValueError as error:
        options.error(str(error))
    result.plot(options.out, options.rule)
    if options.csv is not None:
        result.to_csv(options.csv)
    base_lr, max_lr, _, reason = result.suggest(options.rule)
    print(f"{len(result.lr)} steps, stopped_by={result.stopped_by!r}, drawn to {options.out}")
    print(f"no bounds: {reason}" if max_lr is None else f"base_lr={base_lr:.2e}, max_lr={max_lr:.2e}; {reason}")


def _run_plot(options: argparse.Namespace) -> None:
    from fused_clr import plotting

    try:
        if options.schedule is None:
            schedule: Schedule = Cyclic(**{name: getattr(options, name) for name in CYCLIC_OPTIONS})
        else:
            schedule = _read_schedule(options.schedule)
    except (SyntaxError, TypeError, ValueError) as error:
        options.error(f"schedule: {error}" if options.schedule else str(error))
    for name in CYCLIC_OPTIONS if options.schedule else ():
        if getattr(options, name) != options.default_of(name):
            options.error(f"--{name.replace('_', '-')} is not allowed with a schedule")
    end = schedule.end_step()
    steps = options.steps or min(DEFAULT_STEPS if end == math.inf else int(end) + 1, MOST_STEPS)
    if options.mode == "exp_range" and (steps - 1) * math.log(options.gamma or 1.0) > MAX_LOG_AMPLITUDE:
        options.error(f"gamma={options.gamma:g} overflows within {steps:,} steps")
    lr = schedule.lr(np.arange(steps))
    momentum = schedule.momentum(np.arange(steps)) if schedule.drives_momentum else None
    title = f"{options.mode}: {options.base_lr:g} to {options.max_lr:g}, {options.step_size_up:g} steps up"
    plotting.save(plotting.schedule_figure(lr, momentum, options.schedule or title), options.out)
    print(f"{steps:,} steps drawn to {options.out}")


def _read_schedule(text: str) -> Schedule:
    """A schedule from its Python expression: calls of SCHEDULES and of ``scaled``, with literals.

    Raises:
        SyntaxError: It is no expression.
        TypeError: An argument is missing or unknown.
        ValueError: It is another expression, or a value is not allowed.
    """

    def read(node: ast.expr) -> Any:
        if not isinstance(node, ast.Call):
            try:
                return ast.literal_eval(node)
            except ValueError:
                raise ValueError(f"{ast.unparse(node)} is neither a value nor a schedule") from None
        if isinstance(node.func, ast.Attribute) and node.func.attr == "scaled":
            function = schedule(node.func.value).scaled
        elif isinstance(node.func, ast.Name) and node.func.id in SCHEDULES:
            function = getattr(schedules, node.func.id)
        else:
            raise ValueError(f"{ast.unparse(node.func)} is not one of {', '.join(SCHEDULES)}")
        return function(*map(read, node.args), **{str(keyword.arg): read(keyword.value) for keyword in node.keywords})

    def schedule(node: ast.expr) -> Schedule:
        value = read(node) if isinstance(node, ast.Call) else None
        if not isinstance(value, Schedule):
            raise ValueError(f"{ast.unparse(node)} is not a call of one of {', '.join(SCHEDULES)}")
        return value

    return schedule(ast.parse(text.strip(), mode="eval").body)


def _whole_number(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        # Not over the length of `most`: Python refuses to convert thousands of digits.
        is_number = text.isascii() and text.isdigit() and len(text) <= len(str(most))
        if not (is_number and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most:,}")
        return int(text)

    return parse


def _device(text: str) -> torch.device:
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # Only an allocation shows whether the device exists.
        device = torch.empty(0, dtype=torch.float32, device=text).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"{text!r} is not a device that torch offers here: {reason}") from error
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a CPU nor a CUDA or ROCm device")
    return device


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in (".pdf", ".png", ".svg"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png, .svg or .pdf")
    return path
