"""The benchmarks measure what they say, refuse what is no step, and the pages show what was measured."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from bench import cyclical_claim, measure, report
from bench.cases import CASES, Case
from bench.loops import MODELS
from bench.measure import NotAvailableError, figures_of, make_rounds
from bench.parts import PARTS, Run, runs_of
from bench.peers import HOST_PEERS, OURS, PEERS, REFERENCE, TORCH_CAPTURABLE, Peer, Request, Stepper
from bench.roofline import Cost, as_markdown, cost_of_step, count_opcodes

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
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
    "1x1G": (10**9, 1),
}


def name_of(value: Case | Peer | Run) -> str:
    return value.name


@pytest.mark.parametrize("name", TOTALS)
def test_totals_of_parameter_sets(name: str) -> None:
    assert (Case(name).elements().total(), Case(name).num_tensors) == TOTALS[name]


def test_cases_are_told_apart_and_mixed_ones_have_both_dtypes() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert Case("4x4", "bf16", 64, True).name == "4x4 bf16 64-groups clip"
    for case in CASES:
        if case.dtype == "mixed":
            assert set(case.elements()) == {torch.float32, torch.bfloat16}
            assert case.elements().total() == replace(case, dtype="fp32").elements().total()


def test_bytes_of_a_step() -> None:
    assert Case("4x4").step_bytes() == 28 * 16
    assert Case("4x4", "bf16").step_bytes() == 14 * 16
    assert Case("4x4", clips=True).step_bytes() == 32 * 16


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("part", PARTS)
def test_every_selection_of_a_part_finds_runs(part: str, device: str) -> None:
    runs = runs_of(part, torch.device(device))
    assert {run.mode for run in runs} == {selection[0] for selection in PARTS[part]}
    assert OURS.name in {run.peer.name for run in runs}
    assert len({run.name for run in runs}) == len(runs)
    with mock.patch.dict(PARTS, {"one": PARTS[part][:1]}):
        assert {run.rounds for run in runs_of("one", torch.device(device), 3)} == {3}


@pytest.mark.parametrize("peer", [p for p in PEERS if not (p.is_missing or p.compiles or p.needs_cuda)], ids=name_of)
@pytest.mark.parametrize("case", [SMALLEST, Case("148x16", "mixed", 64), Case("4x16", clips=True)], ids=name_of)
def test_a_peer_steps_every_kind_of_case(case: Case, peer: Peer) -> None:
    measure.make_stepper(case, peer, case.make_parameters(CPU), CPU, captured=False).step()


@pytest.mark.parametrize("run", [Run("eager", SMALLEST, OURS), Run("host", SMALLEST, HOST_PEERS[0])], ids=name_of)
def test_a_run_is_measured(run: Run) -> None:
    reference, peer = make_rounds(replace(run, round_seconds=1e-4), CPU)
    for _ in range(2):
        reference.time()
        peer.time()
    found = figures_of(run, reference.seconds, peer.seconds, None)
    assert (found["mode"], found["case"], found["peer"]) == (run.mode, "4x4 fp32", "fused-clr")
    assert 0 < found["us_p20"] <= found["us_p50"] <= found["us_p80"]
    assert found["ratio_p20"] <= found["ratio_p50"] <= found["ratio_p80"]
    # A stubbed launch is a step of the triton backend that changes nothing.
    params = SMALLEST.make_parameters(CPU)
    before = [param.detach().clone() for param in params]
    stepper = run.peer.build(Request([{"params": params}], CPU))
    with stepper.context():
        stepper.step()
    assert all(torch.equal(*pair) for pair in zip(params, before, strict=True)) == (run.mode == "host")


def test_figures_are_quantiles_of_ratios_round_by_round() -> None:
    run = Run("captured", SMALLEST, OURS)
    found = figures_of(run, [1e-6, 2e-6, 4e-6], [8e-6, 2e-6, 4e-6], 224e6)
    assert (found["us_p50"], found["reference_us_p50"], found["ratio_p50"]) == (4, 2, 1)
    assert (found["gb_per_s"], found["copy_share"]) == (0.11, 0.5)


def test_runs_that_cannot_be_done_say_why() -> None:
    compiling = next(peer for peer in PEERS if peer.compiles)
    for run, reason in (
        (Run("captured", SMALLEST, OURS), "needs CUDA"),
        (Run("captured-loop", "small-mlp", OURS), "needs CUDA"),
        (Run("eager", SMALLEST, TORCH_CAPTURABLE), "needs CUDA"),
        (Run("eager", Case("1000x16"), compiling), "beyond 200 tensors"),
        # For two peers: p and g, as much again, twice m and v.
        (Run("eager", Case("1x1G"), OURS), rf"needs {32e9 / 2**30:.1f} GiB, and the budget is 4\.0 GiB"),
    ):
        with pytest.raises(NotAvailableError, match=reason):
            make_rounds(run, CPU)


@pytest.mark.parametrize("takes_gradients", [False, True])
def test_a_step_that_is_none_is_refused(takes_gradients: bool) -> None:
    def build(request: Request) -> Stepper:
        optimizer = torch.optim.SGD(request.groups[0]["params"])
        return Stepper(optimizer.zero_grad if takes_gradients else lambda: None)

    message = "took 4 of 4 gradients away" if takes_gradients else "left 4 of 4 parameters unchanged"
    with pytest.raises(RuntimeError, match=message):
        make_rounds(Run("eager", SMALLEST, Peer("idle", build)), CPU)


def test_loops_train_and_the_gpt_has_the_tensors_it_says() -> None:
    assert len(MODELS["small-gpt"](CPU)[0]) == 53
    params, compute_loss = MODELS["small-mlp"](CPU)
    with mock.patch.dict(MODELS, {"small-mlp": lambda _: (params, compute_loss)}):
        stepper = measure.make_loop("small-mlp", OURS, CPU, captured=False)
    before = compute_loss().item()
    for _ in range(5):
        stepper.step()
    assert compute_loss().item() < before


def test_steppers_of_frozen_schedules_keep_what_they_need() -> None:
    params = SMALLEST.make_parameters(CPU)
    # Captured, but for the option that needs a GPU: nobody but the stepper holds the scheduler.
    with mock.patch("torch.optim.Adam", lambda groups, capturable, **others: torch.optim.AdamW(groups, **others)):
        stepper = REFERENCE.build(Request([{"params": params}], CPU, captured=True))
    gc.collect()
    assert stepper.schedule is None
    stepper.step()


def test_a_replay_leaves_the_update_to_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(measure.torch, "cuda", mock.MagicMock())
    measure.torch.cuda.CUDAGraph.return_value.replay = lambda: calls.append("replay")  # type: ignore[attr-defined]
    stepper = Stepper(lambda: calls.append("update"), lambda: calls.append("schedule"))
    replay = measure.capture(stepper, CPU)
    assert calls == ["update", "schedule"] * measure.WARM_UP_STEPS + ["update"]
    calls.clear()
    replay.step()
    assert calls == ["replay", "schedule"]


def test_on_a_gpu_captures_are_timed_by_triton_and_host_steps_are_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As far as it can be seen without one."""
    gpu, calls = torch.device("cuda"), list[str]()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: calls.append("synchronize"))
    monkeypatch.setattr(measure, "capture", lambda stepper, device: stepper)
    monkeypatch.setattr(measure.triton.testing, "do_bench", lambda step, **options: options["rep"])
    stepper = Stepper(lambda: calls.append("step"))
    captured = measure.Rounds(Run("captured", SMALLEST, OURS, round_seconds=0.02), stepper, gpu, captured=True)
    assert captured.time() == pytest.approx(0.02)
    assert captured.seconds == [captured.seconds[0]]
    host = measure.Rounds(Run("host", SMALLEST, OURS, round_seconds=1), stepper, gpu, captured=False)
    calls.clear()
    assert 0 < host.time() < 1e-3
    assert calls[0] == "synchronize"
    assert 64 <= calls.count("step") <= 66


