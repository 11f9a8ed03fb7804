"""What Triton's own launcher passes to the driver, against the tensors and numbers of each launch."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from fused_clr import Averaging, FusedAdam
from fused_clr._device import launch as launcher
from fused_clr._device import state
from fused_clr.schedules import Cyclic

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("PRETENDED_GPU" not in os.environ, reason="needs the pretended GPU: make pretended-gpu"),
]

PLAIN: dict[str, Any] = {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 4, "cycle_momentum": False}
WARP_SIZE = 32


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels launched in the test; of each, all that the driver got was compared."""
    from tests.pretended_gpu import device

    names: list[str] = []
    run = launcher.run

    def run_and_compare(launch: launcher.Launch, recorded: bool = True, **replaced: Any) -> None:
        device.launched.clear()
        run(launch, recorded, **replaced)
        (got,) = device.launched
        expected = launcher.replace_arguments(launch, replaced)
        assert got.kernel == expected.kernel.__name__
        assert got.grid == (expected.grid, 1, 1)
        assert got.block == WARP_SIZE * expected.options["num_warps"]
        assert got.shared_bytes == expected.compiled.metadata.shared
        assert [name for name, _, _ in got.arguments] == expected.kernel.arg_names
        for (name, kind, value), want in zip(got.arguments, expected.arguments, strict=True):
            if isinstance(want, torch.Tensor):
                assert value == want.data_ptr(), name
            elif kind != "constexpr":
                assert value == want, name
        names.append(got.kernel)

    for module in (launcher, state):
        monkeypatch.setattr(module, "run", run_and_compare)
    return names


def optimizer_of(dtype: torch.dtype, grad_dtype: torch.dtype, **options: Any) -> FusedAdam:
    params = [torch.nn.Parameter(torch.ones(size, dtype=dtype, device="cuda")) for size in (5, 4096)]
    for param in params:
        if grad_dtype != dtype:
            param.grad_dtype = None
        param.grad = torch.ones_like(param, dtype=grad_dtype)
    return FusedAdam(params, **options)


CASES: dict[str, tuple[torch.dtype, torch.dtype, dict[str, Any]]] = {
    "plain": (torch.float32, torch.float32, {"lr": 0.1}),
    "scheduled": (torch.float32, torch.float32, {"schedule": Cyclic(**PLAIN)}),
    "clipped": (torch.float32, torch.float32, {"max_grad_norm": 1.0, "write_back_grads": True, "amsgrad": True}),
    "bfloat16": (torch.bfloat16, torch.bfloat16, {"max_grad_norm": 1.0, "skip_if_nonfinite": True}),
    "mixed": (torch.float32, torch.bfloat16, {"history_size": 0}),
    "averages": (torch.bfloat16, torch.bfloat16, {"averaging": Averaging.ema(0.9)}),
    "float64": (torch.float64, torch.float64, {"max_grad_norm": 1.0, "advance_schedule_on_skip": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_argument_arrives(case: str, checked: list[str]) -> None:
    dtype, grad_dtype, options = CASES[case]
    optimizer = optimizer_of(dtype, grad_dtype, **options)
    clips = "max_grad_norm" in options
    step = ["norm_kernel", "step_kernel"] if clips else ["step_kernel"]
    optimizer.step()
    assert checked == ["reevaluate_kernel", *step]

    checked.clear()
    for param in optimizer.param_groups[0]["params"]:
        param.grad = param.grad.clone()
    optimizer.step()
    # At addresses that are multiples of 16 bytes, and at others, for which the code is the same.
    memory = torch.ones(3, device="cuda")
    for scale, found in ((torch.full((), 2.0, device="cuda"), torch.zeros((), device="cuda")), (memory[1], memory[2])):
        optimizer.grad_scale, optimizer.found_inf = scale, found
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
    assert checked == 3 * step

    checked.clear()
    optimizer._tick()
    optimizer.set_schedule_step(3)
    optimizer.param_groups[0]["weight_decay"] = 0.1
    assert optimizer.status().schedule_step == 3
    assert checked == ["step_kernel", "reevaluate_kernel", "reevaluate_kernel"]


def test_every_argument_of_the_norm_over_two_devices_arrives(checked: list[str]) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    params = [torch.nn.Parameter(torch.ones(8, device=f"cuda:{index}")) for index in (0, 1)]
    for param in params:
        param.grad = torch.ones_like(param)
    FusedAdam(params, lr=0.1, max_grad_norm=1.0).step()
    assert sorted(checked) == sorted(2 * ["reevaluate_kernel", "norm_kernel", "shared_norm_kernel", "step_kernel"])
