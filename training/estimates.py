"""Members of the ``advantage`` group: what the arithmetic of ``training.advantages`` says of whole episodes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from rollout.episode import Episode, Status
from rollout.errors import UserError
from training.advantages import egae, group_relative, rloo

WHITEN_EPSILON = 1e-8  # added to the variance, as verl's masked_whiten does


@dataclass
class Estimate:
    """What an advantage says of one episode: per sequence a float64 array with one entry per *own* token.

    ``returns`` are the targets of the value model; None where there are none: no critic, or an unfinished episode.
    """

    advantages: list[np.ndarray]
    returns: list[np.ndarray] | None = None


class Advantage(Protocol):
    """A member of the ``advantage`` group: one estimate per episode, over all episodes of a round in one call.

    ``values``: per episode and per sequence V of the state before each own token, float64; None unless
    ``needs_critic``.
    """

    needs_critic: bool

    def __call__(self, episodes: list[Episode], values: list[list[np.ndarray]] | None = None) -> list[Estimate]: ...


class Group:
    """``group_relative`` over whole episodes: every own token of an episode gets the episode's advantage."""

    needs_critic = False

    def __init__(self, normalize: bool = True, clip: float | None = None) -> None:
        if clip is not None and not clip > 0:
            raise UserError(f"advantage.clip: {clip} must be above 0; use null not to clip")
        self.normalize = normalize
        self.clip = clip

    def __call__(self, episodes: list[Episode], values: list[list[np.ndarray]] | None = None) -> list[Estimate]:
        if not episodes:
            return []
        rewards, groups = _rewards(episodes)
        return _spread(episodes, group_relative(rewards, groups, normalize=self.normalize, clip=self.clip))


class Decoupled:
    """GDPO (arXiv 2601.05242): each named part of the reward normalised in its group, times its scale, then summed.

    A part's own coefficient would cancel in its normalisation; ``scales`` brings it back (1 where nothing is said). Its
    size so decides against the other parts, also in a group where nothing else varies. ``joined`` names parts that are
    a correction to another one, and are normalised in one with it: what multiplies a part is no reward by itself. The
    paper's whitening over the batch is left out: it would only scale all parts alike.
    """

    needs_critic = False

    def __init__(
        self,
        clip: float | None = None,
        scales: Mapping[str, float] | None = None,
        joined: Mapping[str, str] | None = None,
    ) -> None:
        self.clip, self.scales, self.joined = clip, dict(scales or {}), dict(joined or {})

    def __call__(self, episodes: list[Episode], values: list[list[np.ndarray]] | None = None) -> list[Estimate]:
        if not episodes:
            return []
        _, groups = _rewards(episodes)
        total = torch.zeros(len(episodes), dtype=torch.float64)
        parts: dict[str, list[str]] = {}
        for name in sorted({name for episode in episodes for name in episode.rewards}):
            parts.setdefault(self.joined.get(name, name), []).append(name)
        for name, names in parts.items():
            part = [math.fsum(episode.rewards.get(each, 0.0) for each in names) for episode in episodes]
            total += self.scales.get(name, 1.0) * group_relative(part, groups, clip=self.clip)
        return _spread(episodes, total)


class Rloo:
    """``rloo`` over whole episodes: every own token of an episode gets the episode's advantage."""

    needs_critic = False

    def __call__(self, episodes: list[Episode], values: list[list[np.ndarray]] | None = None) -> list[Estimate]:
        return _spread(episodes, rloo(*_rewards(episodes))) if episodes else []


class Gae:
    """``gae`` over whole episodes, with a lambda of its own for the value model's targets (VC-PPO, arXiv 2503.01491).

    The own tokens of an episode are one trajectory through all its sequences, in the order of time; the episode's
    reward stands on the last of them. ``whiten``: ``whitened``, over the whole call.
    """

    needs_critic = True

    def __init__(self, gamma: float = 1.0, lam: float = 0.95, lam_value: float = 1.0, whiten: bool = True) -> None:
        for name, factor in (("gamma", gamma), ("lam", lam), ("lam_value", lam_value)):
            if not 0 <= factor <= 1:
                raise UserError(f"advantage.{name}: {factor} must be between 0 and 1; leave it out for the usual one")
        self.gamma, self.lam, self.lam_value, self.whiten = gamma, lam, lam_value, whiten

    def __call__(self, episodes: list[Episode], values: list[list[np.ndarray]] | None = None) -> list[Estimate]:
        """Raises ValueError for an unfinished episode, a reward that is not finite, or values of another length."""
        _refuse_unfinished(episodes, "advantage=egae takes unfinished episodes")
        return self.estimates(episodes, values or [])

    def estimates(self, episodes: list[Episode], values: list[list[np.ndarray]]) -> list[Estimate]:
        """Of all episodes, unfinished ones cut where they stand and without returns."""
        _check(episodes, values)
        result = [
            _estimate(episode, each, self.gamma, self.lam, self.lam_value)
            for episode, each in zip(episodes, values, strict=True)
        ]
        return whitened(episodes, result) if self.whiten else result


