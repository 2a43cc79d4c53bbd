"""What lies between two windows: what ends there, and unfinished episodes as state that another run takes up."""

from __future__ import annotations

import asyncio
import copy
import functools
import pickle
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.chat import Chat
from rollout.environment import Row
from rollout.episode import Episode, Status, Turn
from rollout.errors import UserError
from rollout.runner import Job
from rollout.tools import tool
from rollout.window import State
from tests.rollout.clockwork import (
    CALL_LENGTH,
    Ledger,
    Rig,
    Turns,
    calls,
    chat,
    jobs,
    rig,
    scripted,
    tokens_of,
    turns,
    words,
)

THOUGHTS = "'<think>' + ('\\n' + thoughts if thoughts else '') + '</think>' + content"


@functools.cache
def stripping() -> Chat:
    """The format of a template that drops earlier thinking: each turn after a tool is another sequence."""
    tokenizer = copy.deepcopy(chat().tokenizer)
    for kept, stripped in {THOUGHTS: "content", "{{- content }}": "{{- content.split('</think>')[-1] }}"}.items():
        assert kept in tokenizer.chat_template
        tokenizer.chat_template = tokenizer.chat_template.replace(kept, stripped)
    return Chat(tokenizer)


@settings(deadline=None, max_examples=30)
@given(turns(), st.integers(1, 12), st.booleans(), st.integers(0, 3), st.integers(8, 60))
def test_taken_up_at_every_window_an_episode_is_what_it_would_have_been(
    script: Turns, length: int, strips: bool, max_tool_calls: int, max_new_tokens: int
) -> None:
    limits = {"max_tool_calls": max_tool_calls, "max_new_tokens": max_new_tokens}

    def played(length: int, state: Any = None) -> tuple[Any, list[Episode]]:
        with rig(lambda program, turn: script[turn], length, 1, jobs=jobs(), **limits) as r:
            r.window.policy = replace(r.policy, chat=stripping() if strips else r.policy.chat)
            if state is not None:
                kept, r.clock.ticks, r.clock.written = pickle.loads(state)
                r.window.load_state_dict(kept)
            finished = r.window.play(10.0).finished
            return pickle.dumps((r.window.state_dict(), r.clock.ticks, r.clock.written)), finished

    state, done = played(length)
    while not done:
        state, done = played(length, state)
    with rig(lambda program, turn: script[turn], 100, 1, jobs=jobs(), **limits) as r:
        r.window.policy = replace(r.policy, chat=stripping() if strips else r.policy.chat)
        whole: list[Episode] = []
        while not whole:
            whole = r.window.play(10.0).finished
    ours, theirs = done[0], whole[0]
    assert (
        len(ours.sequences) == (len(theirs.turns) if strips and len(theirs.turns) > 1 else 1)
        or ours.status != "finished"
    )
    for a, b in zip(ours.sequences, theirs.sequences, strict=True):
        assert (a.token_ids, a.own_mask, a.behaviour_logprobs) == (b.token_ids, b.own_mask, b.behaviour_logprobs)
    assert [told(turn) for turn in ours.turns] == [told(turn) for turn in theirs.turns]
    assert (ours.status, ours.rewards) == (theirs.status, theirs.rewards)


def told(turn: Turn) -> Any:
    """All but the seconds that tools took."""
    return turn.reasoning, turn.content, turn.calls, turn.well_formed, [(r.content, r.error) for r in turn.results]


def test_who_is_taken_up_right_after_a_tool_comes_back_from_it() -> None:
    with rig(lambda program, turn: [calls(0), words(5)][turn], CALL_LENGTH, 1, jobs=jobs()) as r:
        r.window.play(10.0)
        with rig(lambda program, turn: [calls(0), words(5)][turn], 20, 1, jobs=jobs("h")) as later:
            later.window.load_state_dict(r.window.state_dict())
            later.window.play(10.0)
            assert later.clock.asked[0].tool == "glance"


def test_each_window_samples_with_seeds_of_its_own_and_a_second_run_with_the_same() -> None:
    def seeds() -> list[int | None]:
        with rig(lambda program, turn: [calls(0, 12), words(12)][turn], 5, 1, jobs=jobs()) as r:
            r.window.policy = replace(r.policy, seed=3)
            for _ in range(6):
                r.window.play(10.0)
            return [request.sampling.seed for request in r.clock.asked]

    first = seeds()
    assert len(set(first)) == len(first) and None not in first, "also where no new version came in between"
    assert seeds() == first


