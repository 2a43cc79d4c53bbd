"""The plug-in's files: latencies beside a checkpoint are found, numbers go to the run, a user's own path stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rollout.scheduling.files import LATENCIES, NUMBERS, with_files


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "step-2"
    folder.mkdir()
    (folder / LATENCIES).write_text("{}")
    return folder


def named(checkpoint: Path, given: dict[str, Any] | None = None, **flags: bool) -> dict[str, Any]:
    options = {"turnstile": {"policy": "plas", **(given or {})}, "other": 1}
    found = with_files(options, checkpoint=checkpoint, run_dir=checkpoint.parent, **flags)
    assert found["other"] == 1
    assert options["turnstile"] == {"policy": "plas", **(given or {})}, "the settings themselves stay as they are"
    return found["turnstile"]


def test_what_lies_beside_the_checkpoint_is_loaded(checkpoint: Path) -> None:
    nothing = {"latencies": None, "metrics_path": None, "save_latencies": None}
    run_dir = checkpoint.parent
    expected = {
        "policy": "plas",
        "latencies": str(checkpoint / LATENCIES),
        "metrics_path": str(run_dir / NUMBERS),
    }
    assert named(checkpoint) == named(checkpoint, nothing) == expected
    assert named(checkpoint, nothing, save=True) == {**expected, "save_latencies": str(run_dir / LATENCIES)}
    (checkpoint / LATENCIES).unlink()
    assert "latencies" not in named(checkpoint)


def test_the_users_paths_stand(checkpoint: Path) -> None:
    given = {"latencies": "mine.json", "metrics_path": "numbers.json", "save_latencies": "kept.json"}
    assert named(checkpoint, given) == {"policy": "plas", **given}


def test_a_resumed_run_goes_on_with_its_own_latencies(checkpoint: Path) -> None:
    assert named(checkpoint, {"latencies": "mine.json"}, resumed=True)["latencies"] == str(checkpoint / LATENCIES)
    (checkpoint / LATENCIES).unlink()
    assert named(checkpoint, {"latencies": "mine.json"}, resumed=True)["latencies"] == "mine.json"


def test_relative_folders_become_whole(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine core may run elsewhere."""
    monkeypatch.chdir(checkpoint.parent)
    own = with_files({"turnstile": {}}, checkpoint=Path("step-2"), run_dir=Path("run"))["turnstile"]
    assert own == {"latencies": str(checkpoint / LATENCIES), "metrics_path": str(checkpoint.parent / "run" / NUMBERS)}
