"""Smith's claim in small: steps to a fixed accuracy on the digits, with cycles, one cycle, and the best constant rate.

python -m bench.cyclical_claim [--seeds 20] [--out bench/results]

And one run whose cycles double in length, beside separate runs of the lengths at which its cycles end (Portes et al.
2022, arXiv:2206.00832). Every arm has the same seeds: weights, order of the digits, split into training and test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from statistics import mean, median, stdev
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from bench.report import as_table, run_study
from fused_clr import FusedAdam, demo, plotting, suggest_step_size
from fused_clr.schedules import Constant, Cosine, CosineRestarts, Cyclic, OneCycle, Schedule

CPU = torch.device("cpu")
TARGET = 0.97
MAX_STEPS, TEST_EVERY = 900, 15
GRID = (3e-4, 1e-3, 3e-3, 6e-3, 1e-2, 2e-2, 3e-2, 6e-2)
FIRST_CYCLE, DOUBLINGS = 45, 4
TITLES = ("schedule", "steps (p20 p50 p80)", "reached", "fewest", "most")


def train(schedule: Schedule, steps: int, seed: int, tested: Callable[[int], bool]) -> Iterator[tuple[int, float]]:
    """Trains the demo's network; each step for which ``tested`` is true, with the test accuracy after it."""
    generator = torch.Generator().manual_seed(seed)
    data = demo.load_data(CPU, generator)
    model = demo.make_model(seed)
    optimizer = FusedAdam(model.parameters(), schedule=schedule)
    batches = data.batches(generator)
    for step in range(1, steps + 1):
        batch = next(batches)
        optimizer.zero_grad()
        F.cross_entropy(model(data.images[batch]), data.labels[batch]).backward()
        optimizer.step()
        if tested(step):
            with torch.no_grad():
                yield step, float((model(data.test_images).argmax(1) == data.test_labels).double().mean())


def steps_to_target(schedule: Schedule, seed: int) -> int | None:
    """The first tested step with the target's accuracy."""
    scores = train(schedule, MAX_STEPS, seed, lambda step: step % TEST_EVERY == 0)
    return next((step for step, score in scores if score >= TARGET), None)


def bounds(seed: int) -> tuple[float, float]:
    """The suggestion of a range test with this seed's weights and data."""
    base_lr, max_lr, _, reason = demo.digits_range_test(CPU, seed, progress=False).suggest()
    if base_lr is None or max_lr is None:
        raise RuntimeError(f"seed {seed}: {reason}")
    return base_lr, max_lr


def _always(schedule: Schedule) -> Callable[[float, float], Schedule]:
    return lambda base, peak: schedule


def measure(seeds: int) -> dict[str, Any]:
    """All runs."""
    step_size = suggest_step_size(45, 2)
    arms: dict[str, Callable[[float, float], Schedule]] = {
        "Cyclic, triangular": lambda base, peak: Cyclic(base, peak, step_size, cycle_momentum=False),
        "Cyclic, triangular2": lambda base, peak: Cyclic(
            base, peak, step_size, mode="triangular2", cycle_momentum=False
        ),
        "Cyclic, triangular2, momentum cycled": lambda base, peak: Cyclic(base, peak, step_size, mode="triangular2"),
        "OneCycle, 270 steps": lambda base, peak: OneCycle(peak, 270),
        "OneCycle, 540 steps": lambda base, peak: OneCycle(peak, 540),
        **{f"Constant, {lr:g}": _always(Constant(lr)) for lr in GRID},
    }
    measured = [bounds(seed) for seed in range(seeds)]
    to_target = {
        name: [steps_to_target(make(*measured[seed]), seed) for seed in tqdm(range(seeds), desc=name)]
        for name, make in arms.items()
    }
    lengths = [FIRST_CYCLE * (2**count - 1) for count in range(1, DOUBLINGS + 1)]
    single: dict[int, list[float]] = {length: [] for length in lengths}
    separate: dict[int, list[float]] = {length: [] for length in lengths}
    for seed in tqdm(range(seeds), desc="cycle ends"):
        max_lr = measured[seed][1]
        restarts = CosineRestarts(max_lr, FIRST_CYCLE, T_mult=2)
        scores = dict(train(restarts, lengths[-1], seed, lengths.__contains__))
        for length in lengths:
            single[length].append(scores[length])
            separate[length] += [score for _, score in train(Cosine(max_lr, 0.0, length), length, seed, length.__eq__)]
    return {
        "torch": torch.__version__,
        "seeds": seeds,
        "target": TARGET,
        "max_steps": MAX_STEPS,
        "bounds": measured,
        "steps_to_target": to_target,
        "cycle_ends": {"one run": single, "separate runs": separate},
    }


