"""The window axis: what of truncated rollouts goes to training, when, and how a run takes them up again."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.config import LimitsConfig
from rollout.engines import Sampling
from rollout.engines.lockstep import Lockstep
from rollout.environment import Row
from rollout.episode import Episode, Status, program_id
from rollout.errors import EngineDied, UserError
from rollout.runner import Runner
from rollout.speaker import Policy
from rollout.tasks import ToolEnvironment
from rollout.tools import Tool, tool
from rollout.tools.calculator import calculator
from rollout.weights import named_weights
from rollout.window import Ended, Window
from tests.rollout import taught
from tests.rollout.clockwork import Rig, calls, rig, words
from training.budgets import Uniform
from training.estimates import Egae, Group
from training.members import ValueModelConfig
from training.packing import MicroBatch
from training.prompts import PromptOrder
from training.rewards import TaskReward
from training.rollouts import Axes, CompleteRollouts, Round, Source, TruncatedRollouts
from training.selection import All, DynamicSampling
from training.settings import BatchConfig
from training.stream import RolloutStream, staleness

if TYPE_CHECKING:
    from rollout.engines.vllm_in_process import InProcessEngine
    from tests.conftest import Loop

ROWS = [Row(f"q{i}", [{"role": "user", "content": "?"}], "") for i in range(5)]
Script = Callable[[str, int], list[int]]


class Finished(TaskReward):
    """The task's, and a complaint about an episode that has no reward yet."""

    def __call__(self, group: Any) -> list[dict[str, float]]:
        assert all(episode.status is not Status.UNFINISHED for episode in group)
        return super().__call__(group)


@dataclass
class Played:
    """Truncated rollouts over a clockwork, and what each of their windows left."""

    rollouts: TruncatedRollouts
    rig: Rig
    windows: list[Ended]

    def state(self) -> Any:
        """As a checkpoint keeps it."""
        kept = self.rollouts.state_dict(), self.rollouts.source.prompts.state_dict()
        return pickle.loads(pickle.dumps(kept)), self.rig.clock.ticks, self.rig.clock.written

    def load(self, kept: Any) -> None:
        (state, prompts), self.rig.clock.ticks, self.rig.clock.written = kept
        self.rollouts.source.prompts.load_state_dict(prompts)
        self.rollouts.load_state_dict(state)


@contextlib.contextmanager
def played(
    script: Script,
    length: int,
    slots: int,
    *,
    unfinished: bool,
    samples: int = 2,
    size: int = 2,
    rows: int = 5,
    selection: All | None = None,
    **options: Any,
) -> Iterator[Played]:
    with rig(script, length, slots, once=unfinished, **options) as r:
        advantage = Egae() if unfinished else Group()
        axes = Axes(Uniform(samples), Finished(), advantage, selection or All())
        source = Source(PromptOrder(ROWS[:rows], seed=1), axes, r.runner, r.policy, size, 10.0)
        made = Played(TruncatedRollouts(source, r.window, unfinished=unfinished), r, [])
        play = r.window.play

        def recorded(timeout: float) -> Ended:
            made.windows.append(play(timeout))
            return made.windows[-1]

        r.window.play = recorded  # type: ignore[method-assign]
        yield made


def scripted(episodes: list[list[list[int]]]) -> Script:
    """Episodes by prompt, visit and sample."""

    def script(program: str, turn: int) -> list[int]:
        visit, _, sample = program.partition("/")
        prompt, _, epoch = visit.partition(".")
        return episodes[(7 * int(prompt[1:]) + 3 * int(epoch) + int(sample)) % len(episodes)][turn]

    return script


def lengths(*each: int) -> Script:
    return scripted([[words(n)] for n in each])


@st.composite
def episodes(draw: st.DrawFn) -> list[list[list[int]]]:
    plain = st.builds(lambda n: [words(n)], st.integers(1, 30))
    called = st.builds(lambda ticks, n: [calls(ticks), words(n)], st.integers(0, 4), st.integers(1, 12))
    return draw(st.lists(plain | called, min_size=1, max_size=6))


def members(group: Any) -> list[str]:
    return [program_id(episode) for episode in group.episodes]


def content(episode: Episode) -> tuple[Any, ...]:
    """All that training reads."""
    sequences = [
        (s.token_ids, s.own_mask, s.behaviour_logprobs, s.versions, s.trained, s.prompt_length)
        for s in episode.sequences
    ]
    results = [(result.call, result.content) for result in episode.tool_results]
    return program_id(episode), sequences, results, episode.rewards, episode.status, episode.success


