"""A run that starts anew in the place of another deletes that one, but nothing that it is told to read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from rollout.errors import UserError
from training.run_directory import RunDirectory


def ended_run(path: Path) -> Path:
    checkpoint = path / "checkpoints" / "step-4"
    RunDirectory(path).open(OmegaConf.create({"run_dir": str(path)}), resume=False, overwrite=False)
    checkpoint.mkdir(parents=True)
    return checkpoint


@pytest.mark.parametrize(
    "settings, key",
    [
        ({"model": {"path": "{checkpoint}"}}, "model.path"),
        ({"budget": {"history": "{checkpoint}"}}, "budget.history"),
        ({"reward": {"parts": [{"labels": "{checkpoint}"}]}}, "reward.parts.0.labels"),
        ({"model": {"path": "{run}"}}, "model.path"),
        ({"model": {"path": "{run}/../run/checkpoints"}}, "model.path"),
    ],
)
def test_what_it_is_to_read_is_not_deleted(tmp_path: Path, settings: dict, key: str) -> None:
    checkpoint = ended_run(tmp_path / "run")
    text = OmegaConf.to_yaml(OmegaConf.create(settings))
    text = text.replace("{checkpoint}", str(checkpoint)).replace("{run}", str(tmp_path / "run"))
    with pytest.raises(
        UserError, match=rf"^{re.escape(key)}: .* overwrite=true would delete first; give another run_dir$"
    ):
        RunDirectory(tmp_path / "run").open(OmegaConf.create(text), resume=False, overwrite=True)
    assert checkpoint.is_dir()
    RunDirectory(tmp_path / "next").open(OmegaConf.create(text), resume=False, overwrite=True)
    RunDirectory(tmp_path / "run").open(OmegaConf.create(text), resume=True, overwrite=False)
    assert checkpoint.is_dir()


def test_what_a_run_writes_is_no_reason_to_keep_the_last_one(tmp_path: Path) -> None:
    checkpoint = ended_run(tmp_path / "run")
    numbers = tmp_path / "run" / "turnstile.json"
    numbers.touch()
    settings = {"run_dir": str(tmp_path / "run"), "name": "step-4", "scheduler": {"metrics_path": str(numbers)}}
    RunDirectory(tmp_path / "run").open(OmegaConf.create(settings), resume=False, overwrite=True)
    assert not checkpoint.exists() and not numbers.exists()
