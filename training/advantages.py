"""Advantages: how much better it went than the group, or the value model, expected. Pure arithmetic over rewards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

STD_EPSILON = 1e-4  # added to the standard deviation, as trl.GRPOTrainer does

Vector = Sequence[float] | np.ndarray | torch.Tensor


def group_relative(
    rewards: Vector,
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


def rloo(rewards: Vector, group_ids: Sequence[Any] | np.ndarray | torch.Tensor) -> torch.Tensor:
    """REINFORCE leave-one-out (arXiv 2402.14740 §2.3): reward minus the mean of the *other* rewards of its group.

    Arguments, result and errors as in ``group_relative``; a group of one or of equal rewards gives exactly 0.
    """
    values, groups, dtype = _checked(rewards, group_ids)
    count, mean = _group_mean(values, groups)
    scale = count / (count - 1).clamp(min=1)
    centred = (values - mean[groups]) * scale[groups]
    return centred.masked_fill(_constant(values, groups, len(mean)), 0.0).to(dtype)


def gae(rewards: Vector, values: Vector, *, gamma: float, lam: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantages of one sequence that has ended (arXiv 1506.02438 eq. 16): V after its last token is 0.

    With d_t = r_t + gamma V_{t+1} - V_t, A_t is the sum of (gamma lam)^j d_{t+j}. ``lam=1`` gives discounted
    (Monte-Carlo) returns, whatever the values.

    Args:
        rewards: (n,) per own token of the policy, any unit: the outcome stands on the last, tool tokens have no place.
        values: (n,) V of the state before each of these tokens, in the unit of the rewards.
        gamma, lam: in [0, 1].

    Returns:
        Advantages (n,), and returns (n,), which are advantages + values: what a value model learns. The wider dtype of
        rewards and values, float64 where neither is floating; on the device of ``rewards``.

    Raises:
        ValueError: empty, not 1-D, unequal lengths, not finite, or gamma or lam outside [0, 1].
    """
    return egae(rewards, values, gamma=gamma, lam=lam, truncated=False)


def egae(
    rewards: Vector, values: Vector, *, gamma: float, lam: float, truncated: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """GAE of a sequence that a window has cut (T-PPO, arXiv 2506.15050): V after the cut is taken for V at the cut.

    ``truncated``: V(s_l) := V(s_{l-1}), so that without a reward the last delta is (gamma - 1) V(s_{l-1}): 0 for
    gamma=1. Else equal to ``gae``, whose arguments, result and errors are the same.
    """
    for name, factor in (("gamma", gamma), ("lam", lam)):
        if not 0 <= factor <= 1:
            raise ValueError(f"{name}={factor} must be between 0 and 1")
    given, reward_type = _vector(rewards, "rewards", "own token", "mend the reward function, or drop the episode")
    expected, value_type = _vector(values, "values", "own token", "lower the learning rate of the value model")
    if len(given) != len(expected):
        raise ValueError(f"{len(given)} rewards and {len(expected)} values must be of one length: one each per token")
    terms = list(zip(given.tolist(), expected.tolist(), strict=True))
    after = terms[-1][1] if truncated else 0.0
    advantage, backwards = 0.0, []
    for reward, value in reversed(terms):
        advantage = reward + gamma * after - value + gamma * lam * advantage
        backwards.append(advantage)
        after = value
    advantages = torch.tensor(backwards[::-1], dtype=torch.float64, device=given.device)
    dtype = torch.promote_types(reward_type, value_type)
    dtype = dtype if dtype.is_floating_point else torch.float64
    return advantages.to(dtype), (advantages + expected.to(given.device)).to(dtype)


def _vector(given: Any, name: str, one: str, remedy: str) -> tuple[torch.Tensor, torch.dtype]:
    """As float64, and the dtype that it had; refused unless it is 1-D, finite and has an entry."""
    tensor = given.detach() if isinstance(given, torch.Tensor) else torch.as_tensor(np.asarray(given))
    if tensor.dim() != 1:
        raise ValueError(f"{name} of shape {tuple(tensor.shape)} must be 1-D: one per {one}")
    if len(tensor) == 0:
        raise ValueError(f"{name} are empty; give at least one {one}")
    values = tensor.double()
    bad = (~values.isfinite()).nonzero()
    if len(bad):
        raise ValueError(f"{name}[{int(bad[0])}] is {values[int(bad[0])].item()}; {remedy}")
    return values, tensor.dtype


def _checked(rewards: Any, group_ids: Any) -> tuple[torch.Tensor, torch.Tensor, torch.dtype]:
    """Rewards as float64, groups as 0..k-1 in order of first sight, and the dtype to give back."""
    values, dtype = _vector(rewards, "rewards", "episode", "mend the reward function, or drop the episode")
    ids = group_ids.tolist() if isinstance(group_ids, torch.Tensor | np.ndarray) else list(group_ids)
    if len(values) != len(ids):
        raise ValueError(f"{len(values)} rewards and {len(ids)} group_ids must be of one length: one group per reward")
    for at, group in enumerate(ids):
        if isinstance(group, float) and not math.isfinite(group):
            raise ValueError(f"group_ids[{at}] is {group}; use integers or strings")
    number: dict[Any, int] = {}
    groups = torch.tensor([number.setdefault(group, len(number)) for group in ids], device=values.device)
    return values, groups, dtype if dtype.is_floating_point else torch.float64


def _group_mean(values: torch.Tensor, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    count = torch.bincount(groups).double()
    return count, torch.zeros_like(count).index_add_(0, groups, values) / count


def _constant(values: torch.Tensor, groups: torch.Tensor, size: int) -> torch.Tensor:
    """(n,) True where every reward of the group is the same number."""
    low = values.new_full((size,), math.inf).scatter_reduce(0, groups, values, "amin")
    high = values.new_full((size,), -math.inf).scatter_reduce(0, groups, values, "amax")
    return (low == high)[groups]