def contents(past: Round) -> tuple[Any, ...]:
    groups = [[(g.group_id, g.size, [content(e) for e in g.episodes]) for g in gs] for gs in (past.seen, past.kept)]
    return groups, past.tokens, past.slots, past.drops, past.metrics


# ---- which episodes, and when


@settings(deadline=None, max_examples=25)
@given(episodes(), st.integers(2, 12), st.integers(1, 5), st.integers(1, 3))
def test_a_group_is_trained_once_when_its_last_member_has_finished(
    script: list[list[list[int]]], length: int, slots: int, samples: int
) -> None:
    with played(scripted(script), length, slots, unfinished=False, samples=samples) as p:
        over: list[str] = []
        given: list[str] = []
        for version in range(3):
            before = len(p.windows)
            past = p.rollouts.play(version)
            last = [program_id(e) for e in p.windows[-1].finished]
            over += [program_id(e) for ended in p.windows[before:] for e in ended.finished]
            assert past.kept and past.seen == past.kept and past.slots == slots
            assert past.tokens == sum(ended.tokens for ended in p.windows[before:])
            for group in past.kept:
                assert members(group) == [f"{group.group_id}/{i}" for i in range(samples)]
                assert set(members(group)) <= set(over) and set(members(group)) & set(last), "not before, and not later"
                assert all(e.rewards == {"task": 1.0} for e in group.episodes)
            given += [group.group_id for group in past.kept]
            whole = [v for v, n in Counter(name.partition("/")[0] for name in over).items() if n == samples]
            assert sorted(given) == sorted(whole), "every whole group, each once"
        assert past.metrics == {"rollout/unfinished": float(len(p.windows[-1].unfinished))}


@settings(deadline=None, max_examples=25)
@given(episodes(), st.integers(1, 12), st.integers(1, 5))
def test_unfinished_episodes_bring_what_is_new_and_rewards_come_at_the_end(
    script: list[list[list[int]]], length: int, slots: int
) -> None:
    with played(scripted(script), length, slots, unfinished=True) as p:
        for version in range(4):
            past = p.rollouts.play(version)
            ended = p.windows[-1]
            kept = [episode for group in past.kept for episode in group.episodes]
            over = [episode for episode in kept if episode.status is not Status.UNFINISHED]
            going = [episode for episode in kept if episode.status is Status.UNFINISHED]
            assert sorted(map(program_id, over)) == sorted(map(program_id, ended.finished))
            assert all(episode.rewards == {"task": 1.0} for episode in over)
            assert all(not e.rewards and e.own_tokens > sum(s.trained for s in e.sequences) for e in going)
            fresh = sum(e.own_tokens - sum(s.trained for s in e.sequences) for e in kept)
            assert fresh == past.tokens == ended.tokens, "all that was written in the window, and nothing else"
            assert sorted(e for g in past.seen for e in members(g)) == sorted(map(program_id, over))
            assert len({group.group_id for group in past.kept}) == len(past.kept)


class Values:
    """A value model that says how far the token stands in its row."""

    config = ValueModelConfig(warmup_rounds=0)

    def values(self, micro_batches: list[MicroBatch]) -> list[torch.Tensor]:
        return [batch.own(batch.position_ids).double() for batch in micro_batches]

    def step(self, micro_batches: list[MicroBatch]) -> dict[str, float]:
        raise AssertionError("the trainer's")


@settings(deadline=None, max_examples=20)
@given(episodes(), st.integers(1, 12), st.integers(1, 3))
def test_each_own_token_trains_the_policy_once_in_its_window_and_the_critic_when_its_episode_ends(
    script: list[list[list[int]]], length: int, minibatches: int
) -> None:
    with played(scripted(script), length, 3, unfinished=True) as p:
        batch = BatchConfig(prompts=4, max_tokens=512, minibatches=minibatches)
        stream = RolloutStream(
            p.rollouts, batch, seed=0, pad_id=0, max_new_tokens=100, sync=lambda: 0, critic=Values(), keep_zero=True
        )
        before = 0
        for _ in range(5):
            steps = [next(stream) for _ in range(minibatches)]
            trained = sorted(-x for step in steps for x in logprobs(step["micro_batches"]))
            assert trained == list(range(before + 1, p.rig.clock.written + 1)), "what this window wrote"
            before = p.rig.clock.written
            values = sorted(x for critic in steps[0]["critic"] for x in logprobs(critic))
            done = [s.behaviour_logprobs for e in p.windows[-1].finished for s in e.sequences]
            assert values == sorted(x for each in done for x in each if x is not None), "those that ended, whole"


