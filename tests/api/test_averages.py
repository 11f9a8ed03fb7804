"""What users do with averages: evaluate, save, convert; and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from fused_clr import Averaging, CyclicLR, FusedAdam, FusedAdamW, GraphedStep, fuse, range_test, unfuse
from fused_clr.schedules import Constant, Cyclic, OneCycle
from tests.helpers.pairs import copies

pytestmark = pytest.mark.usefixtures("backend")


class Model(nn.Module):
    """A linear layer, batch normalization, and two names for one parameter."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 4, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x)))


def train(model: nn.Module, optimizer: Any, steps: int) -> list[list[torch.Tensor]]:
    """Takes steps; returns the parameters after each."""
    seen = []
    for number in range(steps):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        seen.append(copies(list(model.parameters())))
    return seen


def mean_of(seen: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    return [torch.stack(each).mean(0) for each in zip(*seen, strict=True)]


def assert_close(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_the_body_sees_averages() -> None:
    model = Model()
    optimizer = FusedAdam(model.parameters(), lr=0.1, averaging=Averaging.swa(every=2))
    seen = train(model, optimizer, 6)
    params = list(model.parameters())
    addresses = [param.data_ptr() for param in params]
    with optimizer.averaged_parameters():
        assert_close(copies(params), mean_of(seen[1::2]))
        assert [param.data_ptr() for param in params] == addresses
    assert all(map(torch.equal, params, seen[-1]))
    # And training goes on as if nothing had been looked at.
    twin = Model()
    other = FusedAdam(twin.parameters(), lr=0.1, averaging=Averaging.swa(every=2))
    train(twin, other, 6)
    assert all(map(torch.equal, train(model, optimizer, 2)[-1], train(twin, other, 2)[-1]))


def test_the_parameters_are_back_after_an_exception() -> None:
    model = Model()
    optimizer = FusedAdam(model.parameters(), lr=0.1, averaging=Averaging.ema(0.5))
    seen = train(model, optimizer, 3)
    with pytest.raises(KeyboardInterrupt), optimizer.averaged_parameters():
        raise KeyboardInterrupt
    assert all(map(torch.equal, model.parameters(), seen[-1]))
    train(model, optimizer, 1)


def test_the_body_may_move_the_parameters() -> None:
    model = Model()
    optimizer = FusedAdam(model.parameters(), lr=0.1, averaging=Averaging.ema(0.5))
    seen = train(model, optimizer, 3)
    with optimizer.averaged_parameters():
        model.double()
    assert_close([param.float() for param in copies(list(model.parameters()))], seen[-1])


@pytest.mark.parametrize("clear", [lambda o: o.state.clear(), lambda o: setattr(o, "state", {})], ids=["clear", "new"])
def test_removed_averages_start_anew(clear: Any) -> None:
    model = Model()
    optimizer = FusedAdam(model.parameters(), lr=0.1, averaging=Averaging.swa(every=1))
    train(model, optimizer, 3)
    clear(optimizer)
    assert optimizer.n_averaged == [0]
    seen = train(model, optimizer, 2)
    with optimizer.averaged_parameters():
        assert_close(copies(list(model.parameters())), mean_of(seen))


def test_a_parameter_in_the_place_of_another() -> None:
    """With the other's state, as loops do that add or remove rows of a parameter."""
    model = nn.Linear(4, 4, bias=False)
    optimizer = FusedAdam(model.parameters(), lr=0.1, averaging=Averaging.swa(every=1))
    seen = train(model, optimizer, 3)
    state = optimizer.state.pop(model.weight)
    model.weight = nn.Parameter(model.weight.detach().clone())
    optimizer.param_groups[0]["params"][0] = model.weight
    optimizer.state[model.weight] = state
    seen += train(model, optimizer, 1)
    assert optimizer.n_averaged == [4]
    with optimizer.averaged_parameters():
        assert_close(copies(list(model.parameters())), mean_of(seen))


def test_an_exception_while_the_averages_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    optimizer = FusedAdam(model.parameters(), lr=0.1, averaging=Averaging.ema(0.5))
    seen = train(model, optimizer, 3)
    last = list(model.parameters())[-1]
    optimizer.state[last]["average"].data = torch.ones(3)
    with pytest.raises(RuntimeError, match="size"), optimizer.averaged_parameters():
        pytest.fail("the body ran")
    assert all(map(torch.equal, model.parameters(), seen[-1]))


def test_before_the_first_average_the_parameters_keep_their_values() -> None:
    model = Model()
    optimizer = FusedAdam(model.parameters(), lr=0.1, averaging=Averaging.swa(every=1, start=3))
    for steps, count in ((0, 0), (3, 0), (1, 1)):
        seen = train(model, optimizer, steps)
        assert optimizer.n_averaged == [count]
        with optimizer.averaged_parameters():
            assert not seen or all(map(torch.equal, model.parameters(), seen[-1]))


def test_steps_in_the_body_are_refused() -> None:
    model = Model()
    optimizer = FusedAdam(model.parameters(), lr=0.1, averaging=Averaging.ema(0.5))
    train(model, optimizer, 2)
    with optimizer.averaged_parameters():
        with pytest.raises(RuntimeError, match=r"optimizer.step\(\) must not be called in the body of averaged_param"):
            optimizer.step()
        with (
            pytest.raises(RuntimeError, match=r"averaged_parameters\(\) must not be called in the body"),
            optimizer.averaged_parameters(),
        ):
            pass
        with pytest.raises(RuntimeError, match="must not be called in the body"):
            optimizer.averaged_state_dict(model)
    train(model, optimizer, 1)


def test_state_dicts() -> None:
    model = Model()
    optimizer = FusedAdamW(model.named_parameters(), lr=0.1, averaging=Averaging.swa(every=1))
    seen = train(model, optimizer, 3)
    averages = dict(zip([name for name, _ in model.named_parameters()], mean_of(seen), strict=True))
    by_names = optimizer.averaged_state_dict()
    assert list(by_names) == list(averages)
    assert_close(list(by_names.values()), list(averages.values()))
    whole = optimizer.averaged_state_dict(model)
    assert list(whole) == list(model.state_dict())
    # The other name of the shared weight has the average too, and buffers are as they are.
    assert torch.equal(whole["last.weight"], whole["first.weight"])
    assert torch.equal(whole["norm.running_mean"], model.norm.running_mean)
    other = Model(seed=1)
    other.load_state_dict(whole)
    assert_close(list(other.parameters()), list(averages.values()))
    # They are copies.
    whole["first.weight"].zero_()
    assert all(map(torch.equal, model.parameters(), seen[-1]))
    assert_close([optimizer.averaged_state_dict()["first.weight"]], [averages["first.weight"]])


def test_without_names_the_module_must_be_given() -> None:
    model = Model()
    optimizer = FusedAdam(model.parameters(), averaging=Averaging.ema(0.5))
    with pytest.raises(ValueError, match=r"module must be given, since the parameters have no names; or create the"):
        optimizer.averaged_state_dict()


def test_the_module_must_be_the_parameters(backend: str) -> None:
    optimizer = FusedAdam(Model().parameters(), averaging=Averaging.ema(0.5))
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module or None, got str"):
        optimizer.averaged_state_dict("model")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"module must have parameters of this optimizer, got Model with none of them"):
        optimizer.averaged_state_dict(Model())


def test_the_first_average_is_a_copy_whatever_was_there() -> None:
    param = nn.Parameter(torch.full((3,), torch.nan))
    optimizer = FusedAdam([param], lr=0.1, averaging=Averaging.ema(0.5, start=1))
    param.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[param]["average"].isnan().all()
    with torch.no_grad():
        param.fill_(1.0)
    for entry in optimizer.state.values():
        entry["exp_avg"].zero_()
        entry["exp_avg_sq"].fill_(1.0)
    optimizer.step()
    assert torch.equal(optimizer.state[param]["average"], param)


def test_in_16_bits_the_body_sees_rounded_averages() -> None:
    param = nn.Parameter(torch.linspace(1, 2, 50, dtype=torch.bfloat16))
    optimizer = FusedAdam([param], lr=0.1, averaging=Averaging.ema(0.9))
    for _ in range(3):
        param.grad = torch.ones_like(param)
        optimizer.step()
    average = optimizer.state[param]["average"]
    assert average.dtype == torch.float32
    with optimizer.averaged_parameters():
        assert torch.equal(param, average.bfloat16())


def test_without_averaging() -> None:
    optimizer = FusedAdam([nn.Parameter(torch.ones(2))])
    assert optimizer.averaging is None
    for use in (lambda: optimizer.n_averaged, lambda: optimizer.averaged_state_dict(Model())):
        with pytest.raises(RuntimeError, match=r"keeps no averages: create it with averaging=Averaging.swa\(\) or"):
            use()
    with pytest.raises(RuntimeError, match="keeps no averages"), optimizer.averaged_parameters():
        pass
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
    optimizer.step()
    assert "average" not in optimizer.state[optimizer.param_groups[0]["params"][0]]


@pytest.mark.parametrize("schedule", [None, Constant(0.1)], ids=["none", "constant"])
def test_averages_of_cycles_need_cycles(schedule: Any) -> None:
    model = Model()
    optimizer = FusedAdam(model.parameters(), lr=0.1, schedule=schedule, averaging=Averaging.swa())
    train(model, optimizer, 2)
    with (
        pytest.raises(RuntimeError, match=r"averaging must have every= .* since param_groups\[0\] has no cycles: its"),
        optimizer.averaged_parameters(),
    ):
        pass
    # As soon as a scheduler has some, they are averaged.
    CyclicLR(optimizer, 0.0, 0.1, step_size_up=2)
    seen = train(model, optimizer, 5)
    with optimizer.averaged_parameters():
        assert_close(copies(list(model.parameters())), seen[3])


def test_the_last_decay_is_a_cycle() -> None:
    model = Model()
    optimizer = FusedAdam(model.parameters(), schedule=Cyclic(0.0, 0.1, 2), averaging=Averaging.swa())
    seen = train(model, optimizer, 5)
    optimizer.begin_decay(3)
    seen += train(model, optimizer, 5)
    assert optimizer.n_averaged == [2]
    with optimizer.averaged_parameters():
        assert_close(copies(list(model.parameters())), mean_of([seen[3], seen[7]]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Averaging.swa(every=0), r"every must be an integer in \[1, 2\*\*53\] or 'cycle', got 0"),
        (lambda: Averaging.swa(every="epoch"), "every must be an integer .* got 'epoch'"),
        (lambda: Averaging.swa(every=True), "every must be an integer .* got True"),
        (lambda: Averaging.swa(every=2.0), "every must be an integer .* got 2.0"),
        (lambda: Averaging.swa(start=-1), r"start must be an integer in \[0, 2\*\*53\], got -1"),
        (lambda: Averaging.ema(1.0), r"decay must be a number in \[0, 1\) or None, got 1.0"),
        (lambda: Averaging.ema(-0.1), r"decay must be a number in \[0, 1\) or None, got -0.1"),
        (lambda: Averaging.ema(float("nan")), "decay must be .* got nan"),
        (lambda: Averaging.ema(None), "decay must be .* got None"),
        (lambda: Averaging.ema("0.9"), "decay must be .* got '0.9'"),
    ],
)
def test_bad_values(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_options() -> None:
    params = [nn.Parameter(torch.ones(2))]
    with pytest.raises(TypeError, match=r"averaging must be a fused_clr.Averaging or None, got str"):
        FusedAdam(params, averaging="swa")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"averaging applies to all groups: pass it to the optimizer"):
        FusedAdam([{"params": params, "averaging": Averaging.swa()}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved["param_groups"][0].update(n_averaged=-1), r"\['n_averaged'\] must be an integer in .*-1"),
        (
            lambda saved: saved["param_groups"][0].update(n_averaged=1.5),
            r"\['n_averaged'\] must be an integer in .*1.5",
        ),
        (lambda saved: saved["state"][0].update(average=torch.ones(3)), r"\['average'\] must be a tensor of the param"),
        (lambda saved: saved["state"][0].update(average=2.0), r"\['average'\] must be a tensor of the param"),
    ],
)
def test_corrupt_checkpoints(change: Any, message: str) -> None:
    model = Model()
    optimizer = FusedAdam(model.parameters(), lr=0.1, averaging=Averaging.ema(0.5))
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    saved["state"] = {key: dict(entry) for key, entry in saved["state"].items()}
    change(saved)
    before = copies([entry["average"] for entry in optimizer.state.values()])
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert optimizer.n_averaged == [2]
    assert all(map(torch.equal, before, [entry["average"] for entry in optimizer.state.values()]))


