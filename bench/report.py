"""Results as a Markdown table."""

from __future__ import annotations

from bench.schema import QUANTILES, Result, Row

TITLES = ("case", "mode", "peer", "us a step (p20 p50 p80)", "ratio to torch's pair (p20 p50 p80)", "remark")
GPU_TITLES = ("GB/s", "of a copy")


def as_markdown(result: Result) -> str:
    """The rows as a table, under their stamp and the peers that are missing."""
    lines = [", ".join(f"{name} {value}" for name, value in result.stamp.items()), ""]
    if result.missing:
        missing = ", ".join(f"{peer} (no module `{module}`)" for peer, module in result.missing.items())
        lines += [f"Missing on this machine: {missing}.", ""]
    has_bandwidth = any(row.gb_per_s is not None for row in result.rows)
    has_loops = any(row.mode == "loop" for row in result.rows)
    titles = [*TITLES[:-1], *(GPU_TITLES if has_bandwidth else ()), *(("steps/s",) if has_loops else ()), TITLES[-1]]
    lines += [_line(titles), "|---" * len(titles) + "|"]
    for row in result.rows:
        cells = [row.case, row.mode, row.peer, _quantiles(row, "us", ",.1f"), _quantiles(row, "ratio", ".3f")]
        if has_bandwidth:
            cells += [_number(row.gb_per_s, ",.0f"), _number(row.copy_share, ".1%")]
        if has_loops:
            cells.append(_number(1e6 / row.us_p50 if row.us_p50 and row.mode == "loop" else None, ",.0f"))
        outcome = "" if row.status == "measured" else f"{row.status}: "
        lines.append(_line([*cells, outcome + row.remark]))
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _number(value: float | None, style: str) -> str:
    return "" if value is None else format(value, style)


def _quantiles(row: Row, prefix: str, style: str) -> str:
    return " ".join(_number(getattr(row, f"{prefix}_p{q}"), style) for q in QUANTILES).strip()
