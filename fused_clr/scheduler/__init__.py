"""Schedulers with torch's signatures, whose schedules run inside the optimizer's step."""

from .base import FusedScheduler
from .cyclic import CyclicLR

__all__ = ["CyclicLR", "FusedScheduler"]
