"""Pictures say what the numbers say: written as SVG with its text as text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from rollout.episode import Episode
from rollout.evaluation import report
from rollout.plots import plot_behaviour, plot_evaluations, plot_reward, read_jsonl, smoothed


@pytest.fixture(autouse=True)
def text_as_text() -> Any:
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        yield


def words(path: Path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())


def record(right: dict[str, list[bool]]) -> dict[str, Any]:
    """An evaluation of one question a difficulty."""
    episodes = [Episode(d, d, i, d, success=s) for d, samples in right.items() for i, s in enumerate(samples)]
    return {"sampled": report(episodes, [])}


def test_smoothed_is_a_centred_mean_that_shrinks_at_the_ends() -> None:
    assert smoothed([1.0, 2.0, 3.0, 4.0, 10.0]) == [2.0, 2.5, 4.0, 4.75, 17 / 3]
    assert smoothed([]) == []


def test_a_run_without_evaluations_still_has_its_pictures(tmp_path: Path) -> None:
    rows = [{"step": 1, "reward": 0.5, "rollout/tool_calls": 1.0, "rollout/tokens_per_episode": 9.0}]
    plot_reward(rows, [], tmp_path / "reward.png")
    plot_behaviour(rows, tmp_path / "behaviour.png")
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("reward", "behaviour"))
    assert read_jsonl(tmp_path / "absent.jsonl") == []


def test_every_evaluation_is_named(tmp_path: Path) -> None:
    records = [("one", record({"1": [True], "2": [False]})), ("two", record({"1": [False], "2": [True]}))]
    plot_evaluations(records, tmp_path / "e.svg")
    assert {"one", "two", "1", "2", "sampled"} <= set(words(tmp_path / "e.svg"))


def test_tasks_of_different_difficulties_keep_their_own_labels(tmp_path: Path) -> None:
    records = [("arithmetic", record({"2": [True], "3": [False]})), ("gsm8k", record({"7 steps": [True]}))]
    plot_evaluations(records, tmp_path / "e.svg")
    assert [word for word in words(tmp_path / "e.svg") if word in ("2", "3", "7 steps")] == ["2", "3", "7 steps"]


def test_questions_that_are_all_right_in_one_third_can_be_drawn(tmp_path: Path) -> None:
    """Rounding puts their mean a bit beyond the end of its interval."""
    one_third = {f"{i}": [True, False, False] for i in range(100)}
    plot_evaluations([("one", record(one_third))], tmp_path / "e.svg")
