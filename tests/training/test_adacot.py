"""AdaCoT's prices against the equation, labels, and the mask of the decision."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollout.chat import parse_text
from rollout.episode import Episode, Sequence
from training.estimates import Decoupled, Group
from training.rewards.adacot import AdaCot, decision_mask, shaped_reward
from training.rewards.otc import Otc
from training.rewards.otc_adacot import OtcAdaCot

NEEDS = st.sampled_from([True, False, None])
CASES = st.tuples(st.floats(-5, 5), st.booleans(), NEEDS, st.booleans())


def equation(base: float, thought: bool, needs: bool | None, kept: bool, a1: float, a2: float, gamma: float) -> float:
    """Equation 4, one case at a time."""
    if needs is True and not thought:
        base -= a1
    if needs is False and thought:
        base -= a2
    return base if kept else base - gamma


@given(st.lists(CASES, min_size=1, max_size=6), st.floats(0, 2), st.floats(0, 2), st.floats(0, 2))
def test_the_shaped_reward_is_equation_4(cases: list[Any], a1: float, a2: float, gamma: float) -> None:
    base, thought, needs, kept = map(list, zip(*cases, strict=True))
    prices = {"alpha_miss": a1, "alpha_over": a2, "gamma_format": gamma}
    got = shaped_reward(base, thought=thought, needs_thought=needs, well_formed=kept, **prices)
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx([equation(*case, a1, a2, gamma) for case in cases])
    one = shaped_reward(base[0], thought=thought[0], needs_thought=needs[0], well_formed=kept[0], **prices)
    assert isinstance(one, float) and one == pytest.approx(got[0].item())
    neither = shaped_reward(base, thought=thought, needs_thought=None, well_formed=[True] * len(base), **prices)
    assert neither.tolist() == base


@pytest.mark.parametrize(
    "change",
    [{"base": []}, {"base": [math.nan, 0]}, {"thought": [True]}, {"needs_thought": [True]}, {"alpha_over": -1}],
)
def test_what_cannot_be_is_refused(change: dict[str, Any]) -> None:
    given = {"base": [1.0, 0.0], "thought": [True, False], "needs_thought": [True, False], "well_formed": [True, True]}
    given |= {"alpha_miss": 0.1, "alpha_over": 0.1, "gamma_format": 1.0} | change
    with pytest.raises(ValueError, match=r"must be|give one each"):
        shaped_reward(given.pop("base"), **given)


THINK = 9


@pytest.mark.parametrize(
    ("ids", "own", "dropped"),
    [
        ([1, THINK, 5, 6], [0, 1, 1, 1], [2]),
        ([1, THINK, 5, 6], [0, 0, 1, 1], [2]),  # the prompt opens the tag
        ([1, THINK, 2, 5, 6], [0, 0, 0, 1, 1], [3]),  # and a line after it
        ([1, THINK, 5, 2, THINK, 6, 7], [0, 1, 1, 0, 1, 1, 1], [2, 5]),
        ([1, 5, THINK], [0, 1, 1], []),  # a trailing one decides nothing
        ([1, 5, 6], [0, 1, 1], []),
        ([1, THINK, THINK, 5], [0, 1, 1, 1], [2, 3]),
    ],
)
def test_the_mask_drops_the_first_own_token_after_each_tag(ids: list[int], own: list[int], dropped: list[int]) -> None:
    mask = decision_mask(ids, THINK, own=own)
    assert mask.dtype == torch.bool and [i for i, kept in enumerate(mask) if not kept] == dropped
    if all(own[1:]):
        assert decision_mask(ids, THINK).tolist() == mask.tolist()


def test_a_mask_of_nothing_is_refused() -> None:
    for ids, own in (([], None), ([1], [True, True])):
        with pytest.raises(ValueError, match="one length"):
            decision_mask(ids, THINK, own=own)


def episode(text: str, success: bool = True, prompt: str = "q", **fields: Any) -> Episode:
    turns = [parse_text(part) for part in text.split("|")]
    made = {"turns": turns, "rewards": {"task": float(success)}, "success": success, "group_id": prompt}
    return Episode(prompt, **(made | fields))


DIRECT, THOUGHT = "<think></think>4", "<think>2+2</think>4"


@pytest.mark.parametrize(
    ("text", "need", "missed", "over", "ill"),
    [
        (DIRECT, True, 1, 0, 0),
        (DIRECT, False, 0, 0, 0),
        (THOUGHT, True, 0, 0, 0),
        (THOUGHT, False, 0, 1, 0),
        (THOUGHT, None, 0, 0, 0),
        (f"{DIRECT}|{THOUGHT}", [True, False], 1, 1, 0),  # labels are per turn
        (f"{DIRECT}|{THOUGHT}", [False, True], 0, 0, 0),
        (f"{DIRECT}|{THOUGHT}", False, 0, 1, 0),
        (f"{DIRECT}|{THOUGHT}", [], 0, 0, 0),
        ("4", True, 1, 0, 1),
        ("<think>2+2", True, 0, 0, 1),
    ],
)
def test_prices_by_label(text: str, need: Any, missed: int, over: int, ill: int) -> None:
    (parts,) = AdaCot(0.2, 0.3, 1.0)([episode(text, needs_thought=need)])
    assert parts == {"task": 1.0, "missed": -0.2 * missed, "over": -0.3 * over, "format": -1.0 * ill}


def test_a_forced_mode_pays_for_no_decision_but_for_ill_form() -> None:
    reward = AdaCot(0.2, 0.3, 1.0)
    forced = [
        episode(DIRECT, needs_thought=True, reasoning="never"),
        episode("4", needs_thought=True, reasoning="never"),
    ]
    assert [sum(parts.values()) for parts in reward(forced)] == [1.0, 0.0]


def test_reasoning_moved_into_the_answer_counts_as_thought() -> None:
    moved = episode("<think></think>2+2 is 4, so the answer is 4", needs_thought=False)
    assert AdaCot(longest_answer=12)([moved])[0]["over"] < 0 == AdaCot()([moved])[0]["over"]


def test_labels_of_its_own_come_from_success_without_thought() -> None:
    reward = AdaCot(0.2, 0.3, labels="self", least_seen=4)
    easy = [episode(DIRECT, True, "easy", group_id="easy.0") for _ in range(3)]
    assert all(parts["over"] == parts["missed"] == 0 for parts in reward(easy)), "three are too few to judge by"
    hard = [episode(DIRECT, i == 0, "hard") for i in range(4)] + [episode(THOUGHT, True, "hard")]
    assert [parts["missed"] for parts in reward(hard)] == [-0.2] * 4 + [0.0]
    assert reward([episode(DIRECT, True, "easy"), episode(THOUGHT, True, "easy")])[1]["over"] == -0.3
    other = AdaCot(0.2, 0.3, labels="self", least_seen=4)
    other.load_state_dict(reward.state_dict())
    assert other([episode(THOUGHT, True, "easy")])[0]["over"] == -0.3


def test_what_the_system_prompt_asks_for_goes_before_the_need() -> None:
    for text, told, paid in (
        (DIRECT, "always", -1.5),
        (THOUGHT, "always", 0),
        (DIRECT, "never", 0),
        (THOUGHT, "never", -1.5),
    ):
        (parts,) = AdaCot(0.2, 0.3)([episode(text, needs_thought=told == "always", told=told)])
        assert parts == {"task": 1.0, "missed": 0, "over": 0, "format": 0, "told": paid}


@pytest.mark.parametrize(
    "text",
    [
        "<think></think><tool_response>4</tool_response>4",
        '<think><tool_call>{"name": "f", "arguments": {}}</tool_call></think>4',
        "<think><think></think>4",
        "<think></think><think>2+2</think>4",
        "4",
    ],
)
def test_successes_by_broken_format_earn_nothing(text: str) -> None:
    assert sum(AdaCot()([episode(text, True, needs_thought=None)])[0].values()) == 0


def all_right(alpha: float) -> tuple[AdaCot, list[Episode]]:
    """Four of eight thought needlessly; all are right."""
    reward = AdaCot(alpha_over=alpha)
    group = [episode(text, needs_thought=False) for text in [DIRECT, THOUGHT] * 4]
    for sample, each in enumerate(group):
        each.sequences.append(Sequence.open([1]))
        each.sequences[0].append_own([sample], [0.0], [0])
    for each, parts in zip(group, reward(group), strict=True):
        each.rewards = parts
    return reward, group


def firsts(estimates: Any) -> list[float]:
    return [float(estimate.advantages[0][0]) for estimate in estimates]


def test_penalties_survive_all_but_the_division_by_the_groups_deviation() -> None:
    (reward, one), (doubled, two) = all_right(0.1), all_right(0.2)
    erased = [firsts(Group()(group)) for group in (one, two)]
    assert erased[0] == pytest.approx(erased[1], rel=5e-3), "GRPO's normalisation cancels a penalty's size"
    centred = [firsts(Group(normalize=False)(group)) for group in (one, two)]
    assert [2 * value for value in centred[0]] == pytest.approx(centred[1])
    decoupled = [firsts(Decoupled(scales=r.scales)(group)) for r, group in ((reward, one), (doubled, two))]
    assert [2 * value for value in decoupled[0]] == pytest.approx(decoupled[1], rel=5e-3)


def test_the_parts_of_both_add_up_and_multiply_as_they_do_alone() -> None:
    otc, adacot = Otc("ppo", max_calls=4), AdaCot(0.2, 0.3)
    both = OtcAdaCot(Otc("ppo", max_calls=4), AdaCot(0.2, 0.3))
    call = '<think>hm</think><tool_call>{"name": "f", "arguments": {}}</tool_call>'
    group = [episode(f"{call}|{DIRECT}", needs_thought=False), episode(DIRECT, False, needs_thought=True)]
    for parts, tools, thinking in zip(both(group), otc(group), adacot(group), strict=True):
        economy = sum(tools.values())
        assert sum(parts.values()) == pytest.approx(economy + sum(thinking.values()) - thinking["task"])
    assert sum(both(group)[0].values()) == pytest.approx(0.866 - 0.3, abs=1e-3)
    again = OtcAdaCot(Otc("ppo", max_calls=4), AdaCot(0.2, 0.3))
    again.load_state_dict(both.state_dict())
    assert again.state_dict() == both.state_dict()
