"""OTC against the paper's tables and formulas, and the memory of what sufficed."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollout.chat import parse_text
from rollout.episode import Episode, Sequence
from training.estimates import Decoupled
from training.rewards.otc import OptimalCalls, Otc, grpo_tool_reward, ppo_tool_reward, tool_cost

CALL = '<tool_call>{"name": "search", "arguments": {"query": "x"}}</tool_call>'
COUNTS = st.integers(0, 40)
# (success, calls) of the members of a group
GROUPS = st.lists(st.tuples(st.booleans(), st.integers(0, 4)), min_size=1, max_size=8)


def episode(success: bool, calls: int = 0, prompt: str = "q", text: str | None = None) -> Episode:
    """Each call in a turn of its own, then the answer."""
    turns = [parse_text(f"<think></think>{CALL}") for _ in range(calls)]
    turns.append(parse_text("<think></think>4" if text is None else text))
    return Episode(prompt, prompt, turns=turns, rewards={"task": float(success)}, success=success)


@pytest.mark.parametrize(
    ("c", "row"), [(4, [1, 0.866, 0.707, 0.588, 0.5, 0.434]), (3, [1, 0.809, 0.624, 0.5, 0.415, 0.355])]
)
def test_cosine_is_the_papers_table(c: int, row: list[float]) -> None:
    assert ppo_tool_reward(range(6), max_calls=c).tolist() == pytest.approx(row, abs=1e-3)


@pytest.mark.parametrize(
    ("n", "row"),
    [
        (1, [0, 1, 0.866, 0.707, 0.588, 0.5]),
        (2, [0, 0.866, 1, 0.951, 0.866, 0.782]),
        (3, [0, 0.707, 0.951, 1, 0.975, 0.924]),
    ],
)
def test_sine_is_the_papers_table(n: int, row: list[float]) -> None:
    assert grpo_tool_reward(range(6), n, max_calls=4).tolist() == pytest.approx(row, abs=1e-3)


@given(COUNTS, COUNTS, COUNTS)
def test_grpo_form_is_equation_6_and_ppo_form_equation_5(m: int, n: int, c: int) -> None:
    f = 0 if m == n == 0 else m if n == 0 else 2 * n * m / (m + n)
    cosine = 1.0 if m == 0 else math.cos(m * math.pi / (2 * m + c))
    expected = 1.0 if f == n == 0 else cosine if n == 0 else math.sin(f * math.pi / (2 * n))
    assert grpo_tool_reward(m, n, max_calls=c) == pytest.approx(expected, abs=1e-12)
    assert ppo_tool_reward(m, max_calls=c) == pytest.approx(cosine, abs=1e-12)


@given(st.integers(1, 20), st.integers(0, 20))
def test_every_legal_number_of_calls_keeps_half(c: int, m: int) -> None:
    if m <= c:
        assert ppo_tool_reward(m, max_calls=c) >= 0.5 - 1e-12
    assert ppo_tool_reward(m, max_calls=c) >= ppo_tool_reward(m + 1, max_calls=c)


def test_vectors_keep_their_dtype_and_broadcast_numbers() -> None:
    calls = torch.tensor([0.0, 1.0, 2.0])
    assert grpo_tool_reward(calls, [0, 1, 1], max_calls=4).dtype == torch.float32
    assert ppo_tool_reward([0, 1], max_calls=4).dtype == torch.float64
    assert isinstance(ppo_tool_reward(1, max_calls=4), float)


@pytest.mark.parametrize("bad", [-1, math.nan, math.inf, [], [1, -2], [[1]]])
def test_impossible_counts_are_refused(bad: Any) -> None:
    for call in (
        lambda: ppo_tool_reward(bad, max_calls=4),
        lambda: grpo_tool_reward(bad, 1, max_calls=4),
        lambda: grpo_tool_reward(1, bad, max_calls=4),
        lambda: ppo_tool_reward(1, max_calls=bad),
    ):
        with pytest.raises(ValueError, match="must be"):
            call()
    with pytest.raises(ValueError, match="one length"):
        grpo_tool_reward([1, 2, 3], [1, 2], max_calls=4)


def shaped(reward: Otc, group: list[Episode]) -> list[float]:
    return [sum(parts.values()) for parts in reward(group)]


@given(GROUPS, st.sampled_from(["grpo", "ppo"]))
def test_a_wrong_answer_earns_nothing_and_a_right_one_its_economy(members: list[tuple[bool, int]], form: str) -> None:
    rewards = shaped(Otc(form, alpha=2.0, max_calls=4), [episode(*member) for member in members])
    best = min((calls for success, calls in members if success), default=0)
    for (success, calls), got in zip(members, rewards, strict=True):
        economy = ppo_tool_reward(calls, max_calls=4)
        if form == "grpo":
            economy = grpo_tool_reward(calls, best, max_calls=4)
        assert got == pytest.approx(2.0 * economy * success, abs=1e-12)


def test_with_a_format_term_a_wrong_answer_earns_too() -> None:
    wrong, right = shaped(Otc("ppo", format_weight=1.0), [episode(False, 0), episode(True, 0)])
    assert (wrong, right) == (1.0, 2.0), "as in the paper, which is why it is off"


def test_the_optimum_outlives_the_group_that_found_it() -> None:
    reward = Otc(max_calls=4)
    assert shaped(reward, [episode(True, 2)]) == [1.0]
    assert shaped(reward, [episode(True, 1), episode(True, 2)])[1] == pytest.approx(0.866, abs=1e-3)
    assert shaped(reward, [episode(True, 2)])[0] == pytest.approx(0.866, abs=1e-3)
    other = Otc(max_calls=4)
    other.load_state_dict(reward.state_dict())
    assert shaped(other, [episode(True, 2)])[0] == pytest.approx(0.866, abs=1e-3)
    assert shaped(other, [episode(True, 2, prompt="another")]) == [1.0]
    assert shaped(Otc(optimum="group"), [episode(True, 2)]) == [1.0]


def test_one_lucky_guess_does_not_set_the_optimum_for_ever() -> None:
    reward = Otc(least_successes=2)
    assert shaped(reward, [episode(True, 0), episode(True, 1), episode(True, 1)])[1] == 1.0
    assert shaped(reward, [episode(True, 1)]) == [1.0]
    assert shaped(reward, [episode(True, 0)]) == [1.0], "the second guess is luck no more"
    assert shaped(reward, [episode(True, 1)])[0] < 0.9


@given(st.lists(st.tuples(st.sampled_from("ab"), COUNTS), max_size=30), st.integers(1, 3), st.randoms())
def test_the_optimum_does_not_depend_on_order_or_on_who_counted(
    found: list[tuple[str, int]], least: int, rng: random.Random
) -> None:
    one, parts = OptimalCalls(least), (OptimalCalls(least), OptimalCalls(least))
    for prompt, calls in found:
        one.add(prompt, calls)
    shuffled = list(found)
    rng.shuffle(shuffled)
    for prompt, calls in shuffled:
        rng.choice(parts).add(prompt, calls)
    parts[0].merge(parts[1])
    assert parts[0].successes == one.successes
    for prompt in "ab":
        counts = [calls for p, calls in found if p == prompt]
        enough = [calls for calls in counts if counts.count(calls) >= least]
        assert one.optimum(prompt) == parts[0].optimum(prompt) == min(enough, default=None)


def test_tools_may_have_prices() -> None:
    assert tool_cost(episode(True, 3), {}) == 3
    assert tool_cost(episode(True, 3), {"search": 0.1}) == pytest.approx(0.3)
    cheap = Otc("ppo", max_calls=4, prices={"search": 0.0})
    assert shaped(cheap, [episode(True, 3)]) == [1.0]


HIDDEN = '{"name": "search", "arguments": {"query": "x", "more": [{"name": "search", "arguments": {"query": "y"}}]}}'


@pytest.mark.parametrize(
    "text",
    [
        "<think></think><tool_response>4</tool_response>4",  # its own tool response
        f"<think>{CALL}</think>4",  # a call inside of the thinking
        "<think><think></think>4",  # nested
        "<think></think><think>2+2</think>4",  # repeated
        "<think></think>4</think>",
        "<think></think>4<tool_call>",
    ],
)
def test_ill_formed_successes_neither_earn_nor_set_the_optimum(text: str) -> None:
    reward = Otc(max_calls=4)
    rewards = shaped(reward, [episode(True, 0, text=text), episode(True, 1)])
    assert rewards == [0.0, 1.0]
    assert reward.optimal.optimum("q") == 1


def test_a_call_hidden_in_arguments_costs_as_one_in_the_open() -> None:
    hidden = episode(True, 0, text=f"<think></think><tool_call>{HIDDEN}</tool_call>")
    assert tool_cost(hidden, {}) == 2


def test_economy_is_normalised_in_one_with_what_it_multiplies() -> None:
    """Alone it would count against every right answer that took a call, and so against being right."""
    group = [episode(calls=1, success=True) for _ in range(4)] + [episode(calls=0, success=False) for _ in range(4)]
    reward = Otc(form="ppo", max_calls=2)
    for each, rewards in zip(group, reward(group), strict=True):
        each.rewards = rewards
        each.sequences.append(Sequence.open([1]))
        each.sequences[0].append_own([2], [0.0], [0])
    alone, joined = (m(group) for m in (Decoupled(), Decoupled(joined=reward.joined)))
    assert abs(alone[0].advantages[0][0]) < 1e-2
    assert joined[0].advantages[0][0] > 0.9 > 0 > joined[-1].advantages[0][0]
