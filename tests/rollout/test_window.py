"""Truncated windows, by the tick of a virtual clock: who writes how much, who waits, who is cut, who is dropped.

Rules from T-PPO (arXiv 2506.15050, "successive batching").
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.environment import Message, Row
from rollout.episode import Episode, Status, program_id
from rollout.errors import EngineDied, UserError, WaitTimeout
from rollout.tasks import ToolEnvironment
from rollout.tools import tool
from rollout.window import State, Window
from tests.rollout.clockwork import (
    CALL_LENGTH,
    SETTLE,
    Clockwork,
    Ledger,
    Rig,
    Turns,
    calls,
    jobs,
    number,
    rig,
    scripted,
    tokens_of,
    turns,
    words,
)

LOOK = calls(1)[3]  # the token that names the tool which takes ticks


class Books:
    """What each slot has written in the window, from what its episodes ask for and are charged."""

    def __init__(self, window: Window, script: Callable[[str], Turns]) -> None:
        self.window, self.script = window, script
        self.wrote = [0] * len(window.slots)
        self.waited: set[int] = set()  # slots of which a tool took ticks
        self.total: dict[str, int] = defaultdict(int)  # by episode
        self.grant, self.charge = window.grant, window.charge
        window.grant, window.charge = self.granted, self.charged  # type: ignore[method-assign]

    def slot(self, episode: Episode) -> int:
        (index,) = (i for i, s in enumerate(self.window.slots) if s.live is not None and s.live.episode is episode)
        return index

    async def granted(self, episode: Episode) -> int:
        tokens = await self.grant(episode)
        assert tokens == self.window.length - self.wrote[self.slot(episode)] > 0, "exactly what is left of the window"
        return tokens

    def charged(self, episode: Episode, tokens: int) -> bool:
        name = program_id(episode)
        self.wrote[self.slot(episode)] += tokens
        self.total[name] += tokens
        ends = zip(itertools.accumulate(map(len, self.script(name))), self.script(name), strict=True)
        if any(end == self.total[name] and LOOK in turn for end, turn in ends):
            self.waited.add(self.slot(episode))
        return self.charge(episode, tokens)

    def opens(self) -> None:
        """A new page. Who waits now has waited in the coming window too."""
        lives = [slot.live for slot in self.window.slots]
        self.wrote = [0] * len(lives)
        self.waited = {i for i, live in enumerate(lives) if live is not None and live.episode.unanswered}


@settings(deadline=None, max_examples=60)
@given(st.lists(turns(), min_size=1, max_size=4), st.integers(1, 12), st.integers(1, 4), st.integers(1, 6))
def test_every_slot_writes_its_window_unless_a_tool_takes_its_time(
    episodes: list[Turns], length: int, slots: int, windows: int
) -> None:
    ledger = Ledger()
    with rig(scripted(episodes), length, slots, jobs=jobs()) as r:
        books = Books(r.window, lambda program: episodes[number(program) % len(episodes)])
        for version in range(windows):
            r.clock.version, start = version, r.clock.ticks
            books.opens()
            ended = r.window.play(10.0)
            ledger.write(ended, version)
            assert ended.tokens == sum(books.wrote) and max(books.wrote) <= length
            steady = set(range(slots)) - books.waited
            assert all(books.wrote[i] == length for i in steady), "full from the start, refilled at once"
            if steady:
                assert r.clock.ticks - start == length, "a window is so many engine steps"
            free = [slot for slot in r.window.slots if slot.live is None]
            assert all(slot.left <= 0 for slot in free), "only where the window's tokens are spent"
            live = [slot.live for slot in r.window.slots if slot.live is not None]
            assert [e.group_id for e in ended.unfinished] == [each.job.group_id for each in live], "by slot"
        assert not r.runner.lost


@settings(deadline=None, max_examples=60)
@given(
    st.lists(turns(), min_size=1, max_size=4),
    st.integers(1, 12),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(10, 40),
)
def test_in_lockstep_a_window_is_a_function_of_its_episodes(
    episodes: list[Turns], length: int, slots: int, windows: int, limit: int
) -> None:
    """An independent simulation: everyone writes as far as it may, then all stop, then newcomers start."""
    expected = simulated([[len(turn) for turn in episode] for episode in episodes], length, slots, windows, limit)
    ledger = Ledger()
    with rig(scripted(episodes), length, slots, jobs=jobs(), lockstep=True, max_new_tokens=limit) as r:
        for version, (finished, unfinished) in enumerate(expected):
            r.clock.version = version
            ended = r.window.play(10.0)
            ledger.write(ended, version)
            assert [(number(e.group_id), e.own_tokens) for e in ended.finished] == finished
            assert [(number(e.group_id), e.own_tokens) for e in ended.unfinished] == unfinished
            assert ended.tokens == length * slots
        assert r.clock.aborted == []


Census = list[tuple[int, int]]  # episode and its own tokens


def simulated(
    lengths: list[list[int]], length: int, slots: int, windows: int, limit: int
) -> list[tuple[Census, Census]]:
    """What each window leaves, finished and unfinished, by slot. ``limit``: own tokens of an episode."""
    holders: list[list[int] | None] = [None] * slots  # episode, turn, written of the turn, written in all
    result, born = [], 0
    for _ in range(windows):
        left, finished = [length] * slots, []
        while any(left):
            for i in range(slots):
                if holders[i] is None and left[i]:
                    holders[i], born = [born, 0, 0, 0], born + 1
            for i, holder in enumerate(holders):
                if holder is None or not left[i]:
                    continue
                said = lengths[holder[0] % len(lengths)]
                n = min(left[i], said[holder[1]] - holder[2], limit - holder[3])
                left[i], holder[2], holder[3] = left[i] - n, holder[2] + n, holder[3] + n
                turn_over = holder[2] == said[holder[1]]
                if turn_over:
                    holder[1], holder[2] = holder[1] + 1, 0
                if holder[1] == len(said) or holder[3] == limit:
                    finished.append((i, holder[0], holder[3]))
                    holders[i] = None
        finished.sort(key=lambda entry: entry[0])
        result.append(([(n, own) for _, n, own in finished], [(h[0], h[3]) for h in holders if h is not None]))
    return result


def test_a_tool_that_takes_no_time_is_no_wait() -> None:
    with rig(lambda program, turn: [calls(0), words(4)][turn], 30, 1, jobs=jobs()) as r:
        ended = r.window.play(10.0)
        assert ended.tokens == 30 and len(ended.finished) == 2 and not r.window.slots[0].lags


def test_who_lags_is_cut_when_another_has_spent_its_window() -> None:
    episodes = [[words(100)], [calls(3), words(50)]]
    with rig(scripted(episodes), 12, 2, jobs=jobs()) as r:
        first = r.window.play(10.0)
        # 8 tokens, 3 ticks with the tool, 1 token in the twelfth tick
        assert [e.own_tokens for e in first.unfinished] == [12, CALL_LENGTH + 1] and first.tokens == 21
        assert r.clock.aborted == ["g1/0"] and r.clock.ticks == 12
        second = r.window.play(10.0)
        assert [e.own_tokens for e in second.unfinished] == [24, CALL_LENGTH + 13] and r.clock.aborted == ["g1/0"]
        tools = [request.tool for request in r.clock.asked if request.program_id == "g1/0"]
        assert tools == [None, "look", None], "what goes on in the second window does not come back from a tool"
        (done,) = (e for _ in range(5) for e in r.window.play(10.0).finished if e.group_id == "g1")
        assert [token for token, *_ in tokens_of(done)] == [*calls(3), *words(50)]


def test_in_lockstep_nobody_is_cut() -> None:
    episodes = [[words(100)], [calls(3), words(50)]]
    with rig(scripted(episodes), 12, 2, jobs=jobs(), lockstep=True) as r:
        assert [e.own_tokens for e in r.window.play(10.0).unfinished] == [12, 12]
        assert r.clock.aborted == []


def test_when_all_wait_for_tools_the_window_ends_if_something_was_written() -> None:
    with rig(lambda program, turn: [calls(5), words(4)][turn], 20, 2, jobs=jobs()) as r:
        ended = r.window.play(10.0)
        assert ended.tokens == 2 * CALL_LENGTH and all(episode.unanswered for episode in ended.unfinished)
        assert [slot.live.state for slot in r.window.slots if slot.live] == [State.TOOL] * 2
        start = r.clock.ticks
        ended = r.window.play(10.0)  # with nothing written there is nothing to train on: it waits for the tools
        assert [e.own_tokens for e in ended.finished] == [CALL_LENGTH + 4] * 2
        assert [e.own_tokens for e in ended.unfinished] == [CALL_LENGTH] * 2
        assert r.clock.ticks - start == 5 + 4 + CALL_LENGTH


def test_who_waits_holds_up_nobody() -> None:
    episodes = [[words(100)], [calls(9), words(4)]]
    with rig(scripted(episodes), 9, 2, jobs=jobs()) as r:
        for ticks, wrote in ((9, 8), (18, 9)):
            ended = r.window.play(10.0)
            assert r.clock.ticks == ticks
            assert [e.own_tokens for e in ended.unfinished] == [ticks, wrote]
    assert r.clock.aborted == ["g1/0"], "its tool answered in tick 17; it wrote in the eighteenth, and was cut"


def test_who_has_spent_its_window_cuts_nobody_if_it_waited_itself() -> None:
    with rig(scripted([[calls(1), words(50)], [calls(5, 14), words(50)]]), 20, 2, jobs=jobs()) as r:
        assert r.window.play(10.0).tokens == 40 and r.clock.aborted == [] and r.clock.ticks == 25


def test_who_asks_in_the_moment_in_which_a_window_ends_waits_for_the_next() -> None:
    for rounds in range(SETTLE - 12, SETTLE + 12):  # of the event loop, from the call to the answer

        @tool(timeout=10.0)
        async def look(ticks: int, rounds: int = rounds) -> str:
            """Wait.

            Args:
                ticks: whatever
                rounds: how long
            """
            for _ in range(rounds):
                await asyncio.sleep(0)
            return "seen"

        script = scripted([[words(100)], [calls(1), words(50)]])
        with rig(script, CALL_LENGTH + 1, 2, jobs=jobs(), tools=[look]) as r:
            r.window.play(10.0)
            assert State.WRITING not in [slot.live.state for slot in r.window.slots if slot.live], rounds


class Slow(ToolEnvironment):
    """Whose beginnings, after the first, and scores take ticks."""

    def __init__(self, like: ToolEnvironment, clock: Clockwork, begun: list[str]) -> None:
        super().__init__(like.tools(), lambda answer, gold: True)
        self.clock, self.begun = clock, begun

    async def reset(self, row: Row) -> list[Message]:
        if row.id in self.begun:
            await self.clock.wait(4)
        self.begun.append(row.id)
        return await super().reset(row)

    async def score(self, episode: Episode) -> tuple[dict[str, float], bool]:
        await self.clock.wait(3)
        return await super().score(episode)


def slow(r: Rig) -> Rig:
    r.runner.environment = functools.partial(Slow, r.runner.environment(), r.clock, [])
    return r


def test_an_episode_that_its_limits_end_waits_for_no_tool() -> None:
    with rig(lambda program, turn: calls(5), 20, 1, jobs=jobs(), max_tool_calls=0) as r:
        ended = slow(r).window.play(10.0)
        assert ended.tokens == 20 and [e.status for e in ended.finished] == [Status.CALL_LIMIT] * 2
        assert [e.status for e in ended.unfinished] == [Status.UNFINISHED]


def test_an_episode_whose_tool_has_answered_waits_no_more_though_it_writes_no_more() -> None:
    """The answer fills the context in tick 9; its score comes in tick 12, after the other's eleventh."""
    with rig(scripted([[words(100)], [calls(1), words(9)]]), 11, 2, jobs=jobs()) as r:
        prompt = r.policy.chat.open([{"role": "user", "content": "?"}], r.runner.environment().tools())
        r.window.policy = replace(r.policy, max_model_len=len(prompt) + CALL_LENGTH + 5)
        ended = slow(r).window.play(10.0)
        assert [(e.group_id, e.status) for e in ended.finished] == [("g1", Status.TRUNCATED)]
        assert [(e.group_id, e.own_tokens) for e in ended.unfinished] == [("g0", 11), ("g2", 0)], "cut as it began"


