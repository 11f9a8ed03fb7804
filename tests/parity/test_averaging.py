"""Averages in the step against torch's AveragedModel, which is given the same parameters."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from fused_clr import Averaging, FusedAdam, FusedSGD, testing
from fused_clr.schedules import Cyclic
from tests.cases import OPTIMIZERS, OptimizerCase, by_optimizer, by_rows, covering
from tests.helpers.emulated_graph import EmulatedGraph, capture
from tests.helpers.pairs import Pair, gradients, make_pair, rewrite_gradients, set_gradients, step

# A cycle of the pairs' schedule, triangular2.
PERIOD = 11
STEPS = 2 * PERIOD + 3
AVERAGINGS = {
    "swa": Averaging.swa(),
    "swa-late": Averaging.swa(start=PERIOD),
    "swa-every-3": Averaging.swa(every=3, start=4),
    "ema": Averaging.ema(0.9),
    "ema-every-2": Averaging.ema(0.75, every=2),
}
by_averaging = pytest.mark.parametrize("averaging", AVERAGINGS.values(), ids=AVERAGINGS)
# Exact but for the last bit of a lerp.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13, torch.complex64: 1e-6}


def is_due(averaging: Averaging, number: int) -> bool:
    every = PERIOD if averaging.every == "cycle" else averaging.every
    return number >= averaging.start and (number + 1) % every == 0


class Peer:
    """torch's AveragedModel of copies of parameters, in the dtype that ours averages them in."""

    def __init__(self, params: list[torch.nn.Parameter], averaging: Averaging) -> None:
        self.params = params
        self.averaging = averaging
        self.copies = torch.nn.ParameterList(map(self.wide, params))
        # torch's multi_avg_fn of SWA has a float32 weight, also for float64 parameters.
        own = None if averaging.decay is None else get_ema_avg_fn(averaging.decay)
        self.model = AveragedModel(self.copies, avg_fn=own)

    @staticmethod
    def wide(param: torch.Tensor) -> torch.Tensor:
        return param.detach().float() if param.dtype in (torch.bfloat16, torch.float16) else param.detach().clone()

    def update(self, number: int) -> None:
        """What a loop of torch's does after the step."""
        if is_due(self.averaging, number):
            for own, param in zip(self.copies, self.params, strict=True):
                own.data.copy_(param)
            self.model.update_parameters(self.copies)

    def check(self, optimizer: Any, but: tuple[int, ...] = ()) -> None:
        count = int(self.model.n_averaged)
        assert optimizer.n_averaged == [count] * len(optimizer.param_groups)
        for index, (average, param) in enumerate(zip(self.model.parameters(), self.params, strict=True)):
            entry = optimizer.state.get(param)
            if entry and index not in but:
                tolerance = TOLERANCE[average.dtype]
                assert entry["average"].dtype == average.dtype
                torch.testing.assert_close(entry["average"], average.data, rtol=tolerance, atol=tolerance)


def run(pair: Pair, peer: Peer, numbers: range) -> None:
    for number in numbers:
        set_gradients(pair.params, number)
        step(pair)
        peer.update(number)
        peer.check(pair.optimizer)


@pytest.mark.usefixtures("backend")
@by_rows(
    "optimizer_case averaging dtype",
    covering(list(OPTIMIZERS.values()), list(AVERAGINGS.values()), [torch.float32, torch.bfloat16, torch.float64]),
)
def test_step_by_step(optimizer_case: OptimizerCase, averaging: Averaging, dtype: torch.dtype) -> None:
    """Also for tensors that get their first gradient late, and for some that get none for a while."""
    options = optimizer_case.options(True)
    ours = make_pair(True, optimizer_case=optimizer_case, dtype=dtype, averaging=averaging, **options)
    peer = Peer(ours.params, averaging)
    for number in range(STEPS):
        set_gradients(ours.params, number)
        if number < 14:
            ours.params[0].grad = None
        if 5 < number < 20:
            ours.params[1].grad = None
        if number == 8:
            for param in ours.params:
                param.grad = None
        step(ours)
        peer.update(number)
        peer.check(ours.optimizer)
    assert max(ours.optimizer.n_averaged) > 0


