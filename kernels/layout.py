"""Memory layouts that kernels and host share: control block, norm, tensor table, scalars, live values, history.

`kernels/schedule.py` has those of the group table, the schedule tables and the settings.
"""

import triton.language as tl

# Words of the control block, int64[CONTROL_WORDS]: the schedule step, the current slot, counters and sticky flags.
SCHEDULE_STEP = tl.constexpr(0)
SLOT = tl.constexpr(1)
DONE = tl.constexpr(2)
GENERATION = tl.constexpr(3)
# Sticky flags: a tabulated scale_fn ran past its table; a captured launch of an older generation was replayed.
OVERRUN = tl.constexpr(4)
STALE = tl.constexpr(5)
APPLIED_STEPS = tl.constexpr(6)
SKIPPED_STEPS = tl.constexpr(7)
NORM_DONE = tl.constexpr(8)
CONTROL_WORDS = tl.constexpr(16)

# Words of the norm, float64[NORM_WORDS]. The host writes MAX_NORM.
GRAD_NORM = tl.constexpr(0)
CLIP_COEFFICIENT = tl.constexpr(1)
# Not 0: the norm is not finite, and the step must be skipped.
OVERFLOW = tl.constexpr(2)
MAX_NORM = tl.constexpr(3)
SUM_OF_SQUARES = tl.constexpr(4)
NORM_WORDS = tl.constexpr(8)

# Columns of the tensor table, int64[num_tensors, TENSOR_COLUMNS]. The address of a missing tensor is 0.
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
# The first of MAX_STATES state tensors, in the order of the update rule.
STATES = tl.constexpr(2)
MAX_STATES = tl.constexpr(3)
NUMEL = tl.constexpr(5)
GROUP = tl.constexpr(6)
ACTIVE = tl.constexpr(7)
# One of the codes below.
GRAD_DTYPE = tl.constexpr(8)
# The average of the parameter, in the dtype that its updates are computed in.
AVERAGE = tl.constexpr(9)
TENSOR_COLUMNS = tl.constexpr(10)

# Codes of the gradients' dtypes. Powers of two, so that a launch's dtypes are a bit set.
FLOAT16 = tl.constexpr(1)
BFLOAT16 = tl.constexpr(2)
FLOAT32 = tl.constexpr(4)
FLOAT64 = tl.constexpr(8)

# Columns of the scalars, [2, num_tensors, SCALAR_COLUMNS]: the sign of the gradient, the weight of the parameter in its
# average (0: this step does not average), then those of the update rule.
SCALAR_GRAD_SIGN = tl.constexpr(0)
SCALAR_AVERAGE_WEIGHT = tl.constexpr(1)
RULE_SCALARS = tl.constexpr(2)
MAX_RULE_SCALARS = tl.constexpr(7)
# A row begins where 64 bytes do.
SCALAR_COLUMNS = tl.constexpr(16)

# Rows of the live values, float64[LIVE_ROWS, num_groups]: what the last step applied, and the next one will apply.
APPLIED_LR = tl.constexpr(0)
APPLIED_MOMENTUM = tl.constexpr(1)
NEXT_LR = tl.constexpr(2)
NEXT_MOMENTUM = tl.constexpr(3)
LIVE_ROWS = tl.constexpr(4)

# Columns of the history, float64[history_rows, num_groups, HISTORY_COLUMNS]: a ring buffer with a row for each step,
# skipped ones too. ENTRY counts the steps from 1; it is 0 in a row that was never written.
ENTRY = tl.constexpr(0)
ENTRY_STEP = tl.constexpr(1)
ENTRY_LR = tl.constexpr(2)
ENTRY_MOMENTUM = tl.constexpr(3)
ENTRY_GRAD_NORM = tl.constexpr(4)
ENTRY_CLIP_COEFFICIENT = tl.constexpr(5)
ENTRY_GRAD_SCALE = tl.constexpr(6)
ENTRY_SKIPPED = tl.constexpr(7)
HISTORY_COLUMNS = tl.constexpr(8)

# A word of the chunk table: tensor id in the upper half, chunk of that tensor in the lower.
CHUNK_BITS = tl.constexpr(32)
CHUNK_MASK = tl.constexpr((1 << 32) - 1)
