"""Rank 0 leads a run, the other processes do their share of what it deals out.

Rank 0 alone has prompts, budgets, rollouts, rewards and advantages; what it hands out are micro-batches. A run so does
not depend on the number of its processes, but for the order in which gradients are summed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from training.critic import Critic
from training.members import ValueModelConfig
from training.packing import MicroBatch, deal
from training.ranks import Ranks
from training.stream import RolloutStream, StepBatch


class Together:
    """What rank 0's stream asks of every rank beside steps; it stands there for the value model.

    ``sync`` and ``logprobs`` do this rank's part of a weight sync, and of the trainer's log-probs.
    """

    def __init__(
        self,
        ranks: Ranks,
        sync: Callable[[int], int],
        logprobs: Callable[[list[MicroBatch]], list[torch.Tensor]],
        critic: Critic | None,
    ) -> None:
        self.ranks = ranks
        self._services: dict[str, Callable[[Any], Any]] = {"sync": sync, "logprobs": logprobs}
        if critic is not None:
            self._critic = critic
            self._services |= {"values": critic.values, "critic": critic.step}

    @property
    def config(self) -> ValueModelConfig:
        return self._critic.config

    def sync(self, version: int) -> int:
        return self._ask("sync", [version] * self.ranks.size)[0]

    def logprobs(self, micro_batches: list[MicroBatch]) -> list[torch.Tensor]:
        return self._in_order("logprobs", micro_batches)

    def values(self, micro_batches: list[MicroBatch]) -> list[torch.Tensor]:
        return self._in_order("values", micro_batches)

    def step(self, micro_batches: list[MicroBatch]) -> dict[str, float]:
        """One of the value model's alone."""
        return self._ask("critic", deal(micro_batches, self.ranks.size))[0]

    def led(self, stream: RolloutStream) -> Iterator[StepBatch]:
        """Rank 0's part of each step; the others get theirs."""
        for step in stream:
            yield self.ranks.scatter([("step", part) for part in dealt(step, self.ranks.size)])[1]

    def followed(self) -> Iterator[StepBatch]:
        """Another rank's part of each step; in between it does what rank 0 asks of all."""
        while True:
            service, work = self.ranks.scatter()
            if service == "step":
                yield work
            else:
                self.ranks.gather(self._services[service](work))

    def _ask(self, service: str, parts: list[Any]) -> list[Any]:
        """By rank, what came of its part."""
        _, mine = self.ranks.scatter([(service, part) for part in parts])
        return self.ranks.gather(self._services[service](mine))

    def _in_order(self, service: str, micro_batches: list[MicroBatch]) -> list[torch.Tensor]:
        size = self.ranks.size
        found = self._ask(service, deal(micro_batches, size))
        return [found[i % size][i // size] for i in range(len(micro_batches))]


def dealt(step: StepBatch, size: int) -> list[StepBatch]:
    """By rank, its part of a step."""
    batches, critic = deal(step["micro_batches"], size), [deal(part, size) for part in step["critic"]]
    anchors = step["anchors"]
    none = torch.zeros(0)  # of a micro-batch that fills up
    return [
        StepBatch(
            micro_batches=mine,
            anchors=None if anchors is None else (anchors[rank::size] + [none] * len(mine))[: len(mine)],
            critic=[part[rank] for part in critic],
            metrics=step["metrics"] if rank == 0 else {},
        )
        for rank, mine in enumerate(batches)
    ]
