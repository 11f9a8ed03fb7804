"""transformers.Trainer and accelerate: learning rates, losses and resumed runs equal those of torch's pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from fused_clr import CyclicLR, FusedAdamW
from tests.helpers.ranks import Ranks

pytestmark = pytest.mark.filterwarnings("default")

KINDS: dict[str, Any] = {
    "torch": (torch.optim.AdamW, lr_scheduler.CyclicLR),
    "ours": (FusedAdamW, CyclicLR),
}
CYCLE: dict[str, Any] = {"base_lr": 1e-3, "max_lr": 1e-2, "step_size_up": 4, "mode": "triangular2"}
STEPS = 12
# Losses of 12 float32 steps.
LOSS_RTOL = 1e-5


def train(kind: str, folder: Path, resume: Path | None = None) -> tuple[list[float], list[float], dict[str, Any]]:
    """The logged learning rates and losses of all steps, and the parameters."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    optimizer_class, scheduler_class = KINDS[kind]
    optimizer = optimizer_class(model.parameters(), weight_decay=0.01)
    scheduler = scheduler_class(optimizer, **CYCLE)
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 32, (64, 8))]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_steps=6,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, optimizers=(optimizer, scheduler))
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    params = {name: param.detach() for name, param in model.named_parameters()}
    return [entry["learning_rate"] for entry in entries], [entry["loss"] for entry in entries], params


def test_trainer_logs_and_trains_as_with_torch_and_resumes_in_mid_cycle(tmp_path: Path) -> None:
    wanted_lrs, wanted_losses, _ = train("torch", tmp_path / "torch")
    lrs, losses, params = train("ours", tmp_path / "ours")
    assert lrs == pytest.approx(wanted_lrs)
    assert len(lrs) == STEPS
    assert losses == pytest.approx(wanted_losses, rel=LOSS_RTOL)

    resumed_lrs, resumed_losses, resumed = train("ours", tmp_path / "resumed", tmp_path / "ours" / "checkpoint-6")
    assert (resumed_lrs, resumed_losses) == (lrs, losses)
    for name, value in params.items():
        assert torch.equal(resumed[name], value), name


@pytest.mark.parametrize(("saved", "loaded"), [("torch", "ours"), ("ours", "torch")])
def test_trainer_resumes_across_the_pairs(tmp_path: Path, saved: str, loaded: str) -> None:
    wanted = train(saved, tmp_path / "first")
    lrs, losses, _ = train(loaded, tmp_path / "second", tmp_path / "first" / "checkpoint-6")
    assert lrs == pytest.approx(wanted[0])
    assert losses == pytest.approx(wanted[1], rel=LOSS_RTOL)


def run_accelerate(kind: str, split_batches: bool, accumulate: int, folder: str) -> tuple[list[float], list[float]]:
    """A loop under accelerate, saved and loaded on the way; gives the learning rates and the weights."""
    from accelerate import Accelerator, DataLoaderConfiguration
    from accelerate.state import AcceleratorState, GradientState

    # It keeps its state for all accelerators of a process.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=accumulate,
        dataloader_config=DataLoaderConfiguration(split_batches=split_batches),
    )
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer_class, scheduler_class = KINDS[kind]
    optimizer = optimizer_class(model.parameters())
    scheduler = scheduler_class(optimizer, **CYCLE)
    inputs = torch.randn(64, 4)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs), batch_size=4)
    prepared = accelerator.prepare(model, optimizer, loader, scheduler)
    model, optimizer, loader, scheduler = prepared
    lrs = []
    for step, (batch,) in enumerate(loader):
        with accelerator.accumulate(model):
            accelerator.backward((model(batch) - batch.sum(1, keepdim=True)).square().mean())
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            lrs.append(scheduler.get_last_lr()[0])
            scheduler.step()
            lrs.append(scheduler.get_last_lr()[0])
            optimizer.zero_grad()
        if step == 3:
            accelerator.save_state(folder)
            accelerator.wait_for_everyone()
            for param in model.parameters():
                param.data.zero_()
            accelerator.load_state(folder)
    return lrs, [value for param in model.parameters() for value in param.flatten().tolist()]


@pytest.mark.parametrize(("split_batches", "accumulate"), [(False, 1), (True, 1), (False, 2)])
def test_accelerate_in_two_processes_equals_torch(
    ranks: Ranks, tmp_path: Path, split_batches: bool, accumulate: int
) -> None:
    """Its scheduler steps once a process and batch, unless batches are split."""
    wanted = ranks.run(run_accelerate, "torch", split_batches, accumulate, str(tmp_path / "torch"))
    found = ranks.run(run_accelerate, "ours", split_batches, accumulate, str(tmp_path / "ours"))
    assert len(set(wanted[0][0])) >= 3
    for (lrs, values), (wanted_lrs, wanted_values) in zip(found, wanted, strict=True):
        assert lrs == pytest.approx(wanted_lrs)
        assert values == pytest.approx(wanted_values, rel=1e-5, abs=1e-6)