def test_without_parameters_and_with_groups_alone() -> None:
    optimizer = FusedAdam([{"params": []}], lr=0.1, averaging=Averaging.ema(0.5))
    optimizer.step()
    with optimizer.averaged_parameters():
        pass
    assert optimizer.averaged_state_dict(nn.Module()) == {}
    # Parameters that come later are averaged from then on.
    late = nn.Parameter(torch.zeros(3))
    optimizer.add_param_group({"params": [late]})
    for _ in range(2):
        late.grad = torch.ones(3)
        optimizer.step()
    assert optimizer.n_averaged[1] == 2
    torch.testing.assert_close(optimizer.state[late]["average"], torch.full((3,), -0.15))


def test_converted() -> None:
    """`fuse` takes the option; `unfuse` leaves the averages out, if told to."""
    model = Model()
    plain = torch.optim.Adam(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CyclicLR(plain, 0.01, 0.1, step_size_up=2, cycle_momentum=False)
    optimizer, scheduler = fuse(plain, scheduler, averaging=Averaging.swa())
    seen = train(model, optimizer, 4)
    with optimizer.averaged_parameters():
        assert_close(copies(list(model.parameters())), seen[3])
    with pytest.raises(ValueError, match=r"averaging=Averaging.* cannot be converted: .* pass drop_averages=True"):
        unfuse(optimizer, scheduler)
    plain, _ = unfuse(optimizer, scheduler, drop_averages=True)
    assert all(set(entry) == {"step", "exp_avg", "exp_avg_sq"} for entry in plain.state.values())
    assert "n_averaged" not in plain.param_groups[0]
    train(model, plain, 1)


def test_averages_that_torch_carried_are_converted() -> None:
    model = Model()
    optimizer = FusedAdam(model.parameters(), lr=0.1, averaging=Averaging.swa(every=1))
    seen = train(model, optimizer, 3)
    plain = torch.optim.Adam(model.parameters(), lr=0.1)
    plain.load_state_dict(optimizer.state_dict())
    scheduler = torch.optim.lr_scheduler.CyclicLR(plain, 0.01, 0.1, step_size_up=2, cycle_momentum=False)
    optimizer, _ = fuse(plain, scheduler, averaging=Averaging.swa(every=1))
    assert optimizer.n_averaged == [3]
    seen += train(model, optimizer, 1)
    with optimizer.averaged_parameters():
        assert_close(copies(list(model.parameters())), mean_of(seen))


def test_a_range_test_leaves_no_trace() -> None:
    model, twin = Model(), Model()
    optimizers = [
        FusedAdam(each.parameters(), schedule=OneCycle(0.1, 40), averaging=Averaging.ema(0.9)) for each in (model, twin)
    ]
    for each, optimizer in zip((model, twin), optimizers, strict=True):
        train(each, optimizer, 3)

    def step(x: torch.Tensor) -> torch.Tensor:
        optimizers[0].zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizers[0].step()
        return loss

    batches = [(torch.randn(8, 4, generator=torch.Generator().manual_seed(n)),) for n in range(100)]
    range_test(lambda batch: step(*batch), optimizers[0], batches, restore=[model], progress=False)
    assert optimizers[0].n_averaged == [3]
    for each, optimizer in zip((model, twin), optimizers, strict=True):
        train(each, optimizer, 2)
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(param, other)
        assert torch.equal(optimizers[0].state[param]["average"], optimizers[1].state[other]["average"])


def test_replays_of_a_graphed_step(backend: str, request: pytest.FixtureRequest) -> None:
    if backend == "triton":
        request.getfixturevalue("emulated_cuda")
    model = Model()
    optimizer = FusedAdam(model.parameters(), lr=0.1, averaging=Averaging.swa(every=3))
    seen = []

    def step(x: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    graphed = GraphedStep(step, optimizer)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    for _ in range(9):
        graphed(x)
        seen.append(copies(list(model.parameters())))
    with optimizer.averaged_parameters():
        assert_close(copies(list(model.parameters())), mean_of(seen[2::3]))
        with pytest.raises(RuntimeError, match="must not be called in the body of averaged_parameters"):
            graphed(x)


def test_the_count_is_a_key_of_each_group() -> None:
    model = Model()
    groups = [{"params": [model.first.weight]}, {"params": [model.first.bias, *model.norm.parameters()]}]
    optimizer = FusedAdam(groups, lr=0.1, averaging=Averaging.swa(every=1))
    train(model, optimizer, 3)
    assert [dict(group)["n_averaged"] for group in optimizer.param_groups] == [3, 3]
    optimizer.param_groups[1]["n_averaged"] = 1
    assert optimizer.n_averaged == [3, 1]
    before = optimizer.state[model.first.bias]["average"].clone()
    seen = train(model, optimizer, 1)
    assert optimizer.n_averaged == [4, 2]
    assert_close([optimizer.state[model.first.bias]["average"]], [(before + seen[0][1]) / 2])
    with pytest.raises(ValueError, match=r"n_averaged must be an integer in \[0, 2\*\*53\], got -1"):
        optimizer.param_groups[0]["n_averaged"] = -1
    # A group that a user puts in the place of one keeps the count.
    optimizer.param_groups[0] = dict(optimizer.param_groups[0])
    assert optimizer.n_averaged == [4, 2]


@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flat"])
def test_distributed_checkpoints_have_the_averages(flatten: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, other = Model(), Model(seed=1)
    optimizers = [FusedAdam(each.parameters(), lr=0.1, averaging=Averaging.swa(every=1)) for each in (model, other)]
    train(model, optimizers[0], 3)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizers[0], options=options))
    set_optimizer_state_dict(other, optimizers[1], saved, options=options)
    other.load_state_dict(model.state_dict())
    assert optimizers[1].n_averaged == [3]
    for each, optimizer in zip((model, other), optimizers, strict=True):
        train(each, optimizer, 1)
    for param, own in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(optimizers[0].state[param]["average"], optimizers[1].state[own]["average"])
