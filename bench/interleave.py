"""Rounds of several steppers in turn, so that a slow minute is slow for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from bench.peers import Stepper
from bench.timing import Clock, collector_paused

Build = Callable[[], Stepper]


class _Runner:
    """A warm stepper and its rounds so far, in seconds a step."""

    def __init__(self, name: str, clock: Clock, stepper: Stepper) -> None:
        self.name = name
        self.seconds: list[float] = []
        self._clock = clock
        self._context = stepper.context
        with self._context():
            self._step = clock.prepare(stepper)

    def run_round(self) -> None:
        with self._context():
            self.seconds.append(self._clock.time_round(self.name, self._step))


def run_interleaved(
    builds: Mapping[str, Build], clock: Clock, rounds: int
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Builds and warms up all, then times them round by round.

    Args:
        builds: By name, what makes each stepper.
        clock: Times a round.
        rounds: How many count. One more goes before, which settles how long a round is.

    Returns:
        By name, seconds a step in each round; and the errors of those that raised one.
    """
    runners: dict[str, _Runner] = {}
    errors: dict[str, Exception] = {}
    for name, build in builds.items():
        try:
            runners[name] = _Runner(name, clock, build())
        # Whatever another package raises is a finding about it, and the others still want to be measured.
        except Exception as error:
            errors[name] = error
    with collector_paused():
        for _ in range(rounds + 1):
            for name, runner in list(runners.items()):
                try:
                    runner.run_round()
                except Exception as error:
                    errors[name] = error
                    del runners[name]
    return {name: runner.seconds[1:] for name, runner in runners.items()}, errors
