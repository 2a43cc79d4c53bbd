"""What the rollouts are busy with, and the seconds that went to it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

KINDS = ("generate", "tools", "reward")


class Activity:
    """Seconds of the rollouts, each counted once: for the first of ``KINDS`` that any episode is in.

    ``tools`` are thus the seconds in which tools ran and the model wrote for nobody: what faster tools would save at
    most. ``reward`` are verifiers and reward functions while neither went on. In lockstep a turn that waits for its
    fellows' tools counts as generation. Thread-safe.
    """

    def __init__(self) -> None:
        self._busy = dict.fromkeys(KINDS, 0)
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._since = time.monotonic()
        self._lock = threading.Lock()

    @contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """An episode is in this kind of work while the block runs."""
        self._change(kind, 1)
        try:
            yield
        finally:
            self._change(kind, -1)

    def seconds(self) -> dict[str, float]:
        """By kind, since the start."""
        with self._lock:
            self._settle()
            return dict(self._seconds)

    def _change(self, kind: str, by: int) -> None:
        with self._lock:
            self._settle()
            self._busy[kind] += by

    def _settle(self) -> None:
        now = time.monotonic()
        kind = next((kind for kind in KINDS if self._busy[kind]), None)
        if kind is not None:
            self._seconds[kind] += now - self._since
        self._since = now
