"""Pictures say what the numbers say: written as SVG with its text as text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.episode import Episode
from rollout.evaluation import report
from rollout.plots import (
    pareto_front,
    plot_behaviour,
    plot_evaluations,
    plot_pareto,
    plot_reward,
    read_jsonl,
    smoothed,
)


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


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_the_pareto_front_is_what_no_other_beats(points: list[tuple[int, int]]) -> None:
    front = [points[i] for i in pareto_front(points)]

    def beats(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return a[0] <= b[0] and a[1] >= b[1] and a != b

    assert front == sorted({p for p in points if not any(beats(q, p) for q in points)})


def test_a_pareto_plot_has_a_panel_for_each_cost_that_differs(tmp_path: Path) -> None:
    results = [("one", record({"1": [True], "2": [False]})), ("two", record({"1": [False], "2": [True]}))]
    plot_pareto(results, tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()
    results[1][1]["sampled"] |= {"thinking": 0.5, "thinking_low": 0.4, "thinking_high": 0.6}
    plot_pareto(results, tmp_path / "p.svg")
    assert {"share that thinks", "one", "two"} <= set(words(tmp_path / "p.svg"))
    assert "own tokens an episode" not in words(tmp_path / "p.svg")


def test_tasks_of_different_difficulties_keep_their_own_labels(tmp_path: Path) -> None:
    records = [("arithmetic", record({"2": [True], "3": [False]})), ("gsm8k", record({"7 steps": [True]}))]
    plot_evaluations(records, tmp_path / "e.svg")
    assert [word for word in words(tmp_path / "e.svg") if word in ("2", "3", "7 steps")] == ["2", "3", "7 steps"]


def test_questions_that_are_all_right_in_one_third_can_be_drawn(tmp_path: Path) -> None:
    """Rounding puts their mean a bit beyond the end of its interval."""
    one_third = {f"{i}": [True, False, False] for i in range(100)}
    plot_evaluations([("one", record(one_third))], tmp_path / "e.svg")
