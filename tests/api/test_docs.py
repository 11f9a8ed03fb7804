"""The documentation's code runs, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import fused_clr.schedules

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_page_on_captured_loops_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "captured-loops.md").read_text(), re.DOTALL)
    assert len(blocks) == 5
    exec("\n".join(blocks), {"__name__": "captured_loops"})
    printed = capsys.readouterr().out.splitlines()
    assert "Status(schedule_step=200" in printed[0]
    assert printed[1] == "220 0"


def test_the_page_on_schedules_runs_and_names_all(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "schedules.md").read_text()
    names: dict[str, Any] = {"__name__": "schedules"}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    assert capsys.readouterr().out == "4e-05 1e-05 1e-05 500\n0.0001\n"
    for name in fused_clr.schedules.__all__:
        assert f"`{name}" in text, name


def test_the_page_on_compatibility_runs_and_names_tests_that_are_there() -> None:
    text = (ROOT / "docs" / "compatibility.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, {"__name__": "compatibility"})
    named = set(re.findall(r"`(tests/[\w/]+\.py)`", text))
    assert len(named) > 8
    for path in named:
        assert (ROOT / path).exists(), path


def test_the_page_on_bounds_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {"__name__": "bounds"}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "choosing-the-bounds.md").read_text(), re.DOTALL):
        exec(block, names)
    assert capsys.readouterr().out == "base_lr: where the loss starts to fall; max_lr: where it turns\n"
    assert isinstance(names["optimizer"].param_groups[0]["schedule"], fused_clr.schedules.Cyclic)
    assert names["optimizer"].status().applied_steps == len(names["batches"]) == 125


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    for link in links:
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link
