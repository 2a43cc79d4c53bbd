"""From prompts to optimizer steps: a real runner and buffer, and a policy that says what it was told to."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollout.chat import parse_text
from rollout.config import LimitsConfig
from rollout.environment import Message, Row
from rollout.episode import Episode, Sequence, ToolResult, Turn
from rollout.runner import Runner
from rollout.tasks import ToolEnvironment
from rollout.tools import Tool
from training.budgets import BayesKnapsack, Knapsack, Uniform
from training.estimates import Group, Rloo
from training.packing import unpack
from training.prompts import PromptOrder
from training.rewards import TaskReward
from training.rewards.adacot import AdaCot
from training.rollouts import Axes, CompleteRollouts, Source
from training.selection import All, DropOverlong, DynamicSampling
from training.settings import BatchConfig
from training.stream import RolloutStream, StepBatch
from training.success_history import Visit

ROWS = [Row(f"q{i}", [{"role": "user", "content": "?"}], i) for i in range(10)]
PAD, LENGTH = 0, 40


class Pupil:
    """Right in every other sample of the questions that it finds hard; one token a character, with the row's number."""

    def __init__(self, hard: Callable[[int], bool]) -> None:
        self.hard = hard

    def speaker(self) -> Pupil:
        return Pupil(self.hard)

    async def open(self, episode: Episode, messages: list[Message], tools: list[Tool]) -> None:
        episode.sequences.append(Sequence.open([1, 2]))

    async def speak(self, episode: Episode, max_tokens: int) -> tuple[Turn, int, bool]:
        number = int(episode.prompt_id[1:])
        wrong = self.hard(number) and episode.sample % 2 == 1
        text = f"<think>{'hm' * episode.sample}</think>{'?' if wrong else number}"
        ids = [10 + number] * min(len(text), max_tokens)
        episode.sequences[-1].append_own(ids, [-0.5] * len(ids), [0] * len(ids))
        return parse_text(text), len(ids), len(text) > max_tokens

    async def read(self, episode: Episode, results: list[ToolResult]) -> None:
        raise AssertionError("it calls no tools")

    async def close(self, episode: Episode) -> None: ...


def grade(answer: str, gold: int) -> bool:
    if gold in (8, 9):
        raise OSError("the grader is down")
    return answer == str(gold)


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    limits = LimitsConfig(max_new_tokens=LENGTH, retries=0, max_failures_in_a_row=10_000)
    with closing(Runner(lambda: ToolEnvironment([], grade), limits)) as runner:
        yield runner


class Rounds(list[Any]):
    """What each round gave: the visits of its groups, and their advantages."""

    def __call__(self, groups: Any, estimates: Any) -> None:
        firsts = [[float(e.advantages[0][0]) for e in each] for each in estimates]
        self.append(([group.group_id for group in groups], firsts))


def stream(runner: Runner, rows: range = range(8), **settings: Any) -> tuple[RolloutStream, Rounds]:
    axes = {"budget": Uniform(2), "reward": TaskReward(), "advantage": Group(normalize=False), "selection": All()}
    axes |= {name: settings.pop(name) for name in list(settings) if name in axes}
    hard = settings.pop("hard", lambda number: True)
    options = {name: settings.pop(name) for name in ("anchor", "keep_zero", "think_id") if name in settings}
    rounds = Rounds()
    policy: Any = SimpleNamespace(speaker=Pupil(hard).speaker)
    batch = BatchConfig(**{"prompts": 4, "max_tokens": 64, **settings})
    source = Source(PromptOrder([ROWS[i] for i in rows], seed=5), Axes(**axes), runner, policy, batch.prompts, 10)
    made = RolloutStream(
        CompleteRollouts(source),
        batch,
        seed=5,
        pad_id=PAD,
        max_new_tokens=LENGTH,
        sync=lambda: 0,
        on_round=rounds,
        **options,
    )
    return made, rounds


def take(made: RolloutStream, n: int) -> list[StepBatch]:
    return [next(made) for _ in range(n)]


def asked_of(made: RolloutStream) -> int:
    """Prompts asked so far."""
    prompts = made.rollouts.source.prompts
    return prompts.epoch * len(prompts.rows) + prompts.position


def tokens(step: StepBatch) -> list[Any]:
    return [[field.tolist() for field in vars(batch).values()] for batch in step["micro_batches"]]