class Gate:
    """A tool that answers when told to, or fails."""

    def __init__(self, answer: str | None = "seen") -> None:
        self.free, self.calls = threading.Event(), 0

        @tool(timeout=10.0)
        def look(ticks: int) -> str:
            """Wait.

            Args:
                ticks: whatever
            """
            self.calls += 1
            self.free.wait(10.0)
            if answer is None:
                raise OSError("the tool is broken")
            return answer

        self.tool = look


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10.0
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("ending", ["dropped", "truncated"])
@pytest.mark.parametrize("resumed", [False, True])
def test_what_ends_between_two_windows_is_in_the_next_ones_account_once(ending: str, resumed: bool) -> None:
    episodes = [[calls(1), words(9)], *[[words(100)]] * 9]
    gate = Gate(None if ending == "dropped" else "x" * 300)  # which fills the context
    made = functools.partial(
        rig, scripted(episodes), 10, 2, jobs=jobs(), tools=[gate.tool], retries=0, max_model_len=200
    )
    ledger = Ledger()
    with made() as r:
        ledger.write(r.window.play(10.0), 0)
        gate.free.set()
        until(lambda: r.window.slots[0].live is None)
        state = pickle.dumps(r.window.state_dict())
        if resumed:
            with made() as later:
                later.window.load_state_dict(pickle.loads(state))
                check_account(later, ending, ledger)
        else:
            check_account(r, ending, ledger)


def check_account(r: Rig, ending: str, ledger: Ledger) -> None:
    r.clock.version = 1
    ended, after = r.window.play(10.0), r.window.play(10.0)
    if ending == "dropped":
        assert [(job.group_id, cause) for job, cause in ended.drops] == [("g0", "tool_error")]
        assert not ended.finished
    else:
        (episode,) = ended.finished
        assert episode.group_id == "g0" and episode.status is Status.TRUNCATED and episode.rewards == {"task": 0.0}
        assert episode.sequences[0].trained == episode.own_tokens == CALL_LENGTH
        assert ledger.told["g0/0"] == tokens_of(episode), "all of it was new in the window before"
        assert not ended.drops
    assert [e.group_id for e in ended.unfinished] == ["g2", "g1"], "its slot is refilled"
    assert not after.drops and not after.finished


def test_an_error_between_two_windows_reaches_who_plays_the_next() -> None:
    gate = Gate(None)
    episodes = [[calls(1), words(9)], [words(100)]]
    with rig(scripted(episodes), 10, 2, jobs=jobs(), tools=[gate.tool], retries=0, max_failures_in_a_row=1) as r:
        r.window.play(10.0)
        gate.free.set()
        until(lambda: r.runner.lost["tool_error"] == 1)
        with pytest.raises(UserError, match=r"^1 episodes in a row failed .*the tool is broken$"):
            r.window.play(10.0)


def test_who_waited_for_a_tool_is_taken_up_by_calling_it_again() -> None:
    gate = Gate()
    script = scripted([[words(100)], [calls(1), words(9)]])
    with rig(script, 10, 2, jobs=jobs(), tools=[gate.tool]) as r:
        assert r.window.play(10.0).unfinished[1].unanswered
        state = pickle.dumps(r.window.state_dict())
        until(lambda: gate.calls == 1)
        with rig(script, 10, 2, jobs=jobs("h"), tools=[gate.tool]) as later:
            later.window.load_state_dict(pickle.loads(state))
            until(lambda: gate.calls == 2)
            ended = later.window.play(10.0)
            assert [(e.own_tokens, e.unanswered) for e in ended.unfinished] == [(20, False), (CALL_LENGTH, True)]
            assert later.clock.ticks == 10, "who waits holds up nobody"
            gate.free.set()
            until(lambda: later.window.slots[1].live.state is State.ASKING)
            (done,) = later.window.play(10.0).finished
            assert [token for token, *_ in tokens_of(done)] == [*calls(1), *words(9)]
            assert [result.content for result in done.tool_results] == ["seen"]


def test_who_lacked_no_more_than_a_score_is_not_played_on() -> None:
    with rig(scripted([[words(3)]]), 10, 1, jobs=jobs()) as r:
        job = Job(Row("q9", [{"role": "user", "content": "?"}], ""), "g9", 0)
        episode = Episode.begin(job.row, "g9")
        asyncio.run(r.policy.speaker().open(episode, job.row.messages, []))
        episode.status = Status.TRUNCATED
        kept = {"job": job, "episode": episode, "age": 2}
        r.window.load_state_dict({"slots": [kept], "finished": [], "drops": []})
        ended = r.window.play(10.0)
        assert ended.finished[0].group_id == "g9" and ended.finished[0].own_tokens == 0
        assert ended.finished[0].rewards == {"task": 0.0}
        assert "g9/0" not in {request.program_id for request in r.clock.asked}


def test_another_number_of_slots_is_refused_in_one_line() -> None:
    with rig(scripted([[words(30)]]), 10, 2, jobs=jobs()) as r, rig(scripted([]), 10, 3, jobs=jobs()) as later:
        r.window.play(10.0)
        with pytest.raises(UserError, match=r"^batch\.prompts, budget\.samples: the run began with 2 episodes at a"):
            later.window.load_state_dict(r.window.state_dict())
