"""Schedules that tests share, their torch peers, and how far from exact a value may be."""

from __future__ import annotations

import dataclasses
import math
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import pytest
import torch
from mpmath import MPContext
from torch.optim import lr_scheduler

from fused_clr.schedules import (
    Constant,
    Cosine,
    CosineRestarts,
    Cyclic,
    Exponential,
    ExponentialDecay,
    InverseSqrt,
    Linear,
    OneCycle,
    Part,
    Polynomial,
    Scaling,
    Schedule,
    Segment,
    Shape,
    WarmupStableDecay,
    sequence,
    warmup,
)

LAST_STEP = 2**53 - 1
# A rounding each in the difference, the quotient and the product, each up to an ulp, and half an ulp in the sum.
ULPS = 4
# gamma**step = exp2(step * log2(gamma)): half an ulp of log2, times at most 1,074, times log(2).
EXP_RANGE_RTOL = 1e-12


@dataclasses.dataclass(frozen=True)
class Given(Schedule):
    """Whatever parts a test wants."""

    given: tuple[Part, ...]

    def parts(self) -> tuple[Part, ...]:
        return self.given


def once(*segments: Segment, **scaling: Any) -> Given:
    return Given((Part(segments, scaling=Scaling(**scaling)),))


def repeated(*segments: Segment, **scaling: Any) -> Given:
    return Given((Part(segments, repeats=True, scaling=Scaling(**scaling)),))


CYCLIC = {
    "symmetric": Cyclic(1e-4, 1e-2, 2000),
    "asymmetric": Cyclic(1e-3, 1e-2, 7, 5),
    "one-step-up": Cyclic(0.0, 0.1, 1, 12),
    "long": Cyclic(2.5e-4, 1e-3, 102_000),
    "triangular2": Cyclic(2.5e-4, 1e-3, 102_000, mode="triangular2"),
    "triangular2-short": Cyclic(0.0, 0.3, 3, 4, mode="triangular2"),
    "equal-bounds": Cyclic(0.1, 0.1, 11),
    "huge-period": Cyclic(1e-5, 1e-3, 2**51, 2**50 + 1),
    "halves": Cyclic(1e-4, 1e-2, 2.5, 3.25),
    "tenths": Cyclic(1e-4, 1e-2, 0.1, 7.3),
}


def shape_segments() -> dict[str, tuple[Segment, ...]]:
    """Every shape, rising and falling, each 24 steps long with the momentum against it where it may have one."""
    shapes = {
        "linear": (Shape.LINEAR, 1.0),
        "cosine": (Shape.COSINE, 1.0),
        "polynomial": (Shape.POLYNOMIAL, 2.5),
        "polynomial-half": (Shape.POLYNOMIAL, 0.5),
        "power": (Shape.POWER, 3.0),
        "power-half": (Shape.POWER, 0.5),
        "exponential": (Shape.EXPONENTIAL, 1.0),
        "inverse-sqrt": (Shape.INVERSE_SQRT, 1.0),
    }
    segments = {
        name: (
            Segment(24, shape, (1e-4, 0.5), (0.95, 0.8), power),
            Segment(24, shape, (0.5, 1e-3), (0.8, 0.9), power),
            Segment(5, Shape.CONSTANT, (0.25, 0.25), (0.9, 0.9)),
        )
        for name, (shape, power) in shapes.items()
    }
    segments["inverse-sqrt"] = tuple(segment._replace(momentum=None) for segment in segments["inverse-sqrt"])
    return segments


def progress_of(segment: Segment, x: float) -> float:
    """The formulas of `Shape`, as they stand there."""
    if segment.shape == Shape.COSINE:
        return (1 - math.cos(math.pi * x)) / 2
    if segment.shape == Shape.POLYNOMIAL:
        return 1 - (1 - x) ** segment.power
    if segment.shape == Shape.POWER:
        return x**segment.power
    if segment.shape == Shape.EXPONENTIAL:
        first, last = segment.lr
        return (first * (last / first) ** x - first) / (last - first)
    if segment.shape == Shape.INVERSE_SQRT:
        first, last = segment.lr
        return ((first**-2 + (last**-2 - first**-2) * x) ** -0.5 - first) / (last - first)
    return x


