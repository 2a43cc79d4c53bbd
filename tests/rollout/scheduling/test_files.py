"""The plug-in's files: latencies beside a checkpoint are found, numbers go to the run, a user's own path stands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rollout.scheduling.files import LATENCIES, NUMBERS, VARIABLES, for_replica, with_files
from rollout.scheduling.options import KEY, Options

NOTHING = {"latencies": None, "metrics_path": None, "save_latencies": None}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return saved(tmp_path)


def saved(run_dir: Path) -> Path:
    folder = run_dir / "step-2"
    folder.mkdir(parents=True)
    (folder / LATENCIES).write_text("{}")
    return folder


def engine(
    checkpoint: Path, given: dict[str, Any] | None = None, *, run_dir: Path | None = None, **flags: bool
) -> tuple[dict[str, Any], Options]:
    """``additional_config``, and the options as the engine's process reads them out of it."""
    options = {"turnstile": {"policy": "plas", **(given or {})}, "other": 1}
    found, variables = with_files(options, checkpoint=checkpoint, run_dir=run_dir or checkpoint.parent, **flags)
    assert options["turnstile"] == {"policy": "plas", **(given or {})}, "the settings themselves stay as they are"
    assert found["other"] == 1 and found["turnstile"]["policy"] == "plas"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        return found, Options.read(found)


def files(checkpoint: Path, given: dict[str, Any] | None = None, **flags: bool) -> dict[str, Path]:
    """Those that the engine gets."""
    _, options = engine(checkpoint, given, **flags)
    return {name: path for name in VARIABLES if (path := getattr(options, name)) is not None}


def test_what_lies_beside_the_checkpoint_is_loaded(checkpoint: Path) -> None:
    run_dir = checkpoint.parent
    expected = {"latencies": checkpoint / LATENCIES, "metrics_path": run_dir / NUMBERS}
    assert files(checkpoint) == files(checkpoint, NOTHING) == expected
    assert files(checkpoint, NOTHING, save=True) == {**expected, "save_latencies": run_dir / LATENCIES}
    (checkpoint / LATENCIES).unlink()
    assert "latencies" not in files(checkpoint)


def test_the_users_paths_stand(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"latencies": "mine.json", "metrics_path": "numbers.json", "save_latencies": "kept.json"}
    assert files(checkpoint, given) == {name: Path(path) for name, path in given.items()}
    monkeypatch.setenv("SCRATCH", str(checkpoint))
    assert files(checkpoint, {"metrics_path": "${SCRATCH}/n.json"})["metrics_path"] == checkpoint / "n.json"


def test_a_resumed_run_goes_on_with_its_own_latencies(checkpoint: Path) -> None:
    assert files(checkpoint, {"latencies": "mine.json"}, resumed=True)["latencies"] == checkpoint / LATENCIES
    (checkpoint / LATENCIES).unlink()
    assert files(checkpoint, {"latencies": "mine.json"}, resumed=True)["latencies"] == Path("mine.json")


def test_relative_folders_become_whole(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine core may run elsewhere."""
    monkeypatch.chdir(checkpoint.parent)
    Path("run").mkdir()
    _, options = engine(Path("step-2"), run_dir=Path("run"))
    assert options.latencies == checkpoint / LATENCIES
    assert options.metrics_path == checkpoint.parent / "run" / NUMBERS


def test_every_run_has_the_same_additional_config(tmp_path: Path) -> None:
    """vLLM's compile cache is keyed by it: paths in it would compile every start anew."""
    first, second = saved(tmp_path / "2026-11-22_10-00-00"), saved(tmp_path / "price: 5$ {x}")
    config, options = engine(first, {"k_own": 1})
    same, others = engine(second, {"k_own": 1})
    assert config == same and str(tmp_path) not in json.dumps(config)
    assert (options.metrics_path, others.metrics_path) == (first.parent / NUMBERS, second.parent / NUMBERS)
    (second / LATENCIES).unlink()
    assert engine(second, {"k_own": 1, **NOTHING}, save=True)[0] == config
    assert engine(second, {"k_own": 1, "latencies": "mine.json"})[0] == config


def test_replicas_write_what_the_user_names_beside_each_other() -> None:
    named = {
        "save_latencies": "/d/kept.json",
        "metrics_path": "$D/stats.json",
        "latencies": "/d/l.json",
        "metrics_port": 9,
    }
    options = {KEY: {"policy": "turnstile", **named}, "other": 1}
    assert for_replica(options, 0) == options
    second = for_replica(options, 1)
    moved = {"save_latencies": "/d/kept.1.json", "metrics_path": "$D/stats.1.json", "metrics_port": 10}
    assert second == {**options, KEY: {**options[KEY], **moved}}
    assert for_replica(options, 2, engines=3)[KEY]["metrics_port"] == 15, "each engine of a server has a port"
    free = {KEY: {"policy": "turnstile", "metrics_port": 0, "metrics_path": None}}
    assert for_replica(free, 1) == free
