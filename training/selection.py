"""Which finished groups make up a batch, and which of their episodes get a loss."""

from __future__ import annotations

from typing import Protocol

from rollout.episode import Episode, Status
from rollout.errors import UserError


class Selection(Protocol):
    """A member of the ``selection`` group, over finished groups of episodes.

    The stream samples fresh prompts until enough groups are kept, in at most ``max_rounds`` rounds (1: never again).
    Group statistics are over all episodes of a kept group, also those that ``trains`` refuses.
    """

    max_rounds: int

    def keep(self, group: list[Episode]) -> bool:
        """Whether the group counts towards the batch."""

    def trains(self, episode: Episode) -> bool:
        """Whether the episode's own tokens get a loss."""


class All:
    """Every group, every episode."""

    max_rounds = 1

    def keep(self, group: list[Episode]) -> bool:
        return True

    def trains(self, episode: Episode) -> bool:
        return True


class DynamicSampling(All):
    """Only groups whose rewards vary: the others have no gradient (DAPO, arXiv 2503.14476 §3.2)."""

    def __init__(self, max_rounds: int = 4) -> None:
        if max_rounds < 1:
            raise UserError(f"selection.max_rounds: {max_rounds} must be at least 1; 1 samples no group again")
        self.max_rounds = max_rounds

    def keep(self, group: list[Episode]) -> bool:
        rewards = [episode.reward for episode in group]
        return bool(rewards) and min(rewards) != max(rewards)


class DropOverlong(All):
    """Episodes cut by the token limit get no loss, but count in their group (DAPO's overlong filtering, §3.4)."""

    def trains(self, episode: Episode) -> bool:
        return episode.status is not Status.TRUNCATED
