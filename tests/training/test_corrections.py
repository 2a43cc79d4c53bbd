import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollout.errors import UserError
from training.corrections import NoCorrection, SequenceMask, Tis, TokenMask

MEMBERS = [NoCorrection(), Tis(), TokenMask(), SequenceMask()]


def tokens(seed, n=20, spread=0.8):
    generator = torch.Generator().manual_seed(seed)
    recomputed = -torch.rand(n, generator=generator, dtype=torch.float64)
    behaviour = recomputed + spread * torch.randn(n, generator=generator, dtype=torch.float64)
    return recomputed.requires_grad_(), behaviour, torch.randint(0, 5, (n,), generator=generator)


@given(st.integers(0, 10_000))
def test_members_are_their_formulas(seed):
    recomputed, behaviour, ids = tokens(seed)
    pairs = list(zip(recomputed.tolist(), behaviour.tolist(), ids.tolist(), strict=True))
    ratios = [math.exp(p - q) for p, q, _ in pairs]
    whole = [math.prod(r for r, (_, _, k) in zip(ratios, pairs, strict=True) if k == i) for _, _, i in pairs]
    expected = {
        NoCorrection(): [1.0] * len(pairs),
        Tis(1.5): [min(r, 1.5) for r in ratios],
        TokenMask(0.5, 2.0): [r if 0.5 <= r <= 2 else 0.0 for r in ratios],
        SequenceMask(0.4, 3.0): [r if 0.4 <= r <= 3 else 0.0 for r in whole],
    }
    for member, factors in expected.items():
        got, stats = member(recomputed, behaviour, ids)
        assert not got.requires_grad
        np.testing.assert_allclose(got, factors, rtol=1e-12)
        assert stats["correction"].item() == pytest.approx(sum(factors))
    _, stats = Tis(1.5)(recomputed, behaviour, ids)
    assert stats["correction_cut"] == sum(r > 1.5 for r in ratios)


@pytest.mark.parametrize("member", MEMBERS)
def test_no_mismatch_changes_nothing(member):
    recomputed, _, ids = tokens(1)
    factors, stats = member(recomputed, recomputed.detach(), ids)
    assert (factors == 1).all()
    assert stats["correction_cut"] == 0


@pytest.mark.parametrize("member", MEMBERS[1:])
def test_nan_is_not_masked_away(member):
    recomputed, behaviour, ids = tokens(2)
    behaviour[4] = math.nan
    assert member(recomputed, behaviour, ids)[0][4].isnan()


@pytest.mark.parametrize("make", [lambda: Tis(0), lambda: TokenMask(1.5, 2), lambda: SequenceMask(-1, 3)])
def test_impossible_settings_are_refused(make):
    with pytest.raises(UserError, match=r"correction\."):
        make()
