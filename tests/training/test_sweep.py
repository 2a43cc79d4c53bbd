"""Runs of a sweep are named by what tells them apart."""

from __future__ import annotations

import json
from pathlib import Path

from omegaconf import OmegaConf

from training.dotted_names import dotted
from training.sweep import Combine, names

NUMBERS = dict.fromkeys(["accuracy_low", "accuracy_high", "tool_calls", "tokens", "thinking"], 0.5)


def test_names_are_the_settings_that_differ() -> None:
    runs = [
        {"run_dir": f"sweep/{i}", "seed": 0, "reward": {"alpha": alpha, "prices": {}}, "advantage": each}
        for i, (alpha, each) in enumerate([(0.1, {"clip": None}), (0.3, {"clip": None}), (0.3, {"lam": 1})])
    ]
    assert names([dotted(run) for run in runs]) == [
        "reward.alpha=0.1",
        "reward.alpha=0.3",
        "reward.alpha=0.3, advantage.lam=1",
    ]
    assert names([dotted(run) for run in runs[1:2]]) == ["0"]


def test_the_table_leaves_out_a_run_that_failed_on_its_way(tmp_path: Path) -> None:
    """It has an evaluation too: the one before training."""
    for seed in range(3):
        (tmp_path / f"{seed}").mkdir()
        sampled = {"accuracy": seed / 4, "trigger": None, "tool_productivity": None, "e3": None, "by_difficulty": {}}
        stages = {"evaluations": [{"step": 5, "sampled": sampled | NUMBERS}]}
        (tmp_path / f"{seed}" / "stages.json").write_text(json.dumps(stages))
        OmegaConf.save({"seed": seed}, tmp_path / f"{seed}" / "config.yaml")
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    Combine().on_multirun_end(config, config_name="training", failed=[tmp_path / "1"])
    records = json.loads((tmp_path / "evaluation.json").read_text())
    assert [record["name"] for record in records] == ["seed=0", "seed=2"]
