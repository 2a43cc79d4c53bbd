import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollout.episode import Sequence
from training.packing import IGNORED, PER_TOKEN, TrainSequence, deal, empty_like, pack, unpack

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=12)


def sequence(index, length, own=None):
    generator = np.random.default_rng([index, length])
    own = generator.random(length) < 0.6 if own is None else np.array(own)
    own[0] = False

    def numbers():
        return np.where(own, generator.normal(size=length), 0.0)

    ids = generator.integers(1, 1000, length)
    critic = (numbers(), numbers()) if index % 2 == 0 else ()
    return TrainSequence(ids, own, numbers(), numbers(), numbers(), index, np.where(own, 7, -1), *critic)


@given(LENGTHS, st.integers(30, 90), st.sampled_from([None, 1, 30, 45]))
def test_unpack_inverts_pack(lengths, max_tokens, row_tokens):
    sequences = [sequence(i, n) for i, n in enumerate(lengths)]
    batches = pack(sequences, max_tokens=max_tokens, row_tokens=row_tokens, pad_id=0)
    seen = []
    for batch in batches:
        fields = {name: unpack(batch, getattr(batch, name)) for name in vars(batch)}
        own = unpack(batch, batch.own(batch.advantages))
        for index, ids in fields["input_ids"].items():
            seen.append(index)
            given_ = sequences[index]
            np.testing.assert_array_equal(ids, given_.token_ids)
            np.testing.assert_array_equal(fields["position_ids"][index], np.arange(len(given_)))
            np.testing.assert_array_equal(fields["targets"][index], [*given_.token_ids[1:], IGNORED])
            np.testing.assert_array_equal(fields["policy_mask"][index], [*given_.own_mask[1:], False])
            for name in PER_TOKEN:
                array = getattr(given_, name)
                expected = [*(np.zeros(len(given_)) if array is None else array)[1:], 0.0]
                np.testing.assert_array_equal(fields[name][index], np.float32(expected))
            if given_.own_mask.any():
                np.testing.assert_array_equal(own[index], np.float32(given_.advantages[given_.own_mask]))
            else:
                assert index not in own
    assert sorted(seen) == list(range(len(lengths)))


