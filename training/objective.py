"""The loss of one micro-batch, and statistics that can be summed over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from training.corrections import Correction, Stats
from training.losses import PolicyLoss, kl_k3
from training.packing import MicroBatch

MAXIMUM = "_max"  # statistics with this ending reduce by maximum, all others by sum


def policy_objective(
    logprobs: torch.Tensor,
    entropy: torch.Tensor,
    batch: MicroBatch,
    *,
    loss: PolicyLoss,
    correction: Correction,
    anchor_logprobs: torch.Tensor | None,
    reference_logprobs: torch.Tensor | None = None,
    kl_coef: float = 0.0,
    kl_unbiased: bool = True,
    entropy_coef: float = 0.0,
) -> tuple[torch.Tensor, Stats]:
    """Sum over own tokens of weight x (correction x policy loss + kl_coef x KL - entropy_coef x entropy).

    The weights come from the whole optimizer step, so the losses of its micro-batches are summed, never averaged.

    Args:
        logprobs, entropy: (n,) from ``token_logprobs``, with gradient.
        anchor_logprobs: (n,) of the trainer before this batch's first update, without gradient: ``anchor=recomputed``.
            None: ``anchor=behaviour``, the engine's log-probs of the batch; every correction is then a factor of 1.
        reference_logprobs: (n,) of the reference policy; needed where ``kl_coef`` is not 0.
        kl_unbiased: multiply k3 by the token's ratio to the anchor, with gradient: only then is the gradient that of
            KL(policy || reference) (DeepSeek-V3.2, arXiv 2512.02556 §3.1; TRL's ``use_bias_correction_kl``).

    Returns:
        The loss, a scalar with gradient, and detached float64 scalars: sums over own tokens, their number ``tokens``,
        and maxima (names ending in ``_max``). ``reduce`` and ``means`` make metrics of them. ``mismatch`` is
        |trainer - engine| before any truncation, of the recomputed anchor, else of the current policy, where updates
        since the rollout add to it; ``mismatch_k3`` estimates KL(engine || trainer). NaN is never filtered.
    """
    advantages, behaviour = batch.own(batch.advantages), batch.own(batch.behaviour_logprobs)
    sequence_ids, weights = batch.own(batch.sequence_ids), batch.own(batch.weights)
    old = behaviour if anchor_logprobs is None else anchor_logprobs.detach()
    trainer = logprobs.detach() if anchor_logprobs is None else old

    policy, clipped = loss(logprobs, old, advantages, sequence_ids)
    factors, stats = correction(old, behaviour, sequence_ids)
    per_token = policy * factors
    if reference_logprobs is not None:
        kl = kl_k3(logprobs, reference_logprobs.detach())
        if kl_unbiased:
            kl = kl * (logprobs - old).exp()
        stats["kl"] = _sum(kl)
        if kl_coef:
            per_token = per_token + kl_coef * kl
    elif kl_coef:
        raise ValueError(f"kl_coef={kl_coef} needs reference_logprobs; score the batch with the reference policy")
    if entropy_coef:
        per_token = per_token - entropy_coef * entropy
    total = (weights * per_token).sum()

    ratio, difference = (logprobs.detach() - old).exp(), trainer - behaviour
    stats |= {
        "tokens": torch.tensor(float(len(logprobs)), dtype=torch.float64, device=logprobs.device),
        "loss": total.detach().double(),
        "ratio": _sum(ratio),
        "ratio_max": _max(ratio),
        "clip_low": _sum(clipped & (advantages < 0)),
        "clip_high": _sum(clipped & (advantages > 0)),
        "entropy": _sum(entropy),
        "mismatch": _sum(difference.abs()),
        "mismatch_max": _max(difference.abs()),
        "mismatch_k3": _sum(kl_k3(behaviour, trainer)),
    }
    return total, stats


def reduce(stats: Iterable[Stats]) -> Stats:
    """One set of statistics of several, all with the same names: maxima by maximum, all others by sum."""
    total: Stats = {}
    for part in stats:
        for name, value in part.items():
            if name not in total:
                total[name] = value
            else:
                total[name] = torch.maximum(total[name], value) if name.endswith(MAXIMUM) else total[name] + value
    return total


def means(stats: Stats) -> dict[str, float]:
    """Metrics of reduced statistics: means per own token; ``loss``, ``tokens`` and maxima as they are."""
    tokens = max(float(stats["tokens"]), 1.0)
    as_is = ("loss", "tokens")
    return {
        name: float(value) if name in as_is or name.endswith(MAXIMUM) else float(value) / tokens
        for name, value in stats.items()
    }


def _sum(values: torch.Tensor) -> torch.Tensor:
    return values.detach().double().sum()


def _max(values: torch.Tensor) -> torch.Tensor:
    """0 for no values: these maxima are of numbers that are never negative."""
    values = values.detach().double()
    return values.amax() if len(values) else values.new_zeros(())
