"""The control that OTC's paper warns of (arXiv 2504.14870 App. D.3): economy added to correctness, not multiplied."""

from __future__ import annotations

from collections.abc import Sequence

from rollout.episode import Episode
from training.rewards.otc import ppo_tool_reward, tool_cost


class AdditiveOtc:
    """The environment's parts, and the economy of calls, which a wrong answer earns as well."""

    needs_tools = True
    teaches_solved = True

    def __init__(self, max_calls: float = 2.0) -> None:
        self.max_calls = max_calls

    def __call__(self, group: Sequence[Episode]) -> list[dict[str, float]]:
        return [
            {**episode.rewards, "tools": ppo_tool_reward(tool_cost(episode, {}), max_calls=self.max_calls)}
            for episode in group
        ]
