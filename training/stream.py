"""prompts → budget → episodes → rewards → advantages → selection → micro-batches: what the trainer iterates over."""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch

from rollout.buffer import Group, RolloutBuffer
from rollout.episode import Episode
from rollout.errors import UserError
from rollout.runner import Job, Runner
from rollout.speaker import Policy
from training.advantages import Advantage
from training.aggregation import token_weights
from training.budgets import Budget
from training.config import BatchConfig
from training.packing import MicroBatch, TrainSequence, pack
from training.prompts import PromptOrder
from training.rewards import Reward
from training.selection import Selection


class StepBatch(TypedDict):
    """One optimizer step: micro-batches, the anchor's log-probs for each (None: behaviour), metrics of a new round."""

    micro_batches: list[MicroBatch]
    anchors: list[torch.Tensor] | None
    metrics: dict[str, float]


@dataclass
class Axes:
    """The members that make a run's algorithm; the stream asks them and never which they are."""

    budget: Budget
    reward: Reward
    advantage: Advantage
    selection: Selection


class RolloutStream:
    """Endless and stateful. Each round of rollouts gives ``epochs × minibatches`` optimizer steps.

    ``sync`` brings the engine to the trainer's weights and returns their version; ``anchor`` gives the trainer's own
    log-probs of micro-batches, and is None where the ratio is taken against the engine's. ``on_round`` sees the
    finished groups with their advantages, for logs. Sequences with zero advantage everywhere have no gradient: they
    keep their share of the denominators but are not computed, unless ``keep_zero``.
    """

    def __init__(
        self,
        prompts: PromptOrder,
        axes: Axes,
        runner: Runner,
        policy: Policy,
        batch: BatchConfig,
        *,
        seed: int,
        pad_id: int,
        max_new_tokens: int,
        sync: Callable[[], int],
        anchor: Callable[[list[MicroBatch]], list[torch.Tensor]] | None = None,
        on_round: Callable[[list[Group], list[list[list[np.ndarray]]]], None] = lambda groups, advantages: None,
        keep_zero: bool = False,
        timeout_s: float = 600.0,
    ) -> None:
        self.prompts, self.axes, self.runner, self.policy, self.batch = prompts, axes, runner, policy, batch
        self.seed, self.pad_id, self.max_new_tokens = seed, pad_id, max_new_tokens
        self.sync, self.anchor, self.on_round = sync, anchor, on_round
        self.keep_zero, self.timeout_s = keep_zero, timeout_s
        self.buffer = RolloutBuffer()
        self.rounds = 0
        self.pending: deque[StepBatch] = deque()

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        if not self.pending:
            self._round()
        return self.pending.popleft()

    def state_dict(self) -> dict[str, Any]:
        """All that a later stream needs to go on as this one would: at a step's end no episode is unfinished."""
        return {"prompts": self.prompts.state_dict(), "rounds": self.rounds, "pending": list(self.pending)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.prompts.load_state_dict(state["prompts"])
        self.rounds, self.pending = state["rounds"], deque(state["pending"])

    def _round(self) -> None:
        start = time.monotonic()
        version = self.sync()
        synced = time.monotonic()
        groups, metrics = self._roll_out(version)
        metrics["time/sync"], metrics["time/generate"] = synced - start, time.monotonic() - synced
        metrics["rollout/tokens_per_second"] = metrics["rollout/tokens"] / metrics["time/generate"]
        advantages = [[e.advantages for e in self.axes.advantage(group.episodes)] for group in groups]
        self.on_round(groups, advantages)
        self.pending.extend(self._steps(groups, advantages))
        if self.anchor is not None and len(self.pending) > 1:
            # With one step a round the trainer's log-probs at that step are the anchor: nothing to recompute.
            for step in self.pending:
                step["anchors"] = self.anchor(step["micro_batches"])
        self.pending[0]["metrics"] = metrics
        self.rounds += 1

    def _roll_out(self, version: int) -> tuple[list[Group], dict[str, float]]:
        kept: list[Group] = []
        seen: list[Group] = []
        for _ in range(self.axes.selection.max_rounds):
            asked = self.prompts.take(self.batch.prompts - len(kept))
            counts = self.axes.budget([row for row, _ in asked])
            jobs = []
            for (row, visit), count in zip(asked, counts, strict=True):
                if count:
                    self.buffer.expect(visit, count, version)
                    jobs += [Job(row, visit, sample) for sample in range(count)]
            self.runner.fill(self.buffer, jobs, self.policy.speaker)
            groups = self.buffer.take(sum(map(bool, counts)), version=version, timeout=self.timeout_s)
            for group in groups:
                for episode, rewards in zip(group.episodes, self.axes.reward(group.episodes), strict=True):
                    episode.rewards = rewards
                    if not math.isfinite(episode.reward):
                        raise UserError(f"reward: {rewards} of prompt {episode.prompt_id} is not finite; mend it")
            seen += groups
            kept += [group for group in groups if group.episodes and self.axes.selection.keep(group.episodes)]
            if len(kept) >= self.batch.prompts:
                break
        metrics = round_metrics(seen, kept)
        metrics |= {f"dropped/{cause}": float(count) for cause, count in self.buffer.drops.items()}
        self.buffer.drops.clear()
        metrics["rollout/stale"] = float(self.buffer.stale)
        return kept, metrics

    def _steps(self, groups: list[Group], advantages: list[list[list[np.ndarray]]]) -> list[StepBatch]:
        """Cut a round into optimizer steps by whole groups, in an order that depends on seed, round and epoch alone."""
        steps: list[StepBatch] = []
        for epoch in range(self.batch.epochs):
            order = list(range(len(groups)))
            if self.batch.minibatches > 1:
                random.Random(f"{self.seed} {self.rounds} {epoch}").shuffle(order)
            for part in np.array_split(np.array(order, dtype=int), self.batch.minibatches):
                members = [pair for i in part for pair in zip(groups[i].episodes, advantages[i], strict=True)]
                steps.append(StepBatch(micro_batches=self._pack(members), anchors=None, metrics={}))
        return steps

    def _pack(self, members: list[tuple[Episode, list[np.ndarray]]]) -> list[MicroBatch]:
        pairs = [
            (sequence, values)
            for episode, per_sequence in members
            if self.axes.selection.trains(episode)
            for sequence, values in zip(episode.sequences, per_sequence, strict=True)
            if sequence.own_tokens
        ]
        lengths = [sequence.own_tokens for sequence, _ in pairs]
        weights = token_weights(lengths, self.batch.aggregation, max_tokens=self.max_new_tokens)
        sequences = [
            TrainSequence.of(sequence, index, values, weight)
            for index, ((sequence, values), weight) in enumerate(zip(pairs, weights, strict=True))
            if self.keep_zero or np.any(values)
        ]
        return pack(sequences, max_tokens=self.batch.max_tokens, row_tokens=self.batch.row_tokens, pad_id=self.pad_id)


def round_metrics(seen: list[Group], kept: list[Group]) -> dict[str, float]:
    """What a round of rollouts was like, over all its groups, also those that selection gave up.

    ``effective_gradient_ratio`` is the share of rollouts in groups whose rewards vary (arXiv 2509.25849).
    """
    episodes = [episode for group in seen for episode in group.episodes]
    n = max(len(episodes), 1)
    varied = [group for group in seen if len({episode.reward for episode in group.episodes}) > 1]
    turns = [turn for episode in episodes for turn in episode.turns]
    metrics = {
        "reward": sum(e.reward for e in episodes) / n,
        "success": sum(e.success for e in episodes) / n,
        "rollout/episodes": float(len(episodes)),
        "rollout/tokens": float(sum(e.own_tokens for e in episodes)),
        "rollout/tokens_per_episode": sum(e.own_tokens for e in episodes) / n,
        "rollout/turns": len(turns) / n,
        "rollout/tool_calls": sum(len(e.tool_results) for e in episodes) / n,
        "rollout/tool_errors": sum(r.error for e in episodes for r in e.tool_results) / n,
        "rollout/thinking": sum(any(turn.thought for turn in e.turns) for e in episodes) / n,
        "rollout/ill_formed": sum(not turn.well_formed for turn in turns) / max(len(turns), 1),
        "rollout/truncated": sum(e.status == "truncated" for e in episodes) / n,
        "rollout/groups": float(len(seen)),
        "rollout/groups_kept": float(len(kept)),
        "effective_gradient_ratio": sum(len(group.episodes) for group in varied) / n,
    }
    for name in sorted({name for episode in episodes for name in episode.rewards}):
        metrics[f"reward/{name}"] = sum(episode.rewards.get(name, 0.0) for episode in episodes) / n
    return metrics
