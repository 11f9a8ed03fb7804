"""Kernels import Triton and each other, so that nothing points up from them."""

from __future__ import annotations

import ast
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "kernels"


def test_kernels_import_triton_and_each_other() -> None:
    files = sorted(KERNELS.glob("*.py"))
    assert "step.py" in {path.name for path in files}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name for alias in node.names} <= {"triton", "triton.language"}, path
            if isinstance(node, ast.ImportFrom):
                assert node.level == 1, path
                assert (KERNELS / f"{node.module}.py").exists(), path
