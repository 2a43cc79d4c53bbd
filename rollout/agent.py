"""The multi-turn loop: model ⇄ tools. One code path for training, evaluation and clients of a server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from rollout.activity import Activity
from rollout.config import LimitsConfig
from rollout.environment import Environment, Message, Row
from rollout.episode import Episode, Status, ToolCall, ToolResult, Turn
from rollout.tools import Tool, ToolError, call

CLOSE_S = 30.0  # for an environment to let go of what it holds
ENOUGH_MODEL_ERRORS = 400  # characters of a tool's error that the model reads


class Speaker(Protocol):
    """The model's side of one episode: an engine by token ids, or a server by messages."""

    async def open(self, episode: Episode, messages: list[Message], tools: list[Tool]) -> None:
        """Begin: the policy reads the messages. An episode that has sequences already is taken up where it stands."""

    async def speak(self, episode: Episode, max_tokens: int) -> tuple[Turn, int, bool]:
        """One assistant turn of at most ``max_tokens``: the turn, how many it wrote, and whether the limit cut it."""

    async def read(self, episode: Episode, results: list[ToolResult]) -> None:
        """The policy reads what its calls returned, in their order."""

    async def close(self, episode: Episode) -> None:
        """The program will not come back."""


class EpisodeDropped(Exception):
    """Infrastructure failed an episode beyond its retries. ``cause`` names it in counts."""

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(detail)
        self.cause = cause


async def run_episode(
    row: Row,
    environment: Environment,
    speaker: Speaker,
    limits: LimitsConfig,
    group_id: str = "",
    sample: int = 0,
    *,
    episode: Episode | None = None,
    timed: Callable[[asyncio.Timeout], None] = lambda deadline: None,
    waiting: Callable[[bool], None] = lambda begins: None,
    activity: Activity | None = None,
) -> Episode:
    """Play one episode to its end and score it. Raises ``EpisodeDropped`` where infrastructure failed.

    ``episode``: one to go on with, as an earlier window left it; tools that had not answered are called again.
    ``timed`` is handed the deadline, for whoever makes an episode wait through no fault of its own. ``waiting`` is
    called when the episode begins (True) to wait for a tool that takes time, and when it has answered (False).
    ``activity`` learns what the episode is busy with.
    """
    if episode is None:
        episode = Episode.begin(row, group_id or row.id, sample)
    activity = activity or Activity()
    try:
        async with asyncio.timeout(limits.episode_timeout_s) as deadline:
            timed(deadline)
            messages = await environment.reset(row)
            tools = environment.tools()
            await speaker.open(episode, messages, tools)
            named = {tool.name: tool for tool in tools}
            try:
                if episode.status is Status.UNFINISHED:  # else it was taken up where only its score was missing
                    await Dialogue(episode, speaker, named, limits, waiting, activity).play()
            finally:
                await speaker.close(episode)
            with activity.during("reward"):
                episode.rewards, episode.success = await environment.score(episode)
    except TimeoutError as error:
        if not deadline.expired():
            raise
        detail = f"episode {row.id} was not done after {limits.episode_timeout_s:.0f} s (limits.episode_timeout_s)"
        raise EpisodeDropped("episode_timeout", detail) from error
    finally:
        await _close(environment, row)
    return episode


async def _close(environment: Environment, row: Row) -> None:
    try:
        async with asyncio.timeout(CLOSE_S) as deadline:
            await environment.close()
    except TimeoutError as error:
        if not deadline.expired():
            raise
        raise EpisodeDropped(
            "environment_close", f"the environment of {row.id} did not close in {CLOSE_S:.0f} s"
        ) from error


@dataclass
class Dialogue:
    """An episode between the policy and its tools, by name; ``waiting`` and ``activity`` as in ``run_episode``."""

    episode: Episode
    speaker: Speaker
    tools: dict[str, Tool]
    limits: LimitsConfig
    waiting: Callable[[bool], None]
    activity: Activity

    async def play(self) -> None:
        """Turn by turn until it has ended; begins with the tools where these owe the last turn their results."""
        episode, limits = self.episode, self.limits
        calls = sum(len(turn.calls) for turn in episode.turns)
        own = episode.own_tokens - episode.open_tokens
        if episode.unanswered:
            await self._answer()
        while True:
            room = limits.max_new_tokens - own
            with self.activity.during("generate"):
                turn, written, cut = await self.speaker.speak(episode, min(room, limits.max_turn_tokens or room))
            episode.turns.append(turn)
            own += written
            if cut or (turn.calls and own >= limits.max_new_tokens):
                episode.status = Status.TRUNCATED
                return
            if not turn.calls:
                episode.status = Status.FINISHED
                return
            calls += len(turn.calls)
            if calls > limits.max_tool_calls or len(episode.turns) >= limits.max_turns:
                episode.status = Status.CALL_LIMIT
                return
            await self._answer()

    async def _answer(self) -> None:
        """Run the calls of the last turn, all at once; the policy reads what they gave."""
        turn = self.episode.turns[-1]
        if any(_takes_time(self.tools[x.name]) for x in turn.calls if x.problem is None and x.name in self.tools):
            self.waiting(True)
        with self.activity.during("tools"):
            results = await asyncio.gather(*(_execute(x, self.tools, self.limits) for x in turn.calls))
        turn.results = list(results)
        self.waiting(False)
        await self.speaker.read(self.episode, turn.results)


def _takes_time(tool: Tool) -> bool:
    """A tool without a time-out is a fast, pure function: it is over before anything else can happen."""
    return tool.is_async or tool.timeout is not None


async def _execute(asked: ToolCall, tools: dict[str, Tool], limits: LimitsConfig) -> ToolResult:
    """Run one call. What the model got wrong is a value; any other failure is retried, then drops the episode."""
    start = time.monotonic()

    def result(content: str, error: bool) -> ToolResult:
        if len(content) > limits.tool_result_chars:
            content = content[: limits.tool_result_chars] + f" … [cut at {limits.tool_result_chars} characters]"
        return ToolResult(asked, content, error, time.monotonic() - start)

    if asked.problem is not None or asked.arguments is None:
        return result(f"error: {asked.problem}", True)
    if asked.name not in tools:
        return result(f"error: no tool {asked.name!r}; there are: {', '.join(tools) or 'none'}", True)
    for attempt in range(limits.retries + 1):
        try:
            return result(await call(tools[asked.name], asked.arguments), False)
        except ToolError as error:
            return result(f"error: {str(error)[:ENOUGH_MODEL_ERRORS]}", True)
        except Exception as error:
            if attempt == limits.retries:
                cause = "tool_timeout" if isinstance(error, TimeoutError) else "tool_error"
                detail = f"tool {asked.name} failed {attempt + 1} times: {type(error).__name__}: {error}"
                raise EpisodeDropped(cause, detail) from error
    raise AssertionError("the loop returns or raises")
