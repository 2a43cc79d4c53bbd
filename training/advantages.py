"""Advantages: how much better an episode did than the others of its group. Pure arithmetic over rewards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from rollout.episode import Episode
from rollout.errors import UserError

STD_EPSILON = 1e-4  # added to the standard deviation, as trl.GRPOTrainer does


def group_relative(
    rewards: Sequence[float] | np.ndarray | torch.Tensor,
    group_ids: Sequence[Any] | np.ndarray | torch.Tensor,
    *,
    normalize: bool = True,
    clip: float | None = None,
) -> torch.Tensor:
    """GRPO's advantage (arXiv 2402.03300 §4.1.2): reward minus the group's mean, over its standard deviation.

    The deviation has ddof=1 plus 1e-4, as TRL's. ``normalize=False`` leaves the division out (Dr. GRPO, arXiv
    2503.20783). ``clip`` limits the result to [-clip, clip] (Knapsack RL uses 5: a lone success among N has
    (N-1)/sqrt(N)). A group of one, or of exactly equal rewards, gives exactly 0: equality is judged on the rewards,
    not on a deviation that rounding makes small but not zero.

    Args:
        rewards: (n,) any unit; floats, or a floating tensor whose dtype and device the result keeps.
        group_ids: (n,) equal where two rewards belong to one group; any hashable values, in any order.

    Returns:
        Tensor (n,), float64 unless ``rewards`` has another floating dtype.

    Raises:
        ValueError: empty, not 1-D, unequal lengths, not finite, or clip not above 0.
    """
    if clip is not None and not clip > 0:
        raise ValueError(f"clip={clip} must be above 0; leave it out (None) not to clip")
    values, groups, dtype = _checked(rewards, group_ids)
    count, mean = _group_mean(values, groups)
    centred = values - mean[groups]
    if normalize:
        squares = torch.zeros_like(mean).index_add_(0, groups, centred**2)
        std = (squares / (count - 1).clamp(min=1)).sqrt()
        centred = centred / (std[groups] + STD_EPSILON)
    if clip is not None:
        centred = centred.clamp(-clip, clip)
    return centred.masked_fill(_constant(values, groups, len(mean)), 0.0).to(dtype)


def rloo(
    rewards: Sequence[float] | np.ndarray | torch.Tensor, group_ids: Sequence[Any] | np.ndarray | torch.Tensor
) -> torch.Tensor:
    """REINFORCE leave-one-out (arXiv 2402.14740 §2.3): reward minus the mean of the *other* rewards of its group.

    Arguments, result and errors as in ``group_relative``; a group of one or of equal rewards gives exactly 0.
    """
    values, groups, dtype = _checked(rewards, group_ids)
    count, mean = _group_mean(values, groups)
    scale = count / (count - 1).clamp(min=1)
    centred = (values - mean[groups]) * scale[groups]
    return centred.masked_fill(_constant(values, groups, len(mean)), 0.0).to(dtype)


def _checked(rewards: Any, group_ids: Any) -> tuple[torch.Tensor, torch.Tensor, torch.dtype]:
    """Rewards as float64, groups as 0..k-1 in order of first sight, and the dtype to give back."""
    given = rewards.detach() if isinstance(rewards, torch.Tensor) else torch.as_tensor(np.asarray(rewards))
    ids = group_ids.tolist() if isinstance(group_ids, torch.Tensor | np.ndarray) else list(group_ids)
    if given.dim() != 1:
        raise ValueError(f"rewards of shape {tuple(given.shape)} must be 1-D: one reward per episode")
    if len(given) == 0:
        raise ValueError("rewards are empty; give at least one episode")
    if len(given) != len(ids):
        raise ValueError(f"{len(given)} rewards and {len(ids)} group_ids must be of one length: one group per reward")
    values = given.double()
    bad = (~values.isfinite()).nonzero()
    if len(bad):
        at = int(bad[0])
        raise ValueError(f"rewards[{at}] is {values[at].item()}; mend the reward function, or drop the episode")
    for at, group in enumerate(ids):
        if isinstance(group, float) and not math.isfinite(group):
            raise ValueError(f"group_ids[{at}] is {group}; use integers or strings")
    number: dict[Any, int] = {}
    groups = torch.tensor([number.setdefault(group, len(number)) for group in ids], device=given.device)
    return values, groups, given.dtype if given.is_floating_point() else torch.float64


def _group_mean(values: torch.Tensor, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    count = torch.bincount(groups).double()
    return count, torch.zeros_like(count).index_add_(0, groups, values) / count


def _constant(values: torch.Tensor, groups: torch.Tensor, size: int) -> torch.Tensor:
    """(n,) True where every reward of the group is the same number."""
    low = values.new_full((size,), math.inf).scatter_reduce(0, groups, values, "amin")
    high = values.new_full((size,), -math.inf).scatter_reduce(0, groups, values, "amax")
    return (low == high)[groups]


class Advantage(Protocol):
    """A member of the ``advantage`` group: per episode and per sequence, one float64 entry per *own* token."""

    def __call__(self, episodes: list[Episode]) -> list[list[np.ndarray]]: ...


class Group:
    """``group_relative`` over whole episodes: every own token of an episode gets the episode's advantage."""

    def __init__(self, normalize: bool = True, clip: float | None = None) -> None:
        if clip is not None and not clip > 0:
            raise UserError(f"advantage.clip: {clip} must be above 0; use null not to clip")
        self.normalize = normalize
        self.clip = clip

    def __call__(self, episodes: list[Episode]) -> list[list[np.ndarray]]:
        rewards, groups = _rewards(episodes)
        return _spread(episodes, group_relative(rewards, groups, normalize=self.normalize, clip=self.clip))


class Rloo:
    """``rloo`` over whole episodes: every own token of an episode gets the episode's advantage."""

    def __call__(self, episodes: list[Episode]) -> list[list[np.ndarray]]:
        return _spread(episodes, rloo(*_rewards(episodes)))


def _rewards(episodes: list[Episode]) -> tuple[list[float], list[str]]:
    return [float(episode.reward) for episode in episodes], [episode.group_id for episode in episodes]


def _spread(episodes: list[Episode], advantages: torch.Tensor) -> list[list[np.ndarray]]:
    return [
        [np.full(sequence.own_tokens, advantage) for sequence in episode.sequences]
        for episode, advantage in zip(episodes, advantages.tolist(), strict=True)
    ]
