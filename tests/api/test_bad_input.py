"""Bad input gets an error that names the argument and its value, and changes nothing."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from fused_clr import CyclicLR, FusedAdam, GraphedStep, testing
from fused_clr._device.engines import engine_class
from fused_clr.schedules import Cyclic
from tests.cases import OPTIMIZERS, OptimizerCase
from tests.helpers.graphed import graphed_model
from tests.helpers.pairs import all_equal, copies, make_pair

NAN = float("nan")


def parameter(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(*shape))


BAD_ARGUMENTS = [
    ({"lr": -1.0}, "lr must be .* got -1.0"),
    ({"lr": NAN}, "lr must be .* got nan"),
    ({"lr": float("inf")}, "lr must be .* got inf"),
    ({"lr": "fast"}, "lr must be .* got 'fast'"),
    ({"lr": None}, "lr must be .* got None"),
    ({"lr": torch.ones(2)}, r"lr must have 1 element .* \(2,\)"),
    ({"betas": (1.0, 0.999)}, r"betas\[0\] must be .* got 1.0"),
    ({"betas": (0.9, -0.1)}, r"betas\[1\] must be .* got -0.1"),
    ({"betas": (0.9, NAN)}, r"betas\[1\] must be .* got nan"),
    ({"betas": 0.9}, "betas must be a pair"),
    ({"betas": (0.9,)}, "betas must be a pair"),
    ({"eps": -1e-8}, "eps must be .* got -1e-08"),
    ({"eps": NAN}, "eps must be .* got nan"),
    ({"weight_decay": -0.1}, "weight_decay must be .* got -0.1"),
    ({"differentiable": True}, "differentiable must be False"),
]


@pytest.mark.parametrize(
    ("optimizer_case", "arguments", "message"),
    [
        (case, arguments, message)
        for case in OPTIMIZERS.values()
        for arguments, message in BAD_ARGUMENTS
        # An optimizer has those of its peer's arguments.
        if arguments.keys() <= inspect.signature(case.torch_peer).parameters.keys()
    ],
    ids=lambda value: getattr(value, "name", None) or str(value),
)
def test_constructor_arguments(optimizer_case: OptimizerCase, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimizer_case.ours([parameter(2)], **arguments)
    optimizer = optimizer_case.ours([parameter(2)])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [parameter(3)], **arguments})
    assert len(optimizer.param_groups) == 1


def test_schedule_must_be_a_schedule() -> None:
    with pytest.raises(TypeError, match="schedule must be a value from fused_clr.schedules or None, got str"):
        FusedAdam([parameter(2)], schedule="triangular")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got float"):
        FusedAdam([{"params": [parameter(2)], "schedule": 0.1}])


def test_parameters() -> None:
    shared = parameter(2)
    for params, error, message in (
        ([], ValueError, "empty parameter list"),
        (parameter(2), TypeError, "iterable of Tensors"),
        ([torch.nn.Parameter(torch.ones(4, 4)[:, :2])], ValueError, r"\['params'\]\[0\] must fill its storage"),
        ([torch.nn.Parameter(torch.ones(3).expand(2, 3))], ValueError, "must fill its storage"),
        ([torch.ones(3, dtype=torch.int64)], ValueError, "floating-point or complex dtype of 16 bits or more, got"),
        ([torch.nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn))], ValueError, "float8_e4m3fn"),
        ([sparse(torch.Size([2]))], ValueError, "must be a dense tensor, got layout torch.sparse_coo"),
        ([shared * 2], ValueError, "non-leaf"),
    ):
        with pytest.raises(error, match=message):
            FusedAdam(params)
    optimizer = FusedAdam([shared])
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [shared]})
    with pytest.raises(ValueError, match="twice"), pytest.warns(UserWarning, match="duplicate"):
        both = parameter(1)
        optimizer.add_param_group({"params": [both, both]})
    assert len(optimizer.param_groups) == 1


def test_add_param_group_leaves_the_dict_alone() -> None:
    optimizer = FusedAdam([parameter(2)])
    group = {"params": [parameter(2)], "lr": 0.5}
    before = dict(group)
    optimizer.add_param_group(group)
    assert group == before


def sparse(shape: torch.Size) -> torch.Tensor:
    return torch.ones(shape).to_sparse()


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        (lambda p: setattr(p, "grad", sparse(p.shape)), "gradient of .*dense, got layout torch.sparse_coo"),
        (lambda p: setattr(p.grad, "data", torch.ones(7)), r"gradient of .*shape \(5, 3\), got \(7,\)"),
        (lambda p: setattr(p.grad, "data", torch.ones(15)), r"gradient of .*shape \(5, 3\), got \(15,\)"),
        (lambda p: setattr(p, "grad", torch.ones(5, 3, device="meta")), "gradient of .*on cpu .* got meta|device"),
        (lambda p: setattr(p, "grad", torch.ones(3).expand(5, 3)), r"gradient of .*be written.*strides \(0, 1\)"),
        (lambda p: setattr(p, "grad", torch.ones(9).as_strided((5, 3), (1, 2))), r"gradient of .*cannot be written"),
    ],
    ids=["sparse", "smaller", "flat", "device", "expanded", "overlapping"],
)
@pytest.mark.parametrize("warm", [False, True], ids=["first-step", "later-step"])
def test_gradients(backend: str, replace: Any, message: str, warm: bool) -> None:
    params = [parameter(4), parameter(5, 3)]
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    optimizer = FusedAdam(groups, schedule=Cyclic(0.1, 0.2, 5), write_back_grads=True)
    for param in params:
        param.grad = torch.ones_like(param)
    if warm:
        optimizer.step()
    before = copies(params)
    step = optimizer.status().schedule_step
    with pytest.raises(RuntimeError, match=message):
        replace(params[1])
        optimizer.step()
    assert all_equal(params, before)
    assert optimizer.status().schedule_step == step
    assert warm or params[0] not in optimizer.state or not optimizer.state[params[0]]
    # And goes on once the cause is removed.
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    assert optimizer.state[params[0]]["step"].item() == warm + 1


def test_errors_name_named_parameters(backend: str) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = FusedAdam(model.named_parameters())
    model.weight.grad = sparse(model.weight.shape)
    with pytest.raises(RuntimeError, match=r"param_groups\[0\]\['params'\]\[0\] \(weight\)"):
        optimizer.step()


def test_state_of_another_shape(backend: str) -> None:
    param = parameter(3)
    param.grad = torch.ones(3)
    optimizer = FusedAdam([param])
    optimizer.step()
    before = param.detach().clone()
    optimizer.state[param]["exp_avg"] = torch.ones(4)
    with pytest.raises(ValueError, match=r"state\['exp_avg'\] of .* shape \(3,\), got \(4,\)"):
        optimizer.step()
    assert torch.equal(param, before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"base_lr": -0.1}, ValueError, "base_lr must be .* got -0.1"),
        ({"max_lr": NAN}, ValueError, "max_lr must be .* got nan"),
        ({"base_lr": [0.1]}, ValueError, r"base_lr must have 2 entries, one per param group, got 1: \[0.1\]"),
        ({"max_lr": [0.1, 0.2, 0.3]}, ValueError, "max_lr must have 2 entries"),
        ({"base_momentum": [0.8]}, ValueError, "base_momentum must have 2 entries"),
        ({"max_momentum": 1.0}, ValueError, "max_momentum must be .* got 1.0"),
        ({"step_size_up": 0}, ValueError, "step_size_up must be .* got 0"),
        ({"step_size_down": -3}, ValueError, "step_size_down must be .* got -3"),
        ({"step_size_up": NAN}, ValueError, "step_size_up must be .* got nan"),
        ({"mode": "cosine"}, ValueError, "mode must be one of .* got mode='cosine'"),
        ({"gamma": -0.5}, ValueError, "gamma must be .* got -0.5"),
        ({"scale_fn": 3}, ValueError, "scale_fn must be callable or None, got 3"),
        ({"scale_fn": abs, "scale_mode": "epochs"}, ValueError, "scale_mode must be one of .* got 'epochs'"),
        ({"last_epoch": -2}, ValueError, "last_epoch must be >= -1, .* got -2"),
        ({"last_epoch": 4}, KeyError, "initial_lr"),
    ],
    ids=str,
)
def test_cyclic_lr(backend: str, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    optimizer = FusedAdam([{"params": [parameter(2)]}, {"params": [parameter(3)]}], lr=0.25)
    with pytest.raises(error, match=message):
        CyclicLR(optimizer, **({"base_lr": 0.1, "max_lr": 0.2} | arguments))
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
    assert all(group["schedule"] is None for group in optimizer.param_groups)
    optimizer.step()


def test_base_lr_may_exceed_max_lr(backend: str) -> None:
    optimizer = FusedAdam([parameter(2)])
    scheduler = CyclicLR(optimizer, 0.5, 0.1, step_size_up=2, cycle_momentum=False)
    lrs = scheduler.get_last_lr()
    for _ in range(4):
        optimizer.step()
        scheduler.step()
        lrs += scheduler.get_last_lr()
    assert lrs == pytest.approx([0.5, 0.3, 0.1, 0.3, 0.5], rel=1e-14)


def test_cyclic_lr_wants_a_fused_optimizer() -> None:
    with pytest.raises(TypeError, match="optimizer must be a FusedAdam, FusedAdamW or FusedSGD, got SGD"):
        CyclicLR(torch.optim.SGD([parameter(2)]), 0.1, 0.2)


def test_backend_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_CLR_BACKEND", "tpu")
    with pytest.raises(ValueError, match="FUSED_CLR_BACKEND must be 'triton' or 'cpu', got 'tpu'"):
        FusedAdam([parameter(2)]).step()
    monkeypatch.setenv("FUSED_CLR_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match="parameters on xpu are not supported, got the backend.*cpu"):
        engine_class(torch.device("xpu"))


def test_recording_needs_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_CLR_BACKEND", "cpu")
    optimizer = FusedAdam([parameter(2)])
    with testing.record_launches(), pytest.raises(RuntimeError, match="record_launches"):
        optimizer.step()


def test_bad_objects() -> None:
    _, optimizer, graphed = graphed_model()
    with pytest.raises(TypeError, match="step must be callable, got NoneType"):
        GraphedStep(None, optimizer)
    with pytest.raises(ValueError, match="optimizer must not be an empty list"):
        GraphedStep(print, [])
    with pytest.raises(TypeError, match="tensors or hashable values, .* got set"):
        graphed({1, 2})
    with pytest.raises(TypeError, match=r"captured must be one of optimizer\.captures or None, got str"):
        optimizer.check_replay("newest")


def test_a_limit_cannot_appear_or_vanish() -> None:
    with pytest.raises(ValueError, match="max_grad_norm is None and cannot become 1.0"):
        make_pair(True).optimizer.max_grad_norm = 1.0
    optimizer = make_pair(True, max_grad_norm=1.0).optimizer
    with pytest.raises(ValueError, match="cannot become None"):
        optimizer.max_grad_norm = None
    with pytest.raises(ValueError, match="must be a number > 0"):
        optimizer.max_grad_norm = -1.0
    assert optimizer.max_grad_norm == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": 0.0}, "max_grad_norm must be a number > 0 .*, got 0.0"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm must be a number > 0 .*, got nan"),
        ({"max_grad_norm": "1"}, "max_grad_norm must be a number > 0 .*, got '1'"),
        ({"max_grad_norm": "one"}, "max_grad_norm must be a number > 0 .*, got 'one'"),
        ({"skip_if_nonfinite": True}, "skip_if_nonfinite=True needs max_grad_norm"),
        ({"write_back_grads": "yes"}, "write_back_grads must be True or False, got 'yes'"),
        ({"history_size": -1}, "history_size must be an integer in .*, got -1"),
        ({"history_size": 2.5}, "history_size must be an integer in .*, got 2.5"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    params = [torch.nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match=message):
        FusedAdam(params, **options)


def test_options_are_no_groups() -> None:
    param = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="max_grad_norm applies to all groups"):
        FusedAdam([{"params": [param], "max_grad_norm": 1.0}])