def logprobs(micro_batches: list[MicroBatch]) -> list[float]:
    return [float(x) for batch in micro_batches for x in batch.own(batch.behaviour_logprobs)]


def test_who_only_waited_brings_nothing_new() -> None:
    script: Script = lambda program, turn: [calls(9), words(4)][turn] if program.endswith("/1") else words(100)  # noqa: E731
    with played(script, 4, 2, unfinished=True) as p:
        kept = [[e for g in p.rollouts.play(version).kept for e in members(g)] for version in range(4)]
        visit = first_visits(1)[0]
        both, one = [f"{visit}/0", f"{visit}/1"], [f"{visit}/0"]
        assert kept == [both, both, one, one], "it calls in tick 8, and has its answer in tick 17"
        assert members(p.rollouts.play(4).kept[0]) == both


def test_a_group_completes_without_those_that_were_too_old() -> None:
    script: Script = lambda program, turn: words(1000 if program == "q1.0/1" else 6)  # noqa: E731
    with played(script, 4, 4, unfinished=False, max_age=4) as p:
        drops: Counter[str] = Counter()
        given = {}
        for version in range(14):
            past = p.rollouts.play(version)
            drops += past.drops
            given |= {group.group_id: members(group) for group in past.kept}
        assert drops == {"too_old": 1} and given.pop("q1.0") == ["q1.0/0"]
        assert all(len(names) == 2 for names in given.values())


def test_a_group_that_was_lost_is_seen_and_not_trained() -> None:
    script: Script = lambda program, turn: words(1000 if program.startswith("q1.0/") else 6)  # noqa: E731
    with played(script, 4, 4, unfinished=False, max_age=3) as p:
        seen, kept = [], []
        while "q1.0" not in seen:
            past = p.rollouts.play(len(p.windows))
            seen, kept = [g.group_id for g in past.seen], [*kept, *(g.group_id for g in past.kept)]
        assert "q1.0" not in kept


def test_a_selection_that_keeps_nothing_ends_the_round() -> None:
    with played(lengths(6), 4, 4, unfinished=False, selection=DynamicSampling(max_rounds=3)) as p:
        past = p.rollouts.play(0)
        assert not past.kept and 6 <= len(past.seen) <= 8, "as many groups as complete rollouts would have asked for"
        assert all(episode.rewards == {"task": 1.0} for group in past.seen for episode in group.episodes)


# ---- what ends a run


def test_failures_are_counted_by_cause() -> None:
    with played(lengths(6), 4, 4, unfinished=True, retries=0) as p:
        p.rig.clock.failures = {f"{visit}/0": [ConnectionError("gone")] for visit in first_visits(2)}
        past = p.rollouts.play(0)
        assert past.drops == {"ConnectionError": 2}
        assert not {f"{visit}/0" for visit in first_visits(2)} & {e for g in past.kept for e in members(g)}


def first_visits(n: int) -> list[str]:
    return [visit for _, visit in PromptOrder(ROWS, seed=1).take(n)]


@pytest.mark.parametrize("unfinished", [False, True])
def test_tools_that_never_return_end_the_run_in_one_line(unfinished: bool) -> None:
    @tool(timeout=0.01)
    async def look(ticks: int) -> str:
        """Never returns.

        Args:
            ticks: whatever
        """
        await asyncio.Event().wait()
        return ""

    options = {"tools": [look], "retries": 1, "max_failures_in_a_row": 9}
    with played(lambda program, turn: calls(1), 20, 4, unfinished=unfinished, **options) as p:
        start, drops = time.monotonic(), Counter()
        with pytest.raises(UserError, match=r"^9 episodes in a row failed .*tool look: no result after 0\.01 s$"):
            while time.monotonic() - start < 20:
                drops += p.rollouts.play(0).drops
        assert set(drops) | {"tool_timeout"} == set(p.rig.runner.lost) == {"tool_timeout"}


