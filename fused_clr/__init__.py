"""Adam and its cyclical learning rate in one Triton kernel launch per training step."""

from . import schedules, testing
from .optim import FusedAdam, FusedAdamW
from .scheduler import CyclicLR

__all__ = ["CyclicLR", "FusedAdam", "FusedAdamW", "schedules", "testing"]
__version__ = "0.1.0"
