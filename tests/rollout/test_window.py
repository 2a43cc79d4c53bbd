"""Truncated windows: on the real engine what they cut goes on as if nothing had been; on a virtual clock, every tick.

Rules from T-PPO (arXiv 2506.15050, "successive batching").
"""

from __future__ import annotations

import asyncio
import copy
import functools
import itertools
import pickle
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.chat import Chat
from rollout.config import LimitsConfig
from rollout.engines import Sampling
from rollout.environment import Message, Row
from rollout.episode import Episode, Status, Turn, program_id
from rollout.errors import EngineDied, UserError, WaitTimeout
from rollout.runner import Job, Runner
from rollout.speaker import Policy
from rollout.tasks import ToolEnvironment
from rollout.tools import Tool, tool
from rollout.tools.calculator import calculator
from rollout.weights import named_weights
from rollout.window import Ended, State, Window
from tests.rollout.clockwork import CALL_LENGTH, SETTLE, Clockwork, Rig, calls, jobs, rig, words
from tests.rollout.clockwork import chat as clockwork_chat
from tests.rollout.taught import EASY, HARD, chat, taught, teaching

if TYPE_CHECKING:
    from rollout.engines.vllm_in_process import InProcessEngine
    from tests.conftest import Loop

LIMITS = LimitsConfig(max_new_tokens=64, episode_timeout_s=60.0)
CLOSE = 1e-5  # nats: a token's log-prob from a prompt that was read anew, beside another batch; 2e-6 is what we saw


def visits() -> Iterator[Job]:
    """Hard, easy, hard, … for ever."""
    number = 0
    while True:
        for row in (HARD, EASY):
            yield Job(row, f"{row.id}.{number}", 0)
        number += 1


# ---- on the real engine


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


def opened(policy: Policy, runner: Runner, length: int, slots: int, **options: Any) -> Window:
    window = Window(runner, length, slots, options.pop("max_age", 1000), once=True)
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
        window = opened(greedy, runner, length, slots=2)
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
        window = opened(greedy, runner, 5, slots=2)
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
        window = opened(greedy, runner, 60, slots=2)
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


# ---- what a window holds, by the tick

Turns = list[list[int]]


@st.composite
def turns(draw: st.DrawFn) -> Turns:
    """Calls, of tools that take ticks or none, and an answer."""
    asked = st.builds(calls, st.integers(0, 5), st.integers(CALL_LENGTH, 14))
    return [*draw(st.lists(asked, max_size=2)), words(draw(st.integers(1, 14)))]


LOOK = calls(1)[3]  # the token that names the tool which takes ticks


def scripted(episodes: list[Turns]) -> Callable[[str, int], list[int]]:
    return lambda program, turn: episodes[number(program) % len(episodes)][turn]


def number(program: str) -> int:
    return int(program.partition("/")[0][1:])


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


class Ledger:
    """The own tokens that each episode brings to training, window for window."""

    def __init__(self) -> None:
        self.told: dict[str, list[tuple[int, float | None, int]]] = defaultdict(list)

    def write(self, ended: Ended, version: int) -> None:
        for episode in (*ended.finished, *ended.unfinished):
            new = tokens_of(episode)[episode.sequences[0].trained :]
            assert all(v == version for *_, v in new), "in the window that wrote it, with its version"
            self.told[program_id(episode)] += new
        for episode in ended.finished:
            assert self.told[program_id(episode)] == tokens_of(episode), "once, with its log-prob"


def tokens_of(episode: Episode) -> list[tuple[int, float | None, int]]:
    """Token, log-prob and version of each own token."""
    (sequence,) = episode.sequences
    rows = zip(sequence.token_ids, sequence.behaviour_logprobs, sequence.versions, sequence.own_mask, strict=True)
    return [(token, logprob, version) for token, logprob, version, own in rows if own]


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
        until(lambda: r.runner._loop.is_running())
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


# ---- between two windows


THOUGHTS = "'<think>' + ('\\n' + thoughts if thoughts else '') + '</think>' + content"


@functools.cache
def stripping() -> Chat:
    """The format of a template that drops earlier thinking: each turn after a tool is another sequence."""
    tokenizer = copy.deepcopy(clockwork_chat().tokenizer)
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
        episode = Episode.begin("q9", "g9")
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
