import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollout.errors import UserError
from training.losses import Cispo, Clip, Gspo, kl_k3, value_loss

SEEDS = st.integers(0, 10_000)


def tokens(seed, n=24, spread=0.5):
    """Log-probs with gradient, old log-probs, advantages with zeros among them, and shuffled sequence ids."""
    generator = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(n, generator=generator, dtype=torch.float64) * 3
    old = logprobs + spread * torch.randn(n, generator=generator, dtype=torch.float64)
    advantages = torch.randn(n, generator=generator, dtype=torch.float64)
    advantages[::5] = 0
    ids = torch.randint(0, 4, (n,), generator=generator) * 10
    return logprobs.requires_grad_(), old, advantages, ids


def clip_loop(ratio, advantage, low, high, dual=None):
    loss = -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    if dual is not None and advantage < 0:
        loss = min(loss, -dual * advantage)
    return loss


@given(SEEDS, st.sampled_from([None, 1.1, 1.5, 10.0]))
def test_clip_is_the_formula(seed, dual):
    logprobs, old, advantages, ids = tokens(seed)
    loss, _ = Clip(0.2, 0.28, dual)(logprobs, old, advantages, ids)
    expected = [
        clip_loop(math.exp(p - q), a, 0.2, 0.28, dual)
        for p, q, a in zip(logprobs.tolist(), old.tolist(), advantages.tolist(), strict=True)
    ]
    np.testing.assert_allclose(loss.detach(), expected, rtol=1e-12, atol=1e-12)


@given(SEEDS, st.sampled_from([Clip(), Clip(dual_clip=1.5), Gspo(0.1, 0.1)]))
def test_clipped_marks_exactly_the_tokens_without_gradient(seed, loss):
    logprobs, old, advantages, ids = tokens(seed)
    per_token, clipped = loss(logprobs, old, advantages, ids)
    if isinstance(loss, Gspo):  # the sequence's ratio carries every token's gradient: ask for one token's at a time
        moves = torch.stack([torch.autograd.grad(x, logprobs, retain_graph=True)[0].abs().sum() for x in per_token])
    else:
        moves = torch.autograd.grad(per_token.sum(), logprobs)[0].abs()
    assert ((moves == 0) == (clipped | (advantages == 0))).all()


def test_on_policy_every_loss_has_the_policy_gradient():
    logprobs, _, advantages, ids = tokens(0)
    for loss in (Clip(), Cispo()):
        per_token, clipped = loss(logprobs, logprobs.detach(), advantages, ids)
        (gradient,) = torch.autograd.grad(per_token.sum(), logprobs)
        torch.testing.assert_close(gradient, -advantages)
        assert not clipped.any()


@given(SEEDS)
def test_cispo_keeps_every_gradient_with_a_cut_weight(seed):
    logprobs, old, advantages, ids = tokens(seed)
    loss, clipped = Cispo(clip_high=0.5)(logprobs, old, advantages, ids)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    ratios = [math.exp(p - q) for p, q in zip(logprobs.tolist(), old.tolist(), strict=True)]
    expected = [-min(r, 1.5) * a for r, a in zip(ratios, advantages.tolist(), strict=True)]
    np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-12)
    assert clipped.tolist() == [r > 1.5 and a > 0 for r, a in zip(ratios, advantages.tolist(), strict=True)]


@given(SEEDS)
def test_gspo_uses_the_mean_log_ratio_of_the_sequence(seed):
    logprobs, old, advantages, ids = tokens(seed)
    loss, _ = Gspo(0.1, 0.2)(logprobs, old, advantages, ids)
    difference = (logprobs - old).detach()
    for i in range(len(ids)):
        own = [difference[j].item() for j in range(len(ids)) if ids[j] == ids[i]]
        expected = clip_loop(math.exp(sum(own) / len(own)), advantages[i].item(), 0.1, 0.2)
        assert loss[i].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_k3_estimates_the_divergence():
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 8, generator=generator, dtype=torch.float64).log_softmax(-1)
    estimate = (policy.exp() * kl_k3(policy, reference)).sum()
    torch.testing.assert_close(
        estimate, torch.nn.functional.kl_div(reference, policy, log_target=True, reduction="sum")
    )
    assert (kl_k3(policy, reference) >= 0).all()


def central_difference(function, at, step=1e-6):
    """The gradient of a scalar function of a float64 vector, one entry at a time."""
    result = []
    for i in range(len(at)):
        up, down = at.detach().clone(), at.detach().clone()
        up[i], down[i] = up[i] + step, down[i] - step
        result.append((function(up) - function(down)).item() / (2 * step))
    return result