def test_who_lags_and_fails_is_cut_when_it_writes_again() -> None:
    """It fails after its tool, in tick 10, and begins anew in tick 14: the other wrote its last token in tick 12."""
    with rig(scripted([[words(100)], [calls(1), words(50)]]), 12, 2, jobs=jobs()) as r:
        r.clock.failures, r.clock.healthy = {"g1/0": [ConnectionError("gone")]}, 9
        ended = slow(r).window.play(10.0)
        assert r.clock.ticks == 14 and [e.own_tokens for e in ended.unfinished] == [12, 0]


# ---- age and failures


@pytest.mark.parametrize("script", [[words(100)], [calls(9, 6 * CALL_LENGTH), words(9)]], ids=["writing", "tool"])
def test_an_episode_that_is_too_old_is_dropped_counted_and_replaced(script: Turns) -> None:
    episodes = [script, *[[words(5)]] * 30]
    with rig(lambda program, turn: episodes[number(program)][turn], 16, 2, jobs=jobs(), max_age=3) as r:
        for _ in range(2):
            ended = r.window.play(10.0)
            assert not ended.drops and ended.unfinished[0].group_id == "g0"
        ended = r.window.play(10.0)
        assert [(job.group_id, cause) for job, cause in ended.drops] == [("g0", "too_old")]
        assert "g0" not in {e.group_id for e in (*ended.finished, *ended.unfinished)}
        ended = r.window.play(10.0)
        assert ended.tokens == 32 and not ended.drops, "somebody else has its place"


