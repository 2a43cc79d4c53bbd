"""What an episode is worth: members of the ``reward`` group shape what the verifier said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from rollout.episode import Episode


class Reward(Protocol):
    """Shapes one finished group. A class that reads tool calls sets ``needs_tools``; tasks without tools refuse it.

    What a class may have besides: ``teaches_solved`` if it tells right answers from better ones, so that budgets which
    withdraw rollouts from prompts that always succeed have to leave them enough; for ``advantage=decoupled``, by part,
    ``scales``, the factor that it has to keep (1 where nothing is said), and ``joined``, the part that it corrects;
    ``mask_decision`` if the decision to think is to have no policy loss; and, of ``Remembers``, what it learns as it
    goes.
    """

    needs_tools: bool

    def __call__(self, group: Sequence[Episode]) -> list[dict[str, float]]:
        """Named parts for each episode; their sum is the reward that advantages are computed from."""


@runtime_checkable
class Remembers(Protocol):
    """A reward with a memory, kept in checkpoints."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class TaskReward:
    """What the environment scored, unchanged."""

    needs_tools = False

    def __call__(self, group: Sequence[Episode]) -> list[dict[str, float]]:
        return [episode.rewards for episode in group]