@given(SEEDS, st.sampled_from([None, 1.5]))
def test_the_gradient_of_clip_is_that_of_finite_differences(seed, dual):
    logprobs, old, advantages, ids = tokens(seed)

    def loss(at):
        return Clip(0.2, 0.28, dual)(at, old, advantages, ids)[0].sum()

    ratio = (logprobs - old).exp()
    kinks = [0.8, 1.28] if dual is None else [0.8, 1.28, dual]
    smooth = torch.stack([(ratio - kink).abs() > 1e-4 for kink in kinks]).all(0)
    (gradient,) = torch.autograd.grad(loss(logprobs), logprobs)
    np.testing.assert_allclose(gradient[smooth], np.array(central_difference(loss, logprobs))[smooth], atol=1e-7)


def value_tokens(seed, n=24):
    generator = torch.Generator().manual_seed(seed)
    values, returns, old = torch.randn(3, n, generator=generator, dtype=torch.float64)
    old[::3] = values[::3] + 0.05  # some inside the range
    return values.requires_grad_(), returns, old


@given(SEEDS, st.sampled_from([None, 0.01, 0.2, 5.0]))
def test_value_loss_is_the_formula(seed, clip):
    values, returns, old = value_tokens(seed)
    loss, clipped = value_loss(values, returns, old, clip)
    for i, (v, r, o) in enumerate(zip(values.tolist(), returns.tolist(), old.tolist(), strict=True)):
        plain = (v - r) ** 2
        bounded = plain if clip is None else (min(max(v, o - clip), o + clip) - r) ** 2
        assert loss[i].item() == pytest.approx(0.5 * max(plain, bounded), rel=1e-12)
        assert clipped[i].item() == (bounded > plain)


@given(SEEDS, st.sampled_from([None, 0.2]))
def test_the_gradient_of_value_loss_is_that_of_finite_differences(seed, clip):
    values, returns, old = value_tokens(seed)

    def loss(at):
        return value_loss(at, returns, old, clip)[0].sum()

    (gradient,) = torch.autograd.grad(loss(values), values)
    _, clipped = value_loss(values, returns, old, clip)
    assert ((gradient == 0) == clipped).all()
    # Kinks: where the cut begins, and where both errors are equal on the two sides of the return.
    cut = values if clip is None else torch.clamp(values, old - clip, old + clip)
    smooth = (((cut - returns).abs() - (values - returns).abs()).abs() > 1e-4) | (cut == values)
    if clip is not None:
        smooth &= ((values - old).abs() - clip).abs() > 1e-4
    np.testing.assert_allclose(gradient[smooth], np.array(central_difference(loss, values))[smooth], atol=1e-7)


def test_nan_reaches_the_value_loss_and_no_tokens_are_no_trouble():
    values, returns, old = value_tokens(0)
    returns[3] = math.nan
    assert value_loss(values, returns, old, 0.2)[0][3].isnan() and value_loss(values, returns, old, None)[0][3].isnan()
    none = torch.zeros(0, requires_grad=True)
    per_token, clipped = value_loss(none, none.detach(), none.detach(), 0.2)
    per_token.sum().backward()
    assert per_token.shape == clipped.shape == (0,)


@pytest.mark.parametrize("loss", [Clip(), Cispo(), Gspo()])
def test_nan_reaches_the_loss(loss):
    logprobs, old, advantages, ids = tokens(0)
    old[3] = math.nan
    assert loss(logprobs, old, advantages, ids)[0][3].isnan()


@pytest.mark.parametrize("loss", [Clip(), Cispo(), Gspo()])
def test_no_tokens_are_no_trouble(loss):
    none = torch.zeros(0, requires_grad=True)
    per_token, clipped = loss(none, none.detach(), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    per_token.sum().backward()
    assert per_token.shape == clipped.shape == (0,)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: Clip(clip_low=0), "loss.clip_low"),
        (lambda: Clip(clip_low=1.0), "loss.clip_low"),
        (lambda: Clip(clip_high=-1), "loss.clip_high"),
        (lambda: Clip(dual_clip=1.0), "loss.dual_clip"),
        (lambda: Cispo(clip_high=0), "loss.clip_high"),
        (lambda: Gspo(clip_low=2), "loss.clip_low"),
    ],
)
def test_impossible_settings_are_refused(make, key):
    with pytest.raises(UserError, match=key):
        make()
