"""Budgets against closed forms, numerical integration and a dynamic programme."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import beta

from benchmarks.knapsack_optimality import best_by_programme, summed
from training.budgets import bayes_knapsack, knapsack, rollout_value
from training.knapsack import allocate, allocate_tokens, expected_gains, known_gains


def value(p: float, n: int) -> float:
    """The paper's, as it stands there."""
    return (1 - p**n - (1 - p) ** n) * p * (1 - p) ** 2 if n else 0.0


rates = st.lists(st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0, 0.5, 1e-9, 1 - 1e-9])), min_size=1, max_size=12)
counts_seen = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200)), min_size=1, max_size=12)


@given(rates, st.integers(1, 40))
def test_known_gains_add_up_to_the_papers_value(ps: list[float], most: int) -> None:
    sums = np.cumsum(known_gains(np.array(ps), most), axis=1)
    for p, row in zip(ps, sums, strict=True):
        assert row == pytest.approx([value(p, n) for n in range(1, most + 1)], abs=1e-12)


@pytest.mark.parametrize("successes, failures", [(0, 0), (3, 5), (8, 0), (0, 8), (2.5, 0.25), (300, 2)])
@pytest.mark.parametrize("prior", [(1.0, 1.0), (0.5, 2.0)])
def test_expected_gains_add_up_to_the_integral(successes: float, failures: float, prior: tuple[float, float]) -> None:
    gains = expected_gains(np.array([float(successes)]), np.array([float(failures)]), 512, prior=prior)
    sums = np.cumsum(gains[0])
    law = beta(prior[0] + successes, prior[1] + failures)
    for n in (1, 2, 3, 8, 64, 512):
        expected, _ = quad(lambda p, n=n: value(p, n) * law.pdf(p), 0, 1, points=[law.mean()], limit=500)
        assert sums[n - 1] == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_many_counts_are_as_good_as_knowing() -> None:
    ps = np.array([0.03, 0.2, 0.5, 0.9])
    many = 1e7
    assert expected_gains(many * ps, many * (1 - ps), 64) == pytest.approx(known_gains(ps, 64), rel=1e-4)


@given(counts_seen, st.integers(3, 512))
def test_gains_fall_and_a_third_rollout_is_worth_half_a_pair(seen: list[tuple[int, int]], most: int) -> None:
    s, f = (np.array(x, dtype=float) for x in zip(*seen, strict=True))
    for gains in (expected_gains(s, f, most), known_gains(s / np.maximum(s + f, 1), most)):
        assert (gains >= 0).all() and (np.diff(gains[:, 1:], axis=1) <= 1e-18).all()
        assert gains[:, 1] == pytest.approx(2 * gains[:, 2], rel=1e-12)


@given(counts_seen, st.data())
def test_allocation_is_the_programmes(seen: list[tuple[int, int]], data: st.DataObject) -> None:
    s, f = (np.array(x, dtype=float) for x in zip(*seen, strict=True))
    low, high = data.draw(st.sampled_from([0, 0, 2, 4])), data.draw(st.integers(4, 20))
    total = data.draw(st.integers(low * len(s), high * len(s)))
    gains = expected_gains(s, f, high) if data.draw(st.booleans()) else known_gains(s / np.maximum(s + f, 1), high)
    counts = allocate(gains, total, low)
    assert counts.sum() == total or (low == 0 and counts.sum() == total - 1)
    assert ((counts >= low) & (counts <= high) & ((counts != 1) | (low == 1))).all()
    assert summed(gains, counts) == pytest.approx(best_by_programme(gains, [1] * len(s), total, low), abs=1e-14)


@given(counts_seen, st.integers(0, 100))
def test_more_rollouts_are_never_worth_less(seen: list[tuple[int, int]], total: int) -> None:
    s, f = (np.array(x, dtype=float) for x in zip(*seen, strict=True))
    gains = expected_gains(s, f, 16)
    total = min(total, 16 * len(s) - 1)
    assert summed(gains, allocate(gains, total, 0)) <= summed(gains, allocate(gains, total + 1, 0)) + 1e-15


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=2, max_size=12, unique=True), st.randoms())
def test_permuted_prompts_get_permuted_rollouts(seen: list[tuple[int, int]], rng: Any) -> None:
    order = list(range(len(seen)))
    rng.shuffle(order)
    s, f = (np.array(x, dtype=float) for x in zip(*seen, strict=True))
    gains = expected_gains(s, f, 32)
    one, other = allocate(gains, 8 * len(s), 2), allocate(gains[order], 8 * len(s), 2)
    assert summed(gains, one) == pytest.approx(summed(gains[order], other), abs=1e-15)
    assert (
        gains[np.arange(len(s)), one - 1][order] == pytest.approx(gains[order][np.arange(len(s)), other - 1])
        or (one[order] != other).sum() <= 2
    )  # a tie at the last unit


def test_equal_prompts_get_equal_rollouts() -> None:
    gains = known_gains(np.full(7, 0.3), 128)
    assert allocate(gains, 56, 2).tolist() == [8] * 7
    assert sorted(allocate(gains, 58, 2).tolist()) == [8] * 5 + [9] * 2
    assert allocate(known_gains(np.array([0.0, 1.0, 0.0]), 16), 12, 2).tolist() == [4, 4, 4]  # nothing to choose by


