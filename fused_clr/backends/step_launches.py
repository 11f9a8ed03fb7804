"""How a step's kernels are configured, compiled and launched."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..kernels import layout
from ..kernels.adam import adam_kernel
from ..kernels.norm import norm_kernel
from ..plan import LaunchPlan, NormChunks
from . import launch as launcher
from .device_memory import DeviceMemory
from .launch import Launch

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
# Partial sums that the norm's last program adds at a time.
PARTIALS = 1024


class LaunchConfig(NamedTuple):
    """How kernels are compiled and how large their grid is.

    Attributes:
        block_size: Elements of a chunk; half of it for float64 parameters.
        num_warps: Warps of a program.
        lanes: Lanes of an evaluator; no more than a program's threads, or it would do its float64 work twice.
        programs_per_multiprocessor: Updaters each multiprocessor gets; each loops over its chunks, since a program per
            chunk would retire a million times at one address.
    """

    block_size: int = 2048
    num_warps: int = 8
    lanes: int = 256
    programs_per_multiprocessor: int = 8

    @property
    def options(self) -> dict[str, Any]:
        """Compile options. Contraction to FMA is stated, since Triton's default changes between versions."""
        return {"num_warps": self.num_warps, "enable_fp_fusion": True}


# By the compiled code (`make audit`), for want of a GPU to measure on; to be replaced by measured choices.
# cuda: 2,048 elements by 8 warps, 100 to 128 registers: 2 programs of 256 threads on a multiprocessor of sm_80, sm_90
#   and sm_100. Each thread loads 128 bytes of p, g, m, v at once, so that 64 KiB are under way on each multiprocessor:
#   more than twice what 4.3 TB/s at 700 ns of latency ask of each of an H200's 132.
# hip: as many threads, in 4 warps of 64: 4 programs by registers on gfx942.
CONFIGS = {"cuda": LaunchConfig(), "hip": LaunchConfig(num_warps=4)}


def config_for_device() -> LaunchConfig:
    """The configuration for what torch was built for."""
    return CONFIGS["hip" if torch.version.hip else "cuda"]


class CompiledLaunch(NamedTuple):
    """A launch, and what its kernel was compiled to; None in the interpreter."""

    launch: Launch
    compiled: Any

    def run(self, **replaced: Any) -> None:
        """Launches, with other values for arguments that no kernel is specialised on."""
        launch = self.launch
        if replaced:
            arguments = list(launch.arguments)
            for name, value in replaced.items():
                arguments[launch.kernel.arg_names.index(name)] = value
            launch = launch._replace(arguments=tuple(arguments))
        launcher.run(launch, self.compiled)


class StepLaunches(NamedTuple):
    """The launches of a step: the norm's, if one is wanted, and one per dtype combination."""

    norm: CompiledLaunch | None
    updates: list[CompiledLaunch]


class StepConstants(NamedTuple):
    """What a step's launches need from their engine, besides memory: see `adam_kernel` and `norm_kernel`."""

    num_tensors: int
    num_groups: int
    num_evaluators: int
    max_updaters: int
    generation: int
    history_rows: int
    advance_on_skip: bool
    skip_nonfinite: bool
    store_grads: bool
    scale_functions: tuple[Any, ...]


def compile_step(
    plan: LaunchPlan,
    tensor_table: Tensor,
    chunk_table: Tensor,
    memory: DeviceMemory,
    config: LaunchConfig,
    constants: StepConstants,
) -> StepLaunches:
    """The launches of a plan over these tables. All are compiled before any runs.

    Args:
        plan: What to update.
        tensor_table: int64[num_tensors, TENSOR_COLUMNS], the plan's own or a captured step's.
        chunk_table: int64[num_chunks].
        memory: The engine's.
        config: The engine's.
        constants: The engine's.

    Returns:
        The launches, ready to run.
    """
    c = constants
    norm = None if plan.norm is None else norm_launch(plan.norm, tensor_table, chunk_table, memory, config, c)
    launches = []
    for chunk_range in plan.launches:
        is_last = chunk_range is plan.launches[-1]
        num_evaluators = c.num_evaluators if is_last else 0
        combination = chunk_range.combination
        arguments = (
            memory.clock,
            memory.norm,
            memory.live,
            memory.history,
            memory.settings,
            memory.hyper_table,
            tensor_table,
            chunk_table[chunk_range.first :],
            memory.scalars,
            memory.scalars_float64,
            memory.update_steps,
            memory.step_mirror,
            memory.no_grad_scale,
            memory.no_found_inf,
            c.num_groups,
            c.num_tensors,
            num_evaluators,
            chunk_range.num_chunks,
            c.history_rows,
            c.generation,
            1,
            int(c.advance_on_skip),
            TRITON_DTYPES[combination.param_dtype],
            TRITON_DTYPES[combination.grad_dtype],
            combination.amsgrad,
            c.store_grads,
            is_last,
            c.scale_functions,
            chunk_range.block_size,
            config.lanes,
        )
        grid = num_evaluators + min(chunk_range.num_chunks, c.max_updaters)
        launches.append(Launch(adam_kernel, grid, arguments, config.options))
    compiled = [
        None if launch is None else CompiledLaunch(launch, launcher.compile_launch(launch))
        for launch in (norm, *launches)
    ]
    return StepLaunches(compiled[0], [launch for launch in compiled[1:] if launch is not None])


def norm_launch(
    chunks: NormChunks,
    tensor_table: Tensor,
    chunk_table: Tensor,
    memory: DeviceMemory,
    config: LaunchConfig,
    constants: StepConstants,
) -> Launch:
    """The norm launch of a plan. Arguments as for `compile_step`."""
    arguments = (
        memory.clock,
        memory.norm,
        tensor_table,
        chunk_table[chunks.first :],
        memory.partial_sums,
        memory.no_grad_scale,
        chunks.num_chunks,
        constants.generation,
        int(constants.skip_nonfinite),
        sum(DTYPE_CODES[dtype] for dtype in chunks.grad_dtypes),
        chunks.block_size,
        PARTIALS,
    )
    # A norm of no gradients is 0, and somebody has to say so.
    grid = max(1, min(chunks.num_chunks, len(memory.partial_sums)))
    return Launch(norm_kernel, grid, arguments, config.options)