@pytest.mark.usefixtures("backend")
def test_without_momentum_there_is_only_the_average() -> None:
    ours = make_pair(
        True, optimizer_case=OPTIMIZERS["SGD"], cyclic={"cycle_momentum": False}, averaging=Averaging.ema(0.5)
    )
    peer = Peer(ours.params, ours.optimizer.averaging)
    run(ours, peer, range(6))
    assert all(set(entry) == {"average"} for entry in ours.optimizer.state.values())


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_saves_averages_of_parameters_that_rest(momentum: float) -> None:
    """SGD's state tells no count of updates: the average alone is a state."""
    averaging = Averaging.swa(every=1)
    ours = make_pair(
        True, optimizer_case=OPTIMIZERS["SGD"], averaging=averaging, cyclic={"cycle_momentum": False}, momentum=momentum
    )
    peer = Peer(ours.params, averaging)
    run(ours, peer, range(3))
    for _ in range(2):
        other = make_pair(
            True,
            optimizer_case=OPTIMIZERS["SGD"],
            averaging=averaging,
            cyclic={"cycle_momentum": False},
            momentum=momentum,
        )
        for param, own in zip(other.params, ours.params, strict=True):
            param.data.copy_(own)
        other.optimizer.load_state_dict(ours.optimizer.state_dict())
        ours, peer.params = other, other.params
        assert set(ours.optimizer.state) == set(ours.params)
        # No update of any parameter.
        step(ours)
        peer.update(0)
        peer.check(ours.optimizer)


@pytest.mark.usefixtures("backend")
def test_parameters_without_a_schedule_and_complex_ones() -> None:
    param = torch.nn.Parameter(torch.randn(70, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)))
    optimizer = FusedAdam([param], lr=0.1, averaging=Averaging.swa(every=2))
    peer = Peer([param], optimizer.averaging)
    for number in range(7):
        param.grad = torch.randn(70, dtype=torch.complex64, generator=torch.Generator().manual_seed(number))
        optimizer.step()
        peer.update(number)
        peer.check(optimizer)


@by_averaging
@pytest.mark.usefixtures("triton_backend")
def test_replays(averaging: Averaging) -> None:
    ours = make_pair(True, averaging=averaging)
    peer = Peer(ours.params, averaging)
    rewrite_gradients(ours, 0)
    with testing.record_launches() as graph:
        ours.optimizer.step()
    assert len(graph) == 1
    peer.update(0)
    for number in range(1, STEPS):
        rewrite_gradients(ours, number)
        graph.replay()
        peer.update(number)
        peer.check(ours.optimizer)


@pytest.mark.usefixtures("triton_backend")
def test_two_graphs_that_update_different_parameters() -> None:
    averaging = Averaging.ema(0.9)
    ours = make_pair(True, averaging=averaging)
    rewrite_gradients(ours, 0)
    step(ours)
    peer = Peer(ours.params, averaging)
    # The first average is a copy of the parameters.
    peer.update(0)
    graphs = []
    for number, active in ((1, (0, 1, 2, 3)), (2, (0, 2))):
        rewrite_gradients(ours, number, active)
        with testing.record_launches() as graph:
            ours.optimizer.step()
        graphs.append(graph)
        peer.update(number)
    for number in range(3, 9):
        for param, gradient in zip(ours.params, gradients(ours.params, number), strict=True):
            if param.grad is not None:
                param.grad.copy_(gradient)
        graphs[number % 2].replay()
        peer.update(number)
        peer.check(ours.optimizer)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("advances", [False, True])
def test_skipped_steps_do_not_average(advances: bool) -> None:
    averaging = Averaging.swa(every=2)
    ours = make_pair(True, averaging=averaging, advance_schedule_on_skip=advances)
    peer = Peer(ours.params, averaging)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    number = 0
    for attempt in range(14):
        scale = scaler.scale(torch.ones(()))
        skips = attempt % 4 == 1
        for param, gradient in zip(ours.params, gradients(ours.params, attempt), strict=True):
            param.grad = gradient * scale
        if skips:
            ours.params[0].grad[0] = torch.inf
        scaler.step(ours.optimizer)
        scaler.update()
        ours.scheduler.step()
        if not skips:
            peer.update(number)
        number += advances or not skips
        peer.check(ours.optimizer)


@pytest.mark.usefixtures("backend")
def test_a_scheduler_step_alone_does_not_average() -> None:
    ours = make_pair(True, averaging=Averaging.ema(0.5))
    set_gradients(ours.params, 0)
    step(ours)
    before = [entry["average"].clone() for entry in ours.optimizer.state.values()]
    with torch.no_grad():
        ours.params[0].add_(1)
    ours.scheduler.step()
    assert ours.optimizer.n_averaged == [1, 1]
    assert all(map(torch.equal, before, [entry["average"] for entry in ours.optimizer.state.values()]))


def through_state_dict(pair: Pair, **options: Any) -> Any:
    other = make_pair(True, seed=1, **options)
    # As torch.save and torch.load(weights_only=True).
    other.optimizer.load_state_dict(copy.deepcopy(pair.optimizer.state_dict()))
    return other.optimizer