def trained(step: StepBatch) -> set[int]:
    """Numbers of the questions in a step."""
    ids = {int(i) for batch in step["micro_batches"] for i in batch.own(batch.targets).unique()}
    return {i - 10 for i in ids}


def weight(step: StepBatch) -> float:
    return float(sum(batch.weights.double().sum() for batch in step["micro_batches"]))


@given(st.integers(1, 12), st.integers(0, 2**32), st.integers(0, 40), st.integers(0, 40))
def test_prompts_every_epoch_visits_each_row_once_and_any_position_resumes(
    n: int, seed: int, at: int, more: int
) -> None:
    rows = [Row(f"r{i}", [], i) for i in range(n)]
    order = PromptOrder(rows, seed)
    seen = order.take(at)
    later = PromptOrder(rows, seed)
    later.load_state_dict(order.state_dict())
    seen += order.take(more)
    assert later.take(more) == seen[at:]
    for epoch in range(len(seen) // n):
        part = seen[epoch * n : (epoch + 1) * n]
        assert sorted(row.answer for row, _ in part) == list(range(n))
        assert {visit for _, visit in part} == {f"r{i}.{epoch}" for i in range(n)}


def test_prompts_are_shuffled_anew_by_epoch_and_seed() -> None:
    rows = [Row(f"r{i}", [], i) for i in range(50)]
    orders = [[row.answer for row, _ in PromptOrder(rows, seed).take(100)] for seed in (0, 1)]
    assert len({tuple(half) for order in orders for half in (order[:50], order[50:])}) == 4
    with pytest.raises(ValueError, match="training split is empty"):
        PromptOrder([], 0)


def test_a_restored_stream_goes_on_as_the_first_would(runner: Runner) -> None:
    whole, rounds = stream(runner, prompts=3, minibatches=2, epochs=2)
    take(whole, 5)  # in the middle of the second round
    saved = io.BytesIO()
    torch.save(whole.state_dict(), saved)
    later, later_rounds = stream(runner, prompts=3, minibatches=2, epochs=2)
    later.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), weights_only=False))
    assert list(map(tokens, take(later, 7))) == list(map(tokens, take(whole, 7)))
    assert later_rounds == rounds[2:] and len(rounds) == 3
    visits = [visit for groups, _ in rounds for visit in groups]
    assert visits == [visit for _, visit in PromptOrder(ROWS[:8], 5).take(9)], "in order, none lost, none repeated"


def test_a_round_gives_minibatches_times_epochs_steps(runner: Runner) -> None:
    made, rounds = stream(runner, prompts=4, minibatches=2, epochs=3)
    steps = take(made, 6)
    assert len(rounds) == 1 and not made.pending
    everything = {int(visit[1 : visit.index(".")]) for visit in rounds[0][0]}
    for epoch in range(3):
        first, second = map(trained, steps[2 * epoch : 2 * epoch + 2])
        assert len(first) == len(second) == 2 and first | second == everything, "whole groups, each once an epoch"
    assert len({frozenset(trained(step)) for step in steps}) > 2, "cut anew each epoch"
    assert all(weight(step) == pytest.approx(1) for step in steps)
    assert [bool(step["metrics"]) for step in steps] == [True] + [False] * 5
    assert steps[0]["metrics"]["rollout/episodes"] == 8 and steps[0]["metrics"]["success"] == 0.5