def tables(results: dict[str, Any]) -> str:
    """The results as a page."""
    steps_of = {name: _with_inf(steps) for name, steps in results["steps_to_target"].items()}
    best = min((name for name in steps_of if "Constant" in name), key=lambda name: median(steps_of[name]))
    rows = []
    for name, steps in steps_of.items():
        pairs = list(zip(steps, steps_of[best], strict=True))
        compared = f"{sum(own < other for own, other in pairs)} / {sum(own > other for own, other in pairs)}"
        p20, p80 = np.quantile(steps, (0.2, 0.8), method="nearest")
        reached = sum(step < math.inf for step in steps)
        extremes = (f"{min(steps):g}", f"{max(steps):g}")
        rows.append((name, f"{p20:g} **{median(steps):g}** {p80:g}", f"{reached}/{len(steps)}", *extremes, compared))
    ends = results["cycle_ends"]
    end_rows = []
    for length, one in ends["one run"].items():
        separate = ends["separate runs"][length]
        cells = [f"{mean(runs):.2%} ± {stdev(runs):.2%}" for runs in (one, separate)]
        end_rows.append((length, *cells, f"{mean(one) - mean(separate):+.2%}"))
    lengths = [int(length) for length in ends["one run"]]
    base_lr, max_lr = (median(pair[index] for pair in results["bounds"]) for index in (0, 1))
    text = f"""\
python -m bench.cyclical_claim; torch {results["torch"]}, {results["seeds"]} seeds, digits, the demo's network, FusedAdam, batches of 32.

Bounds of each seed from its own range test of 100 steps, rule "smith": medians {base_lr:.1e} and {max_lr:.1e}. Step size 90, 2 epochs.

Steps to a test accuracy of {results["target"]:.0%}, tested every {TEST_EVERY} steps, at most {results["max_steps"]}; inf: not reached.
Not counted: the range test's 100 steps, and the other runs of the grid of constant rates, whose best was chosen with these seeds.

{{steps}}

Test accuracy (mean ± standard deviation) at the ends of cycles that double, in one run of {lengths[-1]} steps, beside separate
runs that decay within these lengths, {sum(lengths):,} steps in all. Both fall from `max_lr` in half a cosine wave; up to
step 45 they are the same run.

{{ends}}
"""  # noqa: E501 - lines of a table
    return text.format(
        steps="\n".join(as_table((*TITLES, f"sooner / later than {best}"), rows)),
        ends="\n".join(as_table(("steps", "one run, CosineRestarts", "separate runs, Cosine", "difference"), end_rows)),
    )


def _with_inf(steps: list[float | None]) -> list[float]:
    return [math.inf if step is None else step for step in steps]


def figure(results: dict[str, Any]) -> Any:
    """Both parts as a picture."""
    picture = plotting.new_figure(12, 4.5)
    left, right = picture.subplots(1, 2)
    names = list(results["steps_to_target"])
    for index, name in enumerate(names):
        colour = plotting.MOMENTUM if "Constant" in name else plotting.OURS
        steps = [min(step, results["max_steps"]) for step in _with_inf(results["steps_to_target"][name])]
        left.plot(steps, [index] * len(steps), "|", color=colour, markersize=9, alpha=0.6)
        left.plot([median(steps)], [index], "o", color=colour)
    left.set_yticks(range(len(names)), names, fontsize=8)
    left.invert_yaxis()
    plotting.set_labels(left, "steps (dot: median)", "", f"steps to a test accuracy of {results['target']:.0%}")
    for (name, runs), colour, style in zip(
        results["cycle_ends"].items(), (plotting.OURS, plotting.MOMENTUM), ("o-", "s--"), strict=True
    ):
        right.errorbar(
            [int(length) for length in runs],
            [100 * mean(scores) for scores in runs.values()],
            [100 * stdev(scores) for scores in runs.values()],
            fmt=style,
            color=colour,
            capsize=3,
            label=name,
        )
    right.legend(loc="lower right")
    plotting.set_labels(right, "steps", "test accuracy (%)", "ends of doubling cycles, and separate runs")
    return picture


def main() -> None:
    """Runs, and writes cyclical-claim.json, .md and .png."""
    path, results = run_study(__doc__.splitlines()[0], "cyclical-claim", 20, measure, tables)
    plotting.save(figure(results), path.with_suffix(".png"))


if __name__ == "__main__":
    main()