def test_what_infrastructure_failed_begins_anew_and_is_dropped_after_its_retries() -> None:
    with rig(scripted([[words(9)]]), 6, 2, jobs=jobs(), retries=2) as r:
        r.clock.failures = {"g0/0": [ConnectionError("gone")] * 2, "g1/0": [ConnectionError("gone")] * 3}
        ended = r.window.play(10.0)
        assert [(job.group_id, cause) for job, cause in ended.drops] == [("g1", "ConnectionError")]
        assert ended.tokens == 12, "what is left of the window goes to the next in the slot"
        ended = r.window.play(10.0)
        assert [tokens_of(e) and e.group_id for e in ended.finished] == ["g0", "g2"] and not ended.drops
        assert r.runner.lost == {"ConnectionError": 1}


def test_a_failure_in_a_later_window_begins_anew_too() -> None:
    ledger = Ledger()
    with rig(scripted([[words(9)]]), 6, 1, jobs=jobs()) as r:
        ledger.write(r.window.play(10.0), 0)
        r.clock.version, r.clock.failures = 1, {"g0/0": [ConnectionError("gone")]}
        (again,) = r.window.play(10.0).unfinished
        assert [version for *_, version in tokens_of(again)] == [1] * 6 and again.sequences[0].trained == 0


def test_an_abort_that_is_not_the_windows_is_a_failure() -> None:
    with rig(scripted([[words(20)]]), 6, 1, jobs=jobs()) as r:
        abort = r.clock.abort

        async def other() -> None:
            while r.clock.ticks < 3:
                await asyncio.sleep(0)
            await abort("g0/0")

        aborting = asyncio.run_coroutine_threadsafe(other(), r.runner._loop)
        (again,) = r.window.play(10.0).unfinished
        aborting.result(5.0)
        assert [-logprob for _, logprob, _ in tokens_of(again)] == [4, 5, 6], (
            "what came before the abort is thrown away"
        )


