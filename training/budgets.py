"""How many rollouts each prompt gets."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from rollout.environment import Row
from rollout.episode import Episode
from training.knapsack import (
    Floats,
    Ints,
    allocate,
    allocate_tokens,
    expected_gains,
    known_gains,
    require_feasible,
)
from training.population import RATES, fitted_population, posterior
from training.success_history import SuccessHistory


def rollout_value(n: Any, p: Any) -> Any:
    """What ``n`` rollouts of a prompt with success rate ``p`` teach (arXiv 2509.25849 §3): the chance of both outcomes
    among them, times p (1-p)², which the success rate gains by a step; 0 for fewer than two.

    Numbers give a float; sequences or tensors, broadcast against each other, a float64 tensor.

    Raises:
        ValueError: p outside [0, 1] or not finite, or a negative n.
    """
    counts, rates = torch.as_tensor(n), torch.as_tensor(p, dtype=torch.float64)
    if not bool(((rates >= 0) & (rates <= 1)).all()):
        raise ValueError(f"p={p} must be success rates, between 0 and 1")
    if bool((counts < 0).any()):
        raise ValueError(f"n={n} must be numbers of rollouts, 0 or more")
    both = 1 - rates**counts - (1 - rates) ** counts
    value = torch.where(counts >= 2, both * rates * (1 - rates) ** 2, 0.0)
    return value if value.ndim else float(value)


def knapsack(success_rates: Any, *, total: int, low: int, high: int) -> torch.Tensor:
    """Rollouts for each prompt, ``total`` in all, each ``low`` to ``high``, by their success rates (arXiv 2509.25849).

    Where all rates lie inside (0, 1) the sum of ``rollout_value`` is the largest there is. Prompts at 0 or 1 have no
    value and get ``low``; by the authors' fall-back, the others then get no more than shows both outcomes with
    probability 0.9, if there are enough rollouts for that, and the rest goes evenly to prompts that never succeeded, or
    where there are none to those that always did. Unlike the authors' code, the value of the next rollout counts the
    ``low`` that everyone has.

    success_rates: (n,). Gives (n,) int64.

    Raises:
        ValueError: empty, not 1-D, outside [0, 1], or bounds that do not admit the total.
    """
    rates = _rates(success_rates)
    n, varied, failed = len(rates), (rates > 0) & (rates < 1), rates == 0
    if varied.all():
        return torch.from_numpy(allocate(known_gains(rates, high), total, low))
    require_feasible(n, low, high, total, low * n, high * n)
    counts = np.full(n, low)
    takers = failed if failed.any() else ~varied
    left, room = total - low * n, (high - low) * int(takers.sum())
    if varied.any():
        p = rates[varied]
        wanted = int(np.minimum(math.log(0.1) / np.log(np.maximum(p, 1 - p)), high).astype(int).sum())
        share = min(left, max(wanted, left - room), (high - low) * len(p))
        counts[varied] = allocate(known_gains(p, high), share + low * len(p), low)
        left -= share
    for some in (takers, ~takers):
        left = _spread(counts, np.flatnonzero(some), left, high)
    return torch.from_numpy(counts)


def bayes_knapsack(
    successes: Any,
    failures: Any,
    *,
    total: float,
    low: int,
    high: int,
    prior: tuple[float, float] = (1, 1),
    cost: Any = None,
) -> torch.Tensor:
    """Rollouts for each prompt, by the value's expectation over p ~ Beta(prior + counts): the largest there is.

    With ``low`` 0 a prompt gets none or at least two. ``cost``: of one rollout of each prompt; ``total`` is then an
    upper bound of sum(cost · n), and no prompt could be given more within it.

    successes, failures, cost: (n,). Gives (n,) int64.

    Raises:
        ValueError: empty, unequal, negative or not finite counts, or bounds that do not admit the total.
    """
    s, f = _counts(successes, "successes"), _counts(failures, "failures")
    if len(s) != len(f):
        raise ValueError(f"{len(s)} successes and {len(f)} failures must be of one length: one each per prompt")
    if not (len(prior) == 2 and all(0 < x < math.inf for x in prior)):
        raise ValueError(f"prior={prior} must be two positive numbers: pseudo-counts of successes and of failures")
    return _allocated(expected_gains(s, f, high, prior=prior), total, low, cost)


def _allocated(gains: Floats, total: float, low: int, cost: Any) -> torch.Tensor:
    if cost is None:
        return torch.from_numpy(allocate(gains, int(total), low))
    costs = _counts(cost, "cost")
    if len(costs) != len(gains) or costs.min() <= 0:
        raise ValueError(
            f"{len(costs)} costs, the lowest {costs.min():g}: give a positive one for each of {len(gains)} prompts"
        )
    return torch.from_numpy(allocate_tokens(gains, costs, total, low))


def _counts(given: Any, name: str) -> Floats:
    values = np.asarray(torch.as_tensor(given, dtype=torch.float64))
    if values.ndim != 1 or not len(values):
        raise ValueError(f"{name} of shape {values.shape} must be 1-D and not empty: one per prompt")
    if bad := np.flatnonzero(~(np.isfinite(values) & (values >= 0))).tolist():
        raise ValueError(f"{name}[{bad[0]}] is {values[bad[0]]}; give finite numbers, 0 or more")
    return values


def _rates(given: Any) -> Floats:
    rates = _counts(given, "success_rates")
    if bad := np.flatnonzero(rates > 1).tolist():
        raise ValueError(f"success_rates[{bad[0]}] is {rates[bad[0]]}; a rate is between 0 and 1")
    return rates


def _spread(counts: Ints, some: Ints, left: int, high: int) -> int:
    """Give ``left`` more rollouts to some, evenly, nobody above ``high``; the number that nobody could take."""
    while left and len(some := some[counts[some] < high]):
        given = some[:left]
        counts[given] += 1
        left -= len(given)
    return left


class Budget(Protocol):
    """A member of the ``budget`` group."""

    history: SuccessHistory | None  # what it goes by: saved in checkpoints; None if nothing

    def __call__(self, rows: Sequence[Row]) -> list[int]:
        """The number of rollouts of each row, in their order."""

    def observe(self, episodes: Sequence[Episode]) -> None:
        """Finished episodes, each once."""


class Uniform:
    """The same number for every prompt."""

    history = None

    def __init__(self, samples: int = 8) -> None:
        self.samples = samples

    def __call__(self, rows: Sequence[Row]) -> list[int]:
        return [self.samples] * len(rows)

    def observe(self, episodes: Sequence[Episode]) -> None:
        pass


class Adaptive(ABC):
    """What budgets that go by success rates share: ``samples`` a prompt in the mean, ``low`` to ``high`` for each.

    ``history``: a checkpoint of another run, or its file, to begin with.
    """

    def __init__(self, samples: int, low: int, high: int, history: str | None) -> None:
        self.samples, self.low, self.high = samples, low, high
        self.history = SuccessHistory.read(Path(history)) if history else SuccessHistory()

    def __call__(self, rows: Sequence[Row]) -> list[int]:
        self.history.now += 1
        counts: list[int] = self.shares([row.id for row in rows]).tolist()
        return counts

    @abstractmethod
    def shares(self, prompt_ids: Sequence[str]) -> torch.Tensor:
        """The rollouts of prompts by what the history says of them."""

    def observe(self, episodes: Sequence[Episode]) -> None:
        self.history.add(episodes)


class Knapsack(Adaptive):
    """``knapsack`` by the rates of the last visits; a prompt of fewer than ``least_seen`` rollouts gets ``samples``."""

    def __init__(
        self, samples: int = 8, low: int = 2, high: int = 128, least_seen: int = 8, history: str | None = None
    ) -> None:
        super().__init__(samples, low, high, history)
        self.least_seen = least_seen

    def shares(self, prompt_ids: Sequence[str]) -> torch.Tensor:
        rates = self.history.last_rates(prompt_ids, self.least_seen)
        counts, seen = torch.full((len(rates),), self.samples), ~np.isnan(rates)
        if seen.any():
            total = self.samples * int(seen.sum())
            counts[torch.from_numpy(seen)] = knapsack(rates[seen], total=total, low=self.low, high=self.high)
        return counts


class BayesKnapsack(Adaptive):
    """``bayes_knapsack``: nothing is a special case, and prompts never seen are worth what the ``prior`` says.

    ``prior``: pseudo-counts of successes and failures; None: the population of all prompts seen so far, which need not
    be a Beta (``training.population``), fitted at every call.
    ``half_life``: rounds after which what was seen counts half, as the policy moves; None: for ever. ``cost`` "tokens":
    the budget is what ``samples`` rollouts of each prompt would take, by their lengths so far, and is not exceeded;
    "rollouts": their number.
    """

    def __init__(
        self,
        samples: int = 8,
        low: int = 0,
        high: int = 128,
        prior: Sequence[float] | None = None,
        half_life: float | None = None,
        cost: str = "rollouts",
        history: str | None = None,
    ) -> None:
        super().__init__(samples, low, high, history)
        self.prior = None if prior is None else (float(prior[0]), float(prior[1]))
        self.half_life, self.cost = half_life, cost

    def shares(self, prompt_ids: Sequence[str]) -> torch.Tensor:
        costs = self.history.tokens(prompt_ids) if self.cost == "tokens" else None
        total = self.samples * float(len(prompt_ids) if costs is None else costs.sum())
        counts = self.history.counts(prompt_ids, self.half_life)
        if self.prior is not None:
            bounds: Any = {"low": self.low, "high": self.high}
            return bayes_knapsack(*counts, total=total, prior=self.prior, cost=costs, **bounds)
        population = fitted_population(*self.history.counts([*self.history.visits], self.half_life))
        gains = posterior(*counts, population) @ known_gains(RATES, self.high)
        return _allocated(gains, total, self.low, costs)
