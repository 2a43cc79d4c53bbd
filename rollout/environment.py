"""What an episode acts in. One environment per episode; plain tools with a verifier are the trivial case."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from rollout.episode import Episode
from rollout.tools import Tool

Message = dict[str, Any]


@dataclass
class Row:
    """One question of a task. ``id`` is stable across runs (a content hash); ``messages`` are in OpenAI's format."""

    id: str
    messages: list[Message]
    answer: Any
    difficulty: str = ""
    extras: dict[str, Any] = field(default_factory=dict)


class Environment(Protocol):
    async def reset(self, row: Row) -> list[Message]:
        """Prepare the episode and give the messages that the policy reads first."""

    def tools(self) -> list[Tool]:
        """The tools that the policy may call in this episode."""

    async def score(self, episode: Episode) -> tuple[dict[str, float], bool]:
        """Named rewards of the ended episode, and whether it succeeded. Never reads what infrastructure did."""

    async def close(self) -> None:
        """Give back what ``reset`` took; called exactly once, also after an error."""
