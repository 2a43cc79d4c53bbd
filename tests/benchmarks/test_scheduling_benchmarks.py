"""The benchmarks of the scheduler run and report; their arithmetic against other ways to the same numbers."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import arms, kv_ttl, kv_ttl_sim, sim_prediction
from benchmarks.kv_ttl_cases import (
    BLOCK,
    PINNED,
    POOL,
    SHORT,
    pool_blocks,
    real_case_engine,
    real_case_workload,
    working_set,
    workload,
)
from benchmarks.report import Report
from benchmarks.sim_cells import KNEE, SEEDS, TRACE
from benchmarks.sim_outcomes import bootstrap

ROOT = Path(__file__).parents[2]


def quick(name: str, folder: Path, *flags: str) -> dict[str, float]:
    """The figures of a ``--quick`` run, in a folder of its own."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.strip().splitlines()[-1])
    assert (last["benchmark"], last["bars"]) == (name, [])
    assert not list(folder.rglob("outputs/**/*.json"))  # a benchmark that ended leaves nothing to go on from
    return last["figures"]


def test_kv_ttl_on_real_vllm(tmp_path: Path) -> None:
    figures = quick("kv_ttl", tmp_path, "--plots", "pictures")
    for arm in ("stock", "turnstile"):
        assert 0 < figures[f"{arm}_mean_delay"] < figures[f"{arm}_mean_job_time"] <= figures[f"{arm}_p95_job_time"]
        # vLLM's count of cached tokens and the scheduler's of computed ones: two ways to the same number, but for what
        # preemptions cost. Who is preempted, and what is evicted, is a matter of milliseconds here.
        recomputed, again = figures[f"{arm}_recomputed_tokens"], figures[f"{arm}_computed_again_tokens"]
        assert 0 < recomputed <= again
        assert recomputed == again or figures[f"{arm}_preemptions"] > 0
    assert min(figures[f"step_{name}"] for name in "abcd") >= 0
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 3


def test_kv_ttl_sim(tmp_path: Path) -> None:
    figures = quick("kv_ttl_sim", tmp_path, "--plots", "pictures")
    assert figures["cells"] == 3 and figures["worst_upper_bound"] > 0 and figures["rl_makespan_gain"] > 0
    assert (tmp_path / "pictures" / "kv_ttl_sim_overload.png").stat().st_size > 10_000


def test_the_grid_is_the_issues() -> None:
    """Five policies on both models at light load and at the knee; the rest on one model at the knee; paired seeds."""
    grid = kv_ttl_sim.cells(False, 300)
    workloads = {hardware: set(knees) for hardware, knees in KNEE.items()}
    if not TRACE.exists():
        workloads["h100_8b"].discard("sessions")
    found = {(c.workload, c.load, c.hardware) for c in grid}
    asked = {(w, load, h) for h, names in workloads.items() for w in names for load in ("light", "knee")}
    assert found == asked | {(w, "overload", "h100_8b") for w in workloads["h100_8b"]}
    five = {"fcfs", "program_fcfs", "program_cap", "turnstile", "clairvoyant"}
    for cell in grid:
        for seed in range(SEEDS[cell.workload]):
            runs = kv_ttl_sim.runs(cell, seed, False)
            assert {run.policy for run in runs} >= five
            rest = {run.policy for run in runs} - five - {"continuum"}
            assert bool(rest) == (cell.load == "knee" and cell.hardware == "h100_8b" and seed == 0)
            assert ("continuum" in {run.policy for run in runs}) >= (cell.load == "overload")
            hinted = [run for run in runs if run.hints]
            assert [run.arm for run in hinted] == ["turnstile_hints"] * bool(rest)
    assert max(SEEDS.values()) == 20 and {c.workload for c in grid} | {"sessions", "rl_batch"} == SEEDS.keys()


def test_what_is_missing_is_a_missed_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("test")
    (tmp_path / "there").touch()
    assert report.input("there", tmp_path / "there", "never said")
    assert not report.input("trace", tmp_path / "trace.gz", "fetch it")
    with pytest.raises(SystemExit) as end:
        report.finish()
    printed = capsys.readouterr().out
    assert end.value.code == 1 and f"missing: {tmp_path / 'trace.gz'}: fetch it" in printed
    met = {bar["figure"]: bar["met"] for bar in json.loads(printed.splitlines()[-1])["bars"]}
    assert met == {"missing_there": True, "missing_trace": False}


def test_without_kept_runs_the_prediction_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sim_prediction, "RESULTS", tmp_path)
    report = Report("test")
    sim_prediction.predict(report)
    assert [(bar["figure"], bar["met"]) for bar in report.bars] == [("missing_kv_ttl_results", False)]


def test_the_bootstrap_draws_seeds_and_then_programs() -> None:
    """Against draws of both levels by hand; then without any spread, and with one seed."""
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(6):
        stock = rng.uniform(1, 2, 40)
        pairs.append((stock * rng.uniform(0.5, 0.9), stock))  # seeds differ, programs do not
    ratio, low, high = bootstrap(pairs)
    assert ratio == pytest.approx(sum(a.sum() for a, _ in pairs) / sum(b.sum() for _, b in pairs))
    ends = []
    for _ in range(4000):
        drawn = [pairs[i] for i in rng.integers(6, size=6)]
        again = [(a[d], b[d]) for a, b in drawn for d in [rng.integers(40, size=40)]]
        ends.append(sum(a.sum() for a, _ in again) / sum(b.sum() for _, b in again))
    assert (low, high) == pytest.approx(np.quantile(ends, (0.025, 0.975)), abs=0.01)
    assert high - low > 0.1  # what the programs alone would never show
    same = [(0.7 * stock, stock) for _, stock in pairs]
    assert bootstrap(same) == pytest.approx((0.7, 0.7, 0.7))
    (ours, stock), *_ = pairs
    noisy = ours * rng.uniform(0.5, 1.5, 40)
    ratio, low, high = bootstrap([(noisy, stock)])
    assert low < ratio < high and high - low < 0.2


