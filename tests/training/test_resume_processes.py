"""What one number of processes saved goes on with another where the library can do it, and is refused where not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rollout.plots import read_jsonl
from tests.training.launch import ON_TWO, SMALL, launched

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
CRITIC = ["algorithm=ppo", "critic.warmup_rounds=1", "critic.optimizer.learning_rate=0.01"]
LORA = ["lora=lora", "lora.rank=4", "optimizer.learning_rate=0.01"]
FOUR = list(range(1, 5))


def run(run_dir: Path, overrides: list[str], processes: int, *, fails: bool = False) -> str:
    code, text = launched([*overrides, f"run_dir={run_dir}"], run_dir.with_suffix(".log"), processes=processes)
    assert (code != 0) == fails, text[-3000:]
    return text


def steps(run_dir: Path) -> list[int]:
    return [row["step"] for row in read_jsonl(run_dir / "metrics.jsonl")]


def prompts(run_dir: Path) -> list[str]:
    """One of each group that was trained on, in order; steps of four out of 64, so that none comes twice."""
    return [row["prompt_id"] for row in read_jsonl(run_dir / "episodes.jsonl")]


def difference(ours: Path, theirs: Path, name: str) -> float:
    a, b = (load_file(folder / "checkpoints" / "step-4" / name) for folder in (ours, theirs))
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max()) for key in b)


@pytest.mark.parametrize("before", [1, 2])
@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_a_run_goes_on_with_another_number_of_processes_as_with_the_same(
    sharding: str, before: int, tmp_path: Path
) -> None:
    """Tokens repeat by their seeds, so that weights may differ by the order of sums alone; critic included."""
    exact = ["engine=vllm_process", "engine.deterministic=true", "checkpoint.every=2", "episodes_logged=1000"]
    settings = [*SMALL, *CRITIC, *exact, f"sharding={sharding}", "optimizer.learning_rate=0.01", "steps=4"]
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    run(whole, settings, before)
    shutil.copytree(whole, moved)
    shutil.rmtree(moved / "checkpoints" / "step-4")
    text = run(moved, [*settings, "resume=true"], 3 - before)
    assert steps(moved) == FOUR and prompts(moved) == prompts(whole)
    assert "RNG" not in text and "Traceback" not in text, text
    for name in ("model.safetensors", "critic/model.safetensors"):
        assert difference(moved, whole, name) < 1e-4


@pytest.mark.parametrize(
    ("sharding", "extra"),
    [
        ("zero1", CRITIC),
        ("zero2", LORA),
        ("zero3", CRITIC),
        ("zero3", LORA),
        ("zero3_offload", []),
        ("fsdp2", LORA),
        ("none", LORA),
    ],
    ids=lambda value: value if isinstance(value, str) else "_".join(value[:1]).partition("=")[2],
)
def test_two_processes_go_on_where_two_stopped_and_one_is_refused_what_it_cannot_load(
    sharding: str, extra: list[str], tmp_path: Path
) -> None:
    settings = [*ON_TWO, *extra, f"sharding={sharding}"]
    folder = tmp_path / "run"
    run(folder, [*settings, "steps=2"], 2)
    if sharding.startswith("zero"):
        before = (folder / "config.yaml").read_bytes()
        text = run(folder, [*settings, "steps=4", "resume=true"], 1, fails=True)
        (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
        assert "was saved by 2 processes and this run has 1" in line and "--nproc-per-node 2" in line
        assert (folder / "config.yaml").read_bytes() == before
    text = run(folder, [*settings, "steps=4", "resume=true"], 2)
    assert "Traceback" not in text
    assert steps(folder) == FOUR
    rounds = 5 if extra is CRITIC else 4  # one warms the critic up
    assert len(prompts(folder)) == len(set(prompts(folder))) == 4 * rounds
    merged = load_file(folder / "checkpoints" / "step-4" / "model.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in merged.values())
