"""Adam and its cyclical learning rate in one Triton kernel launch per training step."""

from . import schedules, testing
from .averaging import Averaging
from .convert import fuse, unfuse
from .graphs import CapturedStep, GraphedStep
from .optim import FusedAdam, FusedAdamW, FusedSGD
from .range_test import RangeTest, Suggestion, range_test, suggest_step_size
from .scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LinearLR,
    OneCycleLR,
    PolynomialLR,
    SequentialLR,
)
from .telemetry import History, Live, Status

__all__ = [
    "Averaging",
    "CapturedStep",
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "CyclicLR",
    "ExponentialLR",
    "FusedAdam",
    "FusedAdamW",
    "FusedSGD",
    "GraphedStep",
    "History",
    "LinearLR",
    "Live",
    "OneCycleLR",
    "PolynomialLR",
    "RangeTest",
    "SequentialLR",
    "Status",
    "Suggestion",
    "fuse",
    "range_test",
    "schedules",
    "suggest_step_size",
    "testing",
    "unfuse",
]
__version__ = "0.1.0"
