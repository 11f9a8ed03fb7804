"""The documentation's code runs, what it names exists, and its links lead somewhere."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_clr.schedules

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("**/*.md"))]
# Pages with code, and what it prints: a regular expression. `test_contributing.py` tests the code of CONTRIBUTING.md.
PRINTED = {
    "README.md": r"Status\(schedule_step=3, .*\)\n",
    "docs/averaging.md": r"\[4\]\nTrue\nTrue\n",
    "docs/captured-loops.md": r"[-+.\de]+ Status\(schedule_step=200, .*\)\n220 0\n",
    "docs/choosing-the-bounds.md": r"base_lr: where the loss starts to fall; max_lr: where it turns\n",
    "docs/faq.md": r"0\.0001\n",
    "docs/frameworks.md": r"(?s).*",
    "docs/integrations.md": r"(?s)(.*\n)?16 True\n.*\n10\nTrue\n",
    "docs/migration.md": "",
    "docs/multi-gpu.md": r"[.\d]+ 3\n",
    "docs/quick-start.md": (
        r"200 \[0\.001\]\n0\.001 \(0\.9, 0\.999\)\ntensor\(\[0\.0010\], dtype=torch\.float64\)\n"
        r"(\{'schedule_step': .*\}\n){3}200\n300\n"
    ),
    "docs/schedules.md": r"4e-05 1e-05 1e-05 500\n0\.0001\n",
}


# Those have tests of their own.
OTHERS = {"docs/frameworks.md", "docs/integrations.md", "docs/multi-gpu.md"}


def code_of(page: str) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE))


def run(page: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "page"}
    if page == "README.md":
        # A reader's own.
        batches = [(torch.ones(2, 3), torch.ones(2, 1))] * 3
        names |= {"model": torch.nn.Linear(3, 1), "loader": batches, "loss_function": torch.nn.functional.mse_loss}
    exec(code_of(page), names)
    return names


def test_no_page_with_code_is_left_out() -> None:
    with_code = {str(page.relative_to(ROOT)) for page in PAGES if "```python" in page.read_text()}
    assert with_code - {"CONTRIBUTING.md"} == set(PRINTED)


@pytest.mark.parametrize("page", sorted(PRINTED.keys() - OTHERS))
def test_code_of_pages(
    page: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    # Where a page says what happens without a GPU.
    monkeypatch.delenv("FUSED_CLR_BACKEND", raising=False)
    names = run(page)
    assert re.fullmatch(PRINTED[page], capsys.readouterr().out)
    if page == "docs/choosing-the-bounds.md":
        assert isinstance(names["optimizer"].param_groups[0]["schedule"], fused_clr.schedules.Cyclic)
        assert names["optimizer"].status().applied_steps == len(names["batches"]) == 125


@pytest.mark.filterwarnings("default")
def test_code_of_the_page_on_frameworks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("accelerate", "lightning", "transformers"):
        pytest.importorskip(module)
    import lightning

    # The Trainer writes there.
    monkeypatch.chdir(tmp_path)
    names = run("docs/frameworks.md")
    assert names["scheduler"].scheduler.last_epoch == names["trainer"].state.global_step == 4
    module = names["Regression"]()
    loader = torch.utils.data.DataLoader(torch.randn(32, 8), batch_size=8)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    lightning.Trainer(max_steps=4, enable_checkpointing=False, **quiet).fit(module, loader)
    assert module.optimizers().optimizer.status().applied_steps == 4


@pytest.mark.filterwarnings("default")
def test_code_of_the_page_on_integrations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run("docs/integrations.md")
    assert re.fullmatch(PRINTED["docs/integrations.md"], capsys.readouterr().out)


def test_code_of_the_page_on_several_gpus(tmp_path: Path) -> None:
    """In a process of its own, as torchrun starts it: a process group leaves threads behind."""
    program = tmp_path / "page.py"
    program.write_text(code_of("docs/multi-gpu.md"))
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    environment = os.environ | alone | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(PRINTED["docs/multi-gpu.md"], done.stdout)


def test_the_pages_name_all_schedules_and_schedulers() -> None:
    for name in fused_clr.schedules.__all__:
        assert f"`{name}" in (DOCS / "schedules.md").read_text(), name
        # A function in the module of its name.
        path = f"{name}.{name}" if name.islower() else name
        assert f"::: fused_clr.schedules.{path}\n" in (DOCS / "api" / "schedules.md").read_text(), name
    for kind in fused_clr.scheduler.KINDS:
        assert f"`{kind}`" in (DOCS / "migration.md").read_text(), kind
        assert f"::: fused_clr.scheduler.{kind}\n" in (DOCS / "api" / "schedulers.md").read_text(), kind


def test_the_api_has_every_public_name() -> None:
    documented = set(re.findall(r"^::: ([\w.]+)$", "".join(p.read_text() for p in DOCS.glob("api/*.md")), re.MULTILINE))
    for name in set(fused_clr.__all__) - {"schedules", "testing"}:
        module = getattr(fused_clr, name).__module__
        package = module.rpartition(".")[0]
        assert documented & {module, f"{module}.{name}", f"{package}.{name}", f"fused_clr.{name}"}, name


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere_and_named_files_exist(page: Path) -> None:
    text = page.read_text()
    for link, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", text):
        if not link.startswith("http"):
            target = page.parent / link if link else page
            assert target.exists(), link
            if anchor and target.suffix == ".md" and "api" not in target.parts and not anchor.startswith("fused_clr."):
                headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings}, anchor
    # Not the files that an example tells a reader to make.
    for path in re.findall(r"`((?:tests|bench|examples)/[\w/]+\.(?:py|sh))`", text):
        assert (ROOT / path).exists(), path
