"""What an episode is worth: members of the ``reward`` group shape what the verifier said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rollout.episode import Episode


class Reward(Protocol):
    """Shapes one finished group. A class that reads tool calls sets ``needs_tools``; tasks without tools refuse it.

    One that tells right answers from better ones also sets ``teaches_solved``: budgets that withdraw rollouts from
    prompts that always succeed then have to leave them enough.
    """

    needs_tools: bool

    def __call__(self, group: Sequence[Episode]) -> list[dict[str, float]]:
        """Named parts for each episode; their sum is the reward that advantages are computed from."""


class TaskReward:
    """What the environment scored, unchanged."""

    needs_tools = False

    def __call__(self, group: Sequence[Episode]) -> list[dict[str, float]]:
        return [episode.rewards for episode in group]
