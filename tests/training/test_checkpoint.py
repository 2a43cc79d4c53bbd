"""A checkpoint is whole or absent, whatever happens while it is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import SafetensorError

from rollout.errors import UserError
from training.checkpoint import latest, steps, writing

PARTS = ("trainer_state.json", "stream.pt", "optimizer.pt", "scheduler.pt")


def write(folder: Path, step: int, keep_last: int = 10, text: str = "") -> None:
    with writing(folder, step, keep_last) as scratch:
        for name in PARTS:
            (scratch / name).write_text(json.dumps({"global_step": step, "text": text}))
        (scratch / "adapter").mkdir()
        (scratch / "adapter" / "adapter_config.json").write_text("{}")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail] unexpected pos 64 vs 0: cannot write file\nmore"),
        SafetensorError("IoError: File too large"),
    ],
    ids=["os", "torch", "safetensors"],
)
def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path: Path, error: Exception) -> None:
    write(tmp_path, 2)
    with pytest.raises(UserError, match=r"cannot write .*step-4: .*; free disk space, then resume=true") as refused:  # noqa: SIM117
        with writing(tmp_path, 4, 1) as scratch:
            (scratch / "half").write_text("x")
            raise error
    assert "\n" not in str(refused.value)
    assert names(tmp_path) == ["step-2"], "no half checkpoint, and the old one is not yet given up"


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt(), SystemExit(1), RuntimeError("shapes differ")])
def test_any_other_error_passes_through_and_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, writing(tmp_path, 4, 1) as scratch:
        (scratch / "half").write_text("x")
        raise error
    assert raised.value is error and names(tmp_path) == []


def test_all_but_the_last_are_deleted_by_number_not_by_name(tmp_path: Path) -> None:
    (tmp_path / "warm_start").mkdir()
    for step in (8, 9, 10, 11):
        write(tmp_path, step, keep_last=2)
    assert names(tmp_path) == ["step-10", "step-11", "warm_start"]
    assert [step for step, _ in steps(tmp_path)] == [10, 11]
    assert latest(tmp_path) == tmp_path / "step-11"


def test_a_step_that_is_made_again_replaces_its_folder_and_a_dead_runs_scratch(tmp_path: Path) -> None:
    write(tmp_path, 3, text="before")
    (tmp_path / "step-3" / "stray").write_text("x")
    (tmp_path / ".step-3.tmp").mkdir()
    (tmp_path / ".step-3.tmp" / "half").write_text("killed while it wrote")
    assert latest(tmp_path) == tmp_path / "step-3", "what was never renamed does not count"
    write(tmp_path, 3, text="after")
    assert names(tmp_path) == ["step-3"] and names(tmp_path / "step-3") == sorted([*PARTS, "adapter", "parts.json"])
    assert json.loads((tmp_path / "step-3" / "stream.pt").read_text())["text"] == "after"


@pytest.mark.parametrize("name", [*PARTS, "adapter/adapter_config.json"])
def test_a_checkpoint_that_lacks_a_part_is_refused_by_name(tmp_path: Path, name: str) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)
    (tmp_path / "step-2" / name).unlink()
    with pytest.raises(
        UserError, match=rf"step-2: {name} is missing; delete this folder to resume from the one before"
    ):
        latest(tmp_path)


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert latest(tmp_path) is None and latest(tmp_path / "absent") is None
