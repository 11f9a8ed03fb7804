"""Faults planted into the project's kernels: each is found, and named."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from fused_clr import FusedAdam, schedules
from fused_clr._device import step_plan
from fused_clr._device.step_plan import LaunchConfig
from fused_clr._device.triton import TritonEngine
from tests.audit.test_audit import changed_kernels
from tests.ptx.device import Device
from tests.ptx.faults import DataRace, MemoryFault, PtxError

pytestmark = [pytest.mark.ptx, pytest.mark.usefixtures("device")]

BLOCK_SIZE = 512


class Fault(NamedTuple):
    """A change to a file of kernels, what is then raised, and what the message says."""

    file: str
    old: str
    new: str
    error: type[PtxError]
    message: str
    misaligned: bool = False


LIVE_LR = "lr = tl.load(live_ptr + NEXT_LR * num_groups + lane, mask=is_group)"
FAULTS = {
    "a-relaxed-retire": Fault("step.py", 'sem="acq_rel"', 'sem="relaxed"', DataRace, r"read, then write.*control_ptr"),
    "a-norm-that-only-releases": Fault(
        "norm.py", 'sem="acq_rel"', 'sem="release"', DataRace, "write, then read.*other program.*partial_sums_ptr"
    ),
    "partial-sums-after-the-retire": Fault(
        "norm.py",
        "        tl.store(partial_sums_ptr + program_id, partial_sum)\n        tl.debug_barrier()\n"
        '        done = tl.atomic_add(control_ptr + NORM_DONE, 1, sem="acq_rel")\n',
        '        tl.debug_barrier()\n        done = tl.atomic_add(control_ptr + NORM_DONE, 1, sem="acq_rel")\n'
        "        tl.store(partial_sums_ptr + program_id, partial_sum)\n",
        DataRace,
        "partial_sums_ptr",
    ),
    "a-false-promise-of-16-bytes": Fault(
        "step.py",
        "aligned = (all_addresses & 15) == 0",
        "aligned = (all_addresses & 3) == 0",
        MemoryFault,
        r"misaligned: .*parameter\[\+\d+ of .*ld\.global\.v4.*is no multiple of 16",
        misaligned=True,
    ),
    "a-false-promise-of-the-norm": Fault(
        "norm.py",
        "((address & 15) == 0)",
        "((address & 3) == 0)",
        MemoryFault,
        r"misaligned: .*gradient\[\+\d+ of .*is no multiple of 16",
        misaligned=True,
    ),
    "a-mask-off-by-one": Fault(
        "step.py",
        "offsets < part_end,",
        "offsets <= part_end,",
        MemoryFault,
        "out of bounds: 4 bytes at",
    ),
    "chunks-updated-twice": Fault(
        "step.py", "num_chunks, num_updaters):", "num_chunks, num_updaters - 1):", DataRace, "program; .*parameter"
    ),
    "the-slot-that-updaters-read": Fault(
        "step.py",
        "                    1 - slot,\n",
        "                    slot,\n",
        DataRace,
        "other program; .*scalars_ptr",
    ),
    "a-neighbour's-learning-rate": Fault(
        "evaluate.py",
        LIVE_LR,
        LIVE_LR.replace("+ lane", "+ (lane + 40) % num_groups"),
        DataRace,
        "same program.*live_ptr",
    ),
}  # fmt: skip


def train(misaligned: bool = False, **options: Any) -> FusedAdam:
    """Two steps of 70 groups. Most updaters have full chunks alone, in whose way no barrier stands."""
    generator = torch.Generator().manual_seed(0)

    def values(numel: int) -> torch.Tensor:
        return torch.randn(numel + misaligned, generator=generator)[int(misaligned) :]

    params = [torch.nn.Parameter(values(n)) for n in (6 * BLOCK_SIZE, BLOCK_SIZE + 5, *[1] * 68)]
    groups = [{"params": [param]} for param in params]
    optimizer = FusedAdam(groups, schedule=schedules.Cyclic(1e-3, 1e-2, 3, mode="triangular2"), **options)
    for _ in range(2):
        for param in params[:2]:
            param.grad = values(param.numel())
        optimizer.step()
    return optimizer


@pytest.fixture(autouse=True)
def small_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonEngine, "config", LaunchConfig(BLOCK_SIZE, programs_per_multiprocessor=2))


def use_kernels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes plans launch the kernels of another folder."""
    name = f"kernels_of_{folder.parent.name.replace('-', '_')}"
    package = ModuleType(name)
    package.__path__ = [str(folder)]
    monkeypatch.setitem(sys.modules, name, package)
    for kernel in ("step_kernel", "norm_kernel"):
        module = importlib.import_module(f"{name}.{kernel.removesuffix('_kernel')}")
        monkeypatch.setattr(step_plan, kernel, getattr(module, kernel))


@pytest.mark.parametrize("misaligned", [False, True], ids=["aligned", "misaligned"])
def test_nothing_planted(misaligned: bool) -> None:
    assert int(train(misaligned, max_grad_norm=1.0).live.schedule_step) == 2


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_found(fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(changed_kernels(tmp_path, fault.old, fault.new, fault.file), monkeypatch)
    with pytest.raises(fault.error, match=fault.message):
        train(fault.misaligned, **({"max_grad_norm": 1.0} if fault.file == "norm.py" else {}))


# In PTX: where a kernel uses shared memory, the compiler may put a barrier there by itself. Up to a label or a branch.
BEFORE_THE_RETIRE = re.compile(r"bar\.sync \t0;(?=(?:(?!bar\.sync)[^$])*atom\.global)")


def test_no_barrier_before_the_retire(device: Device) -> None:
    """A warp counts its program as done before another has read the clock."""

    def rewrite(ptx: str) -> str:
        while BEFORE_THE_RETIRE.search(ptx):
            ptx = BEFORE_THE_RETIRE.sub("", ptx)
        return ptx

    device.rewrite = rewrite
    with pytest.raises(DataRace, match="step_kernel: (.*\n)*read, then write.*control_ptr"):
        train()


def test_no_barriers_in_the_norm(device: Device) -> None:
    device.rewrite = lambda ptx: ptx.replace("bar.sync \t0;", "") if "entry norm_kernel" in ptx else ptx
    with pytest.raises((DataRace, MemoryFault), match="norm_kernel: "):
        train(max_grad_norm=1.0)


def test_fewer_lanes_than_threads(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton gives each lane to several threads: one stores what another has not loaded yet."""
    device.adapts = False
    config = LaunchConfig(BLOCK_SIZE, num_warps=2, lanes=8, programs_per_multiprocessor=2)
    monkeypatch.setattr(TritonEngine, "config", config)
    with pytest.raises(DataRace, match=r"step_kernel: (.*\n)*.*same program.*live_ptr"):
        train()
