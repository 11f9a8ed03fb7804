"""What kernels share with the host, word by word: clock, norm, tensor table, scalars, live mirrors, history."""

import triton.language as tl

# Words of the clock, int64[CLOCK_WORDS].
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
CLOCK_WORDS = tl.constexpr(16)

# Words of the settings, int64[SETTINGS_WORDS], which the host writes with the hyper table: the kinds of schedule in
# use, the largest UNIT_SHIFT, the address of the tabulated scale functions. In memory and not arguments, so that
# captured launches follow a new schedule.
KINDS = tl.constexpr(0)
MAX_UNIT_SHIFT = tl.constexpr(1)
SCALE_TABLE = tl.constexpr(2)
SETTINGS_WORDS = tl.constexpr(3)

# Words of the norm, float64[NORM_WORDS]. MAX_NORM is the host's.
GRAD_NORM = tl.constexpr(0)
CLIP_COEFFICIENT = tl.constexpr(1)
# Not 0: the norm is not finite, and such a step is to be skipped.
OVERFLOW = tl.constexpr(2)
MAX_NORM = tl.constexpr(3)
SUM_OF_SQUARES = tl.constexpr(4)
NORM_WORDS = tl.constexpr(8)

# Columns of the tensor table, int64[num_tensors, TENSOR_COLUMNS]. Addresses of parts a tensor lacks are 0.
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
EXP_AVG = tl.constexpr(2)
EXP_AVG_SQ = tl.constexpr(3)
MAX_EXP_AVG_SQ = tl.constexpr(4)
NUMEL = tl.constexpr(5)
GROUP = tl.constexpr(6)
ACTIVE = tl.constexpr(7)
# One of the codes below.
GRAD_DTYPE = tl.constexpr(8)
TENSOR_COLUMNS = tl.constexpr(9)

# Codes of the gradients' dtypes. Powers of two, so that a launch's dtypes are a bit set.
FLOAT16 = tl.constexpr(1)
BFLOAT16 = tl.constexpr(2)
FLOAT32 = tl.constexpr(4)
FLOAT64 = tl.constexpr(8)

# Columns of the scalars, [2, num_tensors, SCALAR_COLUMNS].
STEP_SIZE = tl.constexpr(0)
BIAS_CORRECTION2_SQRT = tl.constexpr(1)
ONE_MINUS_BETA1 = tl.constexpr(2)
ONE_MINUS_BETA2 = tl.constexpr(3)
SCALAR_EPS = tl.constexpr(4)
SCALAR_L2_DECAY = tl.constexpr(5)
DECAY_FACTOR = tl.constexpr(6)
SCALAR_GRAD_SIGN = tl.constexpr(7)
SCALAR_COLUMNS = tl.constexpr(8)

# Rows of the live mirrors, float64[LIVE_ROWS, num_groups]: what the last step applied, what the next one will.
APPLIED_LR = tl.constexpr(0)
APPLIED_BETA1 = tl.constexpr(1)
NEXT_LR = tl.constexpr(2)
NEXT_BETA1 = tl.constexpr(3)
LIVE_ROWS = tl.constexpr(4)

# Columns of the history, float64[history_rows, num_groups, HISTORY_COLUMNS]: a ring, a row for each step, skipped ones
# too. ENTRY counts them from 1; 0 is a row never written.
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
