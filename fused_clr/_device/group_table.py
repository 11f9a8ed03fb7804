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
    decay_schedules = [group.weight_decay_schedule for group in groups]
    tables = encode_schedules([group.schedule for group in groups] + decay_schedules)
    if any(schedule is not None for schedule in decay_schedules):
        tables = tables._replace(in_use=tables.in_use | columns.DECAY_SCHEDULES.value)
    rows = np.zeros((len(groups), columns.GROUP_COLUMNS.value))
    integers = rows.view(np.int64)
    for column, values in ((columns.FIRST_PART, tables.first_part), (columns.NUM_PARTS, tables.num_parts)):
        own, decay = values.reshape(2, len(groups))
        integers[:, column.value], integers[:, columns.WEIGHT_DECAY.value + column.value] = own, decay
    for row, group in zip(rows, groups, strict=True):
        row[columns.LR.value] = 0.0 if isinstance(group.lr, Tensor) else group.lr
        row[columns.MOMENTUM.value] = group.momentum
        row[columns.WEIGHT_DECAY.value] = group.weight_decay
        row[columns.GRAD_SIGN.value] = -1.0 if group.maximize else 1.0
        of_rule = rule.columns(group.values)
        if len(of_rule) > RULE_WIDTH:
            raise ValueError(f"an update rule must have at most {RULE_WIDTH} columns, got {len(of_rule)}")
        row[columns.RULE_COLUMNS.value : columns.RULE_COLUMNS.value + len(of_rule)] = of_rule
    return GroupTable(rows, tables)
