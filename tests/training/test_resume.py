"""Killed at random instants and resumed, a deterministic run ends with the same bits."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from rollout.plots import read_jsonl
from tests.training.launch import SMALL, context, train

STEPS = 48
ALGORITHMS = {
    "grpo_token": ["batch.minibatches=2"],
    # Windows of 5 of 16 tokens: at every step some episodes are unfinished.
    "tppo": [
        "batch.prompts=8",
        "budget.samples=1",
        "window.length=5",
        "critic.warmup_rounds=2",
        "critic.optimizer.learning_rate=0.01",
    ],
}


def settings(algorithm: str, run_dir: Path) -> list[str]:
    exact = ["engine.deterministic=true", f"steps={STEPS}", "checkpoint.every=1", f"algorithm={algorithm}"]
    return [*SMALL, *exact, *ALGORITHMS[algorithm], "optimizer.learning_rate=0.01", f"run_dir={run_dir}"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("algorithm", "most"),
    [
        pytest.param("grpo_token", 5, marks=pytest.mark.slow),
        pytest.param("tppo", 10, marks=pytest.mark.slow),
        ("tppo", 2),
    ],
)
def test_kills_leave_the_same_weights(tmp_path: Path, algorithm: str, most: int) -> None:
    processes = context()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    reference = processes.Process(target=train, args=(settings(algorithm, whole), tmp_path / "whole.log"))
    reference.start()
    reference.join(300)
    assert reference.exitcode == 0, (tmp_path / "whole.log").read_text()[-2000:]

    rng, log = random.Random(0), tmp_path / "killed.log"
    kills = 0
    while True:
        overrides = [*settings(algorithm, killed), f"resume={str(kills > 0).lower()}"]
        process = processes.Process(target=train, args=(overrides, log))
        process.start()
        before = len(read_jsonl(killed / "metrics.jsonl"))
        if kills < most:
            # Wait until it really trains, then a random moment: mid-rollout, mid-step or mid-save.
            for _ in range(3000):
                process.join(0.02)
                if process.exitcode is not None or len(_rows(killed)) > before:
                    break
            process.join(0.6 * rng.random())
            if process.exitcode is None:
                process.kill()
                process.join(30)
                kills += 1
                continue
        process.join(120)
        break
    assert process.exitcode == 0, log.read_text()[-2000:]
    assert kills == most, "the run ended before it was killed often enough"
    a, b = (load_file(run / "checkpoints" / f"step-{STEPS}" / "model.safetensors") for run in (whole, killed))
    assert a.keys() == b.keys()
    assert all((a[name] == b[name]).all() for name in a)
    critics = [run / "checkpoints" / f"step-{STEPS}" / "critic" / "model.safetensors" for run in (whole, killed)]
    if algorithm == "tppo":
        assert critics[0].read_bytes() == critics[1].read_bytes()
    assert steps(killed) == steps(whole) == list(range(1, STEPS + 1))
    assert rewards(killed) == rewards(whole)
    assert not list((killed / "checkpoints").glob(".*")), "a half-written checkpoint was left behind"


def _rows(run_dir: Path) -> list[str]:
    path = run_dir / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def steps(run_dir: Path) -> list[int]:
    return [row["step"] for row in read_jsonl(run_dir / "metrics.jsonl")]


def rewards(run_dir: Path) -> list[float | None]:
    return [row.get("reward") for row in read_jsonl(run_dir / "metrics.jsonl")]
