"""`Averaging`: which steps average the parameters, and with what weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ._checks import check_integer, check_number


@dataclass(frozen=True)
class Averaging:
    """Averages of the parameters over the training, kept by `FusedAdam(..., averaging=)` and the other optimizers.

    Make one with `swa` or `ema`. After an update that averages, for each element:

        average += weight * (parameter - average)

    The first weight is 1: the first average is a copy of the parameters.

    Args:
        decay: Of an exponential average, in [0, 1): ``weight = 1 - decay``. None: ``weight = 1 / n`` for the n-th
            average.
        every: Average after every so many steps, >= 1; or "cycle": after the last step of each cycle.
        start: The first schedule step that may average, >= 0.

    Raises:
        ValueError: An argument is not allowed; the message names it.
    """

    decay: float | None
    every: int | Literal["cycle"] = 1
    start: int = 0

    def __post_init__(self) -> None:
        if self.decay is not None:
            allowed = "a number in [0, 1) or None"
            decay = check_number("decay", self.decay, allowed, lambda x: 0 <= x < 1)
            object.__setattr__(self, "decay", float(decay))
        if not (isinstance(self.every, str) and self.every == "cycle"):
            every = check_integer("every", self.every, "an integer in [1, 2**53] or 'cycle'", lambda n: 1 <= n <= 2**53)
            object.__setattr__(self, "every", every)
        start = check_integer("start", self.start, "an integer in [0, 2**53]", lambda n: 0 <= n <= 2**53)
        object.__setattr__(self, "start", start)

    @classmethod
    def swa(cls, every: int | Literal["cycle"] = "cycle", start: int = 0) -> Averaging:
        """The equal average of the parameters at the end of each cycle, where the learning rate is lowest.

        Stochastic weight averaging: Izmailov et al. 2018 (arXiv:1803.05407, algorithm 1). The same weights as
        `torch.optim.swa_utils.AveragedModel`.

        Args:
            every: An integer n >= 1 averages after the schedule steps n - 1, 2 n - 1, and so on. "cycle" averages after
                the last step of each fall of the group's learning rate; see `Schedule.ends_cycle`.
            start: The first schedule step that may average, >= 0.

        Raises:
            ValueError: An argument is not allowed; the message names it.

        Example:
            >>> Averaging.swa(start=1000)
            Averaging(decay=None, every='cycle', start=1000)
        """
        return cls(None, every, start)

    @classmethod
    def ema(cls, decay: float, every: int | Literal["cycle"] = 1, start: int = 0) -> Averaging:
        """The exponential moving average: the same weights as AveragedModel with `get_ema_multi_avg_fn(decay)`.

        Args:
            decay: Share of the old average that each new one keeps, in [0, 1).
            every: See `swa`.
            start: See `swa`.

        Raises:
            ValueError: An argument is not allowed; the message names it.

        Example:
            >>> Averaging.ema(0.999)
            Averaging(decay=0.999, every=1, start=0)
        """
        check_number("decay", decay, "a number in [0, 1)")
        return cls(decay, every, start)

    def is_due(self, step: int, ends_cycle: bool) -> bool:
        """Whether an average follows the update at schedule step ``step``, the last one of a cycle or not."""
        if step < self.start:
            return False
        return ends_cycle if self.every == "cycle" else (step + 1) % self.every == 0

    def weight(self, count: int) -> float:
        """The weight of an average that ``count`` others came before."""
        if self.decay is None or count == 0:
            return 1.0 / (count + 1)
        return 1.0 - self.decay
