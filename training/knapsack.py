"""How many rollouts a prompt is worth, and how to share a total among prompts: arithmetic without state.

A group of N rollouts of a prompt that succeeds with probability p has a gradient if both outcomes are in it. Weighed
with what a step then gains, its value is (1 - p^N - (1-p)^N) · p (1-p)² (Knapsack RL, arXiv 2509.25849 §3). For N ≥ 1
each further rollout adds less than the one before, so the largest additions are the optimum; no dynamic programme is
needed. A group of one teaches nothing: from nothing, the first step is one of two rollouts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]
Ints = np.ndarray[Any, np.dtype[np.int64]]


def known_gains(rates: Floats, most: int) -> Floats:
    """What the N-th rollout of each prompt adds, in column N - 1, where the success rates are known.

    rates: (n,), in [0, 1]. Gives (n, ``most``); the first column is 0.
    """
    p, q = rates[:, None], 1 - rates[:, None]
    before = np.arange(most)
    gains = p * q**2 * (p**before * q + q**before * p)
    gains[:, 0] = 0.0
    return gains


def expected_gains(
    successes: Floats, failures: Floats, most: int, *, prior: tuple[float, float] = (1.0, 1.0)
) -> Floats:
    """The same in expectation over p ~ Beta(prior + counts), so that a prompt never seen has a value as well.

    With s, f the counts and the prior in one, E[p(1-p)²·p^N] = w · E[p^N] over Beta(s+1, f+2), a ratio of rising
    factorials, and (1-p)^N alike. Their differences are products of positive terms: nothing cancels, up to any N.

    successes, failures: (n,), at least 0, also fractions. Gives (n, ``most``); the first column is 0.
    """
    s, f = (prior[0] + successes)[:, None], (prior[1] + failures)[:, None]
    weight = s * f * (f + 1) / ((s + f) * (s + f + 1) * (s + f + 2))  # E[p (1-p)²]
    before = np.arange(most)
    total = s + f + 3 + before
    all_right = np.cumprod(np.c_[np.ones(len(s)), ((s + 1 + before) / total)[:, :-1]], axis=1)
    all_wrong = np.cumprod(np.c_[np.ones(len(s)), ((f + 2 + before) / total)[:, :-1]], axis=1)
    gains = weight * (all_right * (f + 2) + all_wrong * (s + 1)) / total
    gains[:, 0] = 0.0
    return gains


def allocate(gains: Floats, total: int, low: int) -> Ints:
    """Rollouts of each prompt, ``total`` in all, with the largest sum of gains: exact.

    gains: (n, high) of ``known_gains`` or ``expected_gains``; nobody gets more than ``high`` or less than ``low``. With
    ``low`` 0 a prompt gets none or at least two; one rollout is left over where only whole groups of two remain.

    Raises:
        ValueError: the bounds do not admit the total.
    """
    n, high = gains.shape
    require_feasible(n, low, high, total, float(low * n), float(high * n))
    if low:
        return low + _largest(gains[:, low:], total - low * n, by_row=False)
    # As if each of the first two were worth half the pair. By arithmetic the third is worth as much as either, so that
    # these units are concave, and only the last prompt to be served can be left with one.
    units = gains.copy()
    units[:, :3] = gains[:, 1:2] / 2
    counts = _largest(units, total, by_row=True)
    single = np.flatnonzero(counts == 1)
    return counts if not len(single) else _without_single(gains, counts, int(single[0]))


def allocate_tokens(gains: Floats, costs: Floats, total: float, low: int) -> Ints:
    """Rollouts of each prompt whose costs are at most ``total``, by gain per cost, then by exchanges: near the optimum.

    gains: (n, high); costs: (n,), of one rollout of each prompt, for example in tokens, positive.

    Raises:
        ValueError: not even ``low`` rollouts each can be paid.
    """
    n, high = gains.shape
    least, left = float(low * costs.sum()), total - float(low * costs.sum())
    require_feasible(n, low, high, total, least, np.inf)
    units = gains.copy()
    if not low:
        units[:, :3] = gains[:, 1:2] / 2
    density = (units[:, low:] / costs[:, None]).ravel()
    rows = np.argsort(-density, kind="stable") // max(high - low, 1)  # whose unit it is, the best first
    counts = np.full(n, low)
    while len(rows):
        spent = np.cumsum(costs[rows])
        fit = int(np.searchsorted(spent, left, side="right"))
        counts += np.bincount(rows[:fit], minlength=n)
        left -= float(spent[fit - 1]) if fit else 0.0
        rows = rows[fit:]
        rows = rows[costs[rows] <= left]
    if not low:
        counts[counts == 1] = 0
    return _exchanged(gains, counts, costs, total, low)


def require_feasible(n: int, low: int, high: int, total: float, least: float, most: float) -> None:
    """Refuse bounds that are none, and a total outside what they take, with both sums."""
    if not 0 <= low <= high:
        raise ValueError(f"low={low} must be at least 0 and at most high={high}")
    if not least <= total <= most:
        raise ValueError(
            f"{n} prompts of {low} to {high} rollouts take {least:g} to {most:g}, and the total is {total:g}; "
            "change the total, low or high"
        )


def _largest(units: Floats, total: int, *, by_row: bool) -> Ints:
    """How many of the ``total`` largest units each row has. Of equal ones the first columns, or rows, come first."""
    rows, columns = units.shape
    if total == 0 or columns == 0:
        return np.zeros(rows, dtype=np.int64)
    flat = units.ravel()
    least = np.partition(flat, flat.size - total)[flat.size - total]
    counts = (units > least).sum(1)
    row, column = np.nonzero(units == least)
    order = np.lexsort((column, row) if by_row else (row, column))
    return counts + np.bincount(row[order[: total - int(counts.sum())]], minlength=rows)


def _without_single(gains: Floats, counts: Ints, single: int) -> Ints:
    """The best of the ways to mend one group of one: a unit from somebody else, two from a pair, or to give it up."""
    high = gains.shape[1]
    values = np.c_[np.zeros(len(gains)), np.cumsum(gains, axis=1)]
    at = np.arange(len(gains))
    others = at != single
    ways = []
    grow = np.flatnonzero(others & (counts >= 2) & (counts < high))
    given_up = counts.copy()
    given_up[single] = 0
    if len(grow):
        given_up[grow[np.argmax(gains[grow, counts[grow]])]] += 1
    ways.append(given_up)
    shrink = np.flatnonzero(others & (counts >= 3))
    if len(shrink) and high >= 2:
        paired = counts.copy()
        paired[single] = 2
        paired[shrink[np.argmin(gains[shrink, counts[shrink] - 1])]] -= 1
        ways.append(paired)
    pairs = np.flatnonzero(others & (counts == 2))
    if len(pairs) and high >= 3:
        tripled = counts.copy()
        tripled[single] = 3
        tripled[pairs[np.argmin(values[pairs, 2])]] = 0
        ways.append(tripled)
    return max(ways, key=lambda way: float(values[at, way].sum()))


def _exchanged(gains: Floats, counts: Ints, costs: Floats, total: float, low: int) -> Ints:
    """Add what can be paid, and swap a step of one prompt for a step of another, while the sum of gains grows."""
    n, high = gains.shape
    at = np.arange(n)
    counts = counts.copy()
    for _ in range(n * high):  # more steps than any improvement takes: the sum grows with each
        up = np.where(counts == 0, 2, 1)
        down = np.where(counts == 2, 2, 1) if low == 0 else np.ones(n, dtype=np.int64)
        can_grow, can_shrink = counts + up <= high, counts - down >= low
        # The first of two rollouts adds nothing: a step of two is the second's gain, and no sum swallows a small one.
        gain = np.where(can_grow, gains[at, np.minimum(counts + up, high) - 1], -np.inf)
        loss = np.where(can_shrink, gains[at, np.maximum(counts, 1) - 1], np.inf)
        by_cost = np.argsort(up * costs, kind="stable")
        best = np.maximum.accumulate(gain[by_cost])
        left = total - float(counts @ costs)
        freed, lost = np.r_[0.0, down * costs], np.r_[0.0, loss]
        place = np.searchsorted((up * costs)[by_cost], left + freed, side="right") - 1
        better = np.where(place >= 0, best[place], -np.inf) - lost * (1 + 1e-9)  # an exchange of equals would not end
        choice = int(np.argmax(better))
        if not better[choice] > 0:
            break
        grown = int(by_cost[np.argmax(gain[by_cost][: place[choice] + 1])])
        counts[grown] += up[grown]
        if choice:
            counts[choice - 1] -= down[choice - 1]
    return counts