def test_costs_of_a_step_and_its_floor() -> None:
    case = Case("4x4M", clips=True)
    cost = cost_of_step(case, lambda dtype: Cost(7 * dtype.itemsize, 40, 60))
    assert cost == (32 << 24, 40 << 24, 60 << 24)
    floor_us = (32 << 24) / 4e12 * 1e6
    assert "| 50.0% |" in as_markdown({case: cost}, {case.name: 2 * floor_us}, 4e12, 30e12)


def test_opcodes_are_counted_from_the_first_wide_load_to_the_last_wide_store() -> None:
    listing = """
            /*0010*/                   FMUL R1, R2, R3 ;
            /*0020*/                   LDG.E R1, desc[UR4][R2.64] ;
        //## File "kernels/step.py", line 97
            /*0030*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
    .L_x_1:
            /*0040*/              @!P0 FFMA.FTZ R1, R2, R3, R4 ;
            /*0050*/                   MUFU.RSQ R1, R2 ;
            /*0060*/                   STG.E.128 desc[UR4][R2.64], R4 ;
            /*0070*/                   STG.E desc[UR4][R2.64], R4 ;
    """
    assert count_opcodes(listing) == {"LDG": 1, "FFMA": 1, "MUFU": 1, "STG": 1}
    assert count_opcodes("/*0010*/ FMUL R1, R2, R3 ;") == {}


