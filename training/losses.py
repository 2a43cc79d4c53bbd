"""Losses over the policy's own tokens: flat 1-D tensors in, a loss and a clipped flag per token out."""

from __future__ import annotations

from typing import Protocol

import torch

from rollout.errors import UserError


class PolicyLoss(Protocol):
    """A member of the ``loss`` group.

    All inputs have shape (n,), one entry per own token: ``logprobs`` of the policy that is trained (with gradient),
    ``old_logprobs`` of the anchor, ``advantages``, and ``sequence_ids`` (int64, equal within a sequence; whole
    sequences only). Returns the loss per token (n,) and a bool (n,): True where clipping took the gradient away.
    """

    def __call__(
        self,
        logprobs: torch.Tensor,
        old_logprobs: torch.Tensor,
        advantages: torch.Tensor,
        sequence_ids: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


class Clip:
    """PPO's clipped surrogate (arXiv 1707.06347 eq. 7) with a range of its own on each side (DAPO's clip-higher, §3.1).

    ``dual_clip`` bounds the loss of negative advantages at ``dual_clip * |A|`` (arXiv 1912.09729; TRL's delta).
    """

    def __init__(self, clip_low: float = 0.2, clip_high: float = 0.28, dual_clip: float | None = None) -> None:
        _check_range(clip_low, clip_high)
        if dual_clip is not None and not dual_clip > 1:
            raise UserError(f"loss.dual_clip: {dual_clip} must be above 1 (3 to 10 are usual); use null for none")
        self.clip_low = clip_low
        self.clip_high = clip_high
        self.dual_clip = dual_clip

    def __call__(
        self,
        logprobs: torch.Tensor,
        old_logprobs: torch.Tensor,
        advantages: torch.Tensor,
        sequence_ids: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ratio = (logprobs - old_logprobs).exp()
        loss, clipped = _surrogate(ratio, advantages, self.clip_low, self.clip_high)
        if self.dual_clip is not None:
            bound = -self.dual_clip * advantages
            beyond = (advantages < 0) & (loss > bound)
            loss, clipped = torch.where(beyond, bound, loss), clipped | beyond
        return loss, clipped


class Cispo:
    """CISPO (MiniMax-M1, arXiv 2506.13585 §3.1): REINFORCE weighted by the truncated, detached ratio.

    The ratio is cut at ``1 + clip_high`` (TRL's ``epsilon_high`` for cispo is that sum). No token loses its gradient;
    ``clipped`` marks those whose weight was cut with a positive advantage.
    """

    def __init__(self, clip_high: float = 4.0) -> None:
        if not clip_high > 0:
            raise UserError(f"loss.clip_high: {clip_high} must be above 0; 4 cuts ratios above 5")
        self.clip_high = clip_high

    def __call__(
        self,
        logprobs: torch.Tensor,
        old_logprobs: torch.Tensor,
        advantages: torch.Tensor,
        sequence_ids: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ratio = (logprobs - old_logprobs).detach().exp()
        loss = -ratio.clamp(max=1 + self.clip_high) * advantages * logprobs
        return loss, (ratio > 1 + self.clip_high) & (advantages > 0)


class Gspo:
    """GSPO (arXiv 2507.18071 eq. 5 and 7): the clipped surrogate on the geometric mean of a sequence's ratios.

    Every token of a sequence has the sequence's loss, so ``aggregation=sequence`` gives the paper's objective.
    The defaults are the paper's (§5.1).
    """

    def __init__(self, clip_low: float = 3e-4, clip_high: float = 4e-4) -> None:
        _check_range(clip_low, clip_high)
        self.clip_low = clip_low
        self.clip_high = clip_high

    def __call__(
        self,
        logprobs: torch.Tensor,
        old_logprobs: torch.Tensor,
        advantages: torch.Tensor,
        sequence_ids: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ratio = per_sequence(logprobs - old_logprobs, sequence_ids, mean=True).exp()
        return _surrogate(ratio, advantages, self.clip_low, self.clip_high)


def value_loss(
    values: torch.Tensor, returns: torch.Tensor, old_values: torch.Tensor, clip: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Half the squared error of a value model, with a step per token of at most ``clip`` (PPO's own code; verl's).

    0.5 max((V - R)^2, (V' - R)^2) with V' = V cut to ``old_values`` ± ``clip``; ``clip=None``: 0.5 (V - R)^2.

    Args:
        values: (n,) V of the state before each token, in the unit of the rewards, with gradient.
        returns, old_values: (n,) targets, and what the model said at the rollout.

    Returns:
        The loss per token (n,), and a bool (n,): True where clipping took the gradient away.
    """
    error = (values - returns) ** 2
    if clip is None:
        return 0.5 * error, torch.zeros_like(error, dtype=torch.bool)
    bounded = (torch.clamp(values, old_values - clip, old_values + clip) - returns) ** 2
    return 0.5 * torch.max(error, bounded), bounded > error


def kl_k3(logprobs: torch.Tensor, reference_logprobs: torch.Tensor) -> torch.Tensor:
    """KL(policy || reference) per token, unbiased and never negative, for tokens that the policy sampled: (n,) nats.

    The k3 estimator r - 1 - ln r with r = reference / policy (Schulman, "Approximating KL divergence").
    """
    difference = reference_logprobs - logprobs
    return difference.exp() - difference - 1


def per_sequence(values: torch.Tensor, sequence_ids: torch.Tensor, *, mean: bool) -> torch.Tensor:
    """The mean (or the sum) of each sequence's values, written to every token of the sequence: (n,) to (n,)."""
    ids, members = torch.unique(sequence_ids, return_inverse=True)
    total = values.new_zeros(len(ids)).index_add(0, members, values)
    if mean:
        total = total / torch.bincount(members, minlength=len(ids))
    return total[members]


def _surrogate(
    ratio: torch.Tensor, advantages: torch.Tensor, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    loss = -torch.min(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    clipped = ((ratio < 1 - clip_low) & (advantages < 0)) | ((ratio > 1 + clip_high) & (advantages > 0))
    return loss, clipped


def _check_range(clip_low: float, clip_high: float) -> None:
    if not 0 < clip_low < 1:
        raise UserError(f"loss.clip_low: {clip_low} must be between 0 and 1; 0.2 keeps ratios above 0.8")
    if not clip_high > 0:
        raise UserError(f"loss.clip_high: {clip_high} must be above 0; 0.28 keeps ratios below 1.28")
