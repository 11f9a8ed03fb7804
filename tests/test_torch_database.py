"""Every input that torch's own test database declares for Adam and AdamW, run against ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing._internal.common_optimizers import optim_db

from fused_clr import FusedAdam, FusedAdamW

from .tolerances import AFTER_STEPS

PAIRS = {"Adam": (torch.optim.Adam, FusedAdam), "AdamW": (torch.optim.AdamW, FusedAdamW)}
DATABASE = {info.optim_cls.__name__: info for info in optim_db if info.optim_cls.__name__ in PAIRS}
INPUTS = [(name, i) for name, info in DATABASE.items() for i in range(len(info.optim_inputs_func(device="cpu")))]


def name_of(case: tuple[str, int]) -> str:
    name, index = case
    return f"{name}-{index}-{DATABASE[name].optim_inputs_func(device='cpu')[index].desc}".replace(" ", "_")


@pytest.mark.parametrize("case", INPUTS, ids=name_of)
def test_declared_inputs_agree(backend: str, case: tuple[str, int]) -> None:
    name, index = case
    results = []
    for kind in PAIRS[name]:
        arguments = dict(DATABASE[name].optim_inputs_func(device="cpu")[index].kwargs)
        if kind in (torch.optim.Adam, torch.optim.AdamW):
            # On the CPU torch has no capturable step, and wants it for these.
            arguments.pop("capturable", None)
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 5), (7,), ())]
        optimizer = kind(params, **arguments)
        for _ in range(10):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator)
            optimizer.step()
        results.append([*params, *(optimizer.state[param][key] for param in params for key in optimizer.state[param])])
    tolerance = AFTER_STEPS[torch.float32]
    torch.testing.assert_close(*results, rtol=tolerance.rtol, atol=tolerance.atol)


@pytest.mark.parametrize("name", PAIRS)
def test_declared_error_inputs_raise(name: str) -> None:
    cases = DATABASE[name].optim_error_inputs_func(device="cpu", dtype=torch.float32)
    assert cases
    for case in cases:
        arguments: dict[str, Any] = dict(case.optimizer_error_input.kwargs)
        params = case.optimizer_error_input.params
        if params is None:
            params = [torch.nn.Parameter(torch.ones(2))]
        hyperparameters = [arguments.get("lr"), *arguments.get("betas", ())]
        tensors = [value for value in hyperparameters if isinstance(value, torch.Tensor)]
        if tensors and all(tensor.numel() == 1 for tensor in tensors):
            # Combinations that one of torch's implementations lacks; ours takes any.
            PAIRS[name][1](params, **arguments)
            continue
        # UserWarning: duplicate parameters, which torch warns of and ours then refuses.
        with pytest.raises((ValueError, TypeError, RuntimeError, UserWarning)):
            PAIRS[name][1](params, **arguments)
