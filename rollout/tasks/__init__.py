"""What the policy is asked: a task owns its questions, tools, verifier and demonstrations."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from rollout.environment import Environment, Message, Row
from rollout.episode import Episode, Status
from rollout.tools import Tool, in_thread

Split = Literal["train", "test"]
Verifier = Callable[[str, Any], bool]


@dataclass
class Demonstration:
    """A whole conversation for the warm start; its last message is the answer.

    ``weight`` multiplies the loss of the tokens that the policy would have written.
    """

    messages: list[Message]
    tools: list[Tool] = field(default_factory=list)
    style: str = ""
    difficulty: str = ""
    weight: float = 1.0


class Task(Protocol):
    """A finite set of questions with disjoint splits and stable ids."""

    name: str

    def rows(self, split: Split) -> list[Row]: ...

    def environment(self) -> Environment:
        """A fresh one for one episode."""

    def tools(self) -> list[Tool]: ...


class DemonstratedTask(Task, Protocol):
    """A task that can warm-start a model from nothing."""

    def demonstrations(self, n: int, seed: int = 0) -> Iterator[Demonstration]:
        """``n`` demonstrations from the training split, the same ones for the same seed."""

    def corpus(self) -> Iterable[str]:
        """Texts to train a tiny tokenizer on."""


def row_id(*parts: Any) -> str:
    """A stable id: a hash of the content, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


class ToolEnvironment:
    """The trivial environment: plain tools, and a verifier of the final answer.

    ``verifier(answer, gold)`` says whether the text of the last turn is right; it runs in the event loop, or with a
    ``timeout`` in seconds in a thread, where a longer wait is a WaitTimeout. Only a finished episode can succeed.
    """

    def __init__(self, tools: list[Tool], verifier: Verifier, *, timeout: float | None = None) -> None:
        self._tools = tools
        self._verifier = verifier
        self._timeout = timeout
        self._answer: Any = None

    async def reset(self, row: Row) -> list[Message]:
        self._answer = row.answer
        return row.messages

    def tools(self) -> list[Tool]:
        return self._tools

    async def score(self, episode: Episode) -> tuple[dict[str, float], bool]:
        if episode.status is not Status.FINISHED:
            return {"task": 0.0}, False
        if self._timeout is None:
            success = self._verifier(episode.answer, self._answer)
        else:
            what = f"verifier of prompt {episode.prompt_id}"
            success = await in_thread(what, self._timeout, self._verifier, episode.answer, self._answer)
        return {"task": float(success)}, bool(success)

    async def close(self) -> None:
        self._answer = None
