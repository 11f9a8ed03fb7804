"""The benchmarks measure what they say: totals of the registry, the schema, and how peers that cannot run are named."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from bench import __main__ as command_line
from bench import timing
from bench.cases import CASES, PARAMETER_SETS, Case
from bench.host import HOST_PEERS
from bench.instructions import count_opcodes
from bench.loops import SmallGpt
from bench.parts import PARTS
from bench.peers import OURS, REFERENCE, TORCH_CAPTURABLE, NotAvailableError, Peer, Request, Stepper, all_peers
from bench.report import as_markdown
from bench.roofline import Cost, copy_bandwidth_of, floor_of
from bench.roofline import as_markdown as roofline_markdown
from bench.runner import Settings, batches, measure, needed_bytes
from bench.schema import Result, Row, figures
from bench.session import Session

CPU = torch.device("cpu")
QUICK = Settings(CPU, rounds=2, round_seconds=1e-4)
SMALLEST = Case("4x4")
# Published, or by hand: parameters and tensors.
TOTALS = {
    "resnet50": (25_557_032, 161),
    "vit-b16": (86_567_656, 152),
    "gpt2-124m": (124_439_808, 148),
    "bert-large": (335_141_888, 391),
    "llama-1b": (1_235_814_400, 146),
    "dlrm-mlps": (2_368_897, 16),
    "rl-policy": (450, 4),
    "nnue": (757_604, 86),
    "1000x16": (16_000, 1000),
    "10000x16": (160_000, 10_000),
    "1x1G": (10**9, 1),
    "4x4M": (1 << 24, 4),
}


@pytest.mark.parametrize("name", TOTALS)
def test_totals_of_parameter_sets(name: str) -> None:
    assert (Case(name).numel, Case(name).num_tensors) == TOTALS[name]


def test_names_of_cases_tell_them_apart() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert {case.parameter_set for case in CASES} == set(PARAMETER_SETS)


def test_mixed_cases_have_both_dtypes() -> None:
    for case in CASES:
        if case.dtype == "mixed":
            assert set(case.elements()) == {torch.float32, torch.bfloat16}
            assert sum(case.elements().values()) == case.numel


def test_bytes_of_a_step() -> None:
    assert Case("4x4").step_bytes == 28 * 16
    assert Case("4x4", "bf16").step_bytes == 14 * 16
    assert Case("4x4", clips=True).step_bytes == 32 * 16


@pytest.mark.parametrize("part", PARTS)
def test_every_selection_of_a_part_finds_cases(part: str) -> None:
    session = Session(CPU, rounds=1)
    for selection in PARTS[part]:
        with (
            mock.patch("bench.session.measure", lambda case, peers, settings: [(case, peers)]),
            mock.patch("bench.session.measure_loop", lambda name, settings: [(name, [REFERENCE, OURS])]),
        ):
            found: list[Any] = list(session.rows(selection))
        assert found
        assert all([peer.name for peer in peers[:1]] == [REFERENCE.name] and len(peers) > 1 for _, peers in found)


@pytest.mark.parametrize("case", [SMALLEST, Case("148x16", "mixed", num_groups=64)], ids=lambda case: case.name)
def test_a_case_is_measured(case: Case) -> None:
    reference, ours = measure(case, [REFERENCE, OURS], QUICK)
    assert (reference.peer, ours.peer) == (REFERENCE.name, OURS.name)
    assert reference.ratio_p50 == 1
    assert ours.us_p20 is not None
    assert ours.us_p50 is not None
    assert ours.us_p80 is not None
    assert 0 < ours.us_p20 <= ours.us_p50 <= ours.us_p80
    assert ours.ratio_p50 is not None
    assert (ours.num_tensors, ours.numel) == (case.num_tensors, case.numel)


def test_peers_that_cannot_run_say_why_and_the_others_are_measured() -> None:
    def refuse(_: Request) -> Stepper:
        raise NotAvailableError("not in this version")

    def break_later(request: Request) -> Stepper:
        steps = iter(range(timing.WARM_UP_STEPS))
        return Stepper(lambda: next(steps))

    refusing, breaking = Peer("refusing", refuse), Peer("breaking", break_later)
    rows = measure(SMALLEST, [REFERENCE, TORCH_CAPTURABLE, refusing, breaking, OURS], QUICK)
    assert [row.status for row in rows] == ["measured", "failed", "skipped", "failed", "measured"]
    assert "capturable=True" in rows[1].remark
    assert rows[2].remark == "not in this version"
    assert rows[3].remark == "StopIteration"


def test_a_missing_peer_is_named() -> None:
    absent = Peer("absent-optimizer", OURS.build, requires="no_such_module")
    with mock.patch("bench.session.all_peers", return_value=(*all_peers(), absent)):
        missing = Session(CPU).missing_peers()
    assert missing["absent-optimizer"] == "no_such_module"
    assert "absent-optimizer (no module `no_such_module`)" in as_markdown(Result({}, [], missing))


def test_captured_cases_need_cuda() -> None:
    rows = measure(SMALLEST, [REFERENCE, OURS], replace(QUICK, mode="captured"))
    assert [(row.status, row.remark) for row in rows] == [("skipped", "needs CUDA")] * 2


def test_cases_too_large_are_skipped_with_both_figures() -> None:
    # For a pair: p and g, twice m and v, and as much as p and g again.
    for row in measure(Case("1x1G"), [REFERENCE, OURS, TORCH_CAPTURABLE], QUICK):
        assert (row.status, row.remark) == ("skipped", f"needs {32e9 / 2**30:.1f} GiB, and the budget is 4.0 GiB")


def test_peers_are_measured_in_pairs_where_memory_is_short() -> None:
    case, peers = Case("resnet50"), [REFERENCE, OURS, TORCH_CAPTURABLE]
    assert batches(case, peers, needed_bytes(case, 3)) == [peers]
    assert batches(case, peers, needed_bytes(case, 2)) == [[REFERENCE, OURS], [REFERENCE, TORCH_CAPTURABLE]]
    assert batches(case, peers, needed_bytes(case, 2) - 1) == []


def test_host_mode_launches_nothing(triton_backend: None) -> None:
    row = measure(SMALLEST, [HOST_PEERS[0], HOST_PEERS[-1]], replace(QUICK, mode="host"))[1]
    assert row.status == "measured", row.remark
    assert "replaced by nothing" in row.remark
    params = [torch.nn.Parameter(torch.ones(4))]
    params[0].grad = torch.ones(4)
    stepper = HOST_PEERS[-1].build(Request([{"params": params}], CPU))
    with stepper.context():
        stepper.step()
    assert params[0].tolist() == [1, 1, 1, 1]


def test_a_peer_that_takes_the_gradients_away_is_named() -> None:
    def build(request: Request) -> Stepper:
        optimizer = torch.optim.SGD(request.params)
        return Stepper(optimizer.zero_grad)

    row = measure(SMALLEST, [REFERENCE, Peer("thief", build)], QUICK)[1]
    assert row.status == "failed"
    assert "took 4 of 4 gradients away" in row.remark


def test_host_mode_refuses_the_cpu_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_CLR_BACKEND", "cpu")
    row = measure(SMALLEST, [HOST_PEERS[0], HOST_PEERS[-1]], replace(QUICK, mode="host"))[1]
    assert row.status == "failed"
    assert "FUSED_CLR_BACKEND=triton" in row.remark


def test_figures_are_quantiles_of_times_and_of_ratios_round_by_round() -> None:
    found = figures([1e-6, 4e-6, 9e-6], [1e-6, 2e-6, 3e-6])
    assert (found["us_p50"], found["ratio_p50"]) == (4, 2)
    assert "ratio_p50" not in figures([1e-6], None)


def test_results_survive_a_file(tmp_path: Path) -> None:
    rows = [Row("a", "eager", "x", us_p50=1.5), Row("a", "eager", "y", status="failed", remark="no | way")]
    result = Result({"commit": "abc"}, rows, {"z": "zed"})
    result.write(tmp_path / "deep" / "result.json")
    assert Result.read(tmp_path / "deep" / "result.json") == result
    (tmp_path / "old.json").write_text('{"stamp": {}, "rows": []}')
    with pytest.raises(ValueError, match="schema"):
        Result.read(tmp_path / "old.json")
    assert "failed: no \\| way" in as_markdown(result)


@pytest.mark.parametrize("fields", [{"status": "odd"}, {"status": "skipped", "us_p50": 1.0}, {}], ids=str)
def test_rows_have_figures_exactly_if_they_were_measured(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="status|us_p50"):
        Row("a", "eager", "x", **fields)


def test_markdown_shows_bandwidth_and_loops_where_there_are_any() -> None:
    captured = Row("a", "captured", "x", us_p50=10.0, gb_per_s=2000.0, copy_share=0.5)
    loop = Row("b", "loop", "x", us_p50=500.0)
    lines = as_markdown(Result({}, [captured, loop])).splitlines()
    assert lines[2] == "| case | mode | peer | us a step (p20 p50 p80) | ratio to torch's pair (p20 p50 p80) |" + (
        " GB/s | of a copy | steps/s | remark |"
    )
    assert "| 2,000 | 50.0% |" in lines[4]
    assert "| 2,000 |  |" in lines[5]
    assert "GB/s" not in as_markdown(Result({}, [loop]))


def test_the_command_writes_json_and_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--device", "cpu", "--case", "^4x4 fp32$", "--peer", "^fused-clr$", "--rounds", "1", "--no-plot"]
    assert command_line.run(command_line.parse_arguments([*arguments, "--out", str(tmp_path)])) == 0
    result = Result.read(tmp_path / "eager-selected-cpu.json")
    assert [row.peer for row in result.rows] == [REFERENCE.name, OURS.name]
    assert {"commit", "cpu", "torch", "python"} <= set(result.stamp)
    assert (tmp_path / "eager-selected-cpu.md").read_text() == as_markdown(result)


def test_floors_are_bytes_over_bandwidth() -> None:
    def cost_of(dtype: torch.dtype) -> Cost:
        return Cost(7 * dtype.itemsize, 40, 60)

    floor = floor_of(Case("4x4M", clips=True), cost_of, 4e12, 30e12)
    assert floor.moved == 32 << 24
    assert math.isclose(floor.us, (32 << 24) / 4e6)
    assert math.isclose(floor.issue_us, (60 << 24) / 30e6)
    row = Row(floor.case.name, "captured", OURS.name, us_p50=2 * floor.us)
    assert "| 50.0% |" in roofline_markdown([floor], [row], 4e12, 30e12)
    assert copy_bandwidth_of([Result({"copy_tb_per_s": 4.2}), Result({})]) == pytest.approx(4.2e12)


def test_opcodes_are_counted_by_the_call_they_come_from() -> None:
    listing = """
        //## File "kernels/adam.py", line 211 inlined at "kernels/adam.py", line 348
        //## File "kernels/adam.py", line 348 inlined at "kernels/adam.py", line 476
            /*0010*/              @!P0 FFMA.FTZ R1, R2, R3, R4 ;
            /*0020*/                   MUFU.RSQ R1, R2 ;
        //## File "kernels/adam.py", line 211 inlined at "kernels/adam.py", line 331
            /*0030*/                   FFMA R1, R2, R3, R4 ;
        //## File "kernels/other.py", line 348
            /*0040*/                   FMUL R1, R2, R3 ;
    """
    assert count_opcodes(listing, "adam.py", 348) == {"FFMA": 1, "MUFU": 1}


def test_the_small_gpt_has_the_tensors_it_says() -> None:
    model = SmallGpt()
    assert len(list(model.parameters())) == 53
    assert model(torch.zeros(2, 64, dtype=torch.int64)).shape == (2, 64, 512)


def test_steppers_of_frozen_schedules_keep_what_they_need() -> None:
    params = [torch.nn.Parameter(torch.ones(4))]
    params[0].grad = torch.ones(4)
    # Captured, but for the option that needs a GPU: nobody but the stepper holds the scheduler.
    with mock.patch("torch.optim.Adam", lambda groups, capturable, **others: torch.optim.AdamW(groups, **others)):
        stepper = REFERENCE.build(Request([{"params": params}], CPU, captured=True))
    gc.collect()
    assert stepper.schedule is None
    stepper.step()
    assert params[0][0] < 1


class FakeGraph:
    """Replays what was called while it was being captured, as far as a test on the CPU can."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


def test_a_replay_leaves_the_update_to_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    graph = FakeGraph()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda _: mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    update: Callable[[], object] = lambda: calls.append("update")  # noqa: E731
    stepper = timing.replay_of(Stepper(update, lambda: calls.append("schedule")))
    stepper.step()
    stepper.step()
    assert graph.replays == 2
    assert calls == ["update", "schedule", "schedule"]