def test_stored_results_know_the_code_that_made_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    monkeypatch.setattr(arms, "ROOT", tmp_path)
    assert arms.code() == arms.commit() == ""  # no git
    git("init")
    for name in ("code.py", "README.md", "benchmarks/results/a.json"):
        write(name, "1")
    git("add", ".")
    git("commit", "-m", "first")
    clean = arms.code()
    assert clean == arms.commit()[:12] and not arms.uncommitted()
    for name in ("README.md", "benchmarks/results/a.json", "benchmarks/results/b.json", "notes.txt"):
        write(name, "2")
    assert arms.code() == clean  # nothing of it runs
    seen = {clean}
    for name, text in (("code.py", "2"), ("code.py", "3"), ("new.py", "1"), ("new.py", "2"), ("größe.yaml", "1")):
        write(name, text)
        assert arms.code() not in seen and arms.code().startswith(clean)
        seen.add(arms.code())
    git("commit", "-am", "second")
    assert not arms.code().startswith(clean)


def test_scheduler_overhead(tmp_path: Path) -> None:
    figures = quick("scheduler_overhead", tmp_path)
    assert min(figures.values()) > 0


def test_the_plan_pairs_all_arms_by_seed() -> None:
    runs = kv_ttl.plan(argparse.Namespace(quick=False, full=False, pairs=5))
    pinned = Counter(run.arm for run in runs if run.share is None)
    assert pinned == dict.fromkeys(kv_ttl.ARMS, 3)
    assert len({run.arm for run in runs[:: len(kv_ttl.ARMS)][:3]}) == 3  # another one is first at each seed
    curve = Counter((run.arm, run.share) for run in runs if run.share is not None)
    assert curve == {(arm, share): 5 for arm in ("stock", "turnstile") for share in (0.25, 0.5, 1.0, 2.0)}
    assert len({run.name for run in runs}) == len(runs)
    full = kv_ttl.plan(argparse.Namespace(quick=False, full=True, pairs=5))
    assert {run.arm for run in full} > {run.arm for run in runs}


def test_the_pinned_case_is_the_issues() -> None:
    for seed in range(3):
        load = real_case_workload(seed)
        assert load == workload(PINNED, seed) != real_case_workload(seed + 1)
        assert [len(session.turns) for session in load.sessions] == [6] * 12
        gaps = [turn.gap for session in load.sessions for turn in session.turns[:-1]]
        assert 0.2 <= min(gaps) < 0.5 and 4 < max(gaps) <= 5
        assert 2.7 < working_set(load) / POOL < 3.3
        longest = max(session.tokens for session in load.sessions)
        assert longest < real_case_engine()["pool_tokens"] == (POOL - 1) * BLOCK


def test_pools_hold_their_share_and_the_longest_session() -> None:
    load = workload(SHORT, 0)
    assert pool_blocks(load, 2.0) == 2 * working_set(load) + 1
    assert pool_blocks(load, 0.01) * BLOCK > max(session.tokens for session in load.sessions)


def test_step_costs_are_recovered() -> None:
    rng = np.random.default_rng(0)
    work = np.c_[rng.integers(0, 2000, 300), rng.integers(0, 10**6, 300), rng.integers(1, 12, 300)]
    true = np.array([0.02, 5e-4, 2e-7, 1e-3])
    seconds = true[0] + work @ true[1:] + rng.normal(0, 1e-4, 300)
    found = kv_ttl.fit_steps(np.c_[work, seconds])
    assert list(found) == ["a", "b", "c", "d"]
    assert np.array([*found.values()]) == pytest.approx(true, rel=0.05)
    falling = kv_ttl.fit_steps(np.c_[work, 1 - 1e-3 * work[:, 2]])
    assert falling["d"] == 0 and min(falling.values()) >= 0


def test_bootstrapped_ratios_keep_pairs_together() -> None:
    rng = np.random.default_rng(1)
    stock = [rng.uniform(10, 50, 12) for _ in range(3)]
    low, high = kv_ttl.interval(stock, [x / 2 for x in stock], np.mean)
    assert low == pytest.approx(2) == high
    noisy = [x / 2 + rng.uniform(0, 5, 12) for x in stock]
    low, high = kv_ttl.interval(stock, noisy, np.mean)
    assert low < np.mean(stock) / np.mean(noisy) < high < low + 1


def test_what_was_played_is_not_played_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    played: list[str] = []

    class Engine:
        def __init__(self, model: Path, blocks: int) -> None:
            self.blocks = blocks

        def use(self, options: dict[str, Any] | None) -> None:
            self.policy = "stock" if options is None else options["policy"]

        def close(self) -> None:
            pass

    def play(engine: Engine, load: Any, seed: int, hints: bool) -> dict[str, Any]:
        if engine.policy == "turnstile" and "stop" not in played:
            played.append("stop")
            raise KeyboardInterrupt
        played.append(engine.policy)
        return {"of": engine.policy}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kv_ttl, "RealEngine", Engine)
    monkeypatch.setattr(kv_ttl, "play", play)
    monkeypatch.setattr(kv_ttl, "build_model", lambda folder, shape: 1)
    runs = kv_ttl.plan(argparse.Namespace(quick=True))[:2]
    with pytest.raises(KeyboardInterrupt):
        kv_ttl.play_all(runs, {}, lambda text: None)
    results, _ = kv_ttl.play_all(runs, {}, lambda text: None)
    assert played == ["stock", "stop", "turnstile"]
    assert [results[run]["of"] for run in runs] == ["stock", "turnstile"]
