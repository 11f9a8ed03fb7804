"""The documentation's code runs, and its links lead somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_page_on_captured_loops_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "captured-loops.md").read_text(), re.DOTALL)
    assert len(blocks) == 5
    exec("\n".join(blocks), {"__name__": "captured_loops"})
    printed = capsys.readouterr().out.splitlines()
    assert "Status(schedule_step=200" in printed[0]
    assert printed[1] == "220 0"


def test_the_page_on_compatibility_runs_and_names_tests_that_are_there() -> None:
    text = (ROOT / "docs" / "compatibility.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, {"__name__": "compatibility"})
    named = set(re.findall(r"`(tests/\w+\.py)`", text))
    assert len(named) > 8
    for path in named:
        assert (ROOT / path).exists(), path


# A case as the pages call it; in the README's table otherwise than in the results.
README_CASES = {
    "4 x 4": "4x4 fp32",
    "148 x 16": "148x16 fp32",
    "148 x 16 in 64 groups": "148x16 fp32 64-groups",
    "1,000 x 16": "1000x16 fp32",
    "4 x 4M": "4x4M fp32",
}
RATIO_ROW = re.compile(r"^\| ([^|]+?) \| ([\d.]+) \*\*([\d.]+)\*\* ([\d.]+) \| ([\d.]+) \|", re.MULTILINE)


@pytest.mark.parametrize(("page", "count"), [("README.md", 5), ("docs/performance.md", 22)])
def test_ratios_on_the_pages_are_those_of_committed_results(page: str, count: int) -> None:
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for part in ("steps-small", "steps-options"):
        result = json.loads((ROOT / "bench" / "results" / f"{part}-cpu.json").read_text())
        rows |= {(row["case"], row["peer"]): row for row in result["rows"] if row["mode"] == "eager"}
    found = RATIO_ROW.findall((ROOT / page).read_text())
    assert len(found) == count
    for case, *figures in found:
        name = README_CASES.get(case, case)
        ours, foreach = rows[name, "fused-clr"], rows[name, "torch foreach"]
        wanted = [f"{ours[key]:.2f}" for key in ("ratio_p20", "ratio_p50", "ratio_p80")]
        assert figures == [*wanted, f"{foreach['ratio_p50']:.1f}"], case


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    for link in links:
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link
