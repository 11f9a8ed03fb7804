"""The demo: torch's ``Adam`` and ``CyclicLR`` against ours, on the classic example and on a real training.

The training runs between the bounds that a range test on the same digits finds. A captured loop shows that torch's
learning rate freezes in it, and ours does not. ``demo.png`` has all of it on one page.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from fused_clr import CyclicLR, FusedAdam, RangeTest, plotting, range_test, suggest_step_size
from fused_clr._captured_demo import CapturedLoop, captured_loops
from fused_clr._demo_page import captured_figure, demo_page
from fused_clr.schedules import Cyclic

# Torch's fastest Adam (fused=True, see make_pair) and its CyclicLR; ours accept the same arguments.
PAIRS: dict[str, tuple[Callable[..., Optimizer], Callable[..., LRScheduler]]] = {
    "torch": (torch.optim.Adam, torch.optim.lr_scheduler.CyclicLR),
    "fused-clr": (FusedAdam, CyclicLR),
}

CLASSIC = Cyclic(base_lr=1e-3 / 4, max_lr=1e-3, step_size_up=17_000 * 6, mode="triangular2", cycle_momentum=False)
CLASSIC_EPOCH = 17_000

# Of the captured loops. With a fixed momentum, Adam moves a parameter whose gradient is 1 by the learning rate.
CAPTURED = Cyclic(base_lr=2e-3, max_lr=2e-2, step_size_up=25, cycle_momentum=False)
CAPTURED_STEPS = 120

TEST_IMAGES = 360
BATCH_SIZE = 32
EPOCHS_UP = 4
TIMED_BLOCKS = 50
STEPS_PER_BLOCK = 50


def run(out: Path, device: torch.device, schedule_epochs: int, epochs: int, seed: int) -> None:
    """Runs all parts, writes their pictures into ``out`` and prints a table of the results.

    On the CPU with one thread: several would wait for each other longer than such small models take.

    Args:
        out: Folder of the pictures; made when missing.
        device: The device of the parameters.
        schedule_epochs: Length of the classic example, in epochs of 17,000 steps.
        epochs: Passes over the training digits.
        seed: Seed of the initial weights and of the order of the digits.
    """
    # First: a folder that cannot be made is no news for the end.
    out.mkdir(parents=True, exist_ok=True)
    if device.type == "cpu":
        torch.set_num_threads(1)
    curve, curve_difference = classic_curve(schedule_epochs * CLASSIC_EPOCH)
    figure = plotting.schedule_figure(curve, None, f"The classic example: triangular2 over {len(curve):,} steps")
    plotting.save(figure, out / "classic.png")
    lr_difference, parameter_difference = classic_loop(CLASSIC_EPOCH, device)

    measured = digits_range_test(device, seed)
    measured.plot(out / "range-test.png")
    base_lr, max_lr, _, reason = measured.suggest()
    schedule = digits_schedule(None if max_lr is None else measured)
    theirs, ours = train_digits(epochs, device, seed, schedule)
    plotting.save(
        plotting.training_figure(theirs, ours, f"Handwritten digits, {epochs} epochs on {device}"), out / "digits.png"
    )
    loops = digits_captured(CAPTURED_STEPS, device, seed)
    their_update, our_update = time_updates([theirs, ours])
    page = demo_page(measured, schedule, (theirs, ours), loops, CAPTURED, their_update / our_update, device)
    plotting.save(page, out / "demo.png")
    plotting.save(captured_figure(loops, CAPTURED, device), out / "captured.png")
    loss_difference = np.abs(np.subtract(theirs.losses, ours.losses)).max()
    wanted = CAPTURED.lr(np.arange(CAPTURED_STEPS))
    lr_errors = [np.abs(np.subtract(loops[name].applied_lrs, wanted)).max() for name in PAIRS]
    bounds = ("  bounds of the learning rate", "", f"{base_lr:.1e}", f"{max_lr:.1e}")
    graphs = "captured" if device.type == "cuda" else "captured, emulated"

    print_table(
        ("", "torch", "fused-clr", ""),
        [
            (f"classic example, {len(curve):,} steps", "", "", ""),
            ("  learning rate, largest difference", "", "", f"{curve_difference:.1e}"),
            (f"  the same in a loop of {CLASSIC_EPOCH:,} optimizer steps", "", "", f"{lr_difference:.1e}"),
            ("  parameters after that loop, largest difference", "", "", f"{parameter_difference:.1e}"),
            (f"range test, {len(measured.lr)} steps", "", "", ""),
            bounds if max_lr is not None else (f"  no bounds: {reason}", "", "", ""),
            (f"digits between them, {len(ours.losses):,} steps on {device}", "", "", ""),
            ("  test accuracy", f"{theirs.accuracies[-1]:.2%}", f"{ours.accuracies[-1]:.2%}", ""),
            ("  last training loss", f"{theirs.losses[-1]:.6f}", f"{ours.losses[-1]:.6f}", ""),
            ("  training loss, largest difference", "", "", f"{loss_difference:.1e}"),
            ("  training steps per second", *ratio_cells(1 / theirs.step_seconds, 1 / ours.step_seconds)),
            ("  optimizer + scheduler, steps per second", *ratio_cells(1 / their_update, 1 / our_update)),
            (f"a loop of {CAPTURED_STEPS} steps, {graphs}", "", "", ""),
            ("  applied learning rate, largest error", *(f"{error:.0e}" for error in lr_errors), ""),
        ],
    )
    others = ", ".join(str(out / name) for name in ("classic.png", "digits.png", "range-test.png", "captured.png"))
    print(f"all on one page: {out / 'demo.png'}; single pictures: {others}")


def classic_curve(steps: int) -> tuple[NDArray[np.float64], float]:
    """The classic example's learning rates from our closed form, and their largest difference from torch's scheduler.

    Args:
        steps: How many steps torch's scheduler is stepped.
    """
    optimizer, scheduler = make_pair(
        "torch", [nn.Parameter(torch.zeros(2, 2, dtype=torch.float32, device="cpu"))], CLASSIC
    )
    group = optimizer.param_groups[0]
    # Without a gradient this updates nothing. Torch warns if a scheduler steps before its optimizer.
    optimizer.step()
    peer = np.empty(steps)
    for step in progress(range(steps), "torch's CyclicLR"):
        peer[step] = group["lr"]
        scheduler.step()
    ours = CLASSIC.lr(np.arange(steps))
    return ours, float(np.abs(ours - peer).max())


def classic_loop(steps: int, device: torch.device) -> tuple[float, float]:
    """The classic example as a training loop of both pairs: largest difference of learning rates and of parameters.

    The gradient is 1 everywhere, so that Adam moves each parameter by the learning rate: it ends at minus the sum of
    the learning rates that were applied.
    """
    lrs = {name: np.empty(steps) for name in PAIRS}
    parameters = {name: nn.Parameter(torch.zeros(2, 2, dtype=torch.float32, device=device)) for name in PAIRS}
    for name, parameter in parameters.items():
        parameter.grad = torch.ones_like(parameter)
        optimizer, scheduler = make_pair(name, [parameter], CLASSIC)
        group = optimizer.param_groups[0]
        for step in progress(range(steps), f"training loop, {name}"):
            lrs[name][step] = group["lr"]
            optimizer.step()
            scheduler.step()
    lr_difference = np.abs(lrs["fused-clr"] - lrs["torch"]).max()
    parameter_difference = (parameters["fused-clr"] - parameters["torch"]).abs().max()
    return float(lr_difference), parameter_difference.item()


@dataclass
class Training:
    """One model with its optimizer and scheduler, and the records of its training."""

    name: str
    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    losses: list[float] = field(default_factory=list)
    epoch_step_seconds: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    momenta: list[float] = field(default_factory=list)

    @property
    def step_seconds(self) -> float:
        """Seconds for a training step: the median over the epochs, since the first one is a warm-up."""
        return median(self.epoch_step_seconds)

    def train_epoch(self, images: Tensor, labels: Tensor, batches: Iterable[Tensor]) -> None:
        """Trains on each batch of indices; records the losses and the time."""
        losses = []
        with Timer(images.device) as timer:
            for batch in batches:
                loss = F.cross_entropy(self.model(images[batch]), labels[batch])
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self.scheduler.step()
                losses.append(loss.detach())
        self.epoch_step_seconds.append(timer.seconds / len(losses))
        self.losses += torch.stack(losses).tolist()
        group = self.optimizer.param_groups[0]
        self.lrs.append(group["lr"])
        self.momenta.append(group["betas"][0])

    @torch.no_grad()
    def test(self, images: Tensor, labels: Tensor) -> None:
        """Records the fraction of images that are classified correctly."""
        self.accuracies.append(float((self.model(images).argmax(1) == labels).double().mean()))


def digits_schedule(measured: RangeTest | None) -> Cyclic:
    """triangular2 cycles on the digits, between the bounds that a range test suggests, or usual ones if it is None."""
    steps_per_epoch = -(-(len(load_digits().target) - TEST_IMAGES) // BATCH_SIZE)
    if measured is None:
        step_size = EPOCHS_UP * steps_per_epoch
        return Cyclic(base_lr=2.5e-4, max_lr=2e-3, step_size_up=step_size, mode="triangular2")
    return measured.schedule(suggest_step_size(steps_per_epoch, EPOCHS_UP), mode="triangular2")


def train_digits(
    epochs: int, device: torch.device, seed: int, schedule: Cyclic | None = None
) -> tuple[Training, Training]:
    """Trains one small network twice from the same weights on the same batches: with torch's pair and with ours.

    The two take turns epoch by epoch, so that other work on the machine affects both.

    Returns:
        The trainings with torch's pair and with ours.
    """
    generator = torch.Generator().manual_seed(seed)
    data = load_data(device, generator)
    schedule = schedule or digits_schedule(None)
    first_model = make_model(seed)
    runs = []
    for name in PAIRS:
        model = deepcopy(first_model).to(device)
        runs.append(Training(name, model, *make_pair(name, model.parameters(), schedule)))

    for epoch in progress(range(epochs), "digits"):
        batches = data.epoch(generator)
        for training in in_turn(runs, epoch):
            training.train_epoch(data.images, data.labels, batches)
            training.test(data.test_images, data.test_labels)
    return runs[0], runs[1]


class Digits(NamedTuple):
    """Handwritten digits: images are float32[n, 64], labels int64[n]."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch."""
        return -(-len(self.images) // BATCH_SIZE)

    def epoch(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """The batches of an epoch, as indices, in a new order."""
        order = torch.randperm(len(self.images), generator=generator, dtype=torch.int64, device="cpu").to(
            self.images.device
        )
        batches: tuple[Tensor, ...] = order.split(BATCH_SIZE)
        return batches

    def batches(self, generator: torch.Generator) -> Iterator[Tensor]:
        """The batches of epochs without end."""
        while True:
            yield from self.epoch(generator)


def load_data(device: torch.device, generator: torch.Generator) -> Digits:
    """The digits on ``device``, in an order that ``generator`` draws."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=generator, dtype=torch.int64, device="cpu")
    images = torch.tensor(digits.data[order] / 16, dtype=torch.float32, device=device)
    labels = torch.tensor(digits.target[order], dtype=torch.int64, device=device)
    return Digits(images[TEST_IMAGES:], labels[TEST_IMAGES:], images[:TEST_IMAGES], labels[:TEST_IMAGES])


def digits_range_test(
    device: torch.device,
    seed: int,
    make: Callable[[int], nn.Module] | None = None,
    make_optimizer: Callable[..., Any] = FusedAdam,
    **arguments: Any,
) -> RangeTest:
    """A range test on the digits.

    Args:
        device: Where.
        seed: Seed of the weights and of the order of the digits.
        make: Makes the model from a seed; `make_model` if None.
        make_optimizer: A class of fused optimizers.
        arguments: Other arguments of `range_test`.
    """
    generator = torch.Generator().manual_seed(seed)
    data = load_data(device, generator)
    model = (make or make_model)(seed).to(device)
    optimizer = make_optimizer(model.parameters())

    def step(batch: Tensor) -> Tensor:
        loss = F.cross_entropy(model(data.images[batch]), data.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return range_test(step, optimizer, data.batches(generator), restore=[model], **arguments)


def digits_captured(steps: int, device: torch.device, seed: int) -> dict[str, CapturedLoop]:
    """A linear model of the digits, trained by both pairs in a captured loop; see `captured_loops`."""
    generator = torch.Generator().manual_seed(seed)
    data = load_data(device, generator)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Linear(64, 10).to(device)
    whole = (batch for batch in data.batches(generator) if len(batch) == BATCH_SIZE)
    batches = [(data.images[batch], data.labels[batch]) for batch in islice(whole, steps)]
    capturable = device.type == "cuda"
    return captured_loops(
        {name: partial(make_pair, name, schedule=CAPTURED, capturable=capturable) for name in PAIRS}, model, batches
    )


def time_updates(runs: list[Training]) -> list[float]:
    """Seconds for one ``optimizer.step(); scheduler.step()`` of each run: medians over blocks, the runs in turn.

    Every step applies the gradients of the last batch again, so the models are not usable afterwards.
    """
    seconds: dict[str, list[float]] = {training.name: [] for training in runs}
    for block in progress(range(TIMED_BLOCKS), "timing"):
        for training in in_turn(runs, block):
            device = next(training.model.parameters()).device
            with Timer(device) as timer:
                for _ in range(STEPS_PER_BLOCK):
                    training.optimizer.step()
                    training.scheduler.step()
            seconds[training.name].append(timer.seconds / STEPS_PER_BLOCK)
    return [median(values) for values in seconds.values()]


def in_turn(runs: list[Training], turn: int) -> list[Training]:
    """``runs``, in reverse order at every other turn, so that warm caches favour neither."""
    return runs if turn % 2 == 0 else runs[::-1]


def make_pair(
    name: str, parameters: Iterable[nn.Parameter], schedule: Cyclic, capturable: bool = False
) -> tuple[Optimizer, LRScheduler]:
    """The optimizer and scheduler of ``PAIRS[name]`` over ``parameters``, by the same calls for both libraries."""
    optimizer_class, scheduler_class = PAIRS[name]
    optimizer = optimizer_class(parameters, lr=schedule.max_lr, fused=True, capturable=capturable)
    scheduler = scheduler_class(
        optimizer,
        base_lr=schedule.base_lr,
        max_lr=schedule.max_lr,
        step_size_up=schedule.step_size_up,
        mode=schedule.mode,
        cycle_momentum=schedule.cycle_momentum,
    )
    return optimizer, scheduler


def make_model(seed: int) -> nn.Module:
    """A network for 64 pixels and 10 classes, 8,970 parameters; its weights depend only on ``seed``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


class Timer:
    """``with Timer(device) as timer``: seconds that the block took, including the work it queued on ``device``."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> Timer:
        self._wait()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._wait()
        self.seconds = time.perf_counter() - self._start

    def _wait(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)


def progress(steps: range, what: str) -> Iterable[int]:
    """``steps`` with a progress bar."""
    bar: Iterable[int] = tqdm(steps, desc=what, mininterval=0.5)
    return bar


def ratio_cells(theirs: float, ours: float) -> tuple[str, str, str]:
    """Two speeds and how many times the second is the first."""
    return f"{theirs:,.0f}", f"{ours:,.0f}", f"{ours / theirs:.2f}x"


def print_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Prints aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in [head, tuple("-" * width for width in widths), *rows]:
        first, *others = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *others]).rstrip())
