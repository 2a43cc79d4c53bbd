"""The population of success rates, against what drew it, its own likelihood, and Bayes' rule one prompt at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import betabinom, binom

from training.population import RATES, fitted_population, posterior

COUNTS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=12)


def likelihood(successes: np.ndarray, seen: np.ndarray, weights: np.ndarray) -> float:
    return float(np.log(binom.pmf(successes[:, None], seen[:, None], RATES) @ weights).sum())


@pytest.mark.parametrize("true", [(0.3, 0.5), (1.0, 1.0), (5.0, 2.0), (0.1, 0.1)])
def test_it_is_likelier_than_the_beta_that_drew_the_counts(true: tuple[float, float]) -> None:
    rng = np.random.default_rng(3)
    seen = rng.integers(1, 33, 3000)
    successes = rng.binomial(seen, rng.beta(*true, 3000))
    weights = fitted_population(successes.astype(float), (seen - successes).astype(float))
    assert weights.sum() == pytest.approx(1) and weights.min() > 0
    assert weights @ RATES == pytest.approx(true[0] / sum(true), abs=0.02)
    assert likelihood(successes, seen, weights) > betabinom(seen, *true).logpmf(successes).sum() - 3


def test_broken_prompts_are_told_from_hard_ones() -> None:
    rng = np.random.default_rng(0)
    rates = np.where(np.arange(1000) < 300, 0.0, rng.beta(8, 2, 1000))
    successes = rng.binomial(8, rates).astype(float)
    weights = fitted_population(successes, 8 - successes)
    assert weights[RATES < 0.02].sum() == pytest.approx(0.3, abs=0.04)
    hopes = posterior(np.array([0.0, 0.0, 1.0]), np.array([2.0, 8.0, 7.0]), weights) @ RATES
    assert hopes[1] < 0.01 < hopes[0] and hopes[2] > 0.1, "eight failures are the end, one success is a beginning"


@given(COUNTS)
def test_a_posterior_is_bayes_rule(counts: list[tuple[int, int]]) -> None:
    s, f = (np.array(each, dtype=float) for each in zip(*counts, strict=True))
    weights = fitted_population(s, f)
    for row, successes, failures in zip(posterior(s, f, weights), s, f, strict=True):
        joint = [w * r**successes * (1 - r) ** failures for w, r in zip(weights, RATES, strict=True)]
        assert row == pytest.approx(np.array(joint) / sum(joint), abs=1e-9)


def test_with_nothing_seen_all_rates_are_alike_and_many_counts_are_as_good_as_knowing() -> None:
    for empty in (np.zeros(0), np.zeros(3)):
        assert fitted_population(empty, empty) == pytest.approx(np.full(len(RATES), 1 / len(RATES)))
    weights = fitted_population(np.array([300.0, 900.0]), np.array([700.0, 100.0]))
    assert posterior(np.array([300.0]), np.array([700.0]), weights) @ RATES == pytest.approx([0.3], abs=0.02)
