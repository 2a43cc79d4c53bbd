"""Budgets by greedy arithmetic against a dynamic programme: unit costs exactly, token costs nearly; and how fast.

Random instances: success rates from Beta laws with ends at 0 and 1, posteriors from so many rollouts of them, totals up
to 512. With unit costs the two must agree to rounding, with ``low`` 2 and with ``low`` 0 (nothing, or at least two).
With a cost for each prompt (2 to 30 units) the total is an upper bound, and the gap is what exchanges leave.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import numpy as np

from benchmarks.report import Report
from training.knapsack import allocate, allocate_tokens, expected_gains, known_gains

INSTANCES, INSTANCES_TOKENS = 1000, 300
LARGE = (8192, 65_536)  # prompts, total


def best_by_programme(gains: np.ndarray, costs: Sequence[int], total: int, low: int) -> float:
    """The largest sum of gains whose costs are at most ``total``, by a dynamic programme; groups of one are barred."""
    values = np.c_[np.zeros(len(gains)), np.cumsum(gains, axis=1)]
    sizes = [n for n in range(low, gains.shape[1] + 1) if not (low == 0 and n == 1)]
    best = np.full(total + 1, 0.0)
    for row, cost in zip(values, costs, strict=True):
        new = np.full(total + 1, -np.inf)
        for n in sizes:
            if n * cost <= total:
                new[n * cost :] = np.maximum(new[n * cost :], best[: total + 1 - n * cost] + row[n])
        best = new
    return float(best[total])


def summed(gains: np.ndarray, counts: np.ndarray) -> float:
    """The value of an allocation."""
    return float(np.where(np.arange(gains.shape[1]) < counts[:, None], gains, 0.0).sum())


def instance(rng: np.random.Generator, low: int) -> tuple[np.ndarray, int]:
    """Gains of some prompts, known or expected, and a total that their bounds admit."""
    n, high = int(rng.integers(2, 33)), int(rng.integers(4, 65))
    rates = rng.beta(*rng.uniform(0.2, 2.0, 2), size=n)
    rates[rng.random(n) < 0.1] = 0.0
    rates[rng.random(n) < 0.1] = 1.0
    total = int(rng.integers(max(low * n, 2), min(high * n, 512) + 1))
    if rng.random() < 0.5:
        return known_gains(rates, high), total
    seen = rng.integers(0, 33, n)
    successes = rng.binomial(seen, rates).astype(float)
    return expected_gains(successes, seen - successes, high), total


def gaps(rng: np.random.Generator, low: int, instances: int, *, tokens: bool) -> np.ndarray:
    """How much of the optimum each instance misses, relative to it."""
    found = []
    while len(found) < instances:
        gains, total = instance(rng, low)
        n = len(gains)
        if tokens:
            costs = rng.integers(2, 31, n)
            total = int(low * costs.sum() + rng.integers(60, 512))
            counts = allocate_tokens(gains, costs.astype(float), total, low)
            assert counts @ costs <= total
        else:
            costs = np.ones(n, dtype=int)
            counts = allocate(gains, total, low)
        best = best_by_programme(gains, costs.tolist(), total, low)
        if best > 0:
            found.append(1 - summed(gains, counts) / best)
    return np.array(found)


def seconds_at_large(rng: np.random.Generator, repeats: int = 7) -> float:
    """Median seconds of a whole decision, posteriors included."""
    n, total = LARGE
    seen = rng.integers(0, 33, n)
    successes = rng.binomial(seen, rng.beta(0.5, 0.5, n)).astype(float)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        counts = allocate(expected_gains(successes, seen - successes, 128), total, 0)
        times.append(time.perf_counter() - start)
        assert counts.sum() == total
    return float(np.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="few instances, no bars")
    quick = parser.parse_args().quick
    report, rng = Report("knapsack_optimality"), np.random.default_rng(0)
    few = 20 if quick else None
    rows = []
    for name, low, tokens, instances in (
        ("unit_low2", 2, False, few or INSTANCES),
        ("unit_low0", 0, False, few or INSTANCES),
        ("tokens_low2", 2, True, few or INSTANCES_TOKENS),
        ("tokens_low0", 0, True, few or INSTANCES_TOKENS),
    ):
        missed = gaps(rng, low, instances, tokens=tokens)
        report.figure(f"{name}_worst_gap", float(missed.max()))
        report.figure(f"{name}_mean_gap", float(missed.mean()))
        rows.append((name, instances, float(missed.mean()), float(missed.max()), int((missed > 1e-9).sum())))
    report.table("what the optimum is missed by", ["instances of", "n", "mean", "worst", "not exact"], rows)
    report.figure("seconds_8192_prompts", seconds_at_large(rng))
    if not quick:
        report.bar("unit_low2_worst_gap", "<=", 1e-9)
        report.bar("unit_low0_worst_gap", "<=", 1e-9)
        report.bar("tokens_low2_mean_gap", "<=", 0.02)
        report.bar("tokens_low0_mean_gap", "<=", 0.02)
        report.bar("seconds_8192_prompts", "<=", 0.2)
    report.finish(quick)


if __name__ == "__main__":
    main()
