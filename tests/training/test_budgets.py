"""Members of the budget group, and the history of success rates that they go by."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.environment import Row
from rollout.episode import Episode, Sequence
from rollout.errors import UserError
from training.budgets import BayesKnapsack, Budget, Knapsack, Uniform
from training.members import BayesKnapsackConfig, KnapsackConfig
from training.success_history import FILE, SuccessHistory


def rows(n: int) -> list[Row]:
    return [Row(f"q{i}", [{"role": "user", "content": "?"}], "") for i in range(n)]


def group(prompt: int, right: int, wrong: int, *, visit: int = 0, tokens: int = 3) -> list[Episode]:
    """A finished group; its shaped rewards say the contrary of the verifier."""
    episodes = []
    for sample in range(right + wrong):
        sequence = Sequence.open([1])
        sequence.append_own([2] * tokens, [0.0] * tokens, [0] * tokens)
        success = sample < right
        shaped = {"task": float(not success)}
        episodes.append(
            Episode(f"q{prompt}", f"q{prompt}.{visit}", sample, "", [sequence], rewards=shaped, success=success)
        )
    return episodes


def seen(budget: Budget, *counts: tuple[int, int]) -> list[int]:
    """What the budget gives to prompts with so many right and wrong so far."""
    for prompt, (right, wrong) in enumerate(counts):
        budget.observe(group(prompt, right, wrong))
    return budget(rows(len(counts)))


def test_uniform_gives_everyone_the_same() -> None:
    assert seen(Uniform(5), (3, 0), (0, 0), (1, 1)) == [5, 5, 5]


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=20), st.integers(2, 12))
def test_every_budget_spends_its_total_within_its_bounds(counts: list[tuple[int, int]], samples: int) -> None:
    for budget in (Knapsack(samples, 2, 32), BayesKnapsack(samples, 0, 32), BayesKnapsack(samples, 2, 32)):
        given_out = seen(budget, *counts)
        assert sum(given_out) == samples * len(counts)
        assert all(n == 0 or 2 <= n <= 32 for n in given_out) and min(given_out) >= budget.low


def test_before_anything_was_seen_everyone_gets_the_same() -> None:
    assert Knapsack(8)(rows(5)) == BayesKnapsack(8)(rows(5)) == [8] * 5
    assert seen(Knapsack(8, least_seen=8), (1, 6), (7, 0)) == [8, 8]  # seven are too few to judge by


def test_the_published_rule_by_hand() -> None:
    # Everyone gets 2. Of 8 · 4 - 8 = 24 more the varied one wants ln .1 / ln .75 = 8, the failed one gets the rest.
    assert seen(Knapsack(8), (8, 0), (0, 8), (2, 6), (8, 0)) == [2, 2 + 16, 2 + 8, 2]
    # Nobody varies: what is left goes to those that never succeeded, and without any to everyone.
    assert seen(Knapsack(8), (8, 0), (0, 8), (0, 8)) == [2, 11, 11]
    assert seen(Knapsack(8), (8, 0), (8, 0)) == [8, 8]
    # A hard prompt with much to gain before an easy one; nobody beyond the bound.
    hard, easy = seen(Knapsack(8, high=12), (3, 9), (11, 1))
    assert (hard, easy) == (12, 4)


def test_rates_are_those_of_the_last_visits_that_are_enough() -> None:
    history = SuccessHistory()
    history.add(group(0, 8, 0, visit=0))
    history.add(group(0, 2, 2, visit=1))
    history.add(group(0, 0, 4, visit=2))
    assert history.last_rates(["q0"], least=4) == pytest.approx([0.0])
    assert history.last_rates(["q0"], least=8) == pytest.approx([0.25])
    assert history.last_rates(["q0"], least=9) == pytest.approx([10 / 16])
    assert np.isnan(history.last_rates(["q0", "q1"], least=17)).all()


def test_a_posterior_forgets_neither_failures_nor_hope() -> None:
    never, seldom, even, always = seen(BayesKnapsack(8, low=0), (0, 64), (8, 24), (16, 16), (64, 0))
    assert seldom > even > never and never < 8 and always <= 2
    few, many = seen(BayesKnapsack(8, low=0), (0, 4), (0, 400))
    assert few > many  # four failures say little


def test_what_was_seen_half_lives_ago_counts_less() -> None:
    history = SuccessHistory()
    history.add(group(0, 8, 0))
    history.now = 10
    history.add(group(0, 0, 4, visit=1))
    assert [float(x[0]) for x in history.counts(["q0"], half_life=5.0)] == [2.0, 4.0]
    assert [float(x[0]) for x in history.counts(["q0"])] == [8.0, 4.0]


def test_costs_in_tokens_bound_the_budget() -> None:
    budget = BayesKnapsack(8, low=2, high=64, cost="tokens")
    budget.observe(group(0, 4, 4, tokens=100))
    budget.observe(group(1, 4, 4, tokens=10))
    assert budget.history is not None and budget.history.tokens(["q0", "q1", "q2"]).tolist() == [100, 10, 55]
    long, short, unseen = budget(rows(3))
    assert 100 * long + 10 * short + 55 * unseen <= 8 * 165
    assert short > long


def test_history_counts_parts_of_a_group_together_and_survives_a_checkpoint(tmp_path: Path) -> None:
    history = SuccessHistory(keep=2)
    history.add(group(0, 1, 0))
    history.add(group(0, 0, 2))
    assert [(v.rollouts, v.successes, v.tokens) for v in history.visits["q0"]] == [(3, 1, 9)]
    for visit in (1, 2):
        history.now += 1
        history.add(group(0, 2, 2, visit=visit))
    assert [v.group_id for v in history.visits["q0"]] == ["q0.1", "q0.2"]
    again = SuccessHistory(keep=2)
    again.load_state_dict(history.state_dict())
    assert again.state_dict() == history.state_dict()
    assert history.spent() == [(0.5, 4, 2)]
    history.write(tmp_path)
    budget = BayesKnapsack(history=str(tmp_path))
    assert budget.history is not None
    budget.observe(group(0, 4, 0, visit=1))  # of this run: not the other's visit with the same name
    assert [v.rollouts for v in budget.history.visits["q0"]] == [4, 4, 4]


def test_histories_of_processes_merge_once() -> None:
    one, other = SuccessHistory(), SuccessHistory()
    one.add(group(0, 1, 3))
    other.add(group(0, 1, 3))
    other.add(group(1, 2, 2))
    other.now = 7
    for _ in range(2):
        one.merge(other)
    assert [x.tolist() for x in one.counts(["q0", "q1"])] == [[1, 2], [3, 2]]
    assert one.now == 7


def test_a_file_that_is_no_history_is_refused_in_one_line(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"now": 1}', '{"now": 1, "visits": {"q": [{"a": 1}]}}'):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(UserError, match=rf"budget\.history: .*{FILE} is no history .*; give a checkpoint"):
            Knapsack(history=str(tmp_path))
    with pytest.raises(UserError, match=r"budget\.history: "):
        Knapsack(history=str(tmp_path / "absent"))


@pytest.mark.parametrize(
    "settings, key",
    [
        ({"samples": 1}, "budget.samples"),
        ({"samples": 9, "high": 8}, "budget.samples"),
        ({"low": 1}, "budget.low"),
        ({"low": -2}, "budget.low"),
        ({"low": 0}, "budget.low"),
        ({"least_seen": 0}, "budget.least_seen"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, int], key: str) -> None:
    with pytest.raises(UserError, match=f"^{key}: "):
        KnapsackConfig(**settings)


@pytest.mark.parametrize(
    "settings, key",
    [
        ({"prior": [1.0]}, "prior"),
        ({"prior": [0.0, 1.0]}, "prior"),
        ({"half_life": 0.0}, "half_life"),
        ({"cost": "x"}, "cost"),
    ],
)
def test_impossible_posteriors_are_refused(settings: dict[str, object], key: str) -> None:
    with pytest.raises(UserError, match=rf"^budget\.{key}: "):
        BayesKnapsackConfig(**settings)  # type: ignore[arg-type]
