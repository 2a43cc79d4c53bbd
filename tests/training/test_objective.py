import math

import numpy as np
import pytest
import torch

from training.aggregation import token_weights
from training.corrections import NoCorrection, SequenceMask, Tis, TokenMask
from training.losses import Cispo, Clip, Gspo
from training.objective import means, policy_objective, reduce
from training.packing import TrainSequence, empty_like, pack, unpack

LENGTHS = [6, 11, 4, 9, 8]


def sequences(mode="token"):
    generator = np.random.default_rng(3)
    masks = []
    for length in LENGTHS:
        own = generator.random(length) < 0.7
        own[0], own[-1] = False, True
        masks.append(own)
    weights = token_weights([int(own.sum()) for own in masks], mode, max_tokens=12)
    result = []
    for index, (own, weight) in enumerate(zip(masks, weights, strict=True)):
        full = np.zeros(len(own))
        full[own] = weight
        advantages = np.where(own, generator.normal(), 0.0)
        behaviour = np.where(own, -generator.random(len(own)) * 2, 0.0)
        result.append(TrainSequence(np.arange(len(own)), own, advantages, behaviour, full, index, own - 1))
    return result


def logprobs_of(given, seed, spread):
    """Per sequence: its behaviour log-probs, moved."""
    generator = np.random.default_rng(seed)
    return [x.behaviour_logprobs[x.own_mask] + spread * generator.normal(size=x.own_mask.sum()) for x in given]


def flat(batch, values):
    """Own-token values of all sequences in the order of the batch."""
    order = dict.fromkeys(batch.own(batch.sequence_ids).tolist())
    return torch.as_tensor(np.concatenate([values[i] for i in order]), dtype=torch.float32)


def run(given, max_tokens, *, anchored=True, kl_coef=0.0, loss=None, correction=None, **options):
    current, anchor, reference = (logprobs_of(given, seed, 0.3) for seed in (1, 2, 3))
    entropies = [np.abs(x) for x in current]
    total, stats, gradients = 0.0, [], {}
    for batch in pack(given, max_tokens=max_tokens, row_tokens=12, pad_id=0):
        logprobs = flat(batch, current).requires_grad_()
        value, part = policy_objective(
            logprobs,
            flat(batch, entropies),
            batch,
            loss=loss or Clip(),
            correction=correction or Tis(),
            anchor_logprobs=flat(batch, anchor) if anchored else None,
            reference_logprobs=flat(batch, reference) if kl_coef else None,
            kl_coef=kl_coef,
            **options,
        )
        value.backward()
        gradients |= unpack(batch, logprobs.grad)
        total += value.item()
        stats.append(part)
    return total, reduce(stats), gradients


@pytest.mark.parametrize("unbiased", [True, False])
def test_the_objective_is_the_formula(unbiased):
    given = sequences()
    current, anchor, reference = (logprobs_of(given, seed, 0.3) for seed in (1, 2, 3))
    expected = kl = mismatch = low = high = 0.0
    for i, x in enumerate(given):
        own = x.own_mask
        for p, q, b, r, a, w in zip(
            current[i],
            anchor[i],
            x.behaviour_logprobs[own],
            reference[i],
            x.advantages[own],
            x.weights[own],
            strict=True,
        ):
            ratio = math.exp(p - q)
            policy = -min(ratio * a, min(max(ratio, 0.8), 1.28) * a) * min(math.exp(q - b), 2.0)
            k3 = (math.exp(r - p) - (r - p) - 1) * (ratio if unbiased else 1)
            expected += w * (policy + 0.1 * k3 - 0.01 * abs(p))
            kl += k3
            mismatch += abs(q - b)
            low += ratio < 0.8 and a < 0
            high += ratio > 1.28 and a > 0
    total, stats, _ = run(given, 100, kl_coef=0.1, kl_unbiased=unbiased, entropy_coef=0.01)
    assert total == pytest.approx(expected, rel=1e-5)
    metrics = means(stats)
    tokens = sum(int(x.own_mask.sum()) for x in given)
    assert metrics["tokens"] == tokens
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["kl"] == pytest.approx(kl / tokens, rel=1e-5)
    assert metrics["mismatch"] == pytest.approx(mismatch / tokens, rel=1e-5)
    assert metrics["clip_low"] == pytest.approx(low / tokens) and metrics["clip_high"] == pytest.approx(high / tokens)
    assert low + high > 0


