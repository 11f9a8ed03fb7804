"""The plan of a step on a device: its tables there, and its launches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from ..kernels import layout
from ..kernels.norm import norm_kernel
from ..kernels.step import step_kernel
from .capture import relaxed_capture, upload_stream
from .chunks import Chunks, NormChunks
from .engine import CLIP_EPS
from .launch import Launch, make_launch, replace_arguments
from .memory import DeviceMemory
from .tensors import upload

TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
DTYPE_CODES = {
    torch.float16: layout.FLOAT16.value,
    torch.bfloat16: layout.BFLOAT16.value,
    torch.float32: layout.FLOAT32.value,
    torch.float64: layout.FLOAT64.value,
}
# How many partial sums the norm's last program adds at a time.
PARTIALS = 1024
# Tensor tables kept for later captures: so many graphs can be captured without an eager step in between.
SPARE_TABLES = 4


class LaunchConfig(NamedTuple):
    """How kernels are compiled and how large their grid is.

    Attributes:
        block_size: Elements of a chunk; half of it for float64 parameters. Ragged chunks are updated in halves: where
            these have fewer elements than threads, the compiler gives an element to several threads.
        num_warps: Warps of a program.
        lanes: Lanes of an evaluator; no more than a program's threads, which would otherwise do float64 work twice.
        programs_per_multiprocessor: Updaters per multiprocessor. Each loops over its chunks: with a program per chunk,
            a million programs would do an atomic at one address.
        limits_registers: Whether the compiler can be given a limit: CUDA's can.
    """

    block_size: int = 2048
    num_warps: int = 8
    lanes: int = 256
    programs_per_multiprocessor: int = 8
    limits_registers: bool = True

    @property
    def options(self) -> dict[str, Any]:
        """Compile options. Contraction to FMA is stated, since Triton's default changes between versions."""
        return {"num_warps": self.num_warps, "enable_fp_fusion": True}

    def step_options(self, param_dtype: torch.dtype, num_states: int, averages: bool) -> dict[str, Any]:
        """Compile options of updaters.

        On CUDA, those that need more than 64 registers get a limit: for fewer, the compiler would spill.
        """
        options = self.options
        needs_more = num_states > 2 or averages or (num_states == 2 and param_dtype == torch.float64)
        if self.limits_registers and needs_more:
            # 80 are 3 programs on a multiprocessor, and 128 are 2.
            options["maxnreg"] = 128 if param_dtype == torch.float64 or num_states < 2 else 80
        return options

    def for_warp_size(self, warp_size: int) -> LaunchConfig:
        """The configuration for a device whose warps have so many lanes: AMD has GPUs of 64 and of 32."""
        return self._replace(lanes=min(self.lanes, self.num_warps * warp_size))


# Chosen from the compiled code (`make audit`), since no GPU was available; to be replaced by measured choices.
# cuda: 2,048 elements by 8 warps, 64 registers: 4 programs of 256 threads on a multiprocessor of sm_80, sm_90
#   and sm_100. Each thread loads 128 bytes of p, g, m, v at once: up to 128 KiB are in flight on a multiprocessor,
#   64 KiB in bfloat16: an H200 needs 23 KiB on each of its 132 for 4.3 TB/s at a latency of 700 ns.
# hip: as many threads, in 4 warps of 64: 5 programs by registers on gfx942.
CONFIGS = {"cuda": LaunchConfig(), "hip": LaunchConfig(num_warps=4, limits_registers=False)}


def config_for_device() -> LaunchConfig:
    """The configuration for the platform that torch was built for."""
    return CONFIGS["hip" if torch.version.hip else "cuda"]


class StepLaunches(NamedTuple):
    """The launches of a step: the norm's, if there is clipping, and one per dtype combination."""

    norm: Launch | None
    updates: list[Launch]

    def with_table(self, tensor_table: Tensor) -> StepLaunches:
        """The same launches for another tensor table. Compiles nothing, so it is allowed in a capture."""
        replaced = {"tensor_table_ptr": tensor_table}
        norm = None if self.norm is None else replace_arguments(self.norm, replaced)
        return StepLaunches(norm, [replace_arguments(launch, replaced) for launch in self.updates])


