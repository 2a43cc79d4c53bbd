"""Truncated windows on the real engine: what they cut goes on as if nothing had been."""

from __future__ import annotations

import asyncio
import functools
import itertools
import pickle
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from rollout.config import LimitsConfig
from rollout.engines import Sampling
from rollout.episode import Episode, Status, program_id
from rollout.runner import Job, Runner
from rollout.speaker import Policy
from rollout.tasks import ToolEnvironment
from rollout.tools import Tool, tool
from rollout.tools.calculator import calculator
from rollout.weights import named_weights
from rollout.window import Window
from tests.rollout.taught import EASY, HARD, chat, taught, teaching

if TYPE_CHECKING:
    from rollout.engines.vllm_in_process import InProcessEngine
    from tests.conftest import Loop

LIMITS = LimitsConfig(max_new_tokens=64, episode_timeout_s=60.0)
CLOSE = 1e-5  # nats: a token's log-prob from a prompt that was read anew, beside another batch; seen: 4e-7


def visits() -> Iterator[Job]:
    """Hard, easy, hard, … for ever."""
    number = 0
    while True:
        for row in (HARD, EASY):
            yield Job(row, f"{row.id}.{number}", 0)
        number += 1


@pytest.fixture(scope="module")
def greedy(vllm_engine: InProcessEngine, run: Loop, model_dir: Any) -> Iterator[Policy]:
    """Says what it learnt."""
    with teaching(vllm_engine, run, model_dir):
        yield Policy(vllm_engine, chat(), Sampling(max_tokens=1, temperature=0.0), 512)


def runner_with(*tools: Tool) -> Runner:
    return Runner(lambda: ToolEnvironment(list(tools), lambda answer, gold: answer == gold), LIMITS)


@pytest.fixture(scope="module")
def uncut(greedy: Policy) -> dict[str, Episode]:
    """Both episodes as they are without windows."""
    with closing(runner_with(calculator)) as runner:
        played = runner.play([Job(row, row.id, 0) for row in (EASY, HARD)], greedy.speaker, lambda done: None)
    assert all(episode.success and episode.status is Status.FINISHED for episode in played)
    assert [len(episode.tool_results) for episode in played] == [0, 1]
    return {episode.prompt_id: episode for episode in played}


def opened(policy: Policy, runner: Runner, length: int) -> Window:
    window = Window(runner, length, 2, max_age=1000, once=True)
    window.policy = replace(policy, window=window)
    window.supply = functools.partial(next, visits())
    return window


def assert_same(episode: Episode, whole: Episode) -> None:
    """Token for token, log-prob for log-prob, result for result."""
    assert (episode.turns[-1].content, episode.success, episode.status) == (
        whole.turns[-1].content,
        whole.success,
        whole.status,
    )
    assert [(r.call, r.content) for r in episode.tool_results] == [(r.call, r.content) for r in whole.tool_results]
    for ours, theirs in zip(episode.sequences, whole.sequences, strict=True):
        assert (ours.token_ids, ours.own_mask) == (theirs.token_ids, theirs.own_mask)
        pairs = zip(ours.behaviour_logprobs, theirs.behaviour_logprobs, strict=True)
        assert all(a == b if None in (a, b) else a == pytest.approx(b, abs=CLOSE) for a, b in pairs)


def place(episode: Episode) -> str:
    """Where a window cut it."""
    sequence = episode.sequences[-1]
    text = chat().tokenizer.decode(sequence.token_ids[episode.open_turn or len(sequence) :])
    for opening, end in (("<think>", "</think>"), ("<tool_call>", "</tool_call>")):
        if opening in text and end not in text:
            return opening
    return ""


@pytest.mark.parametrize("length", [1, 2, 3, 5, 7, 64])
def test_what_windows_cut_is_what_no_window_had_cut(
    length: int, greedy: Policy, uncut: dict[str, Episode], run: Loop, model_dir: Any
) -> None:
    places, finished, told = set(), [], defaultdict(list)
    with closing(runner_with(calculator)) as runner:
        window = opened(greedy, runner, length)
        while len(finished) < 5:
            version = greedy.engine.version + 1
            run(greedy.engine.update_weights(named_weights(taught(model_dir)), version))
            ended = window.play(60.0)
            assert ended.tokens == 2 * length and not ended.drops
            assert all(episode.status is Status.UNFINISHED and not episode.rewards for episode in ended.unfinished)
            places |= {place(episode) for episode in ended.unfinished}
            finished += ended.finished
            for episode in (*ended.finished, *ended.unfinished):
                (sequence,) = episode.sequences
                own = [i for i, mine in enumerate(sequence.own_mask) if mine][sequence.trained :]
                assert {sequence.versions[i] for i in own} <= {version}, "written in this window, and never seen before"
                told[program_id(episode)] += [sequence.token_ids[i] for i in own]
    for episode in finished:
        assert_same(episode, uncut[episode.prompt_id])
        (sequence,) = episode.sequences
        own = [token for token, mine in zip(sequence.token_ids, sequence.own_mask, strict=True) if mine]
        assert told[program_id(episode)] == own, "each own token is new in one window"
    assert {episode.prompt_id for episode in finished} == {"easy", "hard"}
    assert length > 28 or {"<think>", "<tool_call>"} <= places, "cuts inside of a thought and of a call"


def test_an_evaluation_between_two_windows_neither_sees_nor_disturbs_them(
    greedy: Policy, uncut: dict[str, Episode]
) -> None:
    finished: list[Episode] = []
    with closing(runner_with(calculator)) as runner:
        window = opened(greedy, runner, 5)
        while len(finished) < 3:
            ended = window.play(60.0)
            finished += ended.finished
            before = pickle.dumps(window.state_dict())
            evaluated = [Job(row, f"greedy/{row.id}", 0) for row in (EASY, HARD)]
            seen = runner.play(evaluated, window.policy.at(0.0, None).speaker, lambda done: None)
            assert [program_id(episode) for episode in seen] == ["greedy/easy/0", "greedy/hard/0"]
            for episode in seen:
                assert_same(episode, uncut[episode.prompt_id])
            assert pickle.dumps(window.state_dict()) == before
    for episode in finished:
        assert_same(episode, uncut[episode.prompt_id])


def test_the_real_engine_cuts_who_lags_and_loses_no_token(greedy: Policy, uncut: dict[str, Episode]) -> None:
    @tool(timeout=10.0)
    async def slow(expression: str) -> str:
        """As the calculator, but it takes its time.

        Args:
            expression: what to compute
        """
        await asyncio.sleep(0.1)
        return calculator.function(expression)

    late = Tool(calculator.name, calculator.schema, slow.function, timeout=10.0)
    finished: list[Episode] = []
    tokens = []
    with closing(runner_with(late)) as runner:
        window = opened(greedy, runner, 60)
        order = (Job(HARD, f"hard.{i}", 0) for i in itertools.count())
        steady = (Job(EASY, f"easy.{i}", 0) for i in itertools.count())
        one, other = window.slots
        window.supply = lambda: next(order if one.live is not None and other.live is None else steady)
        while sum(episode.prompt_id == "hard" for episode in finished) < 3:
            ended = window.play(60.0)
            tokens.append(ended.tokens)
            finished += ended.finished
    assert min(tokens) < 120, "the slot whose tool took its time was cut"
    for episode in finished:
        assert_same(episode, uncut[episode.prompt_id])
