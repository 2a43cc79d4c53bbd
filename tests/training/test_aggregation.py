import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.aggregation import token_weights

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=8)


def loss_of(losses, mode, **options):
    weights = token_weights([len(x) for x in losses], mode, **options)
    return sum(float((w * x).sum()) for w, x in zip(weights, losses, strict=True))


@given(LENGTHS, st.integers(0, 99))
def test_each_mode_is_its_mean(lengths, seed):
    losses = [np.random.default_rng([seed, i]).normal(size=n) for i, n in enumerate(lengths)]
    assert loss_of(losses, "token") == pytest.approx(np.concatenate(losses).mean(), abs=1e-12)
    assert loss_of(losses, "sequence") == pytest.approx(np.mean([x.mean() for x in losses]), abs=1e-12)
    constant = np.concatenate(losses).sum() / (len(losses) * 40)
    assert loss_of(losses, "constant", max_tokens=40) == pytest.approx(constant, abs=1e-12)


@given(LENGTHS, LENGTHS, st.sampled_from(["token", "sequence", "constant"]))
def test_ranks_sum_to_the_whole(first, second, mode):
    whole = token_weights(first + second, mode, max_tokens=40)
    totals = {"total_tokens": sum(first + second), "total_sequences": len(first + second), "max_tokens": 40}
    parts = token_weights(first, mode, **totals) + token_weights(second, mode, **totals)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_rank_or_a_sequence_without_tokens():
    assert token_weights([], "token", total_tokens=9, total_sequences=3) == []
    empty, full = token_weights([0, 2], "sequence")
    assert len(empty) == 0
    assert full.tolist() == [0.25, 0.25]  # the empty one counts as a sequence, as in TRL


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([3], "mean"), {}, "'mean' is not one of"),
        (([3], "constant"), {}, "max_tokens=None"),
        (([-1], "token"), {}, "must not be negative"),
        (([3], "token"), {"total_tokens": 2}, "sum them over all ranks"),
    ],
)
def test_bad_input_is_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        token_weights(*arguments, **options)
