"""Turns the JSON of ``pytest bench`` into Markdown and a picture, and fills the tables of the documentation.

    python -m bench.report FILE.json...     writes FILE.md and FILE.png beside each
    python -m bench.report --pages          fills the marked tables of README.md and docs/performance.md

A table is filled if this comment stands above it. It names results, a mode, and for each column but the first a peer:
its ratio to torch's pair (p50), with a star p20, p50 and p80, with a slash the ratio to another peer.

    <!-- bench: steps-small-cpu steps-compiled-cpu, eager: fused-clr* | torch foreach | fused-clr / torch foreach -->
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

QUANTILES = (20, 50, 80)
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md")
MARKED_TABLE = re.compile(r"(<!-- bench: ([^,\n]+), ([\w-]+): (.+) -->\n\|.*\n\|[-|: ]+\|\n)((?:\|.*\n)+)")
MACHINE = (
    "gpu", "driver", "cores", "torch_threads", "python_version",
    "torch", "triton", "numpy", "torch-optimi", "apex", "transformer-engine", "bitsandbytes", "heavyball",
)  # fmt: skip
TITLES = ("case", "mode", "peer", "us a step (p20 p50 p80)", "ratio to torch's pair (p20 p50 p80)")


def rows_of(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of each benchmark of a JSON file, as `bench.measure.figures_of` made them."""
    # One that was interrupted has none.
    return [benchmark["extra_info"] for benchmark in content["benchmarks"] if benchmark["extra_info"]]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Likewise of a file."""
    return rows_of(json.loads(path.read_text()))


def stamp(content: dict[str, Any]) -> str:
    """When, from which commit and on what a file was measured."""
    machine, commit = content["machine_info"], content["commit_info"]
    dirty = "-dirty" if commit.get("dirty") else ""
    words = [f"date {content['datetime']}", f"commit {str(commit.get('id'))[:12]}{dirty}"]
    words += [f"cpu {machine.get('cpu', {}).get('brand_raw', '')}"]
    return ", ".join(words + [f"{name} {machine[name]}" for name in MACHINE if name in machine])


def as_markdown(content: dict[str, Any]) -> str:
    """The benchmarks as a table under their stamp; below it, what could not be measured.

    Args:
        content: Of a JSON file of ``pytest bench``.
    """
    rows = rows_of(content)
    has_bandwidth = any("gb_per_s" in row for row in rows)
    titles = [*TITLES, *(("GB/s", "of a copy") if has_bandwidth else ()), "torch's pair, us (p50)", "remark"]
    table = []
    for row in rows:
        cells = [row["case"], row["mode"], row["peer"], _quantiles(row, "us", ",.1f"), _quantiles(row, "ratio", ".3f")]
        if has_bandwidth:
            cells += [f"{row['gb_per_s']:,.0f}" if "gb_per_s" in row else ""]
            cells += [f"{row['copy_share']:.1%}" if "copy_share" in row else ""]
        table.append([*cells, f"{row['reference_us_p50']:,.1f}", row["remark"]])
    lines = [stamp(content), "", *as_table(titles, table)]
    missing = [f"{peer} (no module `{module}`)" for peer, module in content.get("missing", {}).items()]
    lines += ["", f"Missing on this machine: {', '.join(missing)}."] if missing else []
    by_reason: dict[str, list[str]] = {}
    for name, reason in content.get("not_measured", {}).items():
        by_reason.setdefault(reason, []).append(f"`{name}`")
    lines += ["", "Not measured:", ""] if by_reason else []
    lines += [f"- {reason}: {', '.join(names)}" for reason, names in by_reason.items()]
    return "\n".join(lines) + "\n"


def as_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [_line(titles), "|---" * len(titles) + "|", *map(_line, rows)]


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _quantiles(row: dict[str, Any], name: str, style: str) -> str:
    return " ".join(format(row[f"{name}_p{q}"], style) for q in QUANTILES)


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def fill_tables(page: str, results: Path = RESULTS) -> str:
    """A page with the present figures in its marked tables. Which cases a table has, the page decides.

    Args:
        page: Markdown.
        results: Folder of the JSON files.

    Raises:
        KeyError: A table names a case that was not measured for its first peer.
    """

    def fill(table: re.Match[str]) -> str:
        head, files, mode, columns, body = table.groups()
        rows: dict[tuple[str, str], dict[str, Any]] = {}
        # Of a run in several files, the first counts.
        for name in reversed(files.split()):
            rows |= {(r["case"], r["peer"]): r for r in read_rows(results / f"{name}.json") if r["mode"] == mode}
        peers, lines = columns.split(" | "), []
        for line in body.splitlines():
            case = line.split("|")[1].strip()
            if (case, peers[0].rstrip("*")) not in rows:
                raise KeyError(f"{case!r} is not in {files}")
            lines.append(_line([case, *[cell(rows, case, peer) for peer in peers]]) + "\n")
        return head + "".join(lines)

    def cell(rows: dict[tuple[str, str], dict[str, Any]], case: str, column: str) -> str:
        name, _, other = column.partition(" / ")
        row = rows.get((case, name.rstrip("*")))
        if row is None:
            return ""
        if other:
            return _ratio(row["ratio_p50"] / rows[case, other]["ratio_p50"])
        if not name.endswith("*"):
            return _ratio(row["ratio_p50"])
        low, middle, high = (_ratio(row[f"ratio_p{q}"]) for q in QUANTILES)
        return f"{low} **{middle}** {high}"

    return MARKED_TABLE.sub(fill, page)


def plot_ratios(content: dict[str, Any], path: Path) -> None:
    """Draws the ratio of every peer to torch's pair, case by case, with p20 to p80 as a bar. Less is faster.

    Raises:
        ImportError: There is no matplotlib.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    rows = rows_of(content)
    cases = list(dict.fromkeys((row["case"], row["mode"]) for row in rows))
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    picture, axes = pyplot.subplots(figsize=(9, 1.5 + 0.42 * max(len(cases), 2)), layout="constrained")
    axes.axvline(1, color="0.4", linewidth=1, label="torch fused + CyclicLR")
    for index, peer in enumerate(peers):
        own = [row for row in rows if row["peer"] == peer]
        # Peers of a case stand one below the other.
        heights = [cases.index((row["case"], row["mode"])) + (index + 1) / (len(peers) + 1) - 0.5 for row in own]
        low, middle, high = ([row[f"ratio_p{q}"] for row in own] for q in QUANTILES)
        spread = [[m - x for m, x in zip(middle, low, strict=True)], [x - m for m, x in zip(middle, high, strict=True)]]
        size = 7 if peer == "fused-clr" else 4
        axes.errorbar(middle, heights, xerr=spread, fmt="o", markersize=size, capsize=2, label=peer)
    axes.set_xscale("log")
    axes.set_yticks(range(len(cases)), [f"{case} ({mode})" for case, mode in cases])
    axes.invert_yaxis()
    axes.set_xlabel("time a step / torch fused + CyclicLR (less is faster)")
    machine = content["machine_info"]
    axes.set_title(machine.get("gpu") or machine.get("cpu", {}).get("brand_raw", ""))
    axes.grid(axis="x", which="both", alpha=0.25)
    picture.legend(loc="outside right upper", fontsize="small")
    picture.savefig(path, dpi=120)


