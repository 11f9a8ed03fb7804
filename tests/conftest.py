"""Triton runs in its interpreter for the whole test process, so that the real kernels run on the CPU.

With FUSED_CLR_TEST_PTX=90, say, they are compiled for sm_90 instead, and what the compiler emits is executed: see
`tests.ptx`. FUSED_CLR_TEST_PTX_SEED is that of the order in which its warps take turns.
"""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

# Before triton is imported. The tests marked `gpu` and `ptx` run in processes of their own.
if os.environ.get("FUSED_CLR_TEST_GPU") != "1" and "FUSED_CLR_TEST_PTX" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

if TYPE_CHECKING:
    from tests.helpers.ranks import Ranks
    from tests.ptx.device import Device

PTX = os.environ.get("FUSED_CLR_TEST_PTX")

# The tensors are small, and the machine's other cores have tests of their own.
torch.set_num_threads(1)


@pytest.fixture(params=["cpu", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test on both backends; `triton` is the interpreter, or compiled kernels."""
    if request.param == "triton":
        request.getfixturevalue("triton_backend")
    monkeypatch.setenv("FUSED_CLR_BACKEND", request.param)
    return request.param


@pytest.fixture
def triton_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The triton backend, in the interpreter or with compiled kernels."""
    monkeypatch.setenv("FUSED_CLR_BACKEND", "triton")
    if PTX is not None:
        request.getfixturevalue("device")


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> "Device":
    """What executes compiled kernels; a test may choose the capability."""
    from tests.ptx.device import Device

    monkeypatch.setenv("FUSED_CLR_BACKEND", "triton")
    assert PTX is not None
    made = Device(getattr(request, "param", int(PTX)), int(os.environ.get("FUSED_CLR_TEST_PTX_SEED", "0")))
    made.install(monkeypatch)
    return made


@pytest.fixture
def emulated_cuda(triton_backend: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `GraphedStep` capture emulated graphs, on the triton backend in the interpreter."""
    from tests.helpers import emulated_graph

    emulated_graph.emulate_cuda(monkeypatch)


@pytest.fixture(scope="session")
def ranks() -> Iterator["Ranks"]:
    """Two processes of a torch.distributed group."""
    from tests.helpers.ranks import Ranks

    started = Ranks()
    yield started
    started.close()


@pytest.fixture(autouse=True, scope="session")
def interpreter_as_gpus_are() -> None:
    """Rounds as a GPU does, and saves time that changes nothing."""
    if PTX is None:
        from tests.helpers import interpreter

        interpreter.round_to_bfloat16()
        interpreter.patch_once_a_launch()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def torch_in_examples(doctest_namespace: dict[str, object]) -> None:
    """Examples in docstrings may use torch without importing it."""
    doctest_namespace["torch"] = torch


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `gpu` need one, those marked `ptx` compiled kernels; the others need the interpreter."""
    on_gpu = os.environ.get("FUSED_CLR_TEST_GPU") == "1" and torch.cuda.is_available()
    for item in items:
        if item.get_closest_marker("gpu") and not on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and FUSED_CLR_TEST_GPU=1 as bench/on_gpu.sh sets it"))
        if item.get_closest_marker("ptx") and PTX is None:
            item.add_marker(pytest.mark.skip(reason="needs a process without the interpreter: FUSED_CLR_TEST_PTX=90"))
    if PTX is not None:
        # Parameters of a test are in its callspec, if it has any.
        parameters = {item: getattr(getattr(item, "callspec", None), "params", {}) for item in items}
        config.hook.pytest_deselected(items=[item for item in items if parameters[item].get("backend") == "cpu"])
        items[:] = [item for item in items if parameters[item].get("backend") != "cpu"]
