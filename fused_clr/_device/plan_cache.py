"""Which plan fits the present tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from torch import Tensor

from .fingerprint import Fingerprint

Plan = TypeVar("Plan")

# Sets of gradients whose plans are kept; a training loop has one or a few.
MAX_PLANS = 32


class PlanCache(Generic[Plan]):
    """Plans by their fingerprints, the last one used first."""

    def __init__(self) -> None:
        self._plans: list[tuple[Fingerprint, Plan]] = []

    def clear(self) -> None:
        """Forgets all plans."""
        self._plans.clear()

    def plans(self) -> list[Plan]:
        """All of them."""
        return [plan for _, plan in self._plans]

    def get(
        self, grads: list[Tensor | None], build: Callable[[list[Tensor | None]], tuple[Plan, Sequence[Tensor]]]
    ) -> Plan:
        """The plan for these gradients: one from the cache, or a new one.

        Args:
            grads: One entry per parameter; None where it has none.
            build: Makes a plan for them, and names the other tensors that it was made for; may clear the cache.
        """
        for test in (Fingerprint.matches, Fingerprint.matches_slowly):
            for index, (fingerprint, plan) in enumerate(self._plans):
                if test(fingerprint, grads):
                    if index:
                        self._plans.insert(0, self._plans.pop(index))
                    return plan
        plan, others = build(grads)
        self._plans.insert(0, (Fingerprint(grads, others), plan))
        del self._plans[MAX_PLANS:]
        return plan