@given(LENGTHS, st.integers(30, 90), st.sampled_from([None, 1, 30, 45]))
def test_budgets_and_boundaries(lengths, max_tokens, row_tokens):
    sequences = [sequence(i, n) for i, n in enumerate(lengths)]
    batches = pack(sequences, max_tokens=max_tokens, row_tokens=row_tokens, pad_id=0)
    for batch in batches:
        rows, length = batch.shape
        assert rows * length <= max_tokens
        padding = batch.sequence_ids == -1
        assert (batch.targets[padding] == IGNORED).all() and not batch.policy_mask[padding].any()
        assert not padding[0].any()  # the longest row sets the length
        ids = batch.sequence_ids
        same = torch.cat([ids[:, 1:] == ids[:, :-1], torch.zeros(rows, 1, dtype=torch.bool)], dim=1)
        targeted = batch.targets != IGNORED
        assert (same | ~targeted).all(), "a target crosses a boundary"
        assert (batch.targets[targeted] == batch.input_ids.roll(-1, 1)[targeted]).all()
        starts = torch.cat([torch.ones(rows, 1, dtype=torch.bool), ids[:, 1:] != ids[:, :-1]], dim=1) & ~padding
        assert ((batch.position_ids == 0)[~padding] == starts[~padding]).all()
        for row in ids:
            inside = row[row >= 0]
            if row_tokens and len(set(inside.tolist())) > 1:
                assert len(inside) <= row_tokens
    again = pack(sequences, max_tokens=max_tokens, row_tokens=row_tokens, pad_id=0)
    for a, b in zip(batches, again, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def test_first_fit_decreasing_fills_rows():
    sequences = [sequence(i, n) for i, n in enumerate([10, 20, 30, 10, 20])]
    (first, second, third) = pack(sequences, max_tokens=30, pad_id=0)
    assert [b.shape for b in (first, second, third)] == [(1, 30)] * 3
    (together,) = pack(sequences, max_tokens=90, row_tokens=30, pad_id=0)
    assert together.shape == (3, 30)


def test_an_empty_batch_trains_nothing():
    (batch,) = pack([sequence(0, 9), sequence(1, 5)], max_tokens=20, pad_id=0)
    empty = empty_like(batch)
    assert empty.shape == (1, 2)
    assert not empty.policy_mask.any() and (empty.targets == IGNORED).all()
    assert all((getattr(empty, name) == 0).all() for name in PER_TOKEN)
    assert unpack(empty, empty.input_ids) == {}


def test_a_rollout_becomes_a_train_sequence():
    rollout = Sequence.open([1, 2, 3])
    rollout.append_own([4, 5], [-0.1, -0.2], [7, 8])
    rollout.append_injected([6])
    rollout.append_own([7], [-0.3], [8])
    got = TrainSequence.of(rollout, 5, np.array([1.0, 2.0, 3.0]), np.array([0.1, 0.2, 0.3]))
    assert got.token_ids.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert got.advantages.tolist() == [0, 0, 0, 1, 2, 0, 3]
    assert got.behaviour_logprobs.tolist() == [0, 0, 0, -0.1, -0.2, 0, -0.3]
    assert got.weights.tolist() == [0, 0, 0, 0.1, 0.2, 0, 0.3]
    assert got.versions.tolist() == [-1, -1, -1, 7, 8, -1, 8]
    assert got.returns is None and got.values is None
    rollout.train_prompt_ids = [9]
    short = TrainSequence.of(rollout, 5, np.array([1.0, 2.0, 3.0]), np.array([0.1, 0.2, 0.3]))
    assert short.token_ids.tolist() == [9, 4, 5, 6, 7]
    assert short.advantages.tolist() == [0, 1, 2, 0, 3]


def test_a_mask_chooses_the_own_tokens_that_get_a_loss():
    rollout = Sequence.open([1, 2])
    rollout.append_own([3, 4], [-0.1, -0.2], [7, 7])
    rollout.append_injected([5])
    rollout.append_own([6, 7], [-0.3, -0.4], [8, 8])
    each, nan = np.array([1.0, 2.0, 3.0, 4.0]), np.array([np.nan, 2.0, 3.0, np.nan])
    got = TrainSequence.of(
        rollout, 0, nan, each, mask=np.array([False, True, True, False]), returns=10 * nan, values=nan
    )
    assert got.own_mask.tolist() == [False, False, False, True, False, True, False]
    assert got.advantages.tolist() == got.values.tolist() == got.weights.tolist() == [0, 0, 0, 2, 0, 3, 0]
    assert got.returns.tolist() == [0, 0, 0, 20, 0, 30, 0]
    assert got.behaviour_logprobs.tolist() == [0, 0, 0, -0.2, 0, -0.3, 0]
    assert got.versions.tolist() == [-1, -1, 7, 7, -1, 8, 8]
    (batch,) = pack([got], max_tokens=7, pad_id=0)
    assert batch.own(batch.targets).tolist() == [4, 6] and batch.own(batch.returns).tolist() == [20, 30]
    assert batch.policy_mask[0].tolist() == [False, False, True, False, True, False, False], "where it is predicted"
    nothing = TrainSequence.of(rollout, 0, nan, each, mask=np.zeros(4, dtype=bool))
    assert not nothing.own_mask.any() and not nothing.advantages.any()
    with pytest.raises(ValueError, match="3 values for 4 own tokens"):
        TrainSequence.of(rollout, 0, each, each, mask=np.ones(3, dtype=bool))
    with pytest.raises(ValueError, match="2 values for 4 own tokens"):
        TrainSequence.of(rollout, 0, each, each, returns=each[:2])


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="31 tokens, more than max_tokens=30"):
        pack([sequence(0, 31)], max_tokens=30, pad_id=0)
    with pytest.raises(ValueError, match="one index"):
        pack([sequence(0, 3), sequence(0, 4)], max_tokens=30, pad_id=0)
    zeros = np.zeros(3)
    with pytest.raises(ValueError, match="open with a token of its prompt"):
        TrainSequence(np.arange(3), np.ones(3, dtype=bool), zeros, zeros, zeros, 0, zeros)
    with pytest.raises(ValueError, match="one entry each"):
        TrainSequence(np.arange(3), np.zeros(3, dtype=bool), zeros[:2], zeros, zeros, 0, zeros)
    with pytest.raises(ValueError, match="2 values for 1 own tokens"):
        rollout = Sequence.open([1])
        rollout.append_own([2], [-0.1], [0])
        TrainSequence.of(rollout, 0, np.zeros(2), np.zeros(1))


@given(lengths=st.lists(st.integers(2, 20), max_size=30), size=st.integers(1, 5), row=st.sampled_from([None, 24]))
def test_every_process_gets_as_many_micro_batches_and_all_rows_once(
    lengths: list[int], size: int, row: int | None
) -> None:
    sequences = [sequence(index, n) for index, n in enumerate(lengths)]
    whole = pack(sequences, max_tokens=40, row_tokens=row, pad_id=0, multiple=size)
    parts = deal(whole, size)
    assert len(parts) == size and len({len(part) for part in parts}) == 1
    assert all(rows * length <= 40 for rows, length in (batch.shape for batch in whole))
    found = [int(i) for part in parts for batch in part for i in batch.sequence_ids.unique() if i >= 0]
    assert sorted(found) == list(range(len(lengths)))


def test_micro_batches_for_several_processes_are_of_one_size() -> None:
    sequences = [sequence(index, 10) for index in range(24)]
    sizes = [batch.input_ids.numel() for batch in pack(sequences, max_tokens=200, row_tokens=20, pad_id=0, multiple=2)]
    assert len(pack(sequences, max_tokens=200, row_tokens=20, pad_id=0)) == 2 == len(sizes)
    assert sizes[0] == sizes[1]