@pytest.mark.parametrize("unfinished", [False, True])
def test_a_dead_engine_ends_the_run(unfinished: bool) -> None:
    with played(lengths(30), 4, 4, unfinished=unfinished) as p:
        p.rig.clock.failures = {f"{first_visits(1)[0]}/1": [EngineDied("out of memory")]}
        with pytest.raises(EngineDied, match="out of memory"):
            p.rollouts.play(0)


# ---- taken up again


@settings(deadline=None, max_examples=25)
@given(
    st.booleans(),
    episodes(),
    st.integers(2, 12),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(3, 6),
)
def test_in_lockstep_rollouts_taken_up_go_on_as_they_would_have(
    unfinished: bool, script: list[list[list[int]]], length: int, slots: int, before: int, after: int, max_age: int
) -> None:
    options = {"unfinished": unfinished, "lockstep": True, "max_age": max_age}
    with (
        played(scripted(script), length, slots, **options) as whole,
        played(scripted(script), length, slots, **options) as later,
    ):
        for version in range(before):
            whole.rig.clock.version = version
            whole.rollouts.play(version)
        later.load(whole.state())
        for version in range(before, before + after):
            whole.rig.clock.version = later.rig.clock.version = version
            assert contents(later.rollouts.play(version)) == contents(whole.rollouts.play(version))


def test_partly_started_groups_and_waiting_jobs_are_state() -> None:
    options = {"unfinished": False, "samples": 3, "rows": 3}
    with played(lengths(3, 9), 4, 2, **options) as p, played(lengths(3, 9), 4, 2, **options) as later:
        first = p.rollouts.play(0)
        kept = p.state()
        state = kept[0][0]
        assert state["jobs"], "asked for, and not begun"
        started = [g for g in state["groups"]["groups"].values() if 0 < len(g.episodes) < g.size]
        assert started, "a group of which some have ended"
        later.load(kept)
        given = [*map(members, first.kept)]
        while len(given) < 6:
            given += map(members, later.rollouts.play(1).kept)
        assert sorted(given[:6]) == sorted([f"{visit}/{i}" for i in range(3)] for visit in visits(3, 6)), "none lost"


@contextlib.contextmanager
def complete(script: Script, ahead: int, spare: int = 0) -> Iterator[tuple[CompleteRollouts, Rig]]:
    """Two prompts a round, two samples each, so many rounds ahead of the trainer."""
    with rig(script, 10_000, 4) as r:
        r.clock.open = lambda: True
        axes = Axes(Uniform(2), Finished(), Group(), All())
        source = Source(PromptOrder(ROWS, seed=1), axes, r.runner, replace(r.policy, window=None), 2, 10.0)
        yield CompleteRollouts(source, ahead=ahead, spare=spare), r


@settings(deadline=None, max_examples=25)
@given(episodes(), st.integers(0, 3))
def test_rounds_are_trained_in_their_turn_and_no_staler_than_asked(script: list[list[list[int]]], ahead: int) -> None:
    with complete(scripted(script), ahead) as (rollouts, r):
        for turn in range(5):
            r.clock.version = version = 3 * turn  # every round trains for three steps
            past = rollouts.play(version)
            assert [group.group_id for group in past.kept] == visits(5, 2 * turn + 2)[2 * turn :], "long ones too"
            assert all(members(group) == [f"{group.group_id}/0", f"{group.group_id}/1"] for group in past.kept)
            found = staleness(past.kept, version)
            assert 0 <= found["rollout/staleness"] <= found["rollout/staleness_max"] <= 3 * ahead
            assert len(rollouts.state_dict()["flights"]) == ahead


@pytest.mark.parametrize("ahead", [0, 2])
def test_spare_prompts_are_started_and_given_up_in_every_round(ahead: int) -> None:
    with complete(lengths(3, 20), ahead, spare=1) as (rollouts, _):
        rounds = [rollouts.play(version) for version in range(4)]
    assert [len(past.kept) for past in rounds] == [2, 2, 2, 2]
    given_up = sum(past.drops["cancelled"] for past in rounds)
    assert len({group.group_id for past in rounds for group in past.kept}) == 8 and given_up <= 4 * 2


def test_rounds_in_the_air_are_played_again_by_whoever_takes_up() -> None:
    with complete(lengths(3, 20), 2) as (rollouts, _):
        rollouts.play(0)
        kept = pickle.loads(pickle.dumps((rollouts.state_dict(), rollouts.source.prompts.state_dict())))
        on = [[group.group_id for group in rollouts.play(version).kept] for version in (1, 2, 3)]
    with complete(lengths(3, 20), 2) as (later, _):
        later.source.prompts.load_state_dict(kept[1])
        later.load_state_dict(kept[0])
        assert [[group.group_id for group in later.play(version).kept] for version in (1, 2, 3)] == on