def test_packed_sequences_are_the_episodes_own(runner: Runner) -> None:
    made, rounds = stream(runner, prompts=2)
    (step,) = take(made, 1)
    packed = {i: ids for batch in step["micro_batches"] for i, ids in unpack(batch, batch.input_ids).items()}
    values = {i: a for batch in step["micro_batches"] for i, a in unpack(batch, batch.own(batch.advantages)).items()}
    visits, advantages = rounds[0]
    for index in range(4):
        number, sample = int(visits[index // 2][1]), index % 2
        own = len("<think></think>?") + 2 * sample
        assert packed[index].tolist() == [1, 2] + [10 + number] * own
        assert values[index].tolist() == [advantages[index // 2][sample]] * own
    assert advantages == [[0.5, -0.5]] * 2


def test_dynamic_sampling_asks_again_until_enough_groups_vary(runner: Runner) -> None:
    made, rounds = stream(runner, hard=lambda number: number % 2 == 0, selection=DynamicSampling(max_rounds=4))
    (step,) = take(made, 1)
    assert len(rounds[0][0]) == 4 and trained(step) <= {0, 2, 4, 6}
    assert step["metrics"]["rollout/groups_kept"] == 4 < step["metrics"]["rollout/groups"]
    asked = step["metrics"]["rollout/groups"]
    assert asked_of(made) == asked, "never more prompts than groups still missing"


def test_dynamic_sampling_gives_up_after_its_rounds(runner: Runner) -> None:
    made, rounds = stream(runner, hard=lambda number: False, selection=DynamicSampling(max_rounds=3), minibatches=2)
    steps = take(made, 2)
    assert rounds == [([], [])] and asked_of(made) == 12
    assert [step["micro_batches"] for step in steps] == [[], []], "two steps without a gradient, and the run goes on"
    assert steps[0]["metrics"]["effective_gradient_ratio"] == 0 and steps[0]["metrics"]["rollout/groups"] == 12


def test_sequences_without_gradient_keep_their_share_of_the_denominator(runner: Runner) -> None:
    settings = {"prompts": 8, "hard": lambda number: number < 3, "aggregation": "sequence"}
    (step,) = take(stream(runner, **settings)[0], 1)
    assert trained(step) == {0, 1, 2}
    assert weight(step) == pytest.approx(3 / 8)
    (kept,) = take(stream(runner, **settings, keep_zero=True)[0], 1)
    assert trained(kept) == set(range(8)) and weight(kept) == pytest.approx(1)


def test_overlong_episodes_count_in_their_group_and_not_in_the_denominator(runner: Runner) -> None:
    (step,) = take(stream(runner, prompts=2, budget=Uniform(15), selection=DropOverlong())[0], 1)
    # Sample 13 writes 15 + 2·13 + 1 = 42 tokens, above the limit of 40.
    assert step["metrics"]["rollout/truncated"] == pytest.approx(2 / 15)
    lengths = {
        len(values) for batch in step["micro_batches"] for values in unpack(batch, batch.own(batch.weights)).values()
    }
    assert max(lengths) <= LENGTH and weight(step) == pytest.approx(1)
    advantages = np.concatenate([batch.own(batch.advantages).unique() for batch in step["micro_batches"]])
    assert sorted({round(float(a), 4) for a in advantages}) == [round(-7 / 15, 4), round(8 / 15, 4)]


def test_a_budget_may_give_a_prompt_none_and_another_most(runner: Runner) -> None:
    def adaptive() -> BayesKnapsack:
        budget = BayesKnapsack(4, low=0, high=16)
        for number in range(8):  # two questions vary, the others are hopeless or solved
            right = 20 if number in (0, 1) else 0 if number < 5 else 500
            visit = f"q{number}.before"
            wrong = 40 if number in (0, 1) else 500 if number < 5 else 0
            assert budget.history is not None
            budget.history.visits[f"q{number}"] = [Visit(visit, 0, right + wrong, right, 4)]
        return budget

    settings = {"prompts": 8, "minibatches": 2, "hard": lambda number: number < 2}
    made, rounds = stream(runner, **settings, budget=adaptive())
    steps = take(made, 2)
    sizes = {visit.partition(".")[0]: len(firsts) for visit, firsts in zip(*rounds[0], strict=True)}
    assert sizes == {"q0": 16, "q1": 16}
    assert steps[0]["metrics"]["rollout/largest_group"] == 16 and steps[0]["metrics"]["effective_prompt_ratio"] == 1
    assert {frozenset(trained(step)) for step in steps} == {frozenset({0}), frozenset({1})}, "as many rollouts in each"
    later, later_rounds = stream(runner, **settings, budget=adaptive())
    later.load_state_dict(pickle.loads(pickle.dumps(made.state_dict())))
    assert list(map(tokens, take(later, 4))) == list(map(tokens, take(made, 4)))
    assert later_rounds == rounds[1:]


@pytest.mark.parametrize(
    "budget",
    [partial(Knapsack, least_seen=4), BayesKnapsack, partial(BayesKnapsack, cost="tokens", half_life=2.0)],
)
@pytest.mark.parametrize("advantage", [Group(), Group(normalize=False, clip=5.0), Rloo()])
@pytest.mark.parametrize("selection", [All(), DynamicSampling(2), DropOverlong()])
def test_budgets_go_with_every_group_advantage_and_selection(
    runner: Runner, budget: Any, advantage: Any, selection: All
) -> None:
    settings: Any = {"prompts": 4, "minibatches": 2, "advantage": advantage, "selection": selection}
    made, rounds = stream(runner, **settings, hard=lambda number: number % 3 == 0, budget=budget(4, high=12))
    for step in take(made, 8):
        assert weight(step) <= 1 + 1e-6
        for batch in step["micro_batches"]:
            assert bool(torch.isfinite(batch.advantages).all())
    assert len(rounds) == 4 and len({len(firsts) for _, each in rounds for firsts in each}) > 1, "ragged"
    for _, each in rounds:
        for firsts in each:
            assert abs(sum(firsts)) < 1e-5 * len(firsts)


def test_ragged_groups(runner: Runner) -> None:
    class Ragged(Uniform):
        def __call__(self, rows: Any) -> list[int]:
            return [0, 1, 3, 2][: len(rows)]

    made, rounds = stream(runner, budget=Ragged(), prompts=4)
    (step,) = take(made, 1)
    visits, advantages = rounds[0]
    asked = [visit for _, visit in PromptOrder(ROWS[:8], 5).take(4)]
    assert visits == asked[1:], "a prompt without rollouts has no group"
    assert advantages == [[0.0], pytest.approx([1 / 3, -2 / 3, 1 / 3]), [0.5, -0.5]]
    assert trained(step) == {int(visit[1]) for visit in asked[2:]}
    assert step["metrics"]["rollout/episodes"] == 6


def test_the_decision_to_think_has_no_policy_loss(runner: Runner) -> None:
    decision = partial(stream, prompts=8)
    (plain,), (masked,) = take(decision(runner)[0], 1), take(decision(runner, think_id=2)[0], 1)
    count = [sum(int(batch.policy_mask.sum()) for batch in step["micro_batches"]) for step in (plain, masked)]
    assert count[0] - count[1] == 16, "the prompts end with the tag: the first own token decides"
    assert weight(plain) == pytest.approx(1) == weight(masked)


def test_what_a_reward_remembers_is_state(runner: Runner) -> None:
    made, _ = stream(runner, reward=AdaCot(labels="self", gamma_format=0.0))
    take(made, 1)
    later, _ = stream(runner, reward=AdaCot(labels="self", gamma_format=0.0))
    later.load_state_dict(pickle.loads(pickle.dumps(made.state_dict())))
    assert later.axes.reward.state_dict() == made.axes.reward.state_dict() != AdaCot().state_dict()  # type: ignore[attr-defined]


def test_anchors_are_computed_for_every_step_of_a_round_before_the_first(runner: Runner) -> None:
    calls: list[int] = []

    def anchor(micro_batches: list[Any]) -> list[torch.Tensor]:
        calls.append(len(micro_batches))
        return [batch.own(batch.behaviour_logprobs) + 1 for batch in micro_batches]

    made, _ = stream(runner, minibatches=2, epochs=2, anchor=anchor)
    first = next(made)
    assert len(calls) == 4
    for step in [first, *take(made, 3)]:
        assert step["anchors"] is not None and len(step["anchors"]) == len(step["micro_batches"])
        assert all(torch.all(values == 0.5) for values in step["anchors"])
    (alone,) = take(stream(runner, anchor=anchor)[0], 1)
    assert alone["anchors"] is None and len(calls) == 4, "with one step a round there is nothing to recompute"


def test_lost_episodes_are_counted_and_lost_groups_left_out(runner: Runner) -> None:
    made, rounds = stream(runner, rows=range(6, 10), prompts=4)
    (step,) = take(made, 1)
    assert {visit.partition(".")[0] for visit in rounds[0][0]} == {"q6", "q7"}
    assert step["metrics"]["dropped/OSError"] == 4 and step["metrics"]["rollout/episodes"] == 4
    assert trained(step) == {6, 7} and weight(step) == pytest.approx(1)


def test_a_round_of_lost_groups_gives_a_step_without_a_gradient(runner: Runner) -> None:
    (step,) = take(stream(runner, rows=range(8, 10), prompts=2)[0], 1)
    assert step["micro_batches"] == [] and step["metrics"]["rollout/groups_kept"] == 0
    assert all(np.isfinite(value) for value in step["metrics"].values())
