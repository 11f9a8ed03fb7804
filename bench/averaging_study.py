"""Averaged weights beside the last ones, with a cyclical learning rate: the digits, and a small language model.

python -m bench.averaging_study [--seeds 10] [--out bench/results]

Each seed has the same weights, batches and split in all arms, which differ in what is averaged alone: the last weights,
their equal average at the cycles' ends (SWA), and their exponential average (EMA).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import resources
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from bench.report import as_table, run_study
from fused_clr import Averaging, FusedAdam, demo
from fused_clr.schedules import Cyclic

CPU = torch.device("cpu")
CYCLES = 6
# The first cycle is for getting near, as in the paper.
AVERAGES: dict[str, Callable[[int], Averaging]] = {
    "SWA": lambda cycle: Averaging.swa(start=cycle),
    "EMA": lambda cycle: Averaging.ema(0.99),
}
CONTEXT, BATCH = 8, 64
# Loss and accuracy on data that was not trained on.
Task = tuple[nn.Module, Callable[[], Tensor], Callable[[], tuple[float, float]], Cyclic]


def digits(seed: int) -> Task:
    """The demo's network and data; cycles of 4 epochs."""
    generator = torch.Generator().manual_seed(seed)
    data = demo.load_data(CPU, generator)
    model = demo.make_model(seed)
    batches = data.batches(generator)

    def loss() -> Tensor:
        batch = next(batches)
        return F.cross_entropy(model(data.images[batch]), data.labels[batch])

    def test() -> tuple[float, float]:
        return _scores(model(data.test_images), data.test_labels)

    return model, loss, test, Cyclic(2e-3, 2e-2, step_size_up=90, cycle_momentum=False)


def characters(seed: int) -> Task:
    """The next character after 8 others (Bengio et al. 2003) in the texts about scikit-learn's data sets."""
    folder = resources.files("sklearn.datasets.descr")
    text = "".join(sorted(file.read_text() for file in folder.iterdir() if file.name.endswith(".rst")))
    known = sorted(set(text))
    tokens = torch.tensor([known.index(character) for character in text])
    windows = tokens.unfold(0, CONTEXT + 1, 1)
    # Every tenth stretch of 400 characters is for the test.
    is_test = torch.arange(len(windows)) // 400 % 10 == 9
    train_set, test_set = windows[~is_test], windows[is_test]
    torch.manual_seed(seed)
    embedding = nn.Embedding(len(known), 16)
    model = nn.Sequential(embedding, nn.Flatten(), nn.Linear(16 * CONTEXT, 128), nn.Tanh(), nn.Linear(128, len(known)))
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        rows = train_set[torch.randint(len(train_set), (BATCH,), generator=generator)]
        return F.cross_entropy(model(rows[:, :-1]), rows[:, -1])

    def test() -> tuple[float, float]:
        return _scores(model(test_set[:, :-1]), test_set[:, -1])

    return model, loss, test, Cyclic(1e-3, 1e-2, step_size_up=250, cycle_momentum=False)


TASKS = {"digits": digits, "characters": characters}


def _scores(outputs: Tensor, targets: Tensor) -> tuple[float, float]:
    return float(F.cross_entropy(outputs, targets)), float((outputs.argmax(1) == targets).double().mean())


def train(task: Callable[[int], Task], averaging: Averaging, seed: int) -> Iterator[tuple[int, bool, float, float]]:
    """Trains. At the end of each cycle: its number, whether averaged weights were tested, and their scores."""
    model, loss, test, schedule = task(seed)
    optimizer = FusedAdam(model.parameters(), schedule=schedule, averaging=averaging)
    for step in range(CYCLES * 2 * int(schedule.step_size_up)):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        if schedule.ends_cycle(step):
            cycle = (step + 1) // (2 * int(schedule.step_size_up))
            with torch.no_grad():
                yield cycle, False, *test()
                with optimizer.averaged_parameters():
                    yield cycle, True, *test()


def measure(seeds: int) -> dict[str, Any]:
    """All runs: scores by task, arm, cycle and seed."""
    scores: dict[str, dict[str, dict[int, list[tuple[float, float]]]]] = {}
    for task_name, task in TASKS.items():
        by_arm = scores[task_name] = {arm: {n: [] for n in range(1, CYCLES + 1)} for arm in ("last", *AVERAGES)}
        period = 2 * int(task(0)[3].step_size_up)
        for seed in tqdm(range(seeds), desc=task_name):
            for arm, averaging in AVERAGES.items():
                for cycle, is_averaged, *found in train(task, averaging(period), seed):
                    # The last weights are the same in both arms.
                    if is_averaged or arm == "SWA":
                        by_arm[arm if is_averaged else "last"][cycle].append((found[0], found[1]))
    return {"torch": torch.__version__, "seeds": seeds, "cycles": CYCLES, "scores": scores}


def tables(results: dict[str, Any]) -> str:
    """The results as a page."""
    lines = [
        f"python -m bench.averaging_study; torch {results['torch']}, {results['seeds']} seeds, FusedAdam, "
        f"{results['cycles']} triangular cycles.",
        "",
        "Mean ± standard deviation over the seeds, on data that was not trained on, at cycles' ends. SWA starts with",
        "the second cycle: before its end, its weights are the last ones. EMA has decay 0.99.",
    ]
    for task, by_arm in results["scores"].items():
        for index, (what, style) in enumerate((("loss", ".4f"), ("accuracy", ".2%"))):
            rows = []
            for cycle in by_arm["last"]:
                own = {arm: [run[index] for run in runs[cycle]] for arm, runs in by_arm.items()}
                cells = [f"{mean(v):{style}} ± {stdev(v):{style}}" for v in own.values()]
                sign = 1 if what == "accuracy" else -1
                won = [
                    f"{sum(sign * a > sign * b for a, b in zip(own[arm], own['last'], strict=True))}/{len(own[arm])}"
                    for arm in AVERAGES
                ]
                rows.append((str(cycle), *cells, " and ".join(won)))
            titles = ("cycle", "last weights", "SWA", "EMA", "SWA and EMA better in")
            lines += ["", f"{task}: {what}", "", *as_table(titles, rows)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs, and writes averaging-study.json and .md."""
    run_study(__doc__.splitlines()[0], "averaging-study", 10, measure, tables)


if __name__ == "__main__":
    main()
