"""Schedule tables: the schedules of all groups as rows that kernels read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..kernels import schedule as columns
from ..schedules import Schedule, Shape
from ..schedules.compiled import NEVER, Bounds, TimedPart, TimedSegment
from ..schedules.parts import is_triton_function
from ..schedules.timeline import Timeline

# From a column, a constant of `kernels.schedule`, to its value.
Row = dict[Any, float]


class ScheduleTables(NamedTuple):
    """The schedules of all groups, and what kernels must be compiled for to read them.

    Attributes:
        parts: float64[n >= 1, PART_COLUMNS]; integer columns hold the bits of an int64.
        segments: float64[n >= 1, SEGMENT_COLUMNS], likewise.
        scale_table: float64[n >= 1], the tabulated scale functions one after another.
        first_part: int64[num_schedules], the column FIRST_PART of the group table.
        num_parts: int64[num_schedules], the column NUM_PARTS of the group table.
        in_use: Bit set of the shapes and scalings in use; 0 if no group has a schedule.
        part_stride: First stride of the search among parts.
        segment_stride: First stride of the search among segments.
        max_unit_shift: The largest UNIT_SHIFT.
        scale_functions: The ``@triton.jit`` scale functions.
        last_step: The last schedule step for which all tables have a value; infinity if there are none.
    """

    parts: NDArray[np.float64]
    segments: NDArray[np.float64]
    scale_table: NDArray[np.float64]
    first_part: NDArray[np.int64]
    num_parts: NDArray[np.int64]
    in_use: int
    part_stride: int
    segment_stride: int
    max_unit_shift: int
    scale_functions: tuple[Any, ...]
    last_step: float


def encode_schedules(schedules: Sequence[Schedule | None]) -> ScheduleTables:
    """Encodes schedules. One that occurs several times is encoded once.

    Args:
        schedules: None for a group without one.

    Raises:
        ValueError: A ``scale_fn`` cannot be tabulated.
    """
    writer = _Writer()
    unique = {id(schedule): schedule for schedule in schedules if schedule is not None}
    rows = {key: writer.add(schedule) for key, schedule in unique.items()}
    where = [(0, 0) if schedule is None else rows[id(schedule)] for schedule in schedules]
    return ScheduleTables(
        parts=_table(writer.parts, columns.PART_COLUMNS.value),
        segments=_table(writer.segments, columns.SEGMENT_COLUMNS.value),
        scale_table=np.array(writer.scale_table or [1.0]),
        first_part=np.array([first for first, _ in where], np.int64),
        num_parts=np.array([count for _, count in where], np.int64),
        in_use=writer.in_use,
        part_stride=_first_stride(max((count for _, count in where), default=0) - 1),
        # The column SECOND_START saves a part of two segments the search.
        segment_stride=_first_stride(writer.max_segments - 2),
        max_unit_shift=writer.max_unit_shift,
        scale_functions=tuple(writer.scale_functions),
        last_step=min((schedule.last_step() for schedule in unique.values()), default=math.inf),
    )


class _Writer:
    """Collects rows. A row is a dict from columns to values; an int is stored as its bits."""

    def __init__(self) -> None:
        self.parts: list[Row] = []
        self.segments: list[Row] = []
        self.scale_table: list[float] = []
        self.scale_functions: list[Any] = []
        self.in_use = self.max_segments = self.max_unit_shift = 0

    def add(self, schedule: Schedule) -> tuple[int, int]:
        """Adds a schedule. Returns the row of its first part, and the number of its parts."""
        timeline = schedule.timeline
        first_part = len(self.parts)
        for index, (part, bounds) in enumerate(zip(timeline.parts, timeline.bounds, strict=True)):
            self.parts.append(self._part_row(part, bounds[0]) | self._scaling_columns(timeline, index))
            falls = timeline.falls[index]
            self.segments += map(self._segment_row, (0, *part.boundaries), part.segments, bounds, falls)
        return first_part, len(self.parts) - first_part

    def _part_row(self, part: TimedPart, bounds: Bounds) -> Row:
        self.max_segments = max(self.max_segments, len(part.segments))
        self.max_unit_shift = max(self.max_unit_shift, part.shift)
        return {
            columns.START: part.start,
            columns.END: part.end,
            columns.PERIOD: part.period,
            columns.UNIT_SHIFT: part.shift,
            columns.FIRST_SEGMENT: len(self.segments),
            columns.NUM_SEGMENTS: len(part.segments),
            columns.SECOND_START: part.boundaries[0] if part.boundaries else NEVER,
            columns.DRIVES_MOMENTUM: int(bounds.about_momentum is not None),
            columns.ABOUT_LR: bounds.about_lr,
            columns.ABOUT_MOMENTUM: bounds.about_momentum or 0.0,
        }

    def _scaling_columns(self, timeline: Timeline, index: int) -> Row:
        scaling = timeline.parts[index].scaling
        if scaling is None:
            return {columns.SCALING: columns.BY_FACTOR.value, columns.LOG2_FACTOR: 0.0}
        row: Row = {columns.SCALES_PER_STEP: int(scaling.per == "step"), columns.LOG2_FACTOR: 0.0}
        if scaling.scale_fn is None:
            self.in_use |= columns.GEOMETRIC.value
            log2_factor = math.log2(scaling.factor) if scaling.factor > 0 else -math.inf
            return row | {columns.SCALING: columns.BY_FACTOR.value, columns.LOG2_FACTOR: log2_factor}
        if is_triton_function(scaling.scale_fn):
            if scaling.scale_fn not in self.scale_functions:
                self.scale_functions.append(scaling.scale_fn)
            function = self.scale_functions.index(scaling.scale_fn)
            return row | {columns.SCALING: columns.SCALE_FUNCTION.value + function}
        self.in_use |= columns.TABULATED.value
        table = timeline.tabulated_scale(index).tolist()
        offset = len(self.scale_table)
        self.scale_table += table
        return row | {
            columns.SCALING: columns.BY_TABLE.value,
            columns.TABLE_OFFSET: offset,
            columns.TABLE_LENGTH: len(table),
        }

    def _segment_row(self, start: int, segment: TimedSegment, bounds: Bounds, falls: bool) -> Row:
        self.in_use |= segment.shape
        to_log2 = 1.0 / math.log(2.0) if segment.shape == Shape.EXPONENTIAL else 1.0
        return {
            columns.START: start,
            columns.FOOT: segment.foot,
            columns.LENGTH: segment.length,
            columns.SHAPE: segment.shape,
            columns.PARAMETER: segment.parameter * to_log2,
            columns.LR_OFFSET: bounds.lr_offset,
            columns.LR_SPAN: bounds.lr_span,
            columns.MOMENTUM_OFFSET: bounds.momentum_offset or 0.0,
            columns.MOMENTUM_SPAN: bounds.momentum_span or 0.0,
            columns.ENDS_CYCLE: int(falls),
        }


def _first_stride(num_later: int) -> int:
    """The largest power of two that is not above the number of rows after the first; 0 for none."""
    return 1 << num_later.bit_length() - 1 if num_later > 0 else 0


def _table(rows: list[Row], width: int) -> NDArray[np.float64]:
    """The rows as an array. If there are none, one row of zeros, which no kernel reads."""
    table = np.zeros((max(1, len(rows)), width))
    integers = table.view(np.int64)
    for index, row in enumerate(rows):
        for column, value in row.items():
            (integers if isinstance(value, int) else table)[index, column.value] = value
    return table
