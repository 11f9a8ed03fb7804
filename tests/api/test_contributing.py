"""The two pages of CONTRIBUTING.md on extending, followed literally in a copy of the package."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Over both backends: the new schedule drives the new rule, against a loop in plain torch; recorded, replayed and saved.
PROGRAM = """
import os
import torch
from fused_clr import schedules, testing
from fused_clr.optim import FusedSign
from fused_clr.schedules.sawtooth import Sawtooth

for backend in ("cpu", "triton"):
    os.environ["FUSED_CLR_BACKEND"] = backend
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(n, dtype=dtype)) for n in (3, 70)]
        plain = [param.detach().clone() for param in params]
        groups = [{"params": params[:1], "schedule": Sawtooth(0.25, 4)}, {"params": params[1:], "weight_decay": 0.5}]
        optimizer = FusedSign(groups, lr=0.125, max_grad_norm=1.0)
        optimizer.load_state_dict(optimizer.state_dict())
        for step in range(10):
            for param, expected, lr, decay in zip(params, plain, (0.25 - step % 4 / 16, 0.125), (0, 0.5)):
                param.grad = torch.randn_like(param)
                expected.mul_(1 - lr * decay).sub_(param.grad.sign(), alpha=lr)
            optimizer.step()
        if backend == "triton":
            with testing.record_launches() as graph:
                optimizer.step()
            graph.replay()
            for step in (10, 11):
                for param, expected, lr, decay in zip(params, plain, (0.25 - step % 4 / 16, 0.125), (0, 0.5)):
                    expected.mul_(1 - lr * decay).sub_(param.grad.sign(), alpha=lr)
        assert optimizer.param_groups[0]["lr"] == (0.25 if backend == "triton" else 0.125)
        for param, expected in zip(params, plain):
            torch.testing.assert_close(param, expected, rtol=1e-5, atol=1e-6)
        try:
            optimizer.set_schedule(schedules.Cyclic(0.1, 0.5))
        except ValueError as error:
            assert "must not cycle the momentum" in str(error), error
        else:
            raise SystemExit("a rule without momentum took a schedule that cycles it")
"""


def test_the_examples_do_what_the_pages_say(tmp_path: Path) -> None:
    blocks = re.findall(r"   ```python\n(.*?)   ```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    sawtooth, kernel, rule, optimizer = map(textwrap.dedent, blocks)
    package = tmp_path / "fused_clr"
    shutil.copytree(ROOT / "fused_clr", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "schedules" / "sawtooth.py").write_text(sawtooth)
    (package / "kernels" / "sign.py").write_text(kernel)
    (package / "_device" / "rules" / "sign.py").write_text(rule)
    module = package / "optim.py"
    imported = "from ._device.rules.adam import ADAM\n"
    source = module.read_text()
    assert imported in source
    source = source.replace(imported, f"{imported}from ._device.rules.sign import SIGN\n")
    module.write_text(f"{source}\n\n{optimizer}")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env={"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