def edge_steps(schedule: Cyclic) -> list[int]:
    """The ends and peaks of early, late and last cycles, their neighbours, and random steps."""
    assert schedule.step_size_down is not None
    period = Fraction(schedule.step_size_up) + Fraction(schedule.step_size_down)
    edges = {0, 1, LAST_STEP, LAST_STEP - 1, 2**24, 2**24 + 1, 2**31, 2**32 + 1}
    for cycle in (0, 1, 2, 30, 1021, 1022, 1023, 1031, 1074, 1075, 3000, int(LAST_STEP / period) - 1):
        for corner in (int(cycle * period), int(cycle * period + Fraction(schedule.step_size_up))):
            edges |= {corner - 1, corner, corner + 1}
    rng = random.Random(0)
    edges |= {rng.randrange(2 ** rng.randrange(1, 54)) for _ in range(60)}
    return sorted(step for step in edges if 0 <= step <= LAST_STEP)


def assert_within_ulps(actual: float, exact: Fraction | float, ulp_of: float | None = None, ulps: float = ULPS) -> None:
    ulp = Fraction(math.ulp(float(exact) if ulp_of is None else ulp_of))
    assert abs(Fraction(actual) - Fraction(exact)) <= ulps * ulp, (
        f"{actual!r} is {float((Fraction(actual) - Fraction(exact)) / ulp):.2f} ulp off {float(exact)!r}"
    )


# -- formulas in exact arithmetic --------------------------------------------------------------------------------------
mp = MPContext()
mp.dps = 60


def line(x: Any) -> Any:
    return x


def wave(x: Any) -> Any:
    return (1 - mp.cos(mp.pi * x)) / 2


def between(first: Any, last: Any, x: Any, curve: Callable[[Any], Any] = line) -> Any:
    """``first`` at progress 0, ``last`` at progress 1 and after it."""
    return first + (last - first) * curve(mp.mpf(min(x, 1).numerator) / min(x, 1).denominator)


def exact_one_cycle(schedule: OneCycle, step: int) -> tuple[Any, Any]:
    """Learning rate and momentum, as in the docstring of `OneCycle`."""
    curve = wave if schedule.anneal_strategy == "cos" else line
    rise = Fraction(schedule.pct_start) * schedule.total_steps - 1
    initial = mp.mpf(schedule.max_lr) / schedule.div_factor
    low, high = mp.mpf(schedule.base_momentum), mp.mpf(schedule.max_momentum)
    if step <= rise:
        x = step / rise
        return between(initial, schedule.max_lr, x, curve), between(high, low, x, curve)
    last = initial / schedule.final_div_factor
    if not schedule.three_phase:
        x = (step - rise) / (schedule.total_steps - 1 - rise)
        return between(schedule.max_lr, last, x, curve), between(low, high, x, curve)
    if step <= 2 * rise:
        x = (step - rise) / rise
        return between(schedule.max_lr, initial, x, curve), between(low, high, x, curve)
    return between(initial, last, (step - 2 * rise) / (schedule.total_steps - 1 - 2 * rise), curve), high


def exact_restarts(schedule: CosineRestarts, step: int) -> Any:
    if schedule.T_mult == 1:
        length, step = schedule.T_0, step % schedule.T_0
    else:
        length = schedule.T_0
        while step >= length:
            step, length = step - length, length * schedule.T_mult
    return between(mp.mpf(schedule.max_lr), mp.mpf(schedule.eta_min), Fraction(step, length), wave)


def exact_wsd(schedule: WarmupStableDecay, step: int) -> Any:
    peak, final = mp.mpf(schedule.peak_lr), mp.mpf(schedule.final_lr)
    curve = {"1-sqrt": mp.sqrt, "linear": line, "cosine": wave}[schedule.decay]
    decaying = Fraction(step - schedule.warmup_steps - schedule.stable_steps)
    if decaying >= 0:
        return between(peak, final, decaying / Fraction(schedule.decay_steps), curve)
    return between(mp.mpf(0), peak, Fraction(step) / Fraction(schedule.warmup_steps))


