"""Adam and its cyclical learning rate in one Triton kernel launch per training step."""

from . import schedules, testing
from .convert import fuse, unfuse
from .graphs import CapturedStep, GraphedStep
from .optim import FusedAdam, FusedAdamW
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
    "CapturedStep",
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "CyclicLR",
    "ExponentialLR",
    "FusedAdam",
    "FusedAdamW",
    "GraphedStep",
    "History",
    "LinearLR",
    "Live",
    "OneCycleLR",
    "PolynomialLR",
    "SequentialLR",
    "Status",
    "fuse",
    "schedules",
    "testing",
    "unfuse",
]
__version__ = "0.1.0"
