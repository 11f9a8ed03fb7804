"""Adam's own root and quotient: correctly rounded, whatever reciprocal root the hardware begins with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from fused_clr.kernels.adam import quotient, square_root

NUMEL = 2**16
# What PTX allows rsqrt.approx.ftz.f32.
ERROR = 2.0**-22.9


@triton.jit
def root_and_quotient_kernel(x_ptr, y_ptr, root_ptr, quotient_ptr, NUMEL: tl.constexpr):
    offsets = tl.arange(0, NUMEL)
    y = tl.load(y_ptr + offsets)
    tl.store(root_ptr + offsets, square_root(y))
    tl.store(quotient_ptr + offsets, quotient(tl.load(x_ptr + offsets), y))


@pytest.fixture(params=["high", "low", "either"])
def approximate(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reciprocal root that is as wrong as it may be."""
    rng = np.random.default_rng(5)

    def create_rsqrt(builder: Any, x: Any) -> Any:
        exact = 1 / np.sqrt(x.data.astype(np.float64))
        signs = {"high": 1.0, "low": -1.0, "either": rng.uniform(-1, 1, exact.shape)}[request.param]
        # Half an ulp is for the rounding.
        return interpreter.TensorHandle((exact * (1 + signs * (ERROR - 2.0**-24))).astype(np.float32), x.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_rsqrt", create_rsqrt)


@pytest.mark.skipif(not hasattr(interpreter._interpreter, "fma_fp32"), reason="this interpreter's fma rounds twice")
@pytest.mark.usefixtures("approximate")
def test_they_are_correctly_rounded() -> None:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(2, NUMEL, generator=generator, dtype=torch.float64)
    # Of magnitudes for which no remainder underflows.
    x = (x * 10.0 ** torch.linspace(-18, 18, NUMEL, dtype=torch.float64)).float()
    order = torch.randperm(NUMEL, generator=generator)
    y = (y.abs() * 10.0 ** torch.linspace(-8, 18, NUMEL, dtype=torch.float64)[order]).float()
    root, ratio = torch.empty(2, NUMEL)
    root_and_quotient_kernel[(1,)](x, y, root, ratio, NUMEL)
    # Torch's own root on the CPU is not correctly rounded.
    assert np.array_equal(root.numpy(), np.sqrt(y.numpy()))
    assert np.array_equal(ratio.numpy(), x.numpy() / y.numpy())
