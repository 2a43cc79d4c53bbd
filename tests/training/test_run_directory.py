"""A run that starts in the place of another deletes that one once it stands, and nothing that it is told to read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from rollout.errors import UserError
from training import replaced_run, run_directory
from training.run_directory import RunDirectory


def started(
    path: Path, settings: Any = None, *, resume: bool = False, stands: bool = True, fails: bool = False
) -> None:
    """A run that writes a model folder and its engine's log at its start, a step once it stands, and ends."""
    directory = RunDirectory(path)
    composed = OmegaConf.create({"run_dir": str(path)} if settings is None else settings)
    with directory.open(composed, resume=resume, overwrite=True):
        (path / "model").mkdir(exist_ok=True)
        (path / "engine.log").write_text("new" if settings else "old")
        if fails:
            raise UserError("refused")
        if stands:
            directory.stands()
            (directory.checkpoints / "step-4").mkdir(parents=True, exist_ok=True)


def tree(path: Path) -> set[str]:
    return {str(p.relative_to(path)) for p in path.rglob("*") if p.name != ".lock"}


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
    run, checkpoint = tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-4"
    started(run)
    text = OmegaConf.to_yaml(OmegaConf.create(settings))
    text = text.replace("{checkpoint}", str(checkpoint)).replace("{run}", str(run))
    with pytest.raises(UserError, match=rf"^{re.escape(key)}: .* would delete first; give another run_dir$"):
        started(run, text)
    assert checkpoint.is_dir()
    started(tmp_path / "next", text)
    started(run, text, resume=True)
    assert checkpoint.is_dir()


def test_what_a_run_writes_is_no_reason_to_keep_the_last_one(tmp_path: Path) -> None:
    run = tmp_path / "run"
    started(run)
    numbers = run / "turnstile.json"
    numbers.touch()
    started(run, {"run_dir": str(run), "name": "step-4", "scheduler": {"metrics_path": str(numbers)}})
    assert tree(run) == {"model", "engine.log", "config.yaml", "stages.json", "checkpoints", "checkpoints/step-4"}


def test_a_start_that_is_refused_leaves_the_run_before_it_and_says_why_in_the_log(tmp_path: Path) -> None:
    started(tmp_path)
    before, config = tree(tmp_path), (tmp_path / "config.yaml").read_text()
    with pytest.raises(UserError, match="refused"):
        started(tmp_path, {"steps": 3}, fails=True)
    assert tree(tmp_path) == before and (tmp_path / "config.yaml").read_text() == config
    assert (tmp_path / "engine.log").read_text() == "new"


def test_a_start_that_is_killed_may_be_taken_up_or_leaves_the_run_before_it(tmp_path: Path) -> None:
    started(tmp_path)
    before = tree(tmp_path)
    started(tmp_path, {"steps": 3}, stands=False)  # as a kill leaves it
    assert not (tmp_path / "checkpoints").exists()
    directory = RunDirectory(tmp_path)
    with pytest.raises(UserError, match="holds a run already"), directory.open({}, resume=False, overwrite=False):
        pass
    assert tree(tmp_path) == before
    started(tmp_path, {"steps": 3}, stands=False)
    started(tmp_path, {"steps": 3}, resume=True)
    assert tree(tmp_path) == before, "its own checkpoint: the other one's is gone"
    assert "steps: 3" in (tmp_path / "config.yaml").read_text()


def test_a_kill_at_any_instant_loses_neither_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rename, folder and deletion is where it may come."""
    for at in range(40):
        run = tmp_path / str(at)
        started(run)
        left = [at]

        def killed(step: Any, left: list[int] = left) -> Any:
            def instead(*arguments: Any, **keywords: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                return step(*arguments, **keywords)

            return instead

        with monkeypatch.context() as patched:
            for name in ("rename", "mkdir", "rmdir", "unlink"):
                patched.setattr(Path, name, killed(getattr(Path, name)))
            patched.setattr(replaced_run.shutil, "rmtree", killed(replaced_run.shutil.rmtree))
            try:
                started(run, {"steps": 3})
            except KeyboardInterrupt:
                pass
            else:
                assert at > 5
                return
        new = "new" in (run / "engine.log").read_text() if (run / "engine.log").exists() else False
        with RunDirectory(run).open({}, resume=True, overwrite=False):
            pass
        assert new or (run / "checkpoints" / "step-4").is_dir() or (run / ".replaced/checkpoints/step-4").is_dir(), at
    raise AssertionError("it never ended")


def test_two_processes_do_not_have_one_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started(tmp_path)
    monkeypatch.setattr(run_directory, "ENDING", 0.5)
    holds = "import sys; from pathlib import Path; from training.run_directory import locked\n"
    holds += "with locked(Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", holds, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env=os.environ,
    )
    assert other.stdout is not None
    other.stdout.readline()
    with pytest.raises(UserError, match=rf"^run_dir: .* in use by process {other.pid} on .*; stop it, or give another"):
        started(tmp_path, {"steps": 3})
    assert (tmp_path / "checkpoints" / "step-4").is_dir()
    other.kill()
    other.wait()
    started(tmp_path, {"steps": 3})


def test_a_resumed_run_says_what_it_does_otherwise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started(tmp_path, {"loss": {"low": 0.2}, "steps": 3, "resume": False})
    started(tmp_path, {"loss": {"low": 0.3}, "resume": True, "gone": [1]}, resume=True)
    said = " ".join(capsys.readouterr().out.split())
    assert said == "note: resumed with loss.low=0.3 (was 0.2), steps=None (was 3), gone.0=1 (was None)"
    assert OmegaConf.load(tmp_path / "config-until-step-4.yaml").loss.low == 0.2
    started(tmp_path, {"loss": {"low": 0.3}, "resume": False, "gone": [1]}, resume=True)
    assert not capsys.readouterr().out
