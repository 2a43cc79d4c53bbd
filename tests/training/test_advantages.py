import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollout.episode import Episode, Sequence, Status
from rollout.errors import UserError
from training.advantages import group_relative, rloo
from training.estimates import Decoupled, Group, Rloo

REWARDS = st.floats(-1e6, 1e6).map(lambda x: round(x, 6))
PAIRS = st.lists(st.tuples(REWARDS, st.sampled_from("abc")), min_size=1, max_size=20)


def loop(pairs, normalize=True):
    """GRPO's formula, one reward at a time in Python floats."""
    result = []
    for reward, group in pairs:
        rewards = [r for r, g in pairs if g == group]
        if len(set(rewards)) == 1:
            result.append(0.0)
            continue
        advantage = reward - math.fsum(rewards) / len(rewards)
        result.append(advantage / (statistics.stdev(rewards) + 1e-4) if normalize else advantage)
    return result


@given(PAIRS, st.booleans())
def test_group_relative_is_the_formula(pairs, normalize):
    rewards, groups = zip(*pairs, strict=True)
    got = group_relative(rewards, groups, normalize=normalize)
    assert got.dtype == torch.float64
    scale = 1 if normalize else max(map(abs, rewards)) + 1
    np.testing.assert_allclose(got, loop(pairs, normalize), rtol=1e-7, atol=1e-9 * scale)


@given(PAIRS, st.randoms())
def test_the_order_of_episodes_does_not_matter(pairs, random):
    order = list(range(len(pairs)))
    random.shuffle(order)
    straight = group_relative(*zip(*pairs, strict=True))
    shuffled = group_relative(*zip(*(pairs[i] for i in order), strict=True))
    np.testing.assert_allclose(shuffled, straight[order], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1e8 + 0.1, -7.7])
@pytest.mark.parametrize("size", [1, 3, 7, 10])
@pytest.mark.parametrize("function", [group_relative, rloo])
def test_equal_rewards_give_exactly_zero(reward, size, function):
    # The mean of equal floats is often not that float: a deviation would be tiny, not zero.
    got = function([reward] * size + [0.0, 1.0], ["equal"] * size + ["other"] * 2)
    assert got[:size].tolist() == [0.0] * size
    assert (got[size:] != 0).all()


def test_a_rounding_error_is_no_signal():
    assert group_relative([0.1 + 0.2, 0.3], [0, 0]).abs().max() < 1e-9


def test_clip_limits_a_lone_success():
    rewards = [1.0] + [0.0] * 63
    assert group_relative(rewards, [0] * 64)[0] == pytest.approx(63 / 8, rel=1e-2)  # (N-1)/sqrt(N)
    assert group_relative(rewards, [0] * 64, clip=5.0)[0] == 5.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_dtype_of_tensors_is_kept(dtype):
    assert group_relative(torch.tensor([0, 1], dtype=dtype), torch.tensor([3, 3])).dtype == dtype
    assert rloo(torch.tensor([0, 1], dtype=dtype), np.array([3, 3])).dtype == dtype


def test_integers_and_arrays_give_float64():
    assert group_relative([0, 1], ["x", "x"]).dtype == torch.float64
    assert group_relative(np.array([0.0, 1.0], dtype=np.float32), ["x", "x"]).dtype == torch.float32


@given(PAIRS)
def test_rloo_compares_with_the_others(pairs):
    rewards, groups = zip(*pairs, strict=True)
    expected = []
    for i, (reward, group) in enumerate(pairs):
        others = [r for j, (r, g) in enumerate(pairs) if g == group and j != i]
        expected.append(reward - math.fsum(others) / len(others) if others else 0.0)
    np.testing.assert_allclose(rloo(rewards, groups), expected, rtol=1e-7, atol=1e-8 * (max(map(abs, rewards)) + 1))


