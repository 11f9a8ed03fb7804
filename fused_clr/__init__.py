"""Adam and its cyclical learning rate in one Triton kernel launch per training step."""

from . import schedules, testing
from .captured import CapturedStep
from .conversion import fuse, unfuse
from .graphed_step import GraphedStep
from .optim import FusedAdam, FusedAdamW
from .scheduler import CyclicLR
from .telemetry import History, Monitor, Status

__all__ = [
    "CapturedStep",
    "CyclicLR",
    "FusedAdam",
    "FusedAdamW",
    "GraphedStep",
    "History",
    "Monitor",
    "Status",
    "fuse",
    "schedules",
    "testing",
    "unfuse",
]
__version__ = "0.1.0"
