"""Triton runs in its interpreter for the whole test process, so that the real kernels run on the CPU."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

# Before triton is imported. The tests marked `gpu` run in a process of their own (bench/on_gpu.sh).
if os.environ.get("FUSED_CLR_TEST_GPU") != "1":
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

if TYPE_CHECKING:
    from tests.helpers.ranks import Ranks


# The tensors are small, and the machine's other cores have tests of their own.
torch.set_num_threads(1)


@pytest.fixture(params=["cpu", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test on both backends; `triton` is the interpreter."""
    monkeypatch.setenv("FUSED_CLR_BACKEND", request.param)
    return request.param


@pytest.fixture
def triton_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The triton backend, in the interpreter."""
    monkeypatch.setenv("FUSED_CLR_BACKEND", "triton")


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
    from tests.helpers import interpreter

    interpreter.round_to_bfloat16()
    interpreter.patch_once_a_launch()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, whatever ran before."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` need one; the others need the interpreter."""
    on_gpu = os.environ.get("FUSED_CLR_TEST_GPU") == "1" and torch.cuda.is_available()
    for item in items:
        if item.get_closest_marker("gpu") and not on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and FUSED_CLR_TEST_GPU=1 as bench/on_gpu.sh sets it"))
