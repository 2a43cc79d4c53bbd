"""The benchmarks that compare training runs run and report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.knapsack_effect import Arm

ROOT = Path(__file__).parents[2]


def figures_of(name: str, folder: Path, *flags: str, timeout_s: float = 290.0) -> dict[str, float]:
    """The figures of a ``--quick`` run, in a folder of its own."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stderr
    last: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    assert (last["benchmark"], last["bars"]) == (name, [])
    return dict(last["figures"])


def quick(name: str, folder: Path) -> dict[str, float]:
    """``figures_of`` one that leaves its folder as it was but for its picture."""
    draws = name != "knapsack_optimality"
    figures = figures_of(name, folder, *(["--plots", "pictures"] if draws else []))
    assert not list(folder.rglob("metrics.jsonl"))
    if draws:
        assert (folder / "pictures" / f"{name}.png").stat().st_size > 0
    return figures


def test_knapsack_optimality(tmp_path: Path) -> None:
    figures = quick("knapsack_optimality", tmp_path)
    assert max(figures["unit_low2_worst_gap"], figures["unit_low0_worst_gap"]) < 1e-9


def test_knapsack_drift(tmp_path: Path) -> None:
    assert all(np.isfinite(value) for value in quick("knapsack_drift", tmp_path).values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["knapsack_effect", "tppo_vs_ppo", "otc_effect", "adacot_effect", "pareto"])
def test_training_runs_are_compared(name: str, tmp_path: Path) -> None:
    assert all(np.isfinite(value) for value in quick(name, tmp_path).values())


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["process_parity", "resume", "process_throughput"])
def test_runs_on_several_processes_are_compared(name: str, tmp_path: Path) -> None:
    figures = figures_of(name, tmp_path, timeout_s=1100)
    assert figures and all(np.isfinite(value) for value in figures.values())


def test_tokens_to_an_accuracy_lie_on_straight_lines_between_evaluations(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    rows = [{"step": step, "rollout/tokens": 100.0} for step in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluations = [
        {"step": step, "sampled": {"accuracy": accuracy}} for step, accuracy in ((0, 0.2), (4, 0.4), (8, 0.6))
    ]
    (tmp_path / "stages.json").write_text(json.dumps({"evaluations": evaluations}))
    arm = Arm(tmp_path)
    tokens, curve = arm.curve()
    assert tokens.tolist() == [0, 400, 800] and curve == pytest.approx([0.3, 0.4, 0.5])
    assert arm.tokens_to(0.35) == pytest.approx(200) and arm.tokens_to(0.5) == pytest.approx(800)
    assert arm.tokens_to(0.1) == 1.0 and arm.tokens_to(0.9) == 800