def visits(rows: int, n: int) -> list[str]:
    return [visit for _, visit in PromptOrder(ROWS[:rows], seed=1).take(n)]


def test_another_number_of_slots_is_refused_in_one_line() -> None:
    with played(lengths(9), 4, 4, unfinished=True) as p, played(lengths(9), 4, 6, unfinished=True) as later:
        p.rollouts.play(0)
        with pytest.raises(
            UserError, match=r"^batch\.prompts, budget\.samples: the run began with 4 episodes .*now there are 6; "
        ):
            later.load(p.state())


# ---- on the real engine


@pytest.fixture(scope="module")
def engine(vllm_engine: InProcessEngine, run: Loop, model_dir: Any) -> Iterator[InProcessEngine]:
    with taught.teaching(vllm_engine, run, model_dir):
        yield vllm_engine


def late(seconds: float) -> Tool:
    """The calculator, whose answer comes over a wire."""

    @tool
    async def slow(expression: str) -> str:
        """Later.

        Args:
            expression: what to compute
        """
        await asyncio.sleep(seconds)
        return calculator.function(expression)

    return Tool(calculator.name, calculator.schema, slow.function, timeout=10.0)


@contextlib.contextmanager
def sampled(engine: InProcessEngine, unfinished: bool, seconds: float) -> Iterator[TruncatedRollouts]:
    """A run in lockstep, seeded: four episodes at a time of two prompts, seven tokens a window."""
    lockstep = Lockstep(engine)
    environment = functools.partial(ToolEnvironment, [late(seconds)], lambda answer, gold: answer == gold)
    limits = LimitsConfig(max_new_tokens=40, episode_timeout_s=60.0)
    with closing(Runner(environment, limits, lockstep)) as runner:
        window = Window(runner, 7, 4, max_age=20, once=unfinished)
        policy = Policy(lockstep, taught.chat(), Sampling(max_tokens=1), 512, seed=11, window=window)  # type: ignore[arg-type]
        window.policy = policy
        axes = Axes(Uniform(2), Finished(), Egae() if unfinished else Group(), All())
        source = Source(PromptOrder([taught.EASY, taught.HARD], seed=2), axes, runner, policy, 2, 60.0)
        yield TruncatedRollouts(source, window, unfinished=unfinished)


@pytest.mark.parametrize("unfinished", [False, True])
def test_a_run_that_was_taken_up_is_bit_equal(
    unfinished: bool, engine: InProcessEngine, run: Loop, model_dir: Any
) -> None:
    """Tokens, log-probs, which episodes and in which order; an evaluation in between changes nothing."""

    def rounds(rollouts: TruncatedRollouts, versions: range) -> list[Any]:
        given = []
        for version in versions:
            run(engine.update_weights(named_weights(taught.taught(model_dir)), version))
            given.append(contents(rollouts.play(version)))
        return given

    start = 1000 + 100 * unfinished
    with sampled(engine, unfinished, 0.0) as rollouts:
        whole = rounds(rollouts, range(start, start + 6))
    with sampled(engine, unfinished, 0.01) as rollouts:
        parts = rounds(rollouts, range(start, start + 2))
        source = rollouts.source
        jobs = [
            job for _, group in replace(source, prompts=PromptOrder(source.prompts.rows, 9)).jobs(2) for job in group
        ]
        jobs = [replace(job, group_id=f"greedy/{job.group_id}") for job in jobs]
        assert len(source.runner.play(jobs, source.policy.at(0.0, None).speaker, lambda done: None)) == 4
        kept = pickle.dumps((rollouts.state_dict(), source.prompts.state_dict()))
    with sampled(engine, unfinished, 0.02) as rollouts:
        state, prompts = pickle.loads(kept)
        rollouts.source.prompts.load_state_dict(prompts)
        rollouts.load_state_dict(state)
        parts += rounds(rollouts, range(start + 2, start + 6))
    assert parts == whole
    everything = [episode for (_, groups), *_ in whole for *_, each in groups for episode in each]
    assert any(results for _, _, results, *_ in everything), "with tools"
    assert unfinished == any(status is Status.UNFINISHED for *_, status, _ in everything)
