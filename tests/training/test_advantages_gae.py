"""GAE and EGAE against sums written out in Python floats, and the members that read a value model."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollout.episode import Episode, Sequence, Status
from rollout.errors import UserError
from training.advantages import egae, gae
from training.estimates import Egae, Gae

NUMBERS = st.floats(-100, 100).map(lambda x: round(x, 6))
PAIRS = st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=30)
FACTORS = st.sampled_from([0.0, 0.3, 0.95, 1.0])


def double_sum(rewards, values, gamma, lam, after):
    """A_t as the sum over j of (gamma lam)^j delta_{t+j}; ``after`` is V of the state after the last token."""
    following = [*values[1:], after]
    deltas = [r + gamma * v_next - v for r, v, v_next in zip(rewards, values, following, strict=True)]
    n = len(deltas)
    return [math.fsum((gamma * lam) ** j * deltas[t + j] for j in range(n - t)) for t in range(n)]


@given(PAIRS, FACTORS, FACTORS, st.booleans())
def test_the_estimates_are_the_double_sum(pairs, gamma, lam, truncated):
    rewards, values = zip(*pairs, strict=True)
    advantages, returns = egae(rewards, values, gamma=gamma, lam=lam, truncated=truncated)
    expected = double_sum(rewards, values, gamma, lam, values[-1] if truncated else 0.0)
    assert advantages.dtype == returns.dtype == torch.float64
    np.testing.assert_allclose(advantages, expected, rtol=1e-10, atol=1e-9)
    np.testing.assert_allclose(returns, np.add(expected, values), rtol=1e-10, atol=1e-9)


@given(PAIRS, FACTORS, FACTORS)
def test_on_ended_sequences_egae_is_gae(pairs, gamma, lam):
    rewards, values = zip(*pairs, strict=True)
    plain, extended = (
        gae(rewards, values, gamma=gamma, lam=lam),
        egae(rewards, values, gamma=gamma, lam=lam, truncated=False),
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, extended, strict=True))


@given(PAIRS, FACTORS)
def test_with_lambda_1_returns_are_monte_carlo_whatever_the_values(pairs, gamma):
    rewards, values = zip(*pairs, strict=True)
    _, returns = gae(rewards, values, gamma=gamma, lam=1.0)
    expected = [math.fsum(gamma**j * r for j, r in enumerate(rewards[t:])) for t in range(len(rewards))]
    np.testing.assert_allclose(returns, expected, rtol=1e-10, atol=1e-9)


@given(PAIRS, FACTORS)
def test_with_lambda_0_it_is_the_temporal_difference(pairs, gamma):
    rewards, values = map(np.array, zip(*pairs, strict=True))
    advantages, _ = gae(rewards, values, gamma=gamma, lam=0.0)
    np.testing.assert_allclose(advantages, rewards + gamma * np.append(values[1:], 0.0) - values, atol=1e-9)


@given(st.lists(NUMBERS, min_size=1, max_size=30), FACTORS)
def test_at_the_cut_only_discounting_leaves_a_delta(values, lam):
    rewards = [0.0] * len(values)
    undiscounted, _ = egae(rewards, values, gamma=1.0, lam=lam, truncated=True)
    assert undiscounted[-1] == 0.0, "exactly"
    discounted, _ = egae(rewards, values, gamma=0.9, lam=lam, truncated=True)
    assert discounted[-1].item() == pytest.approx((0.9 - 1) * values[-1], rel=1e-12, abs=1e-12)
    telescoped, _ = egae(rewards, values, gamma=1.0, lam=1.0, truncated=True)
    np.testing.assert_allclose(telescoped, values[-1] - np.array(values), rtol=1e-10, atol=1e-9)


def test_an_untrained_critic_says_nothing_of_a_cut_window():
    advantages, _ = egae([0.0] * 5, [0.0] * 5, gamma=1.0, lam=0.95, truncated=True)
    assert advantages.tolist() == [0.0] * 5


@given(st.integers(1, 12), st.integers(0, 100), FACTORS)
def test_a_window_sees_nothing_of_the_windows_before_it(start, seed, lam):
    """The estimate of the tokens of this window is the same whether the tokens before it are handed in or not."""
    values = np.random.default_rng(seed).normal(size=20)
    whole, _ = egae(np.zeros(20), values, gamma=1.0, lam=lam, truncated=True)
    part, _ = egae(np.zeros(20 - start), values[start:], gamma=1.0, lam=lam, truncated=True)
    assert torch.equal(whole[start:], part)


@pytest.mark.parametrize("function", [gae, lambda *a, **k: egae(*a, **k, truncated=True)])
def test_the_wider_floating_dtype_is_kept(function):
    half, single = torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2)
    for rewards, values, dtype in [
        (single, single, torch.float32),
        (half, single, torch.float32),
        (single, np.zeros(2), torch.float64),
        ([0, 1], [0, 1], torch.float64),
        ([0, 1], single, torch.float32),
    ]:
        assert {x.dtype for x in function(rewards, values, gamma=1.0, lam=1.0)} == {dtype}


@pytest.mark.parametrize(
    ("rewards", "values", "settings", "message"),
    [
        ([], [], {}, "rewards are empty; give at least one own token"),
        ([1.0], [0.0, 0.0], {}, "1 rewards and 2 values"),
        ([1.0, math.nan], [0.0, 0.0], {}, r"rewards\[1\] is nan"),
        ([1.0, 1.0], [math.inf, 0.0], {}, r"values\[0\] is inf"),
        ([1.0], [[0.0]], {}, "values of shape .* must be 1-D"),
        ([1.0], [0.0], {"gamma": 1.1}, r"gamma=1\.1 must be between 0 and 1"),
        ([1.0], [0.0], {"lam": -0.1}, r"lam=-0\.1 must be between 0 and 1"),
    ],
)
@pytest.mark.parametrize("function", [gae, lambda *a, **k: egae(*a, **k, truncated=True)])
def test_bad_input_is_refused(function, rewards, values, settings, message):
    with pytest.raises(ValueError, match=message):
        function(rewards, values, **{"gamma": 1.0, "lam": 1.0, **settings})


def episode(*lengths, reward=1.0, status=Status.FINISHED, trained=()):
    """Sequences of so many own tokens, with two tool tokens after the first of each."""
    sequences = []
    for number, length in enumerate(lengths):
        sequence = Sequence.open([1, 2])
        for i in range(length):
            sequence.append_own([3], [-1.0], [0])
            if i == 0:
                sequence.append_injected([4, 4])
        sequence.trained = trained[number] if trained else 0
        sequences.append(sequence)
    rewards = {} if status is Status.UNFINISHED else {"task": reward / 2, "format": reward / 2}
    return Episode("p", "p.0", sequences=sequences, rewards=rewards, status=status)


def numbers(*lengths, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.normal(size=length) for length in lengths]


def outcome(values, reward, gamma, lam, cut=False):
    rewards = [0.0] * (len(values) - 1) + [0.0 if cut else reward]
    return double_sum(rewards, list(values), gamma, lam, values[-1] if cut else 0.0)


@pytest.mark.parametrize("member", [Gae(0.9, 0.8, 1.0, whiten=False), Egae(0.9, 0.8, whiten=False)])
def test_an_episode_is_one_trajectory_of_its_own_tokens(member):
    given_, values = episode(3, 0, 4, reward=2.0), numbers(3, 0, 4)
    (estimate,) = member([given_], [values])
    flat = np.concatenate(values)
    assert [len(x) for x in estimate.advantages] == [len(x) for x in estimate.returns] == [3, 0, 4]
    np.testing.assert_allclose(np.concatenate(estimate.advantages), outcome(flat, 2.0, 0.9, 0.8), atol=1e-12)
    np.testing.assert_allclose(np.concatenate(estimate.returns), [2.0 * 0.9**j for j in range(7)][::-1], atol=1e-12)
    assert all(x.dtype == np.float64 for x in estimate.advantages + estimate.returns)


def test_policy_and_value_have_lambdas_of_their_own():
    values = numbers(6)
    (estimate,) = Gae(1.0, 0.5, 0.7, whiten=False)([episode(6)], [values])
    np.testing.assert_allclose(estimate.advantages[0], outcome(values[0], 1.0, 1.0, 0.5), atol=1e-12)
    np.testing.assert_allclose(estimate.returns[0], values[0] + outcome(values[0], 1.0, 1.0, 0.7), atol=1e-12)


def test_what_a_window_cut_teaches_the_policy_and_not_the_critic():
    values = numbers(4, 3)
    (estimate,) = Egae(1.0, 0.9, whiten=False)([episode(4, 3, status=Status.UNFINISHED)], [values])
    flat = np.concatenate(values)
    np.testing.assert_allclose(np.concatenate(estimate.advantages), outcome(flat, 0.0, 1.0, 0.9, cut=True), atol=1e-12)
    assert estimate.advantages[-1][-1] == 0.0 and estimate.returns is None


@pytest.mark.parametrize("status", [Status.TRUNCATED, Status.CALL_LIMIT])
def test_an_episode_that_a_limit_ended_has_ended(status):
    values = numbers(5)
    limited, finished = (Egae(whiten=False)([episode(5, status=s)], [values])[0] for s in (status, Status.FINISHED))
    assert np.array_equal(limited.advantages[0], finished.advantages[0])
    assert np.array_equal(limited.returns[0], finished.returns[0])


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=5), st.integers(0, 100))
def test_whitening_is_over_the_tokens_that_are_trained_now(shapes, seed):
    episodes = [episode(n, n, reward=float(i), trained=(min(n, k), 0)) for i, (n, k) in enumerate(shapes)]
    values = [numbers(n, n, seed=seed + i) for i, (n, _) in enumerate(shapes)]
    white, plain = (Egae(0.99, 0.9, whiten=whiten)(episodes, values) for whiten in (True, False))

    def fresh(estimates):
        return [
            x
            for given_, estimate in zip(episodes, estimates, strict=True)
            for sequence, values_ in zip(given_.sequences, estimate.advantages, strict=True)
            for x in values_[sequence.trained :]
        ]

    before = fresh(plain)
    if len(before) < 2:
        assert fresh(white) == before
        return
    mean = math.fsum(before) / len(before)
    variance = math.fsum((x - mean) ** 2 for x in before) / (len(before) - 1)
    expected = [(x - mean) / math.sqrt(variance + 1e-8) for x in before]
    np.testing.assert_allclose(fresh(white), expected, rtol=1e-9, atol=1e-9)
    for a, b in zip(white, plain, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a.returns, b.returns, strict=True)), "targets keep their unit"


def test_equal_advantages_whiten_to_nothing():
    white = Gae(1.0, 0.5, whiten=True)([episode(1), episode(1)], [[np.zeros(1)], [np.zeros(1)]])
    assert [x.advantages[0].tolist() for x in white] == [[0.0], [0.0]]
    (alone,) = Gae(1.0, 0.5)([episode(1)], [[np.ones(1)]])
    assert alone.advantages[0].tolist() == [0.0], "a token alone stays as it is: 1 - V"


def test_an_episode_without_own_tokens_gives_empty_arrays():
    for member in (Gae(), Egae()):
        nothing, empty, other = member([episode(), episode(0), episode(2)], [[], [np.zeros(0)], numbers(2)])
        assert nothing.advantages == nothing.returns == []
        assert [len(x) for x in empty.advantages] == [len(x) for x in empty.returns] == [0]
        assert len(other.advantages[0]) == 2
        assert member([]) == [] and member.needs_critic


def test_gae_refuses_what_is_unfinished():
    with pytest.raises(ValueError, match=r"prompt p: an unfinished .*; advantage=egae takes unfinished episodes"):
        Gae()([episode(3), episode(2, status=Status.UNFINISHED)], [numbers(3), numbers(2)])


@pytest.mark.parametrize("member", [Gae(), Egae()])
def test_what_does_not_fit_is_refused_by_the_prompts_name(member):
    with pytest.raises(ValueError, match=r"prompt p: \[3\] values for sequences of \[2\] own tokens"):
        member([episode(2)], [numbers(3)])
    with pytest.raises(ValueError, match="prompt p: reward nan is not finite"):
        member([episode(2, reward=math.nan)], [numbers(2)])
    with pytest.raises(ValueError, match="1 episodes but values of 0"):
        member([episode(2)])


@pytest.mark.parametrize("settings", [{"gamma": 1.5}, {"lam": -1.0}, {"lam_value": 2.0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(UserError, match=rf"advantage\.{next(iter(settings))}: .* between 0 and 1"):
        Gae(**settings)
