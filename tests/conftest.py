"""Triton runs in its interpreter for the whole test process, so that the real kernels run on the CPU."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

# Before triton is imported. The tests marked `gpu` run in a process of their own (bench/on_gpu.sh).
if os.environ.get("FUSED_CLR_TEST_GPU") != "1":
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

if TYPE_CHECKING:
    from .ranks import Ranks


@pytest.fixture(params=["cpu", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test on both backends; `triton` is the interpreter."""
    monkeypatch.setenv("FUSED_CLR_BACKEND", request.param)
    return request.param


@pytest.fixture
def triton_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The triton backend, in the interpreter."""
    monkeypatch.setenv("FUSED_CLR_BACKEND", "triton")


@pytest.fixture(scope="session")
def ranks() -> Iterator["Ranks"]:
    """Two processes of a torch.distributed group."""
    from .ranks import Ranks

    started = Ranks()
    yield started
    started.close()


@pytest.fixture(autouse=True, scope="session")
def interpreter_rounds_to_bfloat16() -> None:
    """Makes the interpreter round float32 to bfloat16 as GPUs do, to nearest even; by itself it cuts 16 bits off.

    That is a bias which moments add up, and which torch's own kernels do not have.
    """
    from triton.runtime import interpreter

    def convert_float(value: Any, from_dtype: Any, to_dtype: Any, rounding_mode: Any) -> Any:
        if (str(from_dtype), str(to_dtype)) != ("fp32", "bf16"):
            return original(value, from_dtype, to_dtype, rounding_mode)
        return torch.from_numpy(value.copy()).bfloat16().view(torch.uint16).numpy()

    original = interpreter._convert_float
    interpreter._convert_float = convert_float


@pytest.fixture(autouse=True, scope="session")
def interpreter_patches_once_a_launch() -> None:
    """The interpreter replaces triton.language's functions for a launch, and once more at every call within it.

    That is a fifth of its time, and changes nothing.
    """
    from triton import language
    from triton.runtime import interpreter

    class Scope:
        def __init__(self, function: Any, modules: set[Any]) -> None:
            self.patches, self.modules = patch(function), modules
            patched.update(modules)

        def restore(self) -> None:
            patched.difference_update(self.modules)
            self.patches.restore()

    def patch_once(function: Any) -> Scope | None:
        names = function.__globals__
        if id(names) not in modules_of:
            found = {m for m in (language, language.core) if any(value is m for value in names.values())}
            modules_of[id(names)] = found
        modules = modules_of[id(names)]
        return None if modules <= patched else Scope(function, modules)

    modules_of: dict[int, set[Any]] = {}
    patch, patched = interpreter._patch_lang, set[Any]()
    interpreter._patch_lang = patch_once


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
