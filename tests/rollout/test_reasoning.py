"""Modes that are forced or told: who gets them, and what a told row says."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from rollout.environment import Row
from rollout.reasoning import TOLD, forced_modes, maybe_told, told

ROW = Row("q", [{"role": "user", "content": "2+2?"}], 4, "1", {"a": 2})


def test_a_told_row_asks_for_its_mode_and_is_a_prompt_of_its_own() -> None:
    never = told(ROW, "never")
    assert never.messages == [{"role": "system", "content": TOLD["never"]}, *ROW.messages]
    assert never.id != ROW.id and never.extras == {"a": 2, "needs_thought": False, "told": "never"}
    instructed = Row("s", [{"role": "system", "content": "Be kind."}, *ROW.messages], 4)
    assert told(instructed, "always").messages[0]["content"] == f"Be kind.\n{TOLD['always']}"
    assert instructed.messages[0]["content"] == "Be kind.", "the task's own row stays as it is"


def test_shares_of_visits_are_told_by_their_names_alone() -> None:
    made = [maybe_told(ROW, f"q.{i}", 0.2, 0.3) for i in range(4000)]
    counts = Counter(row.extras.get("told") for row in made)
    assert abs(counts["always"] - 800) < 100 and abs(counts["never"] - 1200) < 120
    assert made == [maybe_told(ROW, f"q.{i}", 0.2, 0.3) for i in range(4000)]
    assert maybe_told(ROW, "q.0", 0.0, 0.0) is ROW


@given(st.integers(0, 40), st.floats(0, 1), st.floats(0, 1))
def test_forced_modes_fill_the_group_and_no_more(count: int, always: float, never: float) -> None:
    never = min(never, 1 - always)
    modes = forced_modes(count, always, never)
    assert len(modes) == count
    for mode, share in (("always", always), ("never", never)):
        assert abs(modes.count(mode) - count * share) <= 1