def test_failures_in_a_row_end_the_window_in_one_line() -> None:
    with rig(scripted([[words(9)]]), 6, 3, jobs=jobs(), retries=0, max_failures_in_a_row=5) as r:
        r.clock.failures = {f"g{i}/0": [ConnectionError("gone")] for i in range(20)}
        with pytest.raises(UserError, match=r"^5 episodes in a row failed \(limits\.max_failures_in_a_row\).*gone$"):
            r.window.play(10.0)


def test_an_engine_that_dies_is_heard_by_whoever_plays() -> None:
    with rig(scripted([[words(9)]]), 6, 3, jobs=jobs()) as r:
        r.window.play(10.0)
        r.clock.failures = {f"g{i}/0": [EngineDied("out of memory")] for i in range(3)}
        for _ in range(2):
            with pytest.raises(EngineDied, match="out of memory"):
                r.window.play(10.0)


def test_a_window_that_nothing_ends_says_what_it_waited_for() -> None:
    with rig(lambda program, turn: calls(9), 20, 1, jobs=jobs()) as r:
        r.window.play(10.0)
        r.clock.open = lambda: False
        with pytest.raises(WaitTimeout, match=r"a window of 20 tokens to end was not done after 0 s"):
            r.window.play(0.2)


def test_a_tool_that_never_returns_ends_the_run_in_one_line() -> None:
    free = threading.Event()

    @tool(timeout=0.02)
    def look(ticks: int) -> str:
        """Never returns.

        Args:
            ticks: whatever
        """
        free.wait()
        return ""

    settings = {"retries": 1, "max_failures_in_a_row": 5}
    with rig(lambda program, turn: calls(1), 20, 2, jobs=jobs(), tools=[look], **settings) as r:
        drops: list[str] = []
        start = time.monotonic()
        with pytest.raises(UserError, match=r"^5 episodes in a row failed .*tool look: no result after 0\.02 s$"):
            while time.monotonic() - start < 20:
                drops += [cause for _, cause in r.window.play(10.0).drops]
        free.set()
        assert set(drops) == set(r.runner.lost) == {"tool_timeout"}


def test_standing_still_is_not_held_against_an_episode_but_a_long_tool_is() -> None:
    episodes = [[words(8)], [calls(9), words(8)]]
    with rig(scripted(episodes), 4, 1, jobs=jobs(), episode_timeout_s=0.3) as r:
        for _ in range(2):
            ended = r.window.play(10.0)
            assert not ended.drops
            time.sleep(0.4)
        assert [e.group_id for e in ended.finished] == ["g0"]
        for _ in range(2):
            r.window.play(10.0)
        r.clock.open = lambda: False  # the tool takes for ever
        ended = r.window.play(10.0)
        assert [(job.group_id, cause) for job, cause in ended.drops] == [("g1", "episode_timeout")]
