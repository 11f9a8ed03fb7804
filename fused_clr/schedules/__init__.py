"""Schedules as values: learning rate and momentum as functions of the step, independent of an optimizer.

``docs/schedules.md`` shows all of them.
"""

from .base import Schedule
from .cosine_restarts import CosineRestarts
from .cyclic import Cyclic
from .decay import Decay
from .exponential_decay import ExponentialDecay
from .inverse_sqrt import InverseSqrt
from .one_cycle import OneCycle
from .parts import Part, Scaling, Segment, Shape
from .sequence import sequence
from .simple import Constant, Cosine, Exponential, Linear, Polynomial
from .warmup import warmup
from .warmup_stable_decay import WarmupStableDecay

__all__ = [
    "Constant",
    "Cosine",
    "CosineRestarts",
    "Cyclic",
    "Decay",
    "Exponential",
    "ExponentialDecay",
    "InverseSqrt",
    "Linear",
    "OneCycle",
    "Part",
    "Polynomial",
    "Scaling",
    "Schedule",
    "Segment",
    "Shape",
    "WarmupStableDecay",
    "sequence",
    "warmup",
]