def test_the_command_measures_and_reports(tmp_path: Path) -> None:
    """`pytest bench` as users run it."""
    path = tmp_path / "result.json"
    command = [sys.executable, "-m", "pytest", "bench", "-k", "4x4-fp32-fused-clr or 4x4-fp32-torch-cap", "--rounds=2"]
    options = ["--device=cpu", f"--benchmark-json={path}", "-p", "no:cacheprovider"]
    # pytest-benchmark measures nothing where it sees pytest-xdist.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = {**outside, "PYTHONPATH": str(ROOT), "FUSED_CLR_COMMIT": "abc"}
    done = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed, 1 skipped" in done.stdout
    content = json.loads(path.read_text())
    assert content["commit_info"]["id"] == "abc"
    assert content["commit_info"]["dirty"] in (False, True)
    assert {"torch", "triton", "cores", "torch_threads"} <= set(content["machine_info"])
    assert content["not_measured"] == {"eager-4x4-fp32-torch-capturable-tensor-lr": "needs CUDA"}
    (row,) = report.read_rows(path)
    # The two show the same rounds: pytest-benchmark's statistics are of the peer's seconds.
    stats = content["benchmarks"][0]["stats"]
    assert stats["rounds"] == row["rounds"] == 2
    assert stats["median"] * 1e6 == pytest.approx(row["us_p50"], rel=1e-4)
    assert f"| 4x4 fp32 | eager | fused-clr | {row['us_p20']:,.1f} " in report.as_markdown(content)


def test_tables_show_what_was_measured(tmp_path: Path) -> None:
    def row(peer: str, ratio: float) -> dict[str, Any]:
        figures = {"mode": "eager", "case": "4x4 fp32", "peer": peer}
        return {"extra_info": {**figures, "ratio_p20": ratio / 2, "ratio_p50": ratio, "ratio_p80": 2 * ratio}}

    (tmp_path / "a.json").write_text(json.dumps({"benchmarks": [row("x", 0.5), row("y", 2), {"extra_info": {}}]}))
    page = (
        "<!-- bench: a, eager: x* | y | x / y | z -->\n| case | x | y | x / y | z |\n|---|---|---|---|---|\n{}\nend\n"
    )
    filled = report.fill_tables(page.format("| 4x4 fp32 | old |"), tmp_path)
    assert filled == page.format("| 4x4 fp32 | 0.25 **0.50** 1.00 | 2.00 | 0.25 |  |")
    with pytest.raises(KeyError, match="4x16"):
        report.fill_tables(page.format("| 4x16 fp32 | |"), tmp_path)


@pytest.mark.parametrize(("page", "count"), [(report.PAGES[0], 1), (report.PAGES[1], 3)], ids=["readme", "performance"])
def test_ratios_on_the_pages_are_those_of_committed_results(page: Path, count: int) -> None:
    """If not, run ``python -m bench.report --pages``."""
    text = page.read_text()
    assert len(report.MARKED_TABLE.findall(text)) == text.count("<!-- bench:") == count
    assert report.fill_tables(text) == text


def test_the_page_on_the_claim_is_what_was_measured() -> None:
    path = ROOT / "bench" / "results" / "cyclical-claim.json"
    assert path.with_suffix(".md").read_text() == cyclical_claim.tables(json.loads(path.read_text()))


def test_a_small_run_of_the_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MAX_STEPS": 30, "GRID": (1e-2,), "FIRST_CYCLE": 5, "DOUBLINGS": 2, "TARGET": 0.3}.items():
        monkeypatch.setattr(cyclical_claim, name, value)
    results = json.loads(json.dumps(cyclical_claim.measure(2)))
    assert results["steps_to_target"]["Constant, 0.01"] == [15, 15]
    ends = results["cycle_ends"]
    # The same run up to the end of the first cycle.
    assert list(ends["one run"]) == ["5", "15"]
    assert ends["one run"]["5"] == ends["separate runs"]["5"]
    assert "| Constant, 0.01 | 15 **15** 15 | 2/2 | 15 | 15 | 0 / 0 |" in cyclical_claim.tables(results)
