"""Lightning: `CapturedTraining`, a callback that captures the training step in a CUDA graph."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torchmetrics import Metric

from ._step import FrameworkStep, check_optimizer

PRECISIONS = (Precision, MixedPrecision, HalfPrecision, DoublePrecision)
STRATEGIES = (SingleDeviceStrategy, DDPStrategy)
# They run inside the step, and replays would leave them out.
INNER_HOOKS = ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step")
MODULE_HOOKS = ("optimizer_step", "optimizer_zero_grad")
# As torch's documentation of DistributedDataParallel asks for.
DDP_WARMUP = 11


class Logged(NamedTuple):
    """A call of ``self.log`` in a step; every step repeats it with its own value."""

    hook: str
    name: str
    value: Tensor
    args: tuple[Any, ...]
    options: dict[str, Any]


class CapturedTraining(Callback):
    """Captures the training step in a CUDA graph and replays it: ``Trainer(callbacks=[CapturedTraining()])``.

    Forward, backward, clipping, loss scaling and the optimizer's step are one replay. Checkpoints, validation, loggers
    and schedulers work as before. Without CUDA the step runs eagerly. Batches of another shape have a graph of their
    own, and so have other values of numbers and strings that are attributes of the module.

    ``self.log`` of tensors in ``training_step`` is repeated at every step with that step's value. The tensors that
    ``training_step`` returns reach ``on_train_batch_end`` as copies without autograd's graph.

    A replay would be wrong with these. They raise an error before training:

    - an optimizer that is not a fused one, or several optimizers;
    - manual optimization, accumulated gradients, ``detect_anomaly``;
    - strategies other than one device and DDP, and precision plugins that are not Lightning's own;
    - hooks that run inside of the step, such as ``on_after_backward``.

    These raise an error in the step:

    - reading ``batch_idx``, ``current_epoch`` or ``global_step``;
    - logging numbers or metrics, or updating a ``torchmetrics.Metric``;
    - writing attributes of the module while it is captured.

    Args:
        options: Those of `fused_clr.GraphedStep`. ``num_warmup_iters`` is 11 under DDP if it is not given.

    Raises:
        RuntimeError: Training cannot be captured; the message says why. Nothing has been trained.
        TypeError: The optimizer is not a fused one, an option is unknown, or the Trainer is of ``pytorch_lightning``.

    Example:
        >>> trainer = Trainer(callbacks=[CapturedTraining()])  # doctest: +SKIP
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._step: FrameworkStep | None = None
        self._loop: Any = None

    @property
    def num_graphs(self) -> int:
        """Graphs captured and kept; 0 without CUDA."""
        return 0 if self._step is None else self._step.graphed.num_graphs

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that training can be captured, and takes over the step."""
        given: Any = trainer
        if not isinstance(given, Trainer):
            package = type(given).__module__.partition(".")[0]
            raise TypeError(f"CapturedTraining needs lightning.pytorch, got a Trainer of {package}; import the former")
        refusal = _refusal(trainer, pl_module)
        if refusal is not None:
            raise RuntimeError(f"CapturedTraining cannot capture this training: {refusal}")
        optimizer = check_optimizer(trainer.optimizers[0], "return a fused optimizer from configure_optimizers")
        options = dict(self._options)
        if isinstance(trainer.strategy, DDPStrategy):
            options.setdefault("num_warmup_iters", DDP_WARMUP)
        # Any: its method is replaced.
        loop: Any = trainer.fit_loop.epoch_loop.automatic_optimization
        run = loop.run
        self._step = FrameworkStep(self._make_step(run, pl_module, optimizer), pl_module, optimizer, options)
        self._loop = loop
        loop.run = self._make_run(trainer, pl_module)

    def _make_step(self, run: Callable[..., Any], module: LightningModule, optimizer: Any) -> Callable[..., Any]:
        metrics = [part for part in module.modules() if isinstance(part, Metric)]

        def step(batch: Any, takes_index: bool) -> Any:
            kwargs: OrderedDict[str, Any] = OrderedDict(batch=batch)
            if takes_index:
                kwargs["batch_idx"] = _Changing("batch_idx")
            records: list[Logged] = []
            counts = [metric._update_count for metric in metrics]
            with _recorded_logs(module, records), _changing_numbers():
                result = run(optimizer, 0, kwargs)
            if not result:
                raise RuntimeError("training_step returned None to leave out an update, which a captured step cannot")
            if counts != [metric._update_count for metric in metrics]:
                raise RuntimeError(
                    "training_step updated a torchmetrics.Metric, and a replay would not. Return what it needs from "
                    "training_step, and update it in on_train_batch_end"
                )
            return result, records

        return step

    def _make_run(self, trainer: Trainer, module: LightningModule) -> Callable[..., Any]:
        def run(optimizer: Any, batch_idx: int, kwargs: OrderedDict[str, Any]) -> Any:
            del optimizer, batch_idx
            step = self._step
            assert step is not None
            if trainer.accumulate_grad_batches != 1:
                raise RuntimeError(f"accumulate_grad_batches must stay 1, got {trainer.accumulate_grad_batches}")
            (result, records), ran = step(kwargs["batch"], "batch_idx" in kwargs)
            if not ran:
                progress = self._loop.optim_progress.optimizer
                for counter in (progress.zero_grad, progress.step):
                    counter.increment_ready()
                    counter.increment_completed()
                progress.zero_grad.increment_started()
            before = module._current_fx_name
            for record in records:
                module._current_fx_name = record.hook
                module.log(record.name, record.value, *record.args, **record.options)
            module._current_fx_name = before
            return result

        return run

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the step back and frees the graphs."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives the step back and frees the graphs."""
        self._release()

    def _release(self) -> None:
        if self._step is not None and self._loop is not None:
            vars(self._loop).pop("run", None)
            self._step.graphed.release()
            self._step = self._loop = None


