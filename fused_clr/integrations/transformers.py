"""transformers: `CapturedTrainer`, a Trainer that captures its training step in a CUDA graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from ._step import FrameworkStep, check_optimizer
from .accelerate import report_skips

# A mix-in: for the type checker alone it is a Trainer.
if TYPE_CHECKING:
    Base = Trainer
else:
    Base = object


class CapturedTraining(Base):
    """Mix-in that captures the training step of a `transformers.Trainer`; `CapturedTrainer` is the ready class.

    Put it before the Trainer: ``class MyTrainer(CapturedTraining, SFTTrainer): ...``. Forward, backward, clipping, loss
    scaling and the optimizer's step are one replay. Checkpoints, evaluation, logs and callbacks work as before. Without
    CUDA the step runs eagerly. Batches of another shape have a graph of their own: pad them to few lengths.

    ``logging_nan_inf_filter`` (the Trainer's default) and the learning rate in its logs wait for the device at every
    step, outside of the graph. Set ``logging_nan_inf_filter=False`` for speed.

    A replay would be wrong with these. They raise an error before training:

    - an optimizer that is not a fused one;
    - accumulated gradients, several devices in one process, FSDP, DeepSpeed;
    - gradient checkpointing that saves the random state, ``torch_empty_cache_steps``;
    - callbacks with ``on_pre_optimizer_step``.

    Writing attributes of the model raises an error when the step is captured.

    Args:
        args: The Trainer's.
        capture_options: Those of `fused_clr.GraphedStep`. ``num_warmup_iters`` is 11 under DDP if it is not given.
        kwargs: The Trainer's.

    Raises:
        RuntimeError: Training cannot be captured; the message says why. Nothing has been trained.
        TypeError: The optimizer is not a fused one, or an option is unknown.
    """

    def __init__(self, *args: Any, capture_options: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self._capture_options = dict(capture_options or {})
        self._captured_step: FrameworkStep | None = None
        self._captured_norm: Tensor | None = None
        super().__init__(*args, **kwargs)

    @property
    def num_graphs(self) -> int:
        """Graphs captured and kept; 0 without CUDA."""
        return 0 if self._captured_step is None else self._captured_step.graphed.num_graphs

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains; see `transformers.Trainer.train`."""
        refusal = self._refusal()
        if refusal is not None:
            raise RuntimeError(f"{type(self).__name__} cannot capture this training: {refusal}")
        if self.optimizer is not None:
            check_optimizer(self.optimizer, HOW)
        try:
            return super().train(*args, **kwargs)
        finally:
            self._release()

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Forward, backward, clipping and the optimizer's step; see `transformers.Trainer.training_step`."""
        step = self._captured_step or self._begin(model)
        # Evaluation leaves it in its other mode, which is another kind of step.
        model.train()
        if num_items_in_batch is not None:
            # As a number it would need a graph for each of its values.
            num_items_in_batch = torch.as_tensor(num_items_in_batch, dtype=torch.int64, device="cpu")
        loss: Tensor
        (loss, self._captured_norm), _ = step(dict(inputs), num_items_in_batch)
        return loss

    def _begin(self, model: nn.Module) -> FrameworkStep:
        # accelerate's wrapper, which unscales, and ours in it.
        wrapper: Any = self.optimizer
        optimizer = check_optimizer(wrapper.optimizer, HOW)
        options = dict(self._capture_options)
        if self.accelerator.distributed_type is not DistributedType.NO:
            options.setdefault("num_warmup_iters", 11)
        report_skips(self.accelerator)
        take_step, training_step = wrapper.step, super().training_step
        max_norm = self.args.max_grad_norm or torch.inf

        def step(inputs: Any, num_items_in_batch: Any) -> Any:
            loss = training_step(model, inputs, num_items_in_batch)
            norm = self.accelerator.clip_grad_norm_(model.parameters(), max_norm)
            take_step()
            return loss, norm

        # DistributedDataParallel writes its own attributes.
        module = self.accelerator.unwrap_model(model)
        self._captured_step = FrameworkStep(step, module, optimizer, options)
        # The Trainer calls it after training_step, which has taken the step.
        wrapper.step = lambda closure=None: None
        return self._captured_step

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return self._captured_norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return self._captured_norm

    def _release(self) -> None:
        if self._captured_step is not None:
            self.optimizer.__dict__.pop("step", None)
            self._captured_step.graphed.release()
            self._captured_step = None

    def _refusal(self) -> str | None:
        """Why a training cannot be captured; None if it can."""
        args = self.args
        if not hasattr(Trainer, "_get_grad_norm") or not hasattr(Trainer, "_clip_grad_norm"):
            return "this version of transformers has no Trainer._clip_grad_norm; it needs 5.0 or newer"
        if args.gradient_accumulation_steps != 1:
            return (
                f"gradient_accumulation_steps={args.gradient_accumulation_steps}, and every replay is a whole step; "
                "use larger batches"
            )
        if args.n_gpu > 1:
            return f"it uses {args.n_gpu} devices in one process; start one process a device, with torchrun"
        if self.accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU):
            return (
                f"distributed type {self.accelerator.distributed_type.value}; only one device and DDP can be captured"
            )
        # A string has become a dict by now.
        checkpointing: Any = args.gradient_checkpointing_kwargs or {}
        if args.gradient_checkpointing and checkpointing.get("preserve_rng_state", True):
            return (
                "gradient_checkpointing reads the random state of the device, which a capture forbids; give it "
                'gradient_checkpointing_kwargs={"preserve_rng_state": False} if the model draws no random numbers'
            )
        if args.torch_empty_cache_steps is not None:
            return "torch_empty_cache_steps frees memory inside of the step; leave it None"
        for callback in self.callback_handler.callbacks:
            if type(callback).on_pre_optimizer_step is not TrainerCallback.on_pre_optimizer_step:
                return (
                    f"{type(callback).__name__}.on_pre_optimizer_step runs inside of the step, and a replay would "
                    "leave it out; use on_step_begin or on_step_end"
                )
        return None


HOW = "pass optimizers=(FusedAdamW(model.parameters()), scheduler) to the Trainer"


class CapturedTrainer(CapturedTraining, Trainer):
    """A `transformers.Trainer` whose training step is captured: replace ``Trainer(`` with ``CapturedTrainer(``.

    See `CapturedTraining` for what it refuses and for ``capture_options``.

    Example:
        >>> trainer = CapturedTrainer(model=model, args=args, optimizers=(optimizer, scheduler))  # doctest: +SKIP
    """
