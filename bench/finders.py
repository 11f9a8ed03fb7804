"""Learning rate finders beside `fused_clr.range_test`: their curves on the same batches, and what they leave changed.

python -m bench.finders

Prints a table. A finder that is not installed is skipped by name (torch-lr-finder, fastai, lightning). The network has
batch normalization; every finder starts from the same weights and sees the same batches in the same order.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from bench.report import as_table
from fused_clr import FusedAdam, demo, range_test

START_LR, END_LR, STEPS, SMOOTHING = 1e-6, 1.0, 100, 0.98
ERROR_AT = 20

Curve = tuple[list[float], list[float], float | None]


class Net(nn.Module):
    """Counts its forwards, and fails at one of them."""

    def __init__(self, error_at: int | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
        self.forwards, self.error_at = 0, error_at

    def forward(self, images: Tensor) -> Tensor:
        self.forwards += 1
        if self.forwards == self.error_at:
            raise FloatingPointError
        result: Tensor = self.layers(images)
        return result


def make_loader() -> DataLoader[Any]:
    """The batches of all steps, in a fixed order."""
    generator = torch.Generator().manual_seed(0)
    data = demo.load_data(torch.device("cpu"), generator)
    batches = data.batches(generator)
    order = torch.cat([batch for batch in (next(batches) for _ in range(STEPS + 10)) if len(batch) == demo.BATCH_SIZE])
    order = torch.cat([order, order])[: demo.BATCH_SIZE * (STEPS + 5)]
    return DataLoader(TensorDataset(data.images[order], data.labels[order]), batch_size=demo.BATCH_SIZE)


def average(losses: list[float]) -> list[float]:
    """The exponential moving average of the finders, without the bias of its start."""
    value, result = 0.0, []
    for count, loss in enumerate(losses, 1):
        value = SMOOTHING * value + (1 - SMOOTHING) * loss
        result.append(value / (1 - SMOOTHING**count))
    return result


def ours(model: Net, optimizer: Any) -> Curve:
    """`fused_clr.range_test`."""

    def step(batch: tuple[Tensor, Tensor]) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        return loss.detach()

    arguments: Any = {"start_lr": START_LR, "end_lr": END_LR, "num_steps": STEPS, "smoothing": SMOOTHING}
    result = range_test(step, optimizer, make_loader(), restore=[model], progress=False, **arguments)
    return result.lr.tolist(), result.smoothed.tolist(), result.suggest("valley").max_lr


def torch_lr_finder(model: Net, optimizer: Any) -> Curve:
    """davidtvs/pytorch-lr-finder. Its average is another; the losses are computed back from it."""
    from matplotlib.figure import Figure
    from torch_lr_finder import LRFinder

    finder = LRFinder(model, optimizer, nn.CrossEntropyLoss(), device="cpu")
    try:
        finder.range_test(make_loader(), start_lr=START_LR, end_lr=END_LR, num_iter=STEPS, diverge_th=1e9)
    finally:
        # What its documentation says to call afterwards.
        finder.reset()
    smooth_f = 0.05
    history = finder.history["loss"]
    losses = [history[0]] + [(new - (1 - smooth_f) * old) / smooth_f for old, new in pairwise(history)]
    _, suggested = finder.plot(suggest_lr=True, ax=Figure().subplots())
    return finder.history["lr"], average(losses), float(suggested)


def fastai(model: Net, optimizer: Any) -> Curve:
    """fastai's ``Learner.lr_find`` with its rule valley; it creates the optimizer itself."""
    from fastai.callback.schedule import valley
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper

    loader = make_loader()
    with tempfile.TemporaryDirectory() as folder:
        dls = DataLoaders(loader, loader)
        opt_func = partial(OptimWrapper, opt=torch.optim.Adam)
        learner = Learner(dls, model, loss_func=nn.CrossEntropyLoss(), opt_func=opt_func, path=folder, wd=0.0)
        with learner.no_bar(), learner.no_logging():
            arguments = {"start_lr": START_LR, "end_lr": END_LR, "num_it": STEPS, "show_plot": False}
            found = learner.lr_find(stop_div=False, suggest_funcs=(valley,), **arguments)
        recorder = learner.recorder
        return list(map(float, recorder.lrs)), list(map(float, recorder.losses)), float(found.valley)