@pytest.mark.parametrize(
    ("rewards", "groups", "message"),
    [
        ([], [], "empty"),
        ([1.0], [0, 0], "1 rewards and 2 group_ids"),
        ([1.0, math.nan], [0, 0], r"rewards\[1\] is nan"),
        ([math.inf, 1.0], [0, 0], r"rewards\[0\] is inf"),
        ([0.0, 1.0], [0, math.nan], r"group_ids\[1\] is nan"),
        ([[0.0, 1.0]], [0], "1-D"),
    ],
)
@pytest.mark.parametrize("function", [group_relative, rloo])
def test_bad_input_is_refused(function, rewards, groups, message):
    with pytest.raises(ValueError, match=message):
        function(rewards, groups)


def test_bad_clips_are_refused():
    with pytest.raises(ValueError, match="clip=0"):
        group_relative([0.0, 1.0], [0, 0], clip=0)
    with pytest.raises(UserError, match=r"advantage\.clip"):
        Group(clip=-1.0)


def episode(group, reward, *lengths):
    sequences = []
    for length in lengths:
        sequence = Sequence.open([1, 2])
        sequence.append_own([3] * length, [-1.0] * length, [0] * length)
        sequence.append_injected([4])
        sequences.append(sequence)
    return Episode("p", group, sequences=sequences, rewards={"task": reward, "format": 0.5})


def test_members_count_episodes_not_sequences():
    episodes = [episode("a", 1.0, 3, 2, 1), episode("b", 0.0, 1), episode("a", 0.0, 4), episode("a", 0.0, 2)]
    for member, function in ((Group(), group_relative), (Rloo(), rloo)):
        expected = function([1.5, 0.5, 0.5, 0.5], ["a", "b", "a", "a"]).tolist()
        got = member(episodes)
        assert [[len(x) for x in estimate.advantages] for estimate in got] == [[3, 2, 1], [1], [4], [2]]
        for estimate, advantage in zip(got, expected, strict=True):
            assert all((x == advantage).all() and x.dtype == np.float64 for x in estimate.advantages)
            assert estimate.returns is None
        assert expected[1] == 0.0
        assert member([]) == [] and not member.needs_critic


@pytest.mark.parametrize("member", [Group(), Rloo()])
def test_a_group_is_compared_only_when_all_its_members_have_ended(member):
    late = episode("a", 0.0, 2)
    late.status = Status.UNFINISHED
    with pytest.raises(ValueError, match="prompt p: an unfinished episode has no reward; hand in a group when all"):
        member([episode("a", 1.0, 3), late])


PARTS = st.lists(st.tuples(REWARDS, REWARDS, st.sampled_from("abc")), min_size=1, max_size=12)


@given(PARTS, st.floats(0.1, 5))
def test_decoupled_is_the_formula_part_by_part(rows, scale):
    episodes = []
    for number, (task, extra, group) in enumerate(rows):
        sequence = Sequence.open([1])
        sequence.append_own([2, 2], [0.0, 0.0], [0, 0])
        rewards = {"task": task} | ({"extra": extra} if extra else {})  # a part that is not there is 0
        episodes.append(Episode(f"q{group}", group, number, sequences=[sequence], rewards=rewards))
    tasks, extras = (loop([(row[i], row[2]) for row in rows]) for i in (0, 1))
    expected = [a + scale * b for a, b in zip(tasks, extras, strict=True)]
    got = [estimate.advantages[0] for estimate in Decoupled(scales={"extra": scale})(episodes)]
    np.testing.assert_allclose([values[0] for values in got], expected, rtol=1e-6, atol=1e-6)
    assert all(values[0] == values[1] for values in got)
    clipped = [e.advantages[0][0] for e in Decoupled(clip=0.5, scales={"extra": scale})(episodes)]
    assert all(abs(value) <= 0.5 * (1 + scale) + 1e-9 for value in clipped)


def test_one_part_decoupled_is_a_group():
    rewards, groups = [1.0, 0.0, 0.5, 2.0, 2.0], ["a", "a", "a", "b", "b"]
    episodes = []
    for number, (reward, group) in enumerate(zip(rewards, groups, strict=True)):
        sequence = Sequence.open([1])
        sequence.append_own([2], [0.0], [0])
        episodes.append(Episode(group, group, number, sequences=[sequence], rewards={"task": reward}))
    one, other = (member(episodes) for member in (Decoupled(), Group()))
    assert [e.advantages[0].tolist() for e in one] == [e.advantages[0].tolist() for e in other]
