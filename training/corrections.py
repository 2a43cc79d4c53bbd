"""Corrections for the mismatch between the engine that sampled and the trainer that differentiates.

Every member turns two log-probs of the same tokens under the same weights, ``recomputed`` by the trainer and
``behaviour`` from the engine, into factors for the loss of each token. Factors carry no gradient.
"""

from __future__ import annotations

from typing import Protocol

import torch

from rollout.errors import UserError
from training.losses import per_sequence

Stats = dict[str, torch.Tensor]


class Correction(Protocol):
    """A member of the ``correction`` group.

    Inputs have shape (n,), one entry per own token; ``sequence_ids`` is int64, equal within a sequence (whole
    sequences only). Returns the factors (n,) and sums over tokens: ``correction`` (of the factors) and
    ``correction_cut`` (of tokens that were truncated or masked).
    """

    def __call__(
        self, recomputed: torch.Tensor, behaviour: torch.Tensor, sequence_ids: torch.Tensor
    ) -> tuple[torch.Tensor, Stats]: ...


class NoCorrection:
    """Every factor is 1."""

    def __call__(
        self, recomputed: torch.Tensor, behaviour: torch.Tensor, sequence_ids: torch.Tensor
    ) -> tuple[torch.Tensor, Stats]:
        factors = torch.ones_like(recomputed)
        return factors, _stats(factors, torch.zeros_like(factors, dtype=torch.bool))


class Tis:
    """Truncated importance sampling (Yao et al. 2025): min(recomputed / behaviour, cap) per token.

    TRL's ``token_truncate``.
    """

    def __init__(self, cap: float = 2.0) -> None:
        if not cap > 0:
            raise UserError(f"correction.cap: {cap} must be above 0; 2 is usual")
        self.cap = cap

    def __call__(
        self, recomputed: torch.Tensor, behaviour: torch.Tensor, sequence_ids: torch.Tensor
    ) -> tuple[torch.Tensor, Stats]:
        ratio = (recomputed - behaviour).detach().exp()
        factors = ratio.clamp(max=self.cap)
        return factors, _stats(factors, ratio > self.cap)


class TokenMask:
    """The ratio of each token where it lies in [low, high], else 0 (IcePop, arXiv 2510.18855; TRL's ``token_mask``)."""

    def __init__(self, low: float = 0.5, high: float = 5.0) -> None:
        _check_band(low, high)
        self.low = low
        self.high = high

    def __call__(
        self, recomputed: torch.Tensor, behaviour: torch.Tensor, sequence_ids: torch.Tensor
    ) -> tuple[torch.Tensor, Stats]:
        return _band((recomputed - behaviour).detach().exp(), self.low, self.high)


class SequenceMask:
    """The ratio of the whole sequence, the *product* over its own tokens, where it lies in [low, high], else 0.

    The product is the ratio that makes the estimate unbiased; it grows with length, so the band is wide. TRL's
    ``sequence_mask``, which is TRL's default, with the same upper bound.
    """

    def __init__(self, low: float = 0.0, high: float = 3.0) -> None:
        _check_band(low, high)
        self.low = low
        self.high = high

    def __call__(
        self, recomputed: torch.Tensor, behaviour: torch.Tensor, sequence_ids: torch.Tensor
    ) -> tuple[torch.Tensor, Stats]:
        difference = (recomputed - behaviour).detach()
        return _band(per_sequence(difference, sequence_ids, mean=False).exp(), self.low, self.high)


def _band(ratio: torch.Tensor, low: float, high: float) -> tuple[torch.Tensor, Stats]:
    outside = (ratio < low) | (ratio > high)  # NaN is not outside: it must reach the loss and be seen
    factors = ratio.masked_fill(outside, 0.0)
    return factors, _stats(factors, outside)


def _stats(factors: torch.Tensor, cut: torch.Tensor) -> Stats:
    return {"correction": factors.double().sum(), "correction_cut": cut.double().sum()}


def _check_band(low: float, high: float) -> None:
    if not 0 <= low < 1 < high:
        raise UserError(f"correction.low, correction.high: [{low}, {high}] must hold 1 inside, and not be negative")