class StepPlan:
    """The tables of a step on the device, the addresses last uploaded to them, and its launches.

    Args:
        active: Indices of the tensors that it updates, in order.
        params: These tensors.
        states: Their state tensors, one list for each.
        rows: int64[num_tensors, TENSOR_COLUMNS], the tensor table without addresses of parameters and gradients.
        buffers: By tensor index: the buffer that a gradient is first copied into, if its layout is not its parameter's.
        chunks: The chunks of the tensors.
        device: The device of the tables.
        idle: Indices of the tensors that are averaged and not updated.
        idle_params: These tensors.
        averages: The averages of ``active`` and ``idle``, in that order; none if no step averages.
    """

    def __init__(
        self,
        active: list[int],
        params: list[Tensor],
        states: list[list[Tensor]],
        rows: NDArray[np.int64],
        buffers: dict[int, Tensor],
        chunks: Chunks,
        device: torch.device,
        idle: Sequence[int] = (),
        idle_params: Sequence[Tensor] = (),
        averages: Sequence[Tensor] = (),
    ) -> None:
        self.active = active
        self.idle = list(idle)
        self.params = params
        self.idle_params, self.averages = list(idle_params), list(averages)
        self.states = [tensor for own in states for tensor in own]
        self._state_rows = np.array([index for index, own in zip(active, states, strict=True) for _ in own], np.intp)
        self._state_columns = layout.STATES.value + np.array([i for own in states for i in range(len(own))], np.intp)
        self.rows = rows
        self.buffers = buffers
        self.chunks = chunks
        self.device = device
        self.addresses: list[int] | None = None
        self.launches: StepLaunches | None = None
        # Whether it has its launches and, for later captures, its spare tables.
        self.is_complete = False
        self.chunk_table = upload(chunks.chunk_table, device)
        self.tensor_table = self._new_tensor_table()
        # For later captures, during which nothing may be allocated.
        self.spare_tables: list[Tensor] = []
        self._spares_free: torch.cuda.Event | None = None

    def _new_tensor_table(self) -> Tensor:
        return torch.empty(self.rows.shape, dtype=torch.int64, device=self.device)

    def stock_spare_tables(self) -> None:
        """Allocates what the next captures need."""
        while len(self.spare_tables) < SPARE_TABLES:
            self.spare_tables.append(self._new_tensor_table())
        if self.device.type == "cuda":
            # Earlier work on this stream may still use this memory.
            self._spares_free = torch.cuda.Event()
            self._spares_free.record(torch.cuda.current_stream(self.device))
            # Torch creates its streams at the first use of one: not during a capture.
            upload_stream(self.device)

    def take_spare_table(self) -> Tensor:
        """Copies the rows into a spare table while this thread captures; done when it returns.

        On a stream that is not captured: a copy node would read the host's memory again at every replay.
        """
        table = self.spare_tables.pop()
        # The next eager step allocates another.
        self.is_complete = False
        if self._spares_free is None:
            return table.copy_(torch.from_numpy(self.rows))
        with relaxed_capture(self.device):
            stream = upload_stream(self.device)
            with torch.cuda.stream(stream):
                stream.wait_event(self._spares_free)
                table.copy_(torch.from_numpy(self.rows.copy()))
            stream.synchronize()
        return table

    def find_addresses(self, grads: Sequence[Tensor | None], with_states: bool) -> list[int]:
        """Addresses of parameters, gradients and states; gradients of another layout are copied into buffers first.

        Args:
            grads: One entry per parameter.
            with_states: False leaves out the states: nobody else has them, so that they are where they were.
        """
        active: list[Any] = list(grads)
        if len(self.active) != len(grads):
            active = [grads[index] for index in self.active]
        for index, buffer in self.buffers.items():
            position = self.active.index(index)
            active[position] = buffer.copy_(active[position])
        states = self.states + self.averages if with_states else ()
        return list(map(Tensor.data_ptr, chain(self.params, active, self.idle_params, states)))

    def set_addresses(self, addresses: list[int]) -> None:
        """Writes what `find_addresses` gave into the rows; uploads nothing."""
        count = len(self.params)
        active = np.array(self.active, np.intp)
        self.rows[active, layout.PARAM.value] = addresses[:count]
        self.rows[active, layout.GRAD.value] = addresses[count : 2 * count]
        first_state = 2 * count + len(self.idle)
        if self.idle:
            self.rows[np.array(self.idle, np.intp), layout.PARAM.value] = addresses[2 * count : first_state]
        if len(addresses) > first_state:
            first_average = first_state + len(self.states)
            self.rows[self._state_rows, self._state_columns] = addresses[first_state:first_average]
            if self.averages:
                self.rows[np.array(self.active + self.idle, np.intp), layout.AVERAGE.value] = addresses[first_average:]