def families() -> dict[str, tuple[Schedule, Callable[[int], Any]]]:
    """Every family with its formula; most are as long as there are schedule steps."""
    high, low, end = mp.mpf(0.3), mp.mpf(1e-4), LAST_STEP
    ramps: dict[str, tuple[type[Any], Callable[[Any], Any], tuple[Any, ...]]] = {
        "linear": (Linear, line, ()),
        "cosine": (Cosine, wave, ()),
        "polynomial": (Polynomial, lambda x: 1 - (1 - x) ** mp.mpf(2.5), (2.5,)),
        "polynomial-half": (Polynomial, lambda x: 1 - mp.sqrt(1 - x), (0.5,)),
    }
    found: dict[str, tuple[Schedule, Callable[[int], Any]]] = {"constant": (Constant(0.3), lambda step: high)}
    for name, (family, curve, arguments) in ramps.items():
        for ends in ((high, mp.mpf(0)), (low, high)):
            for steps in (end, 1000, 12.75):
                found[f"{name}-{float(ends[0])}-{steps}"] = (
                    family(float(ends[0]), float(ends[1]), steps, *arguments),
                    lambda step, curve=curve, ends=ends, steps=steps: between(
                        *ends, Fraction(step) / Fraction(steps), curve
                    ),
                )
    for first, last in ((high, low), (low, high)):
        found[f"exponential-{float(first)}"] = (
            Exponential(float(first), float(last), end - 5),
            lambda step, ends=(first, last): ends[0] * (ends[1] / ends[0]) ** (mp.mpf(min(step, end - 5)) / (end - 5)),
        )
    for own in (
        OneCycle(0.3, end, 0.25),
        OneCycle(0.3, 1001),
        OneCycle(0.3, end, 0.25, "linear", three_phase=True),
        OneCycle(0.3, 997, 0.1234, "linear", final_div_factor=1e9),
    ):
        found[f"one-cycle-{len(found)}"] = (own, lambda step, own=own: exact_one_cycle(own, step)[0])
    for restarts in (CosineRestarts(0.3, 7, 1, 1e-4), CosineRestarts(0.3, 3, 2), CosineRestarts(0.3, 1, 13, 1e-4)):
        found[f"restarts-{restarts.T_mult}"] = (restarts, lambda step, own=restarts: exact_restarts(own, step))
    for warmup_steps in (1, 4000, 2**52):
        found[f"inverse-sqrt-{warmup_steps}"] = (
            InverseSqrt(0.3, warmup_steps),
            lambda step, w=warmup_steps: high * (mp.sqrt(mp.mpf(w) / step) if step > w else mp.mpf(step) / w),
        )
    for decay in ("1-sqrt", "linear", "cosine"):
        for final_lr, sizes in ((0.0, (2**51, 2**50, 2**52)), (1e-4, (10.5, 1000, 1000.25))):
            wsd = WarmupStableDecay(0.3, *sizes, decay=decay, final_lr=final_lr)
            found[f"wsd-{decay}-{final_lr}"] = (wsd, lambda step, own=wsd: exact_wsd(own, step))
    return found


def steps_of(schedule: Schedule) -> list[int]:
    """The ends of all segments, their neighbours, and random steps."""
    rng = random.Random(0)
    steps = {0, 1, 2, LAST_STEP - 1, LAST_STEP, *(rng.randrange(2 ** rng.randrange(1, 54)) for _ in range(12))}
    for part in schedule.parts():
        edge = Fraction(part.start)
        for segment in part.segments[-6:] if part.segments[8:] else part.segments:
            edge += Fraction(segment.steps)
            steps |= {int(edge) - 1, int(edge), int(edge) + 1, int(edge - Fraction(segment.steps) / 3)}
    return sorted(step for step in steps if 0 <= step <= LAST_STEP)


# -- scale functions ---------------------------------------------------------------------------------------------------
def halving(x: float) -> float:
    return 0.5 ** (x - 1)


def waning(x: float) -> float:
    return 1 / (1 + 0.01 * x)


# -- torch's schedulers, and transformers' where torch has none -------------------------------------------------------
PEER_LR = 0.02
PEER_STEPS = 120

Peer = tuple[Schedule, Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler], int]


