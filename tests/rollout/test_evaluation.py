"""Figures of episodes: unbiased estimates, intervals, and what is counted apart."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.config import EvaluationConfig, LimitsConfig
from rollout.environment import Row
from rollout.episode import Episode, Sequence, Status, ToolCall, ToolResult, Turn
from rollout.errors import UserError
from rollout.evaluation import bootstrap, evaluate, figures, pass_at_k, report
from rollout.runner import Runner
from rollout.speaker import Policy
from rollout.tasks import ToolEnvironment


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(case: tuple[int, int, int]) -> None:
    n, correct, k = case
    subsets = list(combinations([True] * correct + [False] * (n - correct), k))
    assert math.isclose(pass_at_k(n, correct, k), sum(map(any, subsets)) / len(subsets), abs_tol=1e-12)


@pytest.mark.parametrize("n, correct, k", [(3, 1, 4), (3, 1, 0), (3, 4, 1), (3, -1, 1), (0, 0, 0)])
def test_pass_at_k_refuses_what_cannot_be(n: int, correct: int, k: int) -> None:
    with pytest.raises(ValueError, match=r"k must be in 1\.\.n and right in 0\.\.n"):
        pass_at_k(n, correct, k)


@pytest.mark.parametrize("p, n", [(0.5, 400), (0.9, 1000), (0.97, 2000)])
def test_bootstrap_meets_the_normal_interval_of_a_bernoulli_mean(p: float, n: int) -> None:
    low, high = bootstrap([1.0] * round(p * n) + [0.0] * (n - round(p * n)))
    half = 1.959964 * math.sqrt(p * (1 - p) / n)
    assert low == pytest.approx(p - half, abs=0.12 * half) and high == pytest.approx(p + half, abs=0.12 * half)
    narrow = bootstrap([1.0] * round(p * n) + [0.0] * (n - round(p * n)), level=0.5)
    assert narrow[1] - narrow[0] == pytest.approx(2 * 0.674490 * half / 1.959964, rel=0.15)


def test_bootstrap_of_equal_values_is_a_point_and_the_same_each_time() -> None:
    assert bootstrap([1.0]) == (1.0, 1.0)
    assert bootstrap([0.0] * 50) == (0.0, 0.0)
    values = np.random.default_rng(0).random(5000).tolist()
    assert bootstrap(values) == bootstrap(values) != bootstrap(values, seed=1)


def episode(
    prompt: str,
    success: bool,
    *,
    sample: int = 0,
    difficulty: str = "",
    calls: int = 0,
    tokens: int = 4,
    **fields: object,
) -> Episode:
    sequence = Sequence.open([1, 2])
    sequence.append_own([0] * tokens, [0.0] * tokens, [0] * tokens)
    asked = ToolCall("calculator", {})
    turns = [Turn("hm" if calls else "", "4", [asked] * calls, [ToolResult(asked, "4", False, 0.0)] * calls)]
    made = Episode(prompt, prompt, sample, difficulty, [sequence], turns, success=success)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_questions_with_several_samples_count_by_their_mean() -> None:
    right = {"a": [True, True, False, False], "b": [True, False, False, False], "c": [False] * 4}
    episodes = [episode(q, s, sample=i) for q, samples in right.items() for i, s in enumerate(samples)]
    # one of the last question's samples was lost: it counts by the mean of those that are left
    result = figures(episodes[:-1], samples=4)
    assert result["accuracy"] == pytest.approx((0.5 + 0.25 + 0) / 3) and result["questions"] == 3
    assert result["pass@2"] == pytest.approx(sum(pass_at_k(4, c, 2) for c in (2, 1, 0)) / 3)
    assert result["pass@4"] == 1.0, "of the questions that have four samples, each has a right one"
    assert "pass@1" not in result and "pass@3" not in result
    assert result["accuracy_low"] <= result["accuracy"] <= result["accuracy_high"]


def test_behaviour_is_counted_an_episode() -> None:
    broken = Turn("", "", [], well_formed=False)
    result = figures(
        [
            episode("a", True, calls=3, tokens=10),
            episode("b", True, calls=1, tokens=4),
            episode("c", False, tokens=1, turns=[broken], status=Status.TRUNCATED),
            episode("d", False, tokens=1),
        ]
    )
    assert result["tool_calls"] == 1.0 and result["tool_productivity"] == 0.5 and result["tokens"] == 4.0
    assert result["thinking"] == 0.5 and result["ill_formed"] == result["truncated"] == 0.25


def thinking(thought: bool, need: object) -> Episode:
    return episode("a", True, turns=[Turn("hm" if thought else "", "4")], needs_thought=need)


def test_trigger_shows_a_collapse_that_f1_hides() -> None:
    always = [thinking(True, need) for need in (True, False) * 50]
    assert figures(always)["trigger"] == {
        "decisions": 100,
        "accuracy": 0.5,
        "precision": 0.5,
        "recall": 1.0,
        "f1": pytest.approx(2 / 3),
    }
    never = figures([thinking(False, need) for need in (True, False)])["trigger"]
    assert never == {"decisions": 2, "accuracy": 0.5, "precision": None, "recall": 0.0, "f1": 0.0}
    assert figures([thinking(True, None)])["trigger"] is None


def test_trigger_counts_labels_turn_by_turn() -> None:
    turns = [Turn("hm", ""), Turn("", ""), Turn("hm", "4")]
    made = figures([episode("a", True, turns=turns, needs_thought=[True, True, None])])["trigger"]
    assert made is not None and made["decisions"] == 2 and made["accuracy"] == 0.5 and made["precision"] == 1.0


def test_e3_is_accuracy_squared_over_tokens_and_costs_have_intervals() -> None:
    result = figures([episode("a", True, tokens=4, calls=1), episode("b", False, tokens=8)])
    assert result["e3"] == pytest.approx(0.25 / 6)
    for name, low, high in (("tokens", 4, 8), ("tool_calls", 0, 1), ("thinking", 0, 1)):
        assert low <= result[f"{name}_low"] <= result[name] <= result[f"{name}_high"] <= high


def test_productivity_is_null_where_nothing_was_called() -> None:
    assert figures([episode("a", True)])["tool_productivity"] is None


def test_memorised_facts_stand_apart_and_leave_accuracy_alone() -> None:
    rows = [Row("a", [], 1, "1", {"memorised": True}), Row("b", [], 1, "2"), Row("c", [], 1, "2")]
    episodes = [episode("a", True, difficulty="1"), *(episode(q, q == "b", difficulty="2") for q in "bc")]
    result = report(episodes, rows)
    assert result["accuracy"] == 0.5 and result["questions"] == 2 and result["facts"]["accuracy"] == 1.0
    assert {d: f["accuracy"] for d, f in result["by_difficulty"].items()} == {"1": 1.0, "2": 0.5}
    only_facts = report(episodes[:1], rows[:1])
    assert only_facts["accuracy"] == 1.0 and "facts" not in only_facts


def test_a_lost_sample_leaves_no_pass_at_k_to_report() -> None:
    assert "pass@2" not in figures([episode("a", True)], samples=2)


def test_when_every_episode_was_lost_there_is_one_line_to_read() -> None:
    class Lost:
        async def open(self, *args: object) -> None:
            raise OSError("the disk is gone")

        async def close(self, *args: object) -> None: ...

    class Nobody(Policy):
        def speaker(self) -> Lost:  # type: ignore[override]
            return Lost()

    from rollout.engines import Sampling

    runner = Runner(lambda: ToolEnvironment([], lambda answer, gold: True), LimitsConfig(retries=0))
    policy = Nobody(None, None, Sampling(max_tokens=1), 16)  # type: ignore[arg-type]
    rows = [Row("a", [], 1), Row("b", [], 1)]
    with pytest.raises(UserError, match=r"all 2 episodes were lost to .*OSError"):
        evaluate(runner, policy, rows, EvaluationConfig(greedy=False))
    runner.close()
