"""The copy of an engine's tool latencies that outlives it: a training run keeps it beside its checkpoints."""

from __future__ import annotations

import logging
import math
from pathlib import Path

from rollout.scheduling.latency import ToolLatencies

log = logging.getLogger(__name__)
EVERY, IDLE = 30.0, 1.0  # seconds between two copies, under load and when it ends


class LatencyFile:
    """Saves ``latencies`` to ``path`` from time to time, if they have changed; with ``path=None`` never."""

    def __init__(self, latencies: ToolLatencies, path: str | Path | None) -> None:
        self._latencies, self._path = latencies, path
        self._saved = -math.inf
        self._seen = -1

    def tick(self, now: float, *, idle: bool) -> None:
        """Save where it is time to; ``idle``: soon, for an engine may be killed in its sleep. ``now`` in seconds."""
        if now >= self._saved + (IDLE if idle else EVERY):
            self.save()
            self._saved = now

    def save(self) -> None:
        """Write it now. A full disk must not stop the engine: then it says so in the log, and tries again."""
        seen = self._latencies.observed
        if self._path is None or seen == self._seen:
            return
        try:
            self._latencies.save(self._path)
        except OSError as error:
            log.warning("save_latencies: %s cannot be written (%s); it is stale until it can", self._path, error)
        else:
            self._seen = seen
