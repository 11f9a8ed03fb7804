"""What torch offers around an optimizer: weight averaging, clipping, autocast and a GradScaler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from fused_clr import CyclicLR, FusedAdam
from tests.helpers.tolerances import AFTER_STEPS

CYCLE: dict[str, Any] = {"base_lr": 1e-3, "max_lr": 1e-2, "step_size_up": 4}
KINDS = ((torch.optim.Adam, lr_scheduler.CyclicLR), (FusedAdam, CyclicLR))


def make_model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def batches() -> list[torch.Tensor]:
    return list(torch.randn(12, 6, 4, generator=torch.Generator().manual_seed(1)))


def loss_of(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return (model(batch) - batch.sum(1, keepdim=True)).square().mean()


def assert_close(first: torch.nn.Module, second: torch.nn.Module) -> None:
    tolerance = AFTER_STEPS[torch.float32]
    torch.testing.assert_close(
        dict(first.state_dict()), dict(second.state_dict()), rtol=tolerance.rtol, atol=tolerance.atol
    )


def train(kinds: tuple[Any, Any], before: Callable[..., None] = id, after: Callable[..., None] = id) -> Any:
    """A model after a training; ``before`` and ``after`` each optimizer step are given the model."""
    optimizer_class, scheduler_class = kinds
    model = make_model()
    optimizer = optimizer_class(model.parameters())
    scheduler = scheduler_class(optimizer, **CYCLE)
    for batch in batches():
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        before(model)
        optimizer.step()
        scheduler.step()
        after(model)
    return model


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["swa", "ema"])
def test_averaged_models(backend: str, average: Any) -> None:
    averages = []
    for kinds in KINDS:
        averaged = AveragedModel(make_model(), multi_avg_fn=average)
        train(kinds, after=averaged.update_parameters)
        update_bn(batches(), averaged)
        averages.append(averaged)
    assert_close(*averages)


def test_swalr_takes_over_from_a_schedule(backend: str) -> None:
    """It writes ``lr``, which a scheduled group refuses until the schedule is taken away."""
    runs = []
    for optimizer_class, scheduler_class in KINDS:
        model = make_model()
        optimizer = optimizer_class(model.parameters())
        scheduler = scheduler_class(optimizer, **CYCLE, cycle_momentum=False)
        lrs: list[float] = []
        for index, batch in enumerate(batches()):
            if index == 6:
                if isinstance(optimizer, FusedAdam):
                    with pytest.raises(RuntimeError, match="cannot be set by SWALR: the schedule drives lr"):
                        SWALR(optimizer, swa_lr=0.05, anneal_epochs=3).step()
                    optimizer.set_schedule(None)
                scheduler = SWALR(optimizer, swa_lr=0.05, anneal_epochs=3)
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
            scheduler.step()
            lrs.append(optimizer.param_groups[0]["lr"])
        runs.append((model, lrs))
    assert runs[0][1] == pytest.approx(runs[1][1])
    assert_close(runs[0][0], runs[1][0])


CLIPS = {
    "norm": lambda model: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3),
    "value": lambda model: torch.nn.utils.clip_grad_value_(model.parameters(), 0.05),
}


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
def test_torchs_clipping(backend: str, clip: Callable[..., Any]) -> None:
    assert_close(*(train(kinds, before=clip) for kinds in KINDS))


def test_autocast_and_a_gradscaler(backend: str) -> None:
    models = []
    for optimizer_class, scheduler_class in KINDS:
        model = make_model()
        optimizer = optimizer_class(model.parameters())
        scheduler = scheduler_class(optimizer, **CYCLE)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for batch in batches():
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, batch)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
        models.append(model)
    assert_close(*models)
