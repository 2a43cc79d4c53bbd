"""Which success rates prompts have, learnt from all of them: what a prompt is taken for before it has shown itself.

Populations of prompts are seldom even: many always succeed, some never do, because they are too hard or their verifier
is broken. Two pseudo-counts cannot say that: under a Beta prior, eight failures of one prompt still promise successes.
So the prior is a free distribution over a grid of rates, fitted to the counts of all prompts (the non-parametric
maximum likelihood of empirical Bayes, by EM), and one prompt's weight of it spread evenly, so that nothing is ruled
out.
"""

from __future__ import annotations

import numpy as np
import torch

from training.knapsack import Floats

RATES: Floats = np.sin(np.linspace(0, np.pi / 2, 41)) ** 2  # 0 and 1 among them, and close to each other near both
ROUNDS = 60  # of EM
MOST_PAIRS = 1000
SPREAD = 1.0  # prompts


def fitted_population(successes: Floats, failures: Floats) -> Floats:
    """Weights of ``RATES`` in the population that has given these counts: even where nothing has been seen.

    successes, failures: (n,), at least 0, also fractions. Gives (41,), which sum to 1.
    """
    even = np.full(len(RATES), 1 / len(RATES))
    seen = successes + failures > 0
    pairs, times = np.unique(np.c_[successes[seen], failures[seen]], axis=0, return_counts=True)
    if not len(pairs):
        return even
    if len(pairs) > MOST_PAIRS:  # counts that fade are all different
        pairs, times = pairs[:: len(pairs) // MOST_PAIRS + 1], times[:: len(pairs) // MOST_PAIRS + 1]
    likelihood = _likelihood(pairs[:, 0], pairs[:, 1])
    weights = even
    for _ in range(ROUNDS):
        share = times @ (likelihood * weights / (likelihood @ weights)[:, None])
        weights = (share + SPREAD * even) / (times.sum() + SPREAD)
    return weights


def posterior(successes: Floats, failures: Floats, weights: Floats) -> Floats:
    """Of each prompt with these counts, the weights of ``RATES``: (n, 41), each row sums to 1."""
    joint = _likelihood(successes, failures) * weights
    return joint / joint.sum(1, keepdims=True)


def _likelihood(successes: Floats, failures: Floats) -> Floats:
    """Of the counts at each of ``RATES``, over the largest of the row: (n, 41)."""
    rates, s, f = torch.from_numpy(RATES), torch.as_tensor(successes)[:, None], torch.as_tensor(failures)[:, None]
    logs = torch.xlogy(s, rates) + torch.xlogy(f, 1 - rates)
    return np.asarray((logs - logs.max(1, keepdim=True).values).exp())
