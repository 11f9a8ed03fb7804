"""CapturedTrainer: a captured run of transformers.Trainer trains and logs as torch's eager one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from fused_clr import CyclicLR, FusedAdamW
from fused_clr.integrations.transformers import CapturedTrainer

pytestmark = pytest.mark.filterwarnings("default")

CYCLE: dict[str, Any] = {"base_lr": 1e-3, "max_lr": 1e-2, "step_size_up": 4, "mode": "triangular2"}
LENGTHS = (8, 8, 8, 6)
SIZES = {"vocab_size": 32, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}


class Counting(GPT2LMHeadModel):
    """Counts the calls that train it, in a list of its class: a step must not change the model's attributes."""

    calls: list[bool]

    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        self.calls.append(self.training)
        return super().forward(input_ids, labels=labels, **kwargs)


def data() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    # Batches of 4 have one length, and the last of four batches another one.
    lengths = [length for length in LENGTHS for _ in range(4)]
    rows = [torch.randint(0, 32, (length,), generator=generator) for length in lengths]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def train(
    trainer_class: type[Trainer], folder: Path, resume: Path | None = None, **options: Any
) -> tuple[Trainer, list[dict[str, float]]]:
    """A trainer after 12 steps, and what it logged."""
    torch.manual_seed(0)
    model = Counting(GPT2Config(**SIZES, bos_token_id=0, eos_token_id=0, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    type(model).calls = []
    fused = issubclass(trainer_class, CapturedTrainer)
    optimizer = (FusedAdamW if fused else torch.optim.AdamW)(model.parameters(), weight_decay=0.01)
    scheduler = (CyclicLR if fused else lr_scheduler.CyclicLR)(optimizer, **CYCLE)
    optimizers = options.pop("optimizers", (optimizer, scheduler))
    own = {key: options.pop(key) for key in ("capture_options", "callbacks") if key in options}
    arguments = TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": 12,
            "per_device_train_batch_size": 4,
            "train_sampling_strategy": "sequential",
            "logging_steps": 1,
            "save_steps": 6,
            "eval_strategy": "steps",
            "eval_steps": 5,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            **options,
        },
    )
    trainer = trainer_class(
        model=model, args=arguments, train_dataset=data(), eval_dataset=data()[:4], optimizers=optimizers, **own
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    keys = ("loss", "learning_rate", "grad_norm", "eval_loss", "step")
    return trainer, [
        {key: float(entry[key]) for key in keys if key in entry}
        for entry in trainer.state.log_history
        if "loss" in entry or "eval_loss" in entry
    ]


def assert_same(found: Any, wanted: Any) -> None:
    (trainer, logs), (reference, wanted_logs) = found, wanted
    assert len(logs) == len(wanted_logs)
    for ours, theirs in zip(logs, wanted_logs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    expected = dict(reference.model.named_parameters())
    for name, param in trainer.model.named_parameters():
        # The gradient of the keys' bias is 0 but for rounding, of which Adam makes whole updates.
        if not name.endswith("c_attn.bias"):
            torch.testing.assert_close(param, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("emulated_cuda")
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.0}, {"bf16": True}], ids=["clipped", "unclipped", "bf16"])
def test_a_captured_training_is_torchs(tmp_path: Path, options: dict[str, Any]) -> None:
    wanted = train(Trainer, tmp_path / "torch", **options)
    graphs = []

    class Count(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            graphs.append(trainer_of[0].num_graphs)

    trainer_of: list[Any] = []

    class Kept(CapturedTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            trainer_of.append(self)

    found = train(Kept, tmp_path / "ours", capture_options={"num_warmup_iters": 1}, callbacks=[Count()], **options)
    if "bf16" in options:
        # Sums of bfloat16 products, in another order of operators.
        assert [row.get("learning_rate") for row in found[1]] == pytest.approx(
            [row.get("learning_rate") for row in wanted[1]]
        )
    else:
        assert_same(found, wanted)
    # Two lengths, with a warmup and a capture each.
    assert graphs[-1] == 2
    assert Counting.calls.count(True) == 4
    assert trainer_of[0].num_graphs == 0


@pytest.mark.usefixtures("emulated_cuda")
def test_a_captured_training_resumes(tmp_path: Path) -> None:
    options = {"capture_options": {"num_warmup_iters": 1}}
    wanted = train(CapturedTrainer, tmp_path / "ours", **options)
    found = train(CapturedTrainer, tmp_path / "rest", tmp_path / "ours" / "checkpoint-6", **options)
    assert_same(found, wanted)


def test_without_cuda_the_step_runs_eagerly(tmp_path: Path) -> None:
    assert_same(train(CapturedTrainer, tmp_path / "ours"), train(Trainer, tmp_path / "torch"))


class Inner(TrainerCallback):
    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2, and every replay is a whole step"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing reads the random state"),
        ({"torch_empty_cache_steps": 5}, "torch_empty_cache_steps frees memory"),
        ({"callbacks": [Inner()]}, "Inner.on_pre_optimizer_step runs inside of the step"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_cannot_be_captured_is_refused_before_training(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match=f"CapturedTrainer cannot capture this training: {message}"):
        train(CapturedTrainer, tmp_path, **options)
    assert Counting.calls == []


@pytest.mark.parametrize("optimizers", ["own", "none"])
def test_torchs_optimizer_is_refused_before_training(optimizers: str, tmp_path: Path) -> None:
    own = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
    given = (None, None) if optimizers == "none" else (own, None)
    with pytest.raises(TypeError, match="must be a FusedAdam, FusedAdamW or FusedSGD, got AdamW: pass optimizers="):
        train(CapturedTrainer, tmp_path, optimizers=given)
    assert Counting.calls == []


@pytest.mark.usefixtures("emulated_cuda")
def test_a_model_that_keeps_what_it_saw_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Counting.forward

    def keeping(self: Any, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        self.kept = forward(self, input_ids, labels, **kwargs)
        return self.kept

    monkeypatch.setattr(Counting, "forward", keeping)
    with pytest.raises(RuntimeError, match="the captured step changed Counting.kept"):
        train(CapturedTrainer, tmp_path, capture_options={"num_warmup_iters": 1})