def through_torch(pair: Pair, **options: Any) -> Any:
    """A checkpoint that torch's optimizer loaded and saved."""
    plain = make_pair(False, seed=1)
    plain.optimizer.load_state_dict(copy.deepcopy(pair.optimizer.state_dict()))
    other = make_pair(True, seed=1, **options)
    other.optimizer.load_state_dict(plain.optimizer.state_dict())
    return other.optimizer


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    "resume",
    [
        through_state_dict,
        through_torch,
        lambda pair, **_: pickle.loads(pickle.dumps(pair.optimizer)),
        lambda pair, **_: copy.deepcopy(pair.optimizer),
    ],
    ids=["state_dict", "torch", "pickle", "deepcopy"],
)
@pytest.mark.parametrize("averaging", [AVERAGINGS["swa"], AVERAGINGS["ema-every-2"]], ids=["swa", "ema-every-2"])
def test_resumed(averaging: Averaging, resume: Any) -> None:
    ours = make_pair(True, averaging=averaging)
    run(ours, Peer(ours.params, averaging), range(PERIOD + 2))
    resumed = resume(ours, averaging=averaging)
    params = [param for group in resumed.param_groups for param in group["params"]]
    with torch.no_grad():
        for param, own in zip(params, ours.params, strict=True):
            param.copy_(own)
    assert resumed.n_averaged == ours.optimizer.n_averaged
    for number in range(PERIOD + 2, STEPS):
        for each in (ours.params, params):
            set_gradients(each, number)
        ours.optimizer.step()
        resumed.step()
        for param, own in zip(params, ours.params, strict=True):
            assert torch.equal(resumed.state[param]["average"], ours.optimizer.state[own]["average"])


@pytest.mark.usefixtures("backend")
def test_a_checkpoint_without_averages_starts_them() -> None:
    plain = make_pair(True)
    set_gradients(plain.params, 0)
    step(plain)
    ours = make_pair(True, averaging=Averaging.ema(0.9))
    run(ours, Peer(ours.params, ours.optimizer.averaging), range(3))
    ours.optimizer.load_state_dict(plain.optimizer.state_dict())
    assert ours.optimizer.n_averaged == [0, 0]
    run(ours, Peer(ours.params, ours.optimizer.averaging), range(1, 5))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_without_averaging_keeps_saved_averages(dtype: torch.dtype) -> None:
    ours = make_pair(True, averaging=Averaging.ema(0.9), dtype=dtype)
    run(ours, Peer(ours.params, ours.optimizer.averaging), range(3))
    saved = copy.deepcopy(ours.optimizer.state_dict())
    plain = make_pair(True, dtype=dtype)
    plain.optimizer.load_state_dict(saved)
    again = make_pair(True, averaging=Averaging.ema(0.9), dtype=dtype)
    again.optimizer.load_state_dict(plain.optimizer.state_dict())
    assert again.optimizer.n_averaged == [3, 3]
    for param, own in zip(again.params, ours.params, strict=True):
        assert torch.equal(again.optimizer.state[param]["average"], ours.optimizer.state[own]["average"])


@pytest.mark.usefixtures("backend")
def test_later_groups_and_parameters() -> None:
    averaging = Averaging.swa(every=2)
    ours = make_pair(True, averaging=averaging)
    peer = Peer(ours.params, averaging)
    run(ours, peer, range(5))
    late = torch.nn.Parameter(torch.ones(5))
    ours.optimizer.add_param_group({"params": [late], "lr": 0.1})
    second = torch.nn.Parameter(torch.ones(7))
    ours.optimizer.param_groups[0]["params"].append(second)
    start = second.detach().clone()
    stored = []
    for number in range(5, 9):
        set_gradients([*ours.params, late, second], number)
        step(ours)
        peer.update(number)
        if is_due(averaging, number):
            stored.append((late.detach().clone(), second.detach().clone()))
    assert ours.optimizer.n_averaged == [4, 4, 2]
    torch.testing.assert_close(ours.optimizer.state[late]["average"], (stored[0][0] + stored[1][0]) / 2)
    # As if it had been in the group, unchanged, at the two averages before.
    torch.testing.assert_close(ours.optimizer.state[second]["average"], (2 * start + stored[0][1] + stored[1][1]) / 4)