def run_study(
    description: str, name: str, seeds: int, measure: Callable[[int], Any], as_page: Callable[[Any], str]
) -> tuple[Path, Any]:
    """The command of a study: measures, and writes ``name``.json and .md into ``--out``.

    Args:
        description: Of the command.
        name: Of the files.
        seeds: How many, unless ``--seeds`` says.
        measure: From the number of seeds, the results.
        as_page: From the results, the page.

    Returns:
        The path of the files, without suffix; the results, as JSON has them.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / name
    text = json.dumps(measure(options.seeds))
    results = json.loads(text)
    path.with_suffix(".json").write_text(text + "\n")
    path.with_suffix(".md").write_text(as_page(results))
    return path, results


def main() -> int:
    """Writes what the arguments ask for."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="*", help="JSON of `pytest bench --benchmark-json=FILE`")
    parser.add_argument("--pages", action="store_true", help="fill the tables of the pages from bench/results")
    arguments = parser.parse_args()
    for path in arguments.files:
        # Empty if nothing was measured.
        if not (text := path.read_text()):
            print(f"{path} is empty", file=sys.stderr)
            continue
        content = json.loads(text)
        path.with_suffix(".md").write_text(as_markdown(content))
        try:
            plot_ratios(content, path.with_suffix(".png"))
        except ImportError as error:
            print(f"no picture: {error}", file=sys.stderr)
        print(f"wrote {path.with_suffix('.md')}")
    for page in PAGES if arguments.pages else ():
        page.write_text(fill_tables(page.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