def lightning(model: Net, optimizer: Any) -> Curve:
    """Lightning's ``Tuner.lr_find``; its suggestion is the steepest point."""
    import logging

    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.tuner.tuning import Tuner

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.lr = model, START_LR

        def training_step(self, batch: Any, _: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return optimizer

    with tempfile.TemporaryDirectory() as folder:
        options: Any = {"logger": False, "enable_model_summary": False, "enable_progress_bar": False}
        trainer = Trainer(accelerator="cpu", default_root_dir=folder, max_epochs=2, **options)
        arguments: Any = {"min_lr": START_LR, "max_lr": END_LR, "num_training": STEPS, "update_attr": False}
        found = Tuner(trainer).lr_find(
            Module(), train_dataloaders=make_loader(), early_stop_threshold=None, **arguments
        )
    assert found is not None
    # Lightning 2.6 corrects the bias of its average as if it had one loss more, so that it starts at half the loss.
    counts = np.arange(1, len(found.results["loss"]) + 1)
    losses = np.array(found.results["loss"]) * (1 - SMOOTHING ** (counts + 1)) / (1 - SMOOTHING**counts)
    return found.results["lr"], losses.tolist(), found.suggestion()


FINDERS: dict[str, tuple[Callable[[Net, Any], Curve], Callable[..., Any], str | None]] = {
    "fused_clr.range_test": (ours, FusedAdam, None),
    "torch-lr-finder": (torch_lr_finder, torch.optim.Adam, "torch-lr-finder"),
    "fastai": (fastai, torch.optim.Adam, "fastai"),
    "Lightning": (lightning, torch.optim.Adam, "lightning"),
}


def state_of(model: Net, optimizer: Any) -> dict[str, Any]:
    """What a finder may change, by the words of the table."""
    return {
        "parameters": [param.detach().clone() for param in model.parameters()],
        "buffers": [buffer.clone() for buffer in model.buffers()],
        "gradients": [torch.zeros(0) if param.grad is None else param.grad.clone() for param in model.parameters()],
        "optimizer state": [torch.tensor(len(optimizer.state))],
        "lr": [torch.tensor(float(group["lr"])) for group in optimizer.param_groups],
        "random state": [torch.get_rng_state()],
        "training flag": [torch.tensor(module.training) for module in model.modules()],
    }


def changed(
    find: Callable[[Net, Any], Curve], make: Callable[..., Any], error_at: int | None
) -> tuple[str, Curve | None]:
    """What ``find`` leaves changed, and its curve; None if it failed."""
    model = Net(error_at)
    optimizer = make(model.parameters(), lr=1e-3)
    # In evaluation, so that a finder that leaves training on is seen.
    model.layers[2].training = False
    before = state_of(model, optimizer)
    curve = None
    with suppress(FloatingPointError):
        curve = find(model, optimizer)
    after = state_of(model, optimizer)
    names = [
        name
        for name, values in before.items()
        if len(values) != len(after[name]) or not all(map(torch.equal, values, after[name]))
    ]
    return ", ".join(names) or "nothing", curve


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    reference: Curve | None = None
    rows, skipped = [], []
    for name, (find, make, package) in FINDERS.items():
        try:
            title = name if package is None else f"{name} {version(package)}"
            left, curve = changed(find, make, None)
        except ModuleNotFoundError as error:
            skipped.append(f"{name}: {error}")
            continue
        left_by_error, _ = changed(find, make, ERROR_AT)
        assert curve is not None
        reference = reference or curve
        # At the reference's learning rates: finders differ by a step in what they call a loss's learning rate.
        size = min(len(curve[1]), len(reference[1]))
        difference = np.abs(np.array(curve[1][:size]) / np.array(reference[1][:size]) - 1)
        first, last = curve[0][0], curve[0][-1]
        low = int(np.argmin(reference[1]))
        rows.append(
            (
                title,
                f"{len(curve[0])}, {first:.2e} to {last:.2e}",
                f"{difference[:low].max():.1e}",
                left,
                left_by_error,
                "none" if curve[2] is None else f"{curve[2]:.1e}",
            )
        )
    titles = ("finder", "steps, learning rates", "difference of the curve", "changed", "changed after an error", "lr")
    print("\n".join(as_table(titles, rows)))
    for line in skipped:
        print("skipped:", line)


if __name__ == "__main__":
    main()