def evaluators(num_tensors: int, num_groups: int, config: LaunchConfig) -> int:
    """The number of evaluators of a step: one lane per tensor and per group."""
    return -(-(num_tensors + num_groups) // config.lanes)


def at_once(launch: Launch, max_programs: int, config: LaunchConfig) -> int:
    """How many programs of a launch run at the same time, at most ``max_programs``: more would only retire more often.

    By the registers of the compiled code; ``max_programs`` where these are not known (AMD, the interpreter).
    """
    registers = getattr(launch.compiled, "n_regs", None)
    if not registers or launch.device.type != "cuda" or torch.version.hip:
        return max_programs
    device: Any = torch.cuda.get_device_properties(launch.device)
    # Of each thread, in eights.
    warps = device.regs_per_multiprocessor // (-(-registers // 8) * 8 * 32)
    warps = min(warps, device.max_threads_per_multi_processor // 32)
    programs: int = max(warps // config.num_warps, 1) * device.multi_processor_count
    return min(programs, max_programs)


def make_step_launches(
    plan: StepPlan, tensor_table: Tensor, memory: DeviceMemory, config: LaunchConfig, **common: Any
) -> StepLaunches:
    """The launches of a plan. All are compiled before any runs.

    Args:
        plan: What to update.
        tensor_table: int64[num_tensors, TENSOR_COLUMNS], the plan's own or a captured step's.
        memory: The device's.
        config: The engine's.
        common: Arguments of `kernels.step.step_kernel` that are the same for all plans, and ``skip_if_nonfinite`` of
            `kernels.norm.norm_kernel`.

    Returns:
        The launches, ready to run.
    """
    chunks = plan.chunks
    max_updaters = len(memory.partial_sums)
    skip_if_nonfinite = common.pop("skip_if_nonfinite")
    norm = None
    if chunks.norm is not None:
        norm = _norm_launch(plan, chunks.norm, tensor_table, memory, config, common["generation"], skip_if_nonfinite)
    updates = []
    for chunk_range in chunks.launches:
        is_last = chunk_range is chunks.launches[-1]
        num_evaluators = evaluators(common["num_tensors"], common["num_groups"], config) if is_last else 0
        combination = chunk_range.combination
        launch = make_launch(
            step_kernel,
            1,
            config.step_options(combination.param_dtype, combination.num_states, common["HAS_AVERAGING"]),
            plan.device,
            **memory.step_arguments(),
            **common,
            tensor_table_ptr=tensor_table,
            chunk_table_ptr=plan.chunk_table[chunk_range.first :],
            num_evaluators=num_evaluators,
            num_chunks=chunk_range.num_chunks,
            num_idle_chunks=chunk_range.num_idle_chunks,
            counts=1,
            NUM_STATES=combination.num_states,
            PARAM_DTYPE=TRITON_DTYPES[combination.param_dtype],
            GRAD_DTYPE=TRITON_DTYPES[combination.grad_dtype],
            IS_LAST=is_last,
            BLOCK_SIZE=chunk_range.block_size,
            LANES=config.lanes,
        )
        num_updaters = min(max(chunk_range.num_chunks, chunk_range.num_idle_chunks), max_updaters)
        updates.append(launch._replace(grid=num_evaluators + at_once(launch, num_updaters, config)))
    return StepLaunches(norm, updates)


def _norm_launch(
    plan: StepPlan,
    chunks: NormChunks,
    tensor_table: Tensor,
    memory: DeviceMemory,
    config: LaunchConfig,
    generation: int,
    skip_if_nonfinite: bool,
) -> Launch:
    launch = make_launch(
        norm_kernel,
        1,
        config.options,
        plan.device,
        control_ptr=memory.control,
        norm_ptr=memory.norm,
        tensor_table_ptr=tensor_table,
        chunk_table_ptr=plan.chunk_table[chunks.first :],
        partial_sums_ptr=memory.partial_sums,
        grad_scale_ptr=memory.no_grad_scale,
        num_chunks=chunks.num_chunks,
        generation=generation,
        skip_if_nonfinite=int(skip_if_nonfinite),
        DTYPES=sum(DTYPE_CODES[dtype] for dtype in chunks.grad_dtypes),
        BLOCK_SIZE=chunks.block_size,
        PARTIALS=PARTIALS,
        CLIP_EPS=CLIP_EPS,
    )
    # Without gradients, one program still writes a norm of 0.
    num_programs = max(1, min(chunks.num_chunks, len(memory.partial_sums)))
    return launch._replace(grid=at_once(launch, num_programs, config))
