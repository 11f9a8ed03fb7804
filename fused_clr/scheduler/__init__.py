"""Schedulers with torch's signatures, whose schedules run inside the optimizer's step."""

from .base import FusedScheduler
from .cosine_restarts import CosineAnnealingWarmRestarts
from .cyclic import CyclicLR
from .one_cycle import OneCycleLR
from .sequential import KINDS, SequentialLR
from .simple import ConstantLR, CosineAnnealingLR, ExponentialLR, LinearLR, PolynomialLR

__all__ = [
    "KINDS",
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "CyclicLR",
    "ExponentialLR",
    "FusedScheduler",
    "LinearLR",
    "OneCycleLR",
    "PolynomialLR",
    "SequentialLR",
]