@pytest.mark.usefixtures("triton_backend")
def test_a_graph_from_before_a_parameter_was_trained() -> None:
    """Its replays would count averages of that parameter and not make them."""
    ours = make_pair(True, averaging=Averaging.ema(0.9))
    for number, active in enumerate([(0, 1, 2), (0, 1, 2, 3), (0, 1, 2)]):
        rewrite_gradients(ours, number, active)
        if number:
            step(ours)
        else:
            with testing.record_launches():
                ours.optimizer.step()
            ours.optimizer.check_replay()
    with pytest.raises(RuntimeError, match=r"param_groups\[1\]\['params'\]\[1\] got an average after the capture"):
        ours.optimizer.check_replay()


def test_captured_with_a_graph(emulated_cuda: None) -> None:
    averaging = Averaging.swa(every=3)
    ours = make_pair(True, averaging=averaging)
    peer = Peer(ours.params, averaging)
    set_gradients(ours.params, 0)
    step(ours)
    peer.update(0)
    graph = EmulatedGraph()
    rewrite_gradients(ours, 1)
    with capture(graph):
        ours.optimizer.step()
        with pytest.raises(RuntimeError, match="n_averaged was read during CUDA graph capture"):
            ours.optimizer.param_groups[0]["n_averaged"]
        with (
            pytest.raises(RuntimeError, match="n_averaged was read during CUDA graph capture"),
            ours.optimizer.averaged_parameters(),
        ):
            pass
    for number in range(1, 9):
        rewrite_gradients(ours, number)
        graph.replay()
        peer.update(number)
        peer.check(ours.optimizer)
    entry = ours.optimizer.state[ours.params[0]]
    entry["average"] = entry["average"].clone()
    with pytest.raises(RuntimeError, match=r"state\['average'\] of param_groups\[0\]\['params'\]\[0\] has moved"):
        ours.optimizer.check_replay()


@pytest.mark.usefixtures("backend")
def test_an_average_that_a_user_moves_is_followed() -> None:
    averaging = Averaging.ema(0.9)
    ours = make_pair(True, averaging=averaging)
    peer = Peer(ours.params, averaging)
    run(ours, peer, range(2))
    for entry in ours.optimizer.state.values():
        entry["average"].data = entry["average"].data.clone()
    run(ours, peer, range(2, 4))
    # In another dtype it is converted.
    for entry in ours.optimizer.state.values():
        entry["average"] = entry["average"].double()
    run(ours, peer, range(4, 6))
    ours.optimizer.state[ours.params[0]]["average"] = torch.zeros(2)
    set_gradients(ours.params, 6)
    with pytest.raises(ValueError, match=r"state\['average'\] of param_groups\[0\]\['params'\]\[0\] must be a tensor"):
        ours.optimizer.step()


@by_optimizer
def test_cycles_of_each_group(optimizer_case: OptimizerCase, backend: str) -> None:
    """Each group averages at the end of its own cycles."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    schedules = [Cyclic(0.0, 0.1, 2, cycle_momentum=False), Cyclic(0.0, 0.1, 1.5, 1.0, cycle_momentum=False), None]
    groups = [{"params": [p], "schedule": s} for p, s in zip(params, schedules, strict=True)]
    optimizer = optimizer_case.ours(groups, lr=0.1, averaging=Averaging.swa())
    kept: list[list[torch.Tensor]] = [[], []]
    for number in range(13):
        for param in params:
            param.grad = torch.full((3,), float(number))
        optimizer.step()
        if number % 4 == 3:
            kept[0].append(params[0].detach().clone())
        # Cycles of 2.5 steps: they end within the steps 2, 4, 7, 9 and 12.
        if number in (2, 4, 7, 9, 12):
            kept[1].append(params[1].detach().clone())
    assert optimizer.n_averaged == [3, 5, 0]
    for param, own in zip(params, kept, strict=False):
        torch.testing.assert_close(optimizer.state[param]["average"], torch.stack(own).mean(0), rtol=1e-6, atol=1e-6)
    with pytest.raises(RuntimeError, match=r"param_groups\[2\] has no cycles: its schedule is None"):
        optimizer.averaged_state_dict(torch.nn.ParameterList(params))


def test_in_16_bits_an_average_does_not_stall(backend: str) -> None:
    """An average in bfloat16 would not move at all: 1e-3 of the distance is less than half of a bit."""
    param = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = FusedSGD([param], lr=0.0, averaging=Averaging.ema(0.999))
    param.grad = torch.zeros_like(param)
    optimizer.step()
    with torch.no_grad():
        param.fill_(2.0)
    for _ in range(50):
        optimizer.step()
    expected = 2.0 - 0.999**50
    torch.testing.assert_close(optimizer.state[param]["average"], torch.full((8,), expected), rtol=1e-5, atol=0)
    stalled = torch.ones((), dtype=torch.bfloat16)
    assert stalled.lerp(torch.full((), 2.0, dtype=torch.bfloat16), 1e-3) == 1.0
