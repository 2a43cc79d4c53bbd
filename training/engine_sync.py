"""The engine brought to the trainer's weights: what each rank does for it, and when the engine sleeps."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollout.engines import Engine
from rollout.engines.device_transfer import Follower
from rollout.runner import Runner
from rollout.weights import Probe, bound_for, model_logprobs, sync
from training.config import TrainingConfig
from training.device import give_memory_back
from training.lora import adapter_folder, adapter_weights
from training.policy_weights import PolicyWeights
from training.ranks import Ranks
from training.sharding import is_sharded

if TYPE_CHECKING:
    import torch


class EngineSync:
    """Brings the engine to the trainer's weights, at most once a version, through the gate.

    ``runner`` and ``engine`` are None on all ranks but the first: those help to make sharded weights whole.
    """

    def __init__(
        self,
        cfg: TrainingConfig,
        ranks: Ranks,
        runner: Runner | None,
        engine: Engine | None,
        model: Any,
        probe_ids: list[list[int]],
    ) -> None:
        bound = cfg.probe.bound
        if bound is None:  # the coarser of the two dtypes decides
            bound = max(bound_for(cfg.engine.dtype), bound_for(cfg.model.dtype))
        self.probe = Probe(probe_ids, bound)
        self.ranks, self.runner, self.engine, self.model = ranks, runner, engine, model
        self.sends_adapter = cfg.sends_adapter
        self.weights = PolicyWeights(model)
        ipc = getattr(cfg.engine, "transfer", "file") == "ipc" and not self.sends_adapter
        self.follower = Follower() if ipc and runner is None else None
        self.timeout_s = cfg.engine.timeout_s
        self.difference = 0.0
        self._synced: int | None = None
        self._level = getattr(cfg.engine, "sleep_level", 0)
        self._asleep = False

    def __call__(self, version: int) -> int:
        if self._synced == version and self._level == 0:
            return version
        if self._level:
            give_memory_back()
            self.ranks.gather(None)  # the engine wakes when every rank has done so
        if self.runner is None:
            self._help()
        else:
            with self._sent() as weights:
                parts = sync(
                    self.engine,
                    weights,
                    version,
                    probe=self.probe,
                    trainer_logprobs=lambda ids: model_logprobs(self.model, ids),
                    asleep=self._asleep,
                )
                self.difference = self.runner.call(parts, 2 * self.timeout_s, f"the engine to load version {version}")
        self._synced, self._asleep = version, False
        return version

    def rest(self) -> None:
        """The trainer works now: an engine that shares its device gives memory back, until the next call."""
        if self._level == 0 or self._asleep or self.runner is None:
            return
        self.runner.call(self.engine.sleep(self._level), 2 * self.timeout_s, "the engine to sleep")
        self._asleep = True

    def forget(self) -> None:
        """Sync again at the next call: something else has used the engine's prefix cache."""
        self._synced = None

    def _sent(self) -> AbstractContextManager[Iterable[tuple[str, torch.Tensor]] | Path]:
        return adapter_folder(self.model) if self.sends_adapter else nullcontext(self.weights)

    def _help(self) -> None:
        """What the ranks without an engine do meanwhile."""
        if self.follower is not None:
            self.follower.send(self.weights)
        if not is_sharded(self.model):
            return
        if self.follower is None:
            read = adapter_weights(self.model) if self.sends_adapter else iter(self.weights)
            collections.deque(read, maxlen=0)
        model_logprobs(self.model, self.probe.ids)
