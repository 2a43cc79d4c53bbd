"""The loop between a policy and its tools: every kind of failure has one meaning."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest

from rollout import agent
from rollout.agent import EpisodeDropped, run_episode
from rollout.buffer import RolloutBuffer
from rollout.chat import parse_text
from rollout.config import LimitsConfig
from rollout.environment import Message, Row
from rollout.episode import Episode, Sequence, Status, ToolResult, Turn
from rollout.errors import UserError, WaitTimeout
from rollout.runner import Job, Runner
from rollout.tasks import ToolEnvironment
from rollout.tools import Tool, ToolError, tool
from rollout.tools.calculator import calculator

ROW = Row("q", [{"role": "user", "content": "?"}], 4)


class Script:
    """A policy that says what it was told to: a fixed text for each turn, each character one token."""

    def __init__(self, *texts: str) -> None:
        self.texts = list(texts)
        self.read_back: list[str] = []
        self.closed = 0

    async def open(self, episode: Episode, messages: list[Message], tools: list[Tool]) -> None:
        episode.sequences.append(Sequence.open([1]))

    async def speak(self, episode: Episode, max_tokens: int) -> tuple[Turn, int, bool]:
        text = self.texts.pop(0)
        cut = len(text) > max_tokens
        text = text[:max_tokens]
        episode.sequences[-1].append_own([0] * len(text), [0.0] * len(text), [0] * len(text))
        return parse_text(text), len(text), cut

    async def read(self, episode: Episode, results: list[ToolResult]) -> None:
        self.read_back += [result.content for result in results]

    async def close(self, episode: Episode) -> None:
        self.closed += 1


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def play(script: Script, tools: list[Tool], **limits: Any) -> Episode:
    environment = ToolEnvironment(tools, lambda answer, gold: answer == str(gold))
    return asyncio.run(run_episode(ROW, environment, script, LimitsConfig(**{"max_new_tokens": 500, **limits})))


def test_a_call_and_its_answer() -> None:
    script = Script("<think></think>" + call("calculator", expression="2+2"), "<think></think>4")
    episode = play(script, [calculator])
    assert episode.success and episode.rewards == {"task": 1.0} and episode.status is Status.FINISHED
    assert script.read_back == ["4"] and script.closed == 1
    assert [r.call.name for r in episode.tool_results] == ["calculator"]


def test_what_the_model_got_wrong_is_a_value_that_it_reads() -> None:
    wrong = [
        "<think></think>" + call("calculator", expression="2+"),
        "<think></think>" + call("no_such_tool"),
        "<think></think>" + call("calculator", text="2"),
        "<think></think><tool_call>{broken</tool_call>",
        "<think></think>4",
    ]
    script = Script(*wrong)
    episode = play(script, [calculator], max_turns=9, max_tool_calls=9)
    assert episode.success
    assert len(script.read_back) == 4 and all(text.startswith("error: ") for text in script.read_back)
    assert all(result.error for result in episode.tool_results)


def test_concurrent_calls_of_one_turn() -> None:
    barrier = threading.Barrier(2)

    @tool(timeout=5.0)
    def meet(x: int) -> str:
        """Wait for the other call.

        Args:
            x: which one
        """
        barrier.wait(4.0)  # passes only if both calls run at the same time
        return f"met {x}"

    script = Script("<think></think>" + call("meet", x=1) + call("meet", x=2), "<think></think>4")
    play(script, [meet], max_tool_calls=2)
    assert script.read_back == ["met 1", "met 2"]


def test_a_tool_that_raises_is_retried_then_drops_the_episode() -> None:
    tries: list[int] = []

    @tool
    def fails() -> str:
        """Always fails."""
        tries.append(1)
        raise OSError("the database is down")

    with pytest.raises(EpisodeDropped, match="fails failed 3 times: OSError: the database is down") as dropped:
        play(Script("<think></think>" + call("fails")), [fails])
    assert dropped.value.cause == "tool_error" and len(tries) == 3


@pytest.mark.parametrize("answer", ["<think></think>4", "<think></think>" + call("nowhere") * 9])
def test_an_environment_that_does_not_close_holds_nobody_up(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hangs(ToolEnvironment):
        async def close(self) -> None:
            await asyncio.sleep(60.0)

    monkeypatch.setattr(agent, "CLOSE_S", 0.2)
    with pytest.raises(EpisodeDropped, match="the environment of q did not close in 0 s") as dropped:
        asyncio.run(run_episode(ROW, Hangs([], lambda answer, gold: True), Script(answer), LimitsConfig()))
    assert dropped.value.cause == "environment_close"


def test_a_tool_that_recovers_costs_nothing() -> None:
    tries: list[int] = []

    @tool
    def flaky() -> str:
        """Fails once."""
        tries.append(1)
        if len(tries) == 1:
            raise OSError("try again")
        return "4"

    assert play(Script("<think></think>" + call("flaky"), "<think></think>4"), [flaky]).success


def test_a_tool_that_hangs_is_left_behind_after_its_time_out() -> None:
    @tool(timeout=0.05)
    def hangs() -> str:
        """Never returns."""
        threading.Event().wait()
        return ""

    with pytest.raises(EpisodeDropped, match=r"tool hangs: no result after 0\.05 s") as dropped:
        play(Script("<think></think>" + call("hangs")), [hangs], retries=1)
    assert dropped.value.cause == "tool_timeout"


def test_limits_end_an_episode_and_score_it_as_wrong() -> None:
    again = "<think></think>" + call("calculator", expression="1")
    assert play(Script(again, again), [calculator], max_tool_calls=1).status is Status.CALL_LIMIT
    assert play(Script(again, again), [calculator], max_turns=2).status is Status.CALL_LIMIT
    cut = play(Script("<think></think>44444"), [calculator], max_new_tokens=16)
    assert cut.status is Status.TRUNCATED and not cut.success and cut.own_tokens == 16


def test_long_results_are_cut_and_say_so() -> None:
    @tool(timeout=None)
    def long() -> str:
        """Much text."""
        return "x" * 100

    script = Script("<think></think>" + call("long"), "<think></think>4")
    play(script, [long], tool_result_chars=10)
    assert script.read_back == ["x" * 10 + " … [cut at 10 characters]"]


def test_a_call_inside_thinking_is_not_executed() -> None:
    episode = play(Script("<think>" + call("calculator", expression="1") + "</think>4"), [calculator])
    assert not episode.turns[0].well_formed and not episode.tool_results


def failing_runner(failures: int) -> tuple[Runner, RolloutBuffer]:
    def broken() -> Any:
        def verify(answer: str, gold: Any) -> bool:
            raise OSError("the grader is down")

        return ToolEnvironment([], verify)

    limits = LimitsConfig(retries=0, max_failures_in_a_row=failures)
    return Runner(broken, limits), RolloutBuffer()


def test_failed_episodes_are_dropped_and_counted_never_scored() -> None:
    runner, buffer = failing_runner(100)
    buffer.expect("g", 3, 0)
    runner.fill(buffer, [Job(ROW, "g", i) for i in range(3)], lambda: Script("<think></think>4"))
    (group,) = buffer.take(1, timeout=10)
    assert group.episodes == [] and group.dropped == 3 and dict(buffer.drops) == {"OSError": 3}
    runner.close()


def test_failures_in_a_row_stop_the_run_loudly() -> None:
    runner, buffer = failing_runner(4)
    buffer.expect("g", 8, 0)
    runner.fill(buffer, [Job(ROW, "g", i) for i in range(8)], lambda: Script("<think></think>4"))
    with pytest.raises(UserError, match=r"[4-8] episodes in a row failed.*the grader is down"):
        buffer.take(1, timeout=10)
    runner.close()


def test_a_wait_for_episodes_says_what_it_waited_for() -> None:
    buffer = RolloutBuffer()
    buffer.expect("g", 1, 0)
    with pytest.raises(WaitTimeout, match="0 of 1 groups are complete"):
        buffer.take(1, timeout=0.05)


def test_groups_come_out_in_the_order_asked_for() -> None:
    buffer = RolloutBuffer()
    for name in ("b", "a"):
        buffer.expect(name, 2, 3)
    for name, sample in (("a", 1), ("b", 1), ("a", 0), ("b", 0)):
        buffer.add(Episode("p", name, sample))
    groups = buffer.take(2)
    assert [g.group_id for g in groups] == ["b", "a"]
    assert [e.sample for e in groups[0].episodes] == [0, 1]


def test_a_younger_group_does_not_go_before_an_older_one() -> None:
    buffer = RolloutBuffer()
    for name, version in (("long", 0), ("short", 1)):
        buffer.expect(name, 1, version)
    buffer.add(Episode("p", "short", 0))
    with pytest.raises(WaitTimeout, match="0 of 1 groups are complete"):
        buffer.take(1, timeout=0.05)
    buffer.add(Episode("p", "long", 0))
    taken = [buffer.take(1)[0].group_id for _ in range(2)]
    assert taken == ["long", "short"]


def test_tool_errors_are_not_failures() -> None:
    @tool(timeout=None)
    def picky(x: int) -> str:
        """Refuses.

        Args:
            x: anything
        """
        raise ToolError("x must be even")

    script = Script("<think></think>" + call("picky", x=1), "<think></think>4")
    play(script, [picky])
    assert script.read_back == ["error: x must be even"]
