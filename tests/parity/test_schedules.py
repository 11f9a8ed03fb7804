"""Every family of schedules in a group of one optimizer, over whole runs, against torch's schedulers."""

from __future__ import annotations

import pytest
import torch

from fused_clr import FusedAdam
from fused_clr.testing import record_launches
from tests.helpers.schedules import PEER_STEPS, torch_peers, torch_values


# The cpu backend records nothing.
@pytest.mark.parametrize(
    ("backend", "replayed"),
    [("cpu", False), ("triton", False), ("triton", True)],
    indirect=["backend"],
    ids=["cpu", "triton", "replays"],
)
def test_whole_runs_of_all_families_together(backend: str, replayed: bool) -> None:
    peers = torch_peers()
    groups = []
    for schedule, _, _ in peers.values():
        # The interpreter is slow: one parameter is updated, and all schedules are evaluated.
        param = torch.nn.Parameter(torch.ones(1), requires_grad=not groups)
        param.grad = torch.ones(1) if param.requires_grad else None
        groups.append({"params": [param], "schedule": schedule})
    optimizer = FusedAdam(groups, lr=0.5)

    def values() -> list[tuple[float, float]]:
        with optimizer._one_copy():
            return [(group["lr"], group["betas"][0]) for group in optimizer.param_groups]

    advance = optimizer.step
    ours = [values()]
    # Replays run the same kernels to the end.
    steps = 12 if backend == "triton" and not replayed else PEER_STEPS + 2
    if replayed:
        with record_launches() as graph:
            optimizer.step()
        ours.append(values())
        assert len(graph) == 1
        advance = graph.replay
    while len(ours) <= steps:
        advance()
        ours.append(values())

    for column, (name, peer) in enumerate(peers.items()):
        for step, lr, beta1 in torch_values(peer):
            if step > steps:
                break
            # Near 0, torch's recursions leave what they have cancelled.
            assert ours[step][column][0] == pytest.approx(lr, rel=1e-12, abs=1e-16), (name, step)
            expected = beta1 if peer[0].drives_momentum else 0.9
            assert ours[step][column][1] == pytest.approx(expected, rel=1e-12), (name, step)
        # Past its end a schedule holds its last value, where torch's raise an error or rise again.
        if peer[0].end_step() <= steps:
            last = ours[int(peer[0].end_step())][column]
            assert all(row[column] == last for row in ours[int(peer[0].end_step()) :])