@pytest.mark.parametrize("mode", ["token", "sequence", "constant"])
@pytest.mark.parametrize("loss", [Clip(), Cispo(0.2), Gspo(0.05, 0.05)])
@pytest.mark.parametrize("correction", [NoCorrection(), TokenMask(0.7, 1.5), SequenceMask()])
def test_the_cut_into_micro_batches_does_not_matter(mode, loss, correction):
    given = sequences(mode)
    whole, whole_stats, whole_gradients = run(given, 100, kl_coef=0.1, loss=loss, correction=correction)
    parts, stats, gradients = run(given, 12, kl_coef=0.1, loss=loss, correction=correction)
    assert parts == pytest.approx(whole, rel=1e-5, abs=1e-7)
    for index, gradient in whole_gradients.items():
        np.testing.assert_allclose(gradients[index], gradient, rtol=1e-5, atol=1e-7)
    for name, value in means(whole_stats).items():
        assert means(stats)[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


def test_the_behaviour_anchor_measures_the_current_mismatch():
    given = sequences()
    current = logprobs_of(given, 1, 0.3)
    _, stats, _ = run(given, 100, anchored=False)
    gaps = np.concatenate([p - x.behaviour_logprobs[x.own_mask] for p, x in zip(current, given, strict=True)])
    metrics = means(stats)
    assert metrics["mismatch"] == pytest.approx(np.abs(gaps).mean(), rel=1e-5)
    assert metrics["mismatch_max"] == pytest.approx(np.abs(gaps).max(), rel=1e-5)
    assert metrics["mismatch_k3"] == pytest.approx((np.exp(gaps) - gaps - 1).mean(), rel=1e-4)
    assert metrics["ratio_max"] == pytest.approx(np.exp(gaps).max(), rel=1e-5)
    assert metrics["correction"] == 1.0


def objective(batch, logprobs, **options):
    return policy_objective(
        logprobs, logprobs, batch, loss=Clip(), correction=TokenMask(), anchor_logprobs=None, **options
    )


def test_an_empty_batch_adds_nothing():
    (batch,) = pack(sequences(), max_tokens=100, pad_id=0)
    logprobs = batch.own(batch.behaviour_logprobs).clone().requires_grad_()
    none = torch.zeros(0, requires_grad=True)
    full, stats = objective(batch, logprobs)
    empty, nothing = objective(empty_like(batch), none)
    empty.backward()
    assert empty == 0 and nothing.keys() == stats.keys()
    assert means(reduce([stats, nothing])) == means(stats)
    assert full.requires_grad


def test_nan_is_never_filtered():
    (batch,) = pack(sequences(), max_tokens=100, pad_id=0)
    logprobs = batch.own(batch.behaviour_logprobs).clone()
    row, column = batch.policy_mask.nonzero()[3]
    batch.behaviour_logprobs[row, column] = math.nan
    total, stats = objective(batch, logprobs)
    metrics = means(reduce([stats, stats]))
    assert total.isnan()
    assert all(math.isnan(metrics[name]) for name in ("loss", "ratio", "ratio_max", "mismatch", "mismatch_max"))


def test_kl_without_a_reference_is_refused():
    (batch,) = pack(sequences(), max_tokens=100, pad_id=0)
    with pytest.raises(ValueError, match="needs reference_logprobs"):
        objective(batch, batch.own(batch.behaviour_logprobs), kl_coef=0.1)


def test_only_the_unbiased_penalty_has_the_gradient_of_the_divergence():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=generator).requires_grad_()
    reference = torch.randn(6, generator=generator).log_softmax(-1)
    exact = torch.nn.functional.kl_div(reference, logits.log_softmax(-1), log_target=True, reduction="sum")
    (wanted,) = torch.autograd.grad(exact, logits)
    # Every action once, weighted by its probability, stands for sampling from the policy.
    ids = np.arange(7)
    own = ids > 0
    probabilities = np.zeros(7)
    probabilities[1:] = logits.detach().softmax(-1)
    zeros = np.zeros(7)
    (batch,) = pack([TrainSequence(ids, own, zeros, zeros, probabilities, 0, zeros)], max_tokens=7, pad_id=0)
    for unbiased in (True, False):
        logprobs = logits.log_softmax(-1)
        total, _ = policy_objective(
            logprobs,
            logprobs,
            batch,
            loss=Clip(),
            correction=NoCorrection(),
            anchor_logprobs=logprobs.detach(),
            reference_logprobs=reference,
            kl_coef=1.0,
            kl_unbiased=unbiased,
        )
        (gradient,) = torch.autograd.grad(total, logits)
        assert total.item() == pytest.approx(exact.item(), rel=1e-5)
        assert torch.allclose(gradient, wanted, atol=1e-6) == unbiased