def torch_peers() -> dict[str, Peer]:
    """Schedule, its peer, and the last step at which they are to agree."""
    lr, last = PEER_LR, PEER_STEPS
    gamma = 0.97
    peers: dict[str, Peer] = {
        "ConstantLR": (
            sequence(Constant(0.3 * lr), Constant(lr), milestones=[7]),
            lambda o: lr_scheduler.ConstantLR(o, 0.3, 7),
            last,
        ),
        "LinearLR": (Linear(lr / 10, lr, 50), lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 50), last),
        "PolynomialLR": (Polynomial(lr, 0.0, 100, 2.0), lambda o: lr_scheduler.PolynomialLR(o, 100, 2.0), last),
        "PolynomialLR-half": (Polynomial(lr, 0.0, 100, 0.5), lambda o: lr_scheduler.PolynomialLR(o, 100, 0.5), last),
        "CosineAnnealingLR": (Cosine(lr, 1e-3, last), lambda o: lr_scheduler.CosineAnnealingLR(o, last, 1e-3), last),
        "CosineAnnealingWarmRestarts": (
            CosineRestarts(lr, 60, eta_min=1e-3),
            lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 60, eta_min=1e-3),
            last,
        ),
        "CosineAnnealingWarmRestarts-longer": (
            CosineRestarts(lr, 7, 2, 1e-3),
            lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 7, 2, 1e-3),
            last,
        ),
        "ExponentialLR": (
            Exponential(lr, lr * gamma**last, last),
            lambda o: lr_scheduler.ExponentialLR(o, gamma),
            last,
        ),
        "ExponentialLR-scaled": (
            ExponentialDecay(lr, gamma),
            lambda o: lr_scheduler.ExponentialLR(o, gamma),
            last,
        ),
        "StepLR": (
            repeated(Segment(30, Shape.CONSTANT, (lr, lr)), factor=0.1),
            lambda o: lr_scheduler.StepLR(o, 30, 0.1),
            last,
        ),
        "OneCycleLR": one_cycle_peer(),
        "OneCycleLR-linear": one_cycle_peer(anneal_strategy="linear", pct_start=0.123, cycle_momentum=False),
        "OneCycleLR-three-phases": one_cycle_peer(anneal_strategy="linear", three_phase=True),
        "OneCycleLR-three-phases-cos": one_cycle_peer(
            pct_start=0.41, three_phase=True, base_momentum=0.7, max_momentum=0.9, div_factor=7.0, final_div_factor=30.0
        ),
        "SequentialLR": (
            warmup(20, then=Cosine(lr, 1e-4, 100), start_factor=0.1),
            lambda o: lr_scheduler.SequentialLR(
                o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 20), lr_scheduler.CosineAnnealingLR(o, 100, 1e-4)], [20]
            ),
            last,
        ),
        "get_inverse_sqrt_schedule": (
            InverseSqrt(lr, 40),
            lambda o: transformers_schedule("get_inverse_sqrt_schedule", o, num_warmup_steps=40),
            last,
        ),
    }
    for decay in ("1-sqrt", "linear", "cosine"):
        peers[f"get_wsd_schedule-{decay}"] = (
            WarmupStableDecay(lr, 20, 35, 50, decay),
            lambda o, decay=decay: transformers_schedule(  # type: ignore[misc]
                "get_wsd_schedule", o, num_warmup_steps=20, num_stable_steps=35, num_decay_steps=50, decay_type=decay
            ),
            last,
        )
    for mode in ("triangular", "triangular2", "exp_range"):
        for sizes in ((7, 4), (2.5, 3.25)):
            peers[f"CyclicLR-{mode}-{sizes[0]}-{sizes[1]}"] = cyclic_peer(*sizes, mode=mode, gamma=gamma)
    return peers


def cyclic_peer(up: float, down: float, **arguments: Any) -> Peer:
    # Torch's phase, step / period - cycle, loses log2(cycles) bits, and so does its square of a height near 0.
    return (
        Cyclic(1e-4, 1e-2, up, down, **arguments),
        lambda optimizer: lr_scheduler.CyclicLR(optimizer, 1e-4, 1e-2, up, down, **arguments),  # type: ignore[arg-type]
        80,
    )


def one_cycle_peer(**arguments: Any) -> Peer:
    return (
        OneCycle(PEER_LR, PEER_STEPS, **arguments),
        lambda optimizer: lr_scheduler.OneCycleLR(optimizer, PEER_LR, PEER_STEPS, **arguments),
        PEER_STEPS - 1,
    )


def transformers_schedule(name: str, optimizer: torch.optim.Optimizer, **arguments: Any) -> lr_scheduler.LRScheduler:
    return getattr(pytest.importorskip("transformers.optimization"), name)(optimizer, **arguments)


def torch_values(peer: Peer) -> Iterator[tuple[int, float, float]]:
    """Step, learning rate and beta1 of torch's scheduler."""
    _, make, last = peer
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))], lr=PEER_LR)
    with quiet():
        scheduler = make(optimizer)
    optimizer.step()
    for step in range(last + 1):
        group = optimizer.param_groups[0]
        yield step, group["lr"], group["betas"][0]
        if step < last:
            with quiet():
                scheduler.step()


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that torch's SequentialLR gives of its own calls."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
