"""OTC: correctness times tool economy (arXiv 2504.14870). Pure arithmetic, and the reward that remembers optima."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from rollout.episode import Episode, ToolCall

SAME = 9  # decimals at which two costs are one
TINY = 1e-300  # instead of 0 below 0


def ppo_tool_reward(calls: Any, *, max_calls: Any) -> Any:
    """cos(m pi / (2m + c)): 1 without a call, 0.5 at m = c, falling with every call (OTC-PPO, eq. 5).

    Numbers give a float; a 1-D sequence or tensor of calls gives a tensor (n,), float64 unless it has another
    floating dtype.

    Args:
        calls: m >= 0, tool calls, or what they cost.
        max_calls: c >= 0 in the same unit, one number or (n,); a smaller one falls faster. 0: 1 for no call, else 0.

    Raises:
        ValueError: empty, unequal lengths, negative or not finite.
    """
    m, c = _vectors(calls=calls, max_calls=max_calls)
    return _like(calls, _cosine(m, c))


def grpo_tool_reward(calls: Any, optimal_calls: Any, *, max_calls: Any) -> Any:
    """1 at the optimum n, falling on both sides of it (OTC-GRPO, eq. 6).

    1 for m = n = 0; cos(m pi / (2m + c)) for n = 0; else sin(f pi / (2n)) with f = 2nm / (m + n), which is
    sin(pi m / (m + n)).

    Args:
        calls: m >= 0, tool calls, or what they cost.
        optimal_calls: n >= 0 in the same unit, one number or (n,): the fewest that are known to suffice.
        max_calls: c >= 0, one number or (n,), read only for n = 0.

    Result and errors as ``ppo_tool_reward``.
    """
    m, n, c = _vectors(calls=calls, optimal_calls=optimal_calls, max_calls=max_calls)
    sine = torch.sin(math.pi * m / (m + n).clamp(min=TINY))
    return _like(calls, torch.where(n == 0, _cosine(m, c), sine))


def _cosine(m: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return torch.cos(math.pi * m / (2 * m + c).clamp(min=TINY))


def _vectors(**given: Any) -> list[torch.Tensor]:
    """As float64, of one length where they are no single numbers."""
    tensors = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in given.items()}
    lengths = {name: len(tensor) for name, tensor in tensors.items() if tensor.ndim}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise ValueError(f"{lengths} must be of one length, at least 1: one entry per episode")
    for name, tensor in tensors.items():
        if tensor.ndim > 1 or not bool((tensor.isfinite() & (tensor >= 0)).all()):
            raise ValueError(f"{name}={given[name]} must be finite numbers of at least 0")
    return list(tensors.values())


def _like(calls: Any, result: torch.Tensor) -> Any:
    if not result.ndim:
        return float(result)
    kept = isinstance(calls, torch.Tensor) and calls.dtype.is_floating_point
    return result.to(calls.dtype) if kept else result


def tool_cost(episode: Episode, prices: Mapping[str, float]) -> float:
    """What an episode's calls cost: 1 for each call written, refused ones too, or what ``prices`` says of the tool.

    A call that hides in another's arguments costs what it would in the open.
    """
    return sum(_cost(call, prices) for turn in episode.turns for call in turn.calls)


def _cost(call: ToolCall, prices: Mapping[str, float]) -> float:
    return prices.get(call.name, 1.0) + sum(prices.get(name, 1.0) for name in _hidden(call.arguments))


def _hidden(value: Any) -> Iterable[str]:
    """Names of the calls inside of arguments: objects that have both a name and arguments."""
    if isinstance(value, dict):
        if isinstance(value.get("name"), str) and "arguments" in value:
            yield value["name"]
        value = list(value.values())
    for item in value if isinstance(value, list) else ():
        yield from _hidden(item)


class OptimalCalls:
    """For each prompt, how many successes each cost has had: what tells the optimum n, in whatever order they came."""

    def __init__(self, least: int = 1) -> None:
        self.least = least
        self.successes: dict[str, dict[float, int]] = {}

    def add(self, prompt_id: str, cost: float) -> None:
        """A success at this cost."""
        counts = self.successes.setdefault(prompt_id, {})
        cost = round(cost, SAME)
        counts[cost] = counts.get(cost, 0) + 1

    def optimum(self, prompt_id: str) -> float | None:
        """The smallest cost with ``least`` successes, the running minimum for 1; None while there is none."""
        counts = self.successes.get(prompt_id, {})
        return min((cost for cost, n in counts.items() if n >= self.least), default=None)

    def merge(self, other: OptimalCalls) -> None:
        """Add what another process has counted."""
        for prompt_id, counts in other.successes.items():
            mine = self.successes.setdefault(prompt_id, {})
            for cost, n in counts.items():
                mine[cost] = mine.get(cost, 0) + n


class Otc:
    """Members of a group by ``success``, times ``alpha`` and the economy of their tool calls.

    ``form`` grpo measures against the optimum of the prompt, ppo against none. ``optimum`` history takes it over all
    epochs, group from the group alone. An ill-formed episode, such as one that wrote its own tool response, is no
    success here: it neither earns nor sets an optimum. ``format_weight`` adds a share to what is multiplied for
    being well formed; a wrong answer then earns from economy too.
    """

    needs_tools = True
    teaches_solved = True
    joined: ClassVar = {"tools": "task"}  # parts that multiply another one

    def __init__(
        self,
        form: str = "grpo",
        alpha: float = 1.0,
        max_calls: float = 4.0,
        optimum: str = "history",
        least_successes: int = 1,
        format_weight: float = 0.0,
        prices: Mapping[str, float] | None = None,
    ) -> None:
        self.form, self.alpha, self.max_calls, self.format_weight = form, alpha, max_calls, format_weight
        self.prices = dict(prices or {})
        self.remembers = optimum == "history"
        self.optimal = OptimalCalls(least_successes)

    def __call__(self, group: Sequence[Episode]) -> list[dict[str, float]]:
        """The environment's parts, and ``tools``: what makes alpha x economy x correctness of the episode's success."""
        costs = [tool_cost(episode, self.prices) for episode in group]
        right = [episode.success and episode.well_formed for episode in group]
        optimal = self.optimal if self.remembers else OptimalCalls(self.optimal.least)
        for episode, cost, mine in zip(group, costs, right, strict=True):
            if mine:
                optimal.add(episode.prompt_id, cost)
        cheapest = min((cost for cost, mine in zip(costs, right, strict=True) if mine), default=0.0)
        rewards = []
        for episode, cost, mine in zip(group, costs, right, strict=True):
            known = optimal.optimum(episode.prompt_id)
            economy = self._economy(cost, cheapest if known is None else known)
            merit = mine + self.format_weight * episode.well_formed
            rewards.append({**episode.rewards, "tools": self.alpha * economy * merit - episode.success})
        return rewards

    def _economy(self, cost: float, optimum: float) -> float:
        if self.form == "ppo":
            return ppo_tool_reward(cost, max_calls=self.max_calls)
        return grpo_tool_reward(cost, optimum, max_calls=self.max_calls)

    def state_dict(self) -> dict[str, Any]:
        return {"successes": self.optimal.successes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimal.successes = state["successes"]
