"""Measures steps of every peer in one process, in turn; writes JSON, a Markdown table and a plot.

    python -m bench                                    the small cases: part "steps-small"
    python -m bench --part captured                    another part; --case and --peer narrow it
    python -m bench --mode host --case '^148x16 fp32'  any case of the registry

The result is the ratio to torch's pair in the same run; times alone say little on a shared machine.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.environment import choose_triton_backend
from bench.parts import DEFAULT_PART, PARTS, Selection

MODES = ("eager", "captured", "host", "loop")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=sorted(PARTS), help="a named selection of cases")
    parser.add_argument("--case", default="", help="regular expression of case names")
    parser.add_argument("--peer", default="", help="regular expression of peers; the reference is always there")
    parser.add_argument("--mode", choices=MODES, help="only this mode (default without --part: eager)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=_positive, help="rounds of each peer")
    parser.add_argument("--memory", type=float, help="GiB that a case may take (default: 4, or 90 %% of a GPU's)")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of the results")
    parser.add_argument("--no-plot", action="store_true", help="no plot, and no need of matplotlib")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def choose_selections(arguments: argparse.Namespace) -> tuple[str, list[Selection]]:
    """The name of the result, and what to run.

    Raises:
        ValueError: The part has nothing in the mode.
    """
    narrowed = bool(arguments.case or arguments.peer or arguments.mode)
    part = arguments.part or (None if narrowed else DEFAULT_PART)
    if part is None:
        mode = arguments.mode or "eager"
        # What is measured of a registry cut by hand does not pass for a part.
        return f"{mode}-selected", [Selection(mode)]
    selections = [s for s in PARTS[part] if arguments.mode in (None, s.mode)]
    if not selections:
        raise ValueError(f"part {part!r} has nothing in mode {arguments.mode!r}")
    return f"{part}-selected" if narrowed else part, selections


def run(arguments: argparse.Namespace) -> int:
    """Measures and writes."""
    name, selections = choose_selections(arguments)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, and torch sees no GPU")
    if any(selection.mode == "host" for selection in selections) and device.type == "cpu":
        choose_triton_backend()

    # From here on triton may be imported.
    from bench.report import as_markdown
    from bench.schema import Result, Row
    from bench.session import Session
    from bench.stamp import make_stamp

    session = Session(device, arguments.memory, arguments.rounds)
    result = Result(make_stamp(device), missing=session.missing_peers())
    if session.copy_bandwidth is not None:
        result.stamp["copy_tb_per_s"] = round(session.copy_bandwidth / 1e12, 3)

    def rows() -> Iterator[Row]:
        for selection in selections:
            yield from session.rows(selection, arguments.case, arguments.peer)

    path = arguments.out / f"{name}-{device.type}.json"
    for row in rows():
        result.rows.append(row)
        ratio = "" if row.ratio_p50 is None else f"{row.us_p50:12,.1f} us {row.ratio_p50:8.3f}"
        print(f"{row.case:34} {row.mode:9} {row.peer:28} {ratio or row.status + ': ' + row.remark}", flush=True)
        # A run that is cut short leaves what it has measured.
        result.write(path)
        path.with_suffix(".md").write_text(as_markdown(result))
    if not result.rows:
        print(f"no case matches {arguments.case!r} in {name}", file=sys.stderr)
        return 2
    if not arguments.no_plot and any(row.ratio_p50 is not None for row in result.rows):
        try:
            from bench.plots import plot_ratios

            plot_ratios(result, path.with_suffix(".png"))
        except ImportError as error:
            print(f"no plot: {error}", file=sys.stderr)
    print(f"wrote {path} and .md")
    return 0


def main() -> int:
    """Runs the command line."""
    arguments = parse_arguments()
    try:
        for pattern in (arguments.case, arguments.peer):
            re.compile(pattern)
        return run(arguments)
    except (ValueError, re.error) as error:
        print(f"python -m bench: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
