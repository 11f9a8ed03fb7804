"""The hyper table: param groups as rows of float64 that kernels read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..hyperparameters import Hyperparameters
from ..kernels import schedule as columns
from ..schedules import Cyclic, is_triton_function


class HyperTable(NamedTuple):
    """Rows of all groups, and what kernels must be compiled for to read them.

    Attributes:
        rows: float64[num_groups, HYPER_COLUMNS]; integer columns hold the bits of an int64.
        scale_table: float64[n], the tabulated scale functions one after another.
        kinds: Bit set of the schedule kinds in use.
        max_unit_shift: The largest UNIT_SHIFT of any row.
        scale_functions: The ``@triton.jit`` scale functions.
        last_step: The last schedule step for which all tables have a value.
    """

    rows: NDArray[np.float64]
    scale_table: NDArray[np.float64]
    kinds: int
    max_unit_shift: int
    scale_functions: tuple[Any, ...]
    last_step: float


def encode(hyperparameters: Sequence[Hyperparameters]) -> HyperTable:
    """Encodes param groups.

    Args:
        hyperparameters: One entry per group. The value of a tensor ``lr`` is left 0 for the caller to copy in.

    Returns:
        The table.

    Raises:
        ValueError: A ``scale_fn`` cannot be tabulated.
    """
    rows = np.zeros((len(hyperparameters), columns.HYPER_COLUMNS.value))
    integers = rows.view(np.int64)
    tables: list[NDArray[np.float64]] = [np.zeros(1)]
    functions: list[Any] = []
    for row, integer_row, h in zip(rows, integers, hyperparameters, strict=True):
        integer_row[columns.KIND] = columns.CONSTANT
        row[columns.BETA2] = h.beta2
        row[columns.LOG2_BETA2] = _log2(h.beta2)
        row[columns.EPS] = h.eps
        row[columns.DECOUPLED_DECAY if h.decoupled_weight_decay else columns.L2_DECAY] = h.weight_decay
        row[columns.GRAD_SIGN] = -1.0 if h.maximize else 1.0
        row[columns.BASE_LR] = 0.0 if isinstance(h.lr, Tensor) else h.lr
        row[columns.BASE_MOMENTUM] = h.beta1
        # A constant row is located in its cycle too, where it shares a launch with others: no division by 0.
        integer_row[[columns.STEP_UNITS_UP.value, columns.PERIOD_UNITS.value]] = 1, 2
        if h.schedule is not None:
            _encode_schedule(h.schedule, row, integer_row, tables, functions)
    return HyperTable(
        rows,
        np.concatenate(tables),
        int(np.bitwise_or.reduce(integers[:, columns.KIND.value])),
        int(integers[:, columns.UNIT_SHIFT.value].max(initial=0)),
        tuple(functions),
        min((h.schedule.last_step() for h in hyperparameters if h.schedule is not None), default=math.inf),
    )


def _encode_schedule(
    schedule: Cyclic,
    row: NDArray[np.float64],
    integer_row: NDArray[np.int64],
    tables: list[NDArray[np.float64]],
    functions: list[Any],
) -> None:
    up, period, shift = schedule.units
    integer_row[columns.STEP_UNITS_UP] = up
    integer_row[columns.PERIOD_UNITS] = period
    integer_row[columns.UNIT_SHIFT] = shift
    integer_row[columns.CYCLE_MOMENTUM] = schedule.cycle_momentum
    integer_row[columns.SCALE_BY_ITERATION] = schedule.scale_mode == "iterations"
    row[columns.BASE_LR], row[columns.MAX_LR] = schedule.base_lr, schedule.max_lr
    row[columns.LOG2_GAMMA] = _log2(schedule.gamma)
    if schedule.cycle_momentum:
        row[columns.BASE_MOMENTUM], row[columns.MAX_MOMENTUM] = schedule.base_momentum, schedule.max_momentum
    if schedule.scale_fn is None:
        kinds = {"triangular": columns.TRIANGULAR, "triangular2": columns.TRIANGULAR2, "exp_range": columns.EXP_RANGE}
        integer_row[columns.KIND] = kinds[schedule.mode]
    elif is_triton_function(schedule.scale_fn):
        if schedule.scale_fn not in functions:
            functions.append(schedule.scale_fn)
        integer_row[columns.KIND] = columns.SCALE_FUNCTION.value + functions.index(schedule.scale_fn)
    else:
        table = schedule.tabulated_scale()
        integer_row[columns.KIND] = columns.TABULATED
        integer_row[columns.TABLE_OFFSET] = sum(map(len, tables))
        integer_row[columns.TABLE_LENGTH] = len(table)
        tables.append(table)


def _log2(x: float) -> float:
    return math.log2(x) if x > 0 else -math.inf