def _refusal(trainer: Trainer, module: LightningModule) -> str | None:
    """Why a training cannot be captured; None if it can."""
    if not module.automatic_optimization:
        return (
            "it uses manual optimization; wrap what training_step does in a fused_clr.GraphedStep instead, which also "
            "takes several optimizers"
        )
    if len(trainer.optimizers) != 1:
        return f"it has {len(trainer.optimizers)} optimizers; use manual optimization and fused_clr.GraphedStep"
    # The Trainer sets it without declaring it.
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    accumulates = [c for c in callbacks if isinstance(c, GradientAccumulationScheduler)]
    if trainer.accumulate_grad_batches != 1 or any(c.going_to_accumulate_grad_batches() for c in accumulates):
        return (
            f"it accumulates gradients (accumulate_grad_batches={trainer.accumulate_grad_batches}), and every replay "
            "is a whole step; use larger batches, or fused_clr.GraphedStep over a list of batches"
        )
    if trainer._detect_anomaly:
        return "detect_anomaly=True waits for the device in backward; turn it off"
    if not isinstance(trainer.strategy, STRATEGIES):
        return f"its strategy is {type(trainer.strategy).__name__}; only one device and DDP can be captured"
    plugin = trainer.precision_plugin
    # By class: a subclass may do anything.
    if type(plugin) not in PRECISIONS:
        return f"its precision plugin is {type(plugin).__name__}; only those for 32, 64, 16 and bf16 can be captured"
    if isinstance(plugin, MixedPrecision) and plugin.scaler is not None and trainer.gradient_clip_val:
        return (
            f"gradient_clip_val={trainer.gradient_clip_val} cannot be used with a loss scale and a fused optimizer; "
            "give the optimizer max_grad_norm instead"
        )
    for part, hooks in ((module, INNER_HOOKS + MODULE_HOOKS), *((c, INNER_HOOKS) for c in callbacks)):
        for hook in hooks:
            if is_overridden(hook, part):
                return (
                    f"{type(part).__name__}.{hook} runs inside of the step, and a replay would leave it out; use "
                    "on_train_batch_start or on_train_batch_end"
                )
    return None


@contextmanager
def _recorded_logs(module: LightningModule, records: list[Logged]) -> Iterator[None]:
    """In the body, ``module.log`` records its arguments."""

    def log(name: str, value: Any, *args: Any, **options: Any) -> None:
        if not isinstance(value, Tensor):
            raise RuntimeError(
                f"self.log({name!r}, ...) in a captured step must be given a tensor, got {type(value).__name__}: "
                "replays would log the same value again; log it in on_train_batch_end"
            )
        records.append(Logged(module._current_fx_name or "training_step", name, value.detach().clone(), args, options))

    # The method is back when this one is removed.
    module.log = log  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.log


@contextmanager
def _changing_numbers() -> Iterator[None]:
    """In the body, the numbers of a LightningModule that change between steps cannot be read."""
    names = ("current_epoch", "global_step")
    kept = {name: vars(LightningModule)[name] for name in names}
    for name in names:
        setattr(LightningModule, name, _refused(name))
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(LightningModule, name, value)


def _refused(name: str) -> property:
    return property(lambda module: _refuse(name))


def _refuse(name: str) -> Any:
    raise RuntimeError(
        f"the captured step read {name}, which changes at each step: replays would use its capture-time value. "
        "Use it in on_train_batch_start, which may write it into a tensor"
    )


class _Changing:
    """Replaces a number that changes between steps: reading it raises an error."""

    def __init__(self, name: str) -> None:
        self._name = name

    def _read(self, *_: Any) -> Any:
        return _refuse(self._name)

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _read
    __mod__ = __floordiv__ = __pow__ = __divmod__ = __neg__ = __abs__ = __round__ = _read
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __hash__ = _read
    __int__ = __index__ = __float__ = __str__ = __repr__ = __format__ = _read
