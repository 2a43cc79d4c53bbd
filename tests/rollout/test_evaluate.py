"""``python -m rollout.evaluate`` on checkpoints; tests/serving/test_evaluate_url.py does the same to a server."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from rollout.config import register
from rollout.errors import UserError
from rollout.evaluate import evaluate_checkpoint
from rollout.hydra import conf_dir, to_object
from rollout.tasks.arithmetic import Arithmetic
from training.models import build_tiny

ROOT = Path(__file__).parents[2]
SMALL = ["engine=transformers", "evaluation.questions=6", "limits.max_new_tokens=8"]


def command(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "rollout.evaluate", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(line, capture_output=True, text=True, timeout=280, cwd=cwd, env=environment, check=False)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two folders as training leaves them; their names hold an equal sign and a blank."""
    root = tmp_path_factory.mktemp("lr=3 runs")
    shape = {"hidden": 32, "mlp": 48, "heads": 2, "head_dim": 16}
    corpus = list(Arithmetic(size=64, test_size=1).corpus())
    folders = [root / "run" / "checkpoints" / f"step-{step}" for step in (1, 2)]
    return [build_tiny(folder, corpus, seed=seed, **shape) for seed, folder in enumerate(folders)]


def test_a_missing_checkpoint_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    done = command(f"checkpoint={tmp_path / 'none'}", f"run_dir={tmp_path / 'run'}", cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(rf"error: .*{re.escape(str(tmp_path / 'none'))}.*; .*\n", done.stderr), done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["missing", "cut"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_broken_checkpoint_is_refused_in_one_line(
    checkpoints: list[Path], tmp_path: Path, name: str, damage: str
) -> None:
    folder = shutil.copytree(checkpoints[0], tmp_path / "checkpoint")
    whole = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage == "cut":
        (folder / name).write_bytes(whole[: len(whole) // 2])
    register()
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        composed = compose("evaluate", overrides=[f"checkpoint={folder}", "run_dir=unused", *SMALL])
    what = re.escape(name if damage == "cut" else Path(name).suffix if "model" in name else name)
    with pytest.raises(UserError, match=what) as refused:
        evaluate_checkpoint(to_object(composed), tmp_path)
    assert str(folder) in str(refused.value) and "\n" not in str(refused.value)


def test_a_sweep_over_checkpoints_ends_in_one_table_and_one_file(checkpoints: list[Path], tmp_path: Path) -> None:
    """Also a single evaluation: each job is one, in a process of its own."""
    choice = ",".join(f"'{folder}'" for folder in checkpoints)
    sweep = f"hydra.sweep.dir={tmp_path / 'sweep'}"
    done = command("--multirun", f"checkpoint={choice}", "hydra.launcher.slots=2", sweep, *SMALL)
    assert done.returncode == 0, done.stderr[-3000:]
    records = json.loads((tmp_path / "sweep" / "evaluation.json").read_text())
    assert [record["checkpoint"] for record in records] == [str(folder) for folder in checkpoints]
    names = [f"run/step-{step} · arithmetic" for step in (1, 2)]
    assert [record["name"] for record in records] == names
    assert all(name in done.stdout for name in names)
    assert (tmp_path / "sweep" / "evaluation.png").stat().st_size > 5000
    for number, record in enumerate(records):
        job = tmp_path / "sweep" / str(number)
        assert json.loads((job / "evaluation.json").read_text()) == record
        assert json.loads((job / "return_value.json").read_text()) == {"value": record["sampled"]["accuracy"]}
        assert (job / "config.yaml").exists() and (job / "evaluation.png").exists()
        assert record["sampled"]["dropped"] == record["greedy"]["dropped"] == 0
