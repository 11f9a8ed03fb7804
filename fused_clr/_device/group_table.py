"""The group table: settings of the param groups as rows of float64 that kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..kernels import schedule as columns
from .rules import UpdateRule
from .schedule_tables import ScheduleTables, encode_schedules
from .settings import GroupSettings

RULE_WIDTH = columns.GROUP_COLUMNS.value - columns.RULE_COLUMNS.value


class GroupTable(NamedTuple):
    """The group table, and the schedule tables that belong to it.

    Attributes:
        rows: float64[num_groups, GROUP_COLUMNS]; integer columns hold the bits of an int64.
        schedules: The tables that the rows point into.
    """

    rows: NDArray[np.float64]
    schedules: ScheduleTables


def encode_groups(groups: Sequence[GroupSettings], rule: UpdateRule) -> GroupTable:
    """Encodes param groups.

    Args:
        groups: Their settings. The value of a tensor ``lr`` is set to 0; the caller copies it in.
        rule: The update rule, which has its own columns.

    Returns:
        The table.

    Raises:
        ValueError: A ``scale_fn`` cannot be tabulated.
    """
    tables = encode_schedules([group.schedule for group in groups])
    rows = np.zeros((len(groups), columns.GROUP_COLUMNS.value))
    integers = rows.view(np.int64)
    integers[:, columns.FIRST_PART.value] = tables.first_part
    integers[:, columns.NUM_PARTS.value] = tables.num_parts
    for row, group in zip(rows, groups, strict=True):
        row[columns.LR.value] = 0.0 if isinstance(group.lr, Tensor) else group.lr
        row[columns.MOMENTUM.value] = group.momentum
        row[columns.GRAD_SIGN.value] = -1.0 if group.maximize else 1.0
        own = rule.columns(group.values)
        if len(own) > RULE_WIDTH:
            raise ValueError(f"an update rule must have at most {RULE_WIDTH} columns, got {len(own)}")
        row[columns.RULE_COLUMNS.value : columns.RULE_COLUMNS.value + len(own)] = own
    return GroupTable(rows, tables)
