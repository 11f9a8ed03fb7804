"""Schedules as values: learning rate and momentum as functions of the step, independent of an optimizer."""

from .base import Schedule
from .cyclic import Cyclic
from .parts import Part, Scaling, Segment, Shape
from .sequence import sequence

__all__ = ["Cyclic", "Part", "Scaling", "Schedule", "Segment", "Shape", "sequence"]
