"""Rollouts → advantages → micro-batches: what the trainer iterates over."""

from __future__ import annotations

import itertools
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, TypedDict

import numpy as np
import torch

from rollout.buffer import Group
from rollout.episode import Episode, Sequence
from training.aggregation import token_weights
from training.estimates import Estimate
from training.members import ValueModelConfig
from training.packing import MicroBatch, TrainSequence, pack, unpack
from training.rewards import Remembers
from training.rewards.adacot import decision_mask
from training.rollouts import Rollouts, Round
from training.settings import BatchConfig
from training.timing import rollout_seconds


class Member(NamedTuple):
    """An episode in training. ``values``: per sequence, what the critic said before each own token; empty without."""

    episode: Episode
    estimate: Estimate
    values: list[np.ndarray]


class StepBatch(TypedDict):
    """One optimizer step: micro-batches, the anchor's log-probs for each (None: behaviour), metrics of a new round.

    ``critic``: the value model's own optimizer steps that go with it, as micro-batches.
    """

    micro_batches: list[MicroBatch]
    anchors: list[torch.Tensor] | None
    critic: list[list[MicroBatch]]
    metrics: dict[str, float]


class ValueModel(Protocol):
    """What the stream asks of a critic (``training.critic``)."""

    config: ValueModelConfig

    def values(self, micro_batches: list[MicroBatch]) -> list[torch.Tensor]: ...

    def step(self, micro_batches: list[MicroBatch]) -> dict[str, float]: ...


