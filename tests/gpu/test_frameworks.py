"""Captured trainings in Lightning and transformers, and the demo's captured loops, on a GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]


def test_lightning(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    from tests.integrations import test_lightning_captured as cases

    options = {"accelerator": "gpu", "devices": 1}
    theirs, model = cases.Regression(fused=False), cases.Regression()
    _, wanted = cases.fit(theirs, tmp_path / "torch", **options)
    counted = cases.CountGraphs(cases.CapturedTraining())
    _, logged = cases.fit(model, tmp_path / "ours", counted.captured, counted, **options)
    assert counted.graphs == 1
    cases.assert_same_rows(logged, wanted)
    cases.assert_same_parameters(model, theirs)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_lightning_in_mixed_precision(tmp_path: Path, precision: str) -> None:
    pytest.importorskip("lightning")
    from tests.integrations import test_lightning_captured as cases

    counted = cases.CountGraphs(cases.CapturedTraining())
    options = {"accelerator": "gpu", "devices": 1, "precision": precision}
    trainer, _ = cases.fit(cases.Regression(), tmp_path, counted.captured, counted, **options)
    assert counted.graphs == 1
    status = trainer.optimizers[0].status()
    assert status.schedule_step == status.applied_steps
    assert status.applied_steps + status.skipped_steps == trainer.global_step == 18


def test_trainer(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests.integrations import test_trainer_captured as cases

    wanted = cases.train(cases.Trainer, tmp_path / "torch", use_cpu=False)
    cases.assert_same(cases.train(cases.CapturedTrainer, tmp_path / "ours", use_cpu=False), wanted)


def test_the_demos_captured_loops() -> None:
    pytest.importorskip("sklearn")
    from fused_clr import demo

    loops = demo.digits_captured(40, torch.device("cuda"), seed=0)
    wanted = demo.CAPTURED.lr(np.arange(40))
    np.testing.assert_allclose(loops["fused-clr"].applied_lrs, wanted, rtol=0, atol=1e-7)
    assert max(loops["torch"].applied_lrs) == pytest.approx(wanted[3], abs=1e-7)
