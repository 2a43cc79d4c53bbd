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

from benchmarks import kv_ttl
from benchmarks.kv_ttl_arms import (
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
        def __init__(self, model: Path, blocks: int, options: dict[str, Any] | None) -> None:
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