class Egae(Gae):
    """T-PPO's estimate (arXiv 2506.15050): ``egae`` for what a window has cut, ``gae`` for what has ended.

    Trajectories, rewards and ``whiten`` as in ``Gae``. Only episodes that have ended teach the value model, on
    Monte-Carlo returns.
    """

    def __init__(self, gamma: float = 1.0, lam: float = 0.95, whiten: bool = True) -> None:
        super().__init__(gamma, lam, 1.0, whiten)

    def __call__(self, episodes: list[Episode], values: list[list[np.ndarray]] | None = None) -> list[Estimate]:
        """Raises ValueError for a reward that is not finite, or values of another length."""
        return self.estimates(episodes, values or [])


def whitened(episodes: list[Episode], estimates: list[Estimate]) -> list[Estimate]:
    """Advantages shifted and scaled to mean 0 and standard deviation 1 over the tokens that the policy trains on now.

    Those are the own tokens from ``Sequence.trained`` on; the others stay as they are. The deviation has ddof=1, and
    1e-8 is added to its square, as in verl's masked whitening. Fewer than two tokens stay as they are.
    """
    starts = [[sequence.trained for sequence in episode.sequences] for episode in episodes]
    pairs = [pair for e, s in zip(estimates, starts, strict=True) for pair in zip(e.advantages, s, strict=True)]
    fresh = np.concatenate([values[start:] for values, start in pairs]) if pairs else np.zeros(0)
    if len(fresh) < 2:
        return estimates
    mean, deviation = fresh.mean(), math.sqrt(fresh.var(ddof=1) + WHITEN_EPSILON)

    def white(values: np.ndarray, start: int) -> np.ndarray:
        return np.concatenate([values[:start], (values[start:] - mean) / deviation])

    return [
        Estimate([white(v, s) for v, s in zip(e.advantages, each, strict=True)], e.returns)
        for e, each in zip(estimates, starts, strict=True)
    ]


def _estimate(episode: Episode, values: list[np.ndarray], gamma: float, lam: float, lam_value: float) -> Estimate:
    """One episode's own tokens as one trajectory, and back to its sequences."""
    cut = episode.status is Status.UNFINISHED
    ends = np.cumsum([len(v) for v in values], dtype=int)
    flat = np.concatenate([np.zeros(0), *values])
    advantages, returns = flat, flat
    if len(flat):
        rewards = np.zeros(len(flat))
        rewards[-1] = 0.0 if cut else episode.reward
        parts = [egae(rewards, flat, gamma=gamma, lam=factor, truncated=cut) for factor in (lam, lam_value)]
        advantages, returns = parts[0][0].numpy(), parts[1][1].numpy()
    return Estimate(np.split(advantages, ends)[:-1], None if cut else np.split(returns, ends)[:-1])


def _check(episodes: list[Episode], values: list[list[np.ndarray]]) -> None:
    if len(values) != len(episodes):
        raise ValueError(f"{len(episodes)} episodes but values of {len(values)}; give the critic's values of each")
    for episode, each in zip(episodes, values, strict=True):
        given, own = [len(v) for v in each], [sequence.own_tokens for sequence in episode.sequences]
        prompt = f"prompt {episode.prompt_id}"
        if given != own:
            raise ValueError(f"{prompt}: {given} values for sequences of {own} own tokens; give one each")
        if not math.isfinite(episode.reward):
            raise ValueError(f"{prompt}: reward {episode.reward} is not finite; mend the reward function")


def _refuse_unfinished(episodes: list[Episode], remedy: str) -> None:
    for episode in episodes:
        if episode.status is Status.UNFINISHED:
            raise ValueError(f"prompt {episode.prompt_id}: an unfinished episode has no reward; {remedy}")


def _rewards(episodes: list[Episode]) -> tuple[list[float], list[str]]:
    _refuse_unfinished(episodes, "hand in a group when all its members have ended")
    return [float(episode.reward) for episode in episodes], [episode.group_id for episode in episodes]


def _spread(episodes: list[Episode], advantages: torch.Tensor) -> list[Estimate]:
    return [
        Estimate([np.full(sequence.own_tokens, advantage) for sequence in episode.sequences])
        for episode, advantage in zip(episodes, advantages.tolist(), strict=True)
    ]