class RolloutStream:
    """Endless and stateful. Each round of rollouts gives ``epochs × minibatches`` optimizer steps.

    ``sync`` brings the engine to the trainer's weights and returns their version; ``rest`` says that the trainer works
    from here to the next; ``anchor`` gives the trainer's own
    log-probs of micro-batches, and is None where the ratio is taken against the engine's. ``on_round`` sees the
    groups with their estimates, for logs; ``on_warm_up`` each round that trains the critic alone. ``engine_steps``
    counts those of the engine. ``on_scored`` gets the trainer's log-probs of micro-batches where they are known before
    the first update on them. Sequences with zero advantage everywhere have no gradient: they keep their share of the
    denominators but are not computed, unless ``keep_zero``. ``think_id``: the decision after this token gets no policy
    loss (AdaCoT's Selective Loss Masking); None: every own token gets one. ``processes``: that micro-batches are for.
    """

    def __init__(
        self,
        rollouts: Rollouts,
        batch: BatchConfig,
        *,
        seed: int,
        pad_id: int,
        max_new_tokens: int,
        sync: Callable[[], int],
        rest: Callable[[], None] = lambda: None,
        anchor: Callable[[list[MicroBatch]], list[torch.Tensor]] | None = None,
        critic: ValueModel | None = None,
        on_round: Callable[[list[Group], list[list[Estimate]]], None] = lambda groups, estimates: None,
        on_warm_up: Callable[[int, dict[str, float]], None] = lambda round, metrics: None,
        on_scored: Callable[[list[MicroBatch], list[torch.Tensor]], None] = lambda micro_batches, logprobs: None,
        engine_steps: Callable[[], int] | None = None,
        keep_zero: bool = False,
        think_id: int | None = None,
        processes: int = 1,
    ) -> None:
        self.rollouts, self.batch = rollouts, batch
        self.axes = rollouts.source.axes
        self.seed, self.pad_id, self.max_new_tokens = seed, pad_id, max_new_tokens
        self.sync, self.rest, self.anchor, self.critic = sync, rest, anchor, critic
        self.on_round, self.on_warm_up, self.engine_steps = on_round, on_warm_up, engine_steps
        self.keep_zero, self.think_id, self.processes = keep_zero, think_id, processes
        self.on_scored = on_scored
        self.rounds = 0
        self.warm_up_seconds = 0.0  # since the last row of metrics
        self.pending: deque[StepBatch] = deque()

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        while not self.pending:
            self._round()
        return self.pending.popleft()

    def state_dict(self) -> dict[str, Any]:
        """All that a later stream needs to go on as this one would."""
        history, reward = self.axes.budget.history, self.axes.reward
        return {
            "prompts": self.rollouts.source.prompts.state_dict(),
            "history": None if history is None else history.state_dict(),
            "reward": reward.state_dict() if isinstance(reward, Remembers) else None,
            "rollouts": self.rollouts.state_dict(),
            "rounds": self.rounds,
            "pending": list(self.pending),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rollouts.source.prompts.load_state_dict(state["prompts"])
        self.rollouts.load_state_dict(state["rollouts"])
        if (history := self.axes.budget.history) is not None and state["history"] is not None:
            history.load_state_dict(state["history"])
        if isinstance(self.axes.reward, Remembers) and state["reward"] is not None:
            self.axes.reward.load_state_dict(state["reward"])
        self.rounds, self.pending = state["rounds"], deque(state["pending"])

    def _round(self) -> None:
        start = time.monotonic()
        version = self.sync()
        synced, steps = time.monotonic(), self.engine_steps() if self.engine_steps else 0
        activity = self.rollouts.source.runner.activity
        before = activity.seconds()
        played = self.rollouts.play(version)
        elapsed = time.monotonic() - synced
        metrics = round_metrics(played) | staleness(played.kept, version)
        metrics |= rollout_seconds(before, activity.seconds(), elapsed, ahead=self.rollouts.ahead > 0)
        metrics["time/sync"] = synced - start
        if not self.rollouts.ahead:  # else it was played while the trainer worked, and this is only what was waited for
            metrics["rollout/tokens_per_second"] = played.tokens / elapsed
        if self.engine_steps and not self.rollouts.ahead:
            metrics["rollout/engine_steps"] = float(self.engine_steps() - steps)
            metrics["rollout/occupancy"] = played.tokens / max(metrics["rollout/engine_steps"] * played.slots, 1.0)
        resting = time.monotonic()
        self.rest()
        metrics["time/sync"] += time.monotonic() - resting
        groups = self._members(played.kept)
        self.on_round(played.kept, [[member.estimate for member in group] for group in groups])
        if self.critic is not None and self.rounds < self.critic.config.warmup_rounds:
            for step in self._value_steps(groups, self.critic.config, self.critic.config.warmup_epochs):
                metrics |= self.critic.step(step)
            self.rounds += 1
            self.warm_up_seconds += time.monotonic() - start
            self.on_warm_up(self.rounds, metrics)
            return
        self.pending.extend(self._steps(groups))
        if self.anchor is not None and len(self.pending) > 1:
            # With one step a round the trainer's log-probs at that step are the anchor: nothing to recompute.
            anchoring = time.monotonic()
            for step in self.pending:
                step["anchors"] = self.anchor(step["micro_batches"])
                self.on_scored(step["micro_batches"], step["anchors"])
            metrics["time/anchor"] = time.monotonic() - anchoring
        if self.critic is not None:
            self.pending[0]["critic"] = self._value_steps(groups, self.critic.config, self.critic.config.epochs)
        if self.warm_up_seconds:
            metrics["time/warm_up"], self.warm_up_seconds = self.warm_up_seconds, 0.0
        self.pending[0]["metrics"] = metrics
        self.rounds += 1

    def _members(self, groups: list[Group]) -> list[list[Member]]:
        """The groups' episodes with what the advantage says of them, all in one call."""
        episodes = [episode for group in groups for episode in group.episodes]
        values = None if self.critic is None else self._values(self.critic, episodes)
        estimates = self.axes.advantage(episodes, values)
        members = map(Member, episodes, estimates, values or [[] for _ in episodes])
        return [[next(members) for _ in group.episodes] for group in groups]

    def _values(self, critic: ValueModel, episodes: list[Episode]) -> list[list[np.ndarray]]:
        """V of the state before each own token."""
        sequences = [sequence for episode in episodes for sequence in episode.sequences]
        zeros = [np.zeros(sequence.own_tokens) for sequence in sequences]
        micro_batches = self._packed(
            TrainSequence.of(sequence, index, none, none)
            for index, (sequence, none) in enumerate(zip(sequences, zeros, strict=True))
            if len(none)
        )
        found: dict[int, np.ndarray] = {}
        for batch, values in zip(micro_batches, critic.values(micro_batches), strict=True):
            found |= unpack(batch.to("cpu"), values.double())
        each = iter(found.get(index, none) for index, none in enumerate(zeros))
        return [[next(each) for _ in episode.sequences] for episode in episodes]

    def _steps(self, groups: list[list[Member]]) -> list[StepBatch]:
        """Cut a round into optimizer steps by whole groups."""
        return [
            StepBatch(micro_batches=self._pack(members), anchors=None, critic=[], metrics={})
            for epoch in range(self.batch.epochs)
            for members in self._parts(groups, epoch, self.batch.minibatches)
        ]

    def _parts(self, groups: list[list[Member]], epoch: int, n: int) -> Iterator[list[Member]]:
        """The groups in ``n`` parts of about as many episodes, in an order that seed, round and epoch alone decide."""
        order = list(range(len(groups)))
        if n > 1:
            random.Random(f"{self.seed} {self.rounds} {epoch}").shuffle(order)
        total = max(sum(map(len, groups)), 1)
        ends = itertools.accumulate(len(groups[i]) for i in order)
        middles = [(end - len(groups[i]) / 2) * n / total for i, end in zip(order, ends, strict=True)]
        for part in range(n):
            yield [m for i, middle in zip(order, middles, strict=True) if int(middle) == part for m in groups[i]]

    def _pack(self, members: list[Member]) -> list[MicroBatch]:
        """The policy's: own tokens that it has not been trained on."""
        every = [
            (sequence, values, self._trains(sequence))
            for member in members
            if self.axes.selection.trains(member.episode)
            for sequence, values in zip(member.episode.sequences, member.estimate.advantages, strict=True)
        ]
        pairs = [pair for pair in every if pair[-1].any()]
        lengths = [int(mask.sum()) for *_, mask in pairs]
        weights = token_weights(lengths, self.batch.aggregation, max_tokens=self.max_new_tokens)
        return self._packed(
            TrainSequence.of(sequence, index, values, _at(mask, weight), mask=mask)
            for index, ((sequence, values, mask), weight) in enumerate(zip(pairs, weights, strict=True))
            if self.keep_zero or np.any(values[mask])
        )

    def _trains(self, sequence: Sequence) -> np.ndarray:
        """Of its own tokens, those that get a policy loss."""
        fresh = np.arange(sequence.own_tokens) >= sequence.trained
        if self.think_id is None:
            return fresh
        kept = decision_mask(sequence.token_ids, self.think_id, own=sequence.own_mask).numpy()
        return fresh & kept[np.array(sequence.own_mask, dtype=bool)]

    def _value_steps(self, groups: list[list[Member]], config: ValueModelConfig, epochs: int) -> list[list[MicroBatch]]:
        """The critic's optimizer steps: episodes that have ended, on their returns, the mean over their own tokens."""
        return [
            self._pack_values([member for member in members if member.estimate.returns is not None])
            for epoch in range(epochs)
            for members in self._parts(groups, epoch, config.minibatches)
        ]

    def _pack_values(self, members: list[Member]) -> list[MicroBatch]:
        parts = [
            part
            for member in members
            for part in zip(member.episode.sequences, member.estimate.returns or [], member.values, strict=True)
            if part[0].own_tokens
        ]
        weights = token_weights([sequence.own_tokens for sequence, *_ in parts], "token")
        return self._packed(
            TrainSequence.of(sequence, index, np.zeros(len(weight)), weight, returns=returns, values=values)
            for index, ((sequence, returns, values), weight) in enumerate(zip(parts, weights, strict=True))
        )

    def _packed(self, sequences: Iterator[TrainSequence]) -> list[MicroBatch]:
        return pack(
            list(sequences),
            max_tokens=self.batch.max_tokens,
            row_tokens=self.batch.row_tokens,
            pad_id=self.pad_id,
            multiple=self.processes,
        )


def _at(mask: np.ndarray, values: np.ndarray) -> np.ndarray:
    """``values``, one for each True of the mask, at their places among zeros."""
    full = np.zeros(len(mask))
    full[mask] = values
    return full


def staleness(groups: list[Group], version: int) -> dict[str, float]:
    """How many updates old the policy was that wrote a token: mean and largest, over the policy's own tokens.

    ``version`` is that of the policy that will be trained on them.
    """
    sequences = [sequence for group in groups for episode in group.episodes for sequence in episode.sequences]
    ages = version - np.array([wrote for sequence in sequences for wrote in sequence.versions if wrote >= 0])
    if not len(ages):
        return {}
    return {"rollout/staleness": float(ages.mean()), "rollout/staleness_max": float(ages.max())}


def round_metrics(played: Round) -> dict[str, float]:
    """What a round of rollouts was like, over all episodes that ended in it, also those that selection gave up.

    Means over episodes are left out where none has ended. ``effective_gradient_ratio`` is the share of rollouts in
    groups whose rewards vary, ``effective_prompt_ratio`` that of groups (arXiv 2509.25849); ``budget/`` the mean group
    of a difficulty, where there are several, of prompts that got any.
    """
    seen = played.seen
    episodes = [episode for group in seen for episode in group.episodes]
    metrics = {
        "rollout/episodes": float(len(episodes)),
        "rollout/tokens": float(played.tokens),
        "rollout/groups": float(len(seen)),
        "rollout/groups_kept": float(len(played.kept)),
    }
    metrics |= played.metrics | {f"dropped/{cause}": float(count) for cause, count in played.drops.items()}
    if not episodes:
        return metrics
    n = len(episodes)
    varied = [group for group in seen if len({episode.reward for episode in group.episodes}) > 1]
    succeeded = [[episode.success for episode in group.episodes] for group in seen if group.episodes]
    turns = [turn for episode in episodes for turn in episode.turns]
    asked = max(sum(episode.prompt_tokens for episode in episodes), 1)
    metrics |= {
        "reward": sum(e.reward for e in episodes) / n,
        "success": sum(e.success for e in episodes) / n,
        "rollout/tokens_per_episode": sum(e.own_tokens for e in episodes) / n,
        "rollout/turns": len(turns) / n,
        "rollout/tool_calls": sum(len(e.tool_results) for e in episodes) / n,
        "rollout/tool_seconds": sum(r.seconds for e in episodes for r in e.tool_results) / n,
        "rollout/cache_hit_rate": sum(e.cached_tokens for e in episodes) / asked,
        "rollout/tool_errors": sum(r.error for e in episodes for r in e.tool_results) / n,
        "rollout/thinking": sum(e.thought for e in episodes) / n,
        "rollout/ill_formed": sum(not turn.well_formed for turn in turns) / max(len(turns), 1),
        "rollout/truncated": sum(e.status == "truncated" for e in episodes) / n,
        "effective_gradient_ratio": sum(len(group.episodes) for group in varied) / n,
        "effective_prompt_ratio": len(varied) / len(succeeded),
        "rollout/all_right": sum(map(all, succeeded)) / len(succeeded),
        "rollout/all_wrong": sum(not any(group) for group in succeeded) / len(succeeded),
        "rollout/largest_group": float(max(map(len, succeeded))),
    }
    by_difficulty: dict[str, list[int]] = {}
    for group in seen:
        if group.episodes:
            by_difficulty.setdefault(group.episodes[0].difficulty, []).append(len(group.episodes))
    if len(by_difficulty) > 1:
        metrics |= {f"budget/{name}": sum(sizes) / len(sizes) for name, sizes in sorted(by_difficulty.items())}
    for name in sorted({name for episode in episodes for name in episode.rewards}):
        metrics[f"reward/{name}"] = sum(episode.rewards.get(name, 0.0) for episode in episodes) / n
    return metrics
