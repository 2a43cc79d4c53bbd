"""What tools took: windows, counts, the file that travels."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.errors import UserError
from rollout.scheduling import latency
from rollout.scheduling.latency import PERSON, ToolLatencies

GAPS = st.lists(st.tuples(st.sampled_from(["bash", "search", PERSON]), st.floats(0, 1e4)), max_size=60)


def filled(gaps: list[tuple[str, float]], limit: int = 8) -> ToolLatencies:
    latencies = ToolLatencies(limit)
    for tool, seconds in gaps:
        latencies.observe(tool, seconds)
    return latencies


def state(latencies: ToolLatencies) -> dict[str, object]:
    names = [*latencies.tools(), PERSON]
    by_tool = {name: (latencies.count(name), latencies.durations(name)) for name in names}
    return {"tools": by_tool, "all": (latencies.total(), latencies.everything())}


@settings(max_examples=60, deadline=None)
@given(GAPS, st.floats(0, 1e4))
def test_a_window_is_the_tail_of_what_came(gaps: list[tuple[str, float]], t: float) -> None:
    latencies = filled(gaps)
    for tool in ("bash", "search", PERSON, "never seen"):
        seconds = [s for name, s in gaps if name == tool]
        assert latencies.durations(tool) == seconds[-8:]
        assert latencies.count(tool) == len(seconds)
        recent = np.asarray(seconds[-8:])
        assert latencies.cdf(tool, t) == pytest.approx(np.mean(recent <= t) if len(recent) else 0.0)
        if len(recent):
            expected = np.quantile(recent, [0.0, 0.5, 0.9, 1.0], method="inverted_cdf")
            assert latencies.quantiles(tool, [0.0, 0.5, 0.9, 1.0]) == pytest.approx(expected)
    tools = [s for name, s in gaps if name != PERSON]
    assert latencies.everything() == tools[-8:]
    assert latencies.total() == len(tools)
    assert PERSON not in latencies.tools()


def test_an_unknown_tool_has_no_quantiles() -> None:
    assert all(math.isnan(q) for q in ToolLatencies().quantiles("unseen"))


def test_bad_seconds() -> None:
    latencies = filled([("bash", -3.0), ("bash", math.nan), ("bash", math.inf), ("bash", -math.inf), ("bash", 2)])
    assert latencies.durations("bash") == [0.0, 2.0]
    assert latencies.count("bash") == latencies.total() == 2
    with pytest.raises(ValueError, match="limit=0"):
        ToolLatencies(0)


def test_tools_are_bounded_and_the_one_seen_longest_ago_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "MOST_TOOLS", 2)
    latencies = filled([(PERSON, 9.0), ("a", 1.0), ("b", 2.0), ("a", 3.0), ("c", 4.0)])
    assert latencies.tools() == ["a", "c"]
    assert latencies.durations("b") == []
    assert latencies.everything() == [1.0, 2.0, 3.0, 4.0]
    assert latencies.durations(PERSON) == [9.0]


@settings(max_examples=60, deadline=None)
@given(GAPS, GAPS)
def test_merge_counts_exactly_and_keeps_the_newest_of_each(
    ours: list[tuple[str, float]], theirs: list[tuple[str, float]]
) -> None:
    merged, other = filled(ours), filled(theirs)
    before = state(other)
    merged.merge(other)
    assert state(other) == before
    for tool in ("bash", "search", PERSON):
        mine = [s for name, s in ours if name == tool][-8:]
        yours = [s for name, s in theirs if name == tool][-8:]
        kept = merged.durations(tool)
        assert merged.count(tool) == sum(name == tool for name, _ in ours + theirs)
        assert len(kept) == min(len(mine) + len(yours), 8)
        assert any(kept == mine[len(mine) - k :] + yours[len(yours) - len(kept) + k :] for k in range(len(mine) + 1))
        if len(mine) == len(yours) == 8:
            assert kept == mine[-4:] + yours[-4:]
        assert merged.cdf(tool, math.inf) == float(bool(kept))


@settings(max_examples=30, deadline=None)
@given(GAPS)
def test_saved_and_loaded_is_the_same(tmp_path_factory: pytest.TempPathFactory, gaps: list[tuple[str, float]]) -> None:
    directory = tmp_path_factory.mktemp("latencies")
    path = directory / "tool_latencies.json"
    latencies = filled(gaps)
    latencies.save(path)
    loaded = ToolLatencies(8)
    loaded.load(path)
    assert state(loaded) == state(latencies)
    assert [p.name for p in directory.iterdir()] == ["tool_latencies.json"]


def test_a_smaller_window_loads_the_newest(tmp_path: Path) -> None:
    filled([("bash", float(i)) for i in range(8)]).save(tmp_path / "l.json")
    small = ToolLatencies(3)
    small.load(tmp_path / "l.json")
    assert small.durations("bash") == [5.0, 6.0, 7.0]
    assert small.count("bash") == 8


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "l.json"
    filled([("bash", 1.0)]).save(path)
    before = path.read_text()
    (tmp_path / "l.json.tmp").mkdir()
    with pytest.raises(OSError):
        filled([("bash", 2.0)]).save(path)
    assert path.read_text() == before


GOOD = {"version": 1, "tools": {}, "person": {"count": 0, "seconds": []}, "all": {"count": 0, "seconds": []}}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "{}",
        "\x00\xff",
        json.dumps(GOOD | {"version": 2}),
        json.dumps(GOOD | {"tools": []}),
        json.dumps(GOOD | {"tools": {PERSON: {"count": 1, "seconds": [1.0]}}}),
        json.dumps(GOOD | {"tools": {"a": {"count": 0, "seconds": [1.0]}}}),
        json.dumps(GOOD | {"tools": {"a": {"count": 1, "seconds": [-1.0]}}}),
        json.dumps(GOOD | {"tools": {"a": {"count": 1, "seconds": [math.nan]}}}),
        json.dumps(GOOD | {"tools": {"a": {"count": 1, "seconds": ["1"]}}}),
        json.dumps(GOOD | {"tools": {"a": {"count": 1.5, "seconds": [1.0]}}}),
        json.dumps(GOOD | {"tools": {"a": {"count": True, "seconds": []}}}),
        json.dumps(GOOD | {"tools": {"a": {"count": 1, "seconds": [10**400]}}}),
        json.dumps({key: GOOD[key] for key in ("version", "tools", "all")}),
    ],
)
def test_a_bad_file_is_refused_in_one_line_and_adds_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "l.json"
    path.write_text(text, encoding="latin-1")
    latencies = filled([("bash", 1.0)])
    before = state(latencies)
    with pytest.raises(UserError, match=r"l\.json") as error:
        latencies.load(path)
    assert "\n" not in str(error.value)
    assert state(latencies) == before


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        ToolLatencies().load(tmp_path / "absent.json")
