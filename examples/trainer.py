"""Hugging Face's Trainer with FusedAdamW and CyclicLR in ``optimizers=``, on a tiny GPT-2 with random weights.

python examples/trainer.py --steps 60 --folder out/trainer
python examples/trainer.py --steps 120 --folder out/trainer     # resumes from the last checkpoint
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from fused_clr import CyclicLR, FusedAdamW


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--folder", type=Path, default=Path("out/trainer"))
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps must be 1 or more, got {arguments.steps}")

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    # Sequences that count up, which the model can learn.
    starts = torch.randint(0, 64, (256, 1))
    data = [{"input_ids": ids, "labels": ids} for ids in (starts + torch.arange(16)) % 64]

    optimizer = FusedAdamW(model.parameters(), weight_decay=0.01)
    scheduler = CyclicLR(optimizer, base_lr=1e-3, max_lr=1e-2, step_size_up=20, mode="triangular2")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(arguments.folder),
            max_steps=arguments.steps,
            per_device_train_batch_size=16,
            logging_steps=10,
            save_steps=20,
            save_total_limit=2,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=data,
        optimizers=(optimizer, scheduler),
    )
    checkpoint = get_last_checkpoint(str(arguments.folder)) if arguments.folder.exists() else None
    trainer.train(resume_from_checkpoint=checkpoint)
    print(f"step {trainer.state.global_step}, lr {scheduler.get_last_lr()[0]:.6g}")


if __name__ == "__main__":
    main()
