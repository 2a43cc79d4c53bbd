"""Seconds of the rollouts by what they were busy with, through the real runner."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

from rollout.activity import Activity
from rollout.config import LimitsConfig
from rollout.environment import Row
from rollout.episode import Episode, Sequence, ToolCall, Turn
from rollout.runner import Job, Runner
from rollout.tasks import ToolEnvironment
from rollout.tools import tool


@tool
async def look_up(seconds: float) -> str:
    """Takes its time.

    Args:
        seconds: how long
    """
    await asyncio.sleep(seconds)
    return "found"


class Calls:
    """Writes for ``write_s`` a turn, and calls a tool of ``tool_s`` once."""

    def __init__(self, write_s: float, tool_s: float) -> None:
        self.write_s, self.tool_s = write_s, tool_s

    async def open(self, episode: Episode, messages: Any, tools: Any) -> None:
        episode.sequences.append(Sequence.open([1]))

    async def speak(self, episode: Episode, max_tokens: int) -> tuple[Turn, int, bool]:
        await asyncio.sleep(self.write_s)
        first = not episode.turns
        return Turn("", "", [ToolCall("look_up", {"seconds": self.tool_s})] if first else []), 1, False

    async def read(self, episode: Episode, results: Any) -> None: ...

    async def close(self, episode: Episode) -> None: ...


def grade(answer: str, gold: object) -> bool:
    time.sleep(0.1)
    return True


def played(*speakers: Callable[[], Calls]) -> tuple[dict[str, float], float]:
    """What the runner was busy with while it played an episode of each speaker, and the seconds of all."""
    each = iter(speakers)
    jobs = [Job(Row(f"r{i}", [], 0), f"g{i}", 0) for i in range(len(speakers))]
    with closing(Runner(lambda: ToolEnvironment([look_up], grade), LimitsConfig())) as runner:
        start = time.monotonic()
        runner.play(jobs, lambda: next(each)(), lambda done: None)
        return runner.activity.seconds(), time.monotonic() - start


def test_writing_tools_and_verdict_have_their_own_seconds() -> None:
    seconds, elapsed = played(lambda: Calls(0.1, 0.3))
    assert seconds["generate"] >= 0.19 and seconds["tools"] >= 0.29 and seconds["reward"] >= 0.09
    assert sum(seconds.values()) <= elapsed


def test_a_tool_beside_which_the_model_writes_costs_nothing() -> None:
    seconds, elapsed = played(lambda: Calls(0.0, 0.2), lambda: Calls(0.6, 0.0))
    assert seconds["tools"] < 0.1 < 1.1 < seconds["generate"], "the second writes for 1.2 seconds"
    assert sum(seconds.values()) <= elapsed


def test_each_second_counts_once_and_a_failure_ends_its_work() -> None:
    activity = Activity()
    start = time.monotonic()
    try:
        with activity.during("reward"), activity.during("tools"):
            time.sleep(0.02)
            with activity.during("generate"), activity.during("generate"):
                time.sleep(0.02)
                raise OSError
    except OSError:
        pass
    time.sleep(0.02)
    found = activity.seconds()
    assert found == activity.seconds(), "nothing goes on"
    assert min(found["generate"], found["tools"]) >= 0.02 and found["reward"] < 0.02
    assert sum(found.values()) <= time.monotonic() - start - 0.02