def test_extreme_rates_and_counts() -> None:
    gains = expected_gains(np.array([0.0, 1e6, 0.0, 5.0]), np.array([1e6, 0.0, 0.0, 5.0]), 512)
    assert np.isfinite(gains).all()
    counts = allocate(gains, 64, 2)
    assert counts[0] == counts[1] == 2 and counts[2] > 2 and counts[3] > 2


@pytest.mark.parametrize("total", [7, 41])
def test_infeasible_totals_are_refused_with_both_sums(total: int) -> None:
    gains = known_gains(np.array([0.1, 0.2, 0.3, 0.4]), 10)
    with pytest.raises(ValueError, match=f"4 prompts of 2 to 10 rollouts take 8 to 40, and the total is {total};"):
        allocate(gains, total, 2)
    with pytest.raises(ValueError, match="4 prompts of 2 to 10 rollouts take 80 to inf, and the total is 79;"):
        allocate_tokens(gains, np.full(4, 10.0), 79, 2)


@given(counts_seen, st.data())
def test_costs_are_an_upper_bound_and_exchanges_leave_nothing_to_add(
    seen: list[tuple[int, int]], data: st.DataObject
) -> None:
    s, f = (np.array(x, dtype=float) for x in zip(*seen, strict=True))
    low = data.draw(st.sampled_from([0, 2]))
    costs = np.array(data.draw(st.lists(st.integers(1, 30), min_size=len(s), max_size=len(s))), dtype=float)
    total = int(low * costs.sum()) + data.draw(st.integers(0, 300))
    gains = expected_gains(s, f, 12)
    counts = allocate_tokens(gains, costs, total, low)
    assert counts @ costs <= total and ((counts >= low) & (counts <= 12) & (counts != 1)).all()
    left = total - counts @ costs
    assert all(n == 12 or (2 if n == 0 else 1) * cost > left for n, cost in zip(counts, costs, strict=True))
    optimum = best_by_programme(gains, [int(c) for c in costs], total, low)
    assert summed(gains, counts) <= optimum + 1e-12


def test_small_instances_by_trying_everything() -> None:
    gains = known_gains(np.array([0.02, 0.35, 0.6, 0.97]), 5)
    for total in range(21):
        tried = [summed(gains, np.array(way)) for way in product([0, 2, 3, 4, 5], repeat=4) if sum(way) <= total]
        assert summed(gains, allocate(gains, total, 0)) == pytest.approx(max(tried), abs=1e-15)


def test_the_public_value_is_the_papers() -> None:
    assert rollout_value(2, 0.5) == pytest.approx(0.5 * 0.125)
    assert rollout_value(1, 0.3) == rollout_value(0, 0.3) == rollout_value(8, 0.0) == rollout_value(8, 1.0) == 0.0
    table = rollout_value([[0], [1], [2], [7]], [0.1, 0.6])
    assert table.tolist() == [pytest.approx([value(p, n) if n > 1 else 0.0 for p in (0.1, 0.6)]) for n in (0, 1, 2, 7)]
    assert float(rollout_value(8, 1 / 3)) > max(rollout_value(8, 0.2), rollout_value(8, 0.5))


@given(st.lists(st.floats(0.001, 0.999), min_size=1, max_size=12), st.integers(2, 4), st.data())
def test_public_allocations_spend_the_total(ps: list[float], low: int, data: st.DataObject) -> None:
    total = data.draw(st.integers(low * len(ps), 16 * len(ps)))
    counts = knapsack(ps, total=total, low=low, high=16)
    assert counts.dtype == torch.int64 and int(counts.sum()) == total
    gains = known_gains(np.array(ps), 16)
    assert summed(gains, counts.numpy()) == pytest.approx(best_by_programme(gains, [1] * len(ps), total, low))
    with_ends = knapsack(torch.tensor([0.0, *ps, 1.0]), total=total + 2 * low, low=low, high=16)
    assert int(with_ends.sum()) == total + 2 * low and int(with_ends.min()) >= low and int(with_ends.max()) <= 16


@pytest.mark.parametrize(
    "call, problem",
    [
        (lambda: rollout_value(2, 1.5), r"p=1\.5 must be success rates"),
        (lambda: rollout_value(-1, 0.5), "n=-1 must be numbers of rollouts"),
        (lambda: knapsack([], total=0, low=2, high=8), "1-D and not empty"),
        (lambda: knapsack([[0.5]], total=4, low=2, high=8), "1-D and not empty"),
        (lambda: knapsack([0.5, 1.1], total=8, low=2, high=8), r"success_rates\[1\] is 1\.1"),
        (lambda: knapsack([0.5, float("nan")], total=8, low=2, high=8), r"success_rates\[1\] is nan"),
        (lambda: knapsack([0.0, 0.5], total=3, low=2, high=8), "take 4 to 16, and the total is 3"),
        (lambda: knapsack([0.5], total=4, low=5, high=4), "low=5 must be at least 0 and at most high=4"),
        (lambda: bayes_knapsack([1.0], [1.0, 2.0], total=4, low=0, high=8), "1 successes and 2 failures"),
        (lambda: bayes_knapsack([-1], [1], total=4, low=0, high=8), r"successes\[0\] is -1"),
        (lambda: bayes_knapsack([1], [1], total=4, low=0, high=8, prior=(0, 1)), r"prior=\(0, 1\) must be"),
        (lambda: bayes_knapsack([1], [1], total=4, low=0, high=8, cost=[0.0]), "give a positive one for each"),
    ],
)
def test_bad_input_is_a_value_error_with_the_remedy(call: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        call()
