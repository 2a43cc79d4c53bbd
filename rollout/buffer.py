"""The only door between rollouts and training: episodes go in one by one, finished groups come out."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rollout.episode import Episode
from rollout.errors import WaitTimeout


@dataclass
class Group:
    """All episodes of one visit to one prompt. ``version`` is the policy's, or the round's number."""

    group_id: str
    size: int
    version: int
    order: int
    episodes: list[Episode] = field(default_factory=list)
    dropped: int = 0

    @property
    def complete(self) -> bool:
        return len(self.episodes) + self.dropped == self.size


class RolloutBuffer:
    """Thread-safe. The rollout thread calls ``add``, ``drop`` and ``fail``; training calls ``expect`` and ``take``."""

    def __init__(self) -> None:
        self.groups: dict[str, Group] = {}
        self.drops: Counter[str] = Counter()
        self._error: BaseException | None = None
        self._asked = 0
        self._changed = threading.Condition()

    def expect(self, group_id: str, size: int, version: int) -> None:
        """Announce a group of ``size`` episodes before any of them can arrive."""
        with self._changed:
            if group_id in self.groups:
                raise ValueError(f"group {group_id} is already expected; ids must be unique")
            self.groups[group_id] = Group(group_id, size, version, self._asked)
            self._asked += 1
            self._changed.notify_all()

    def add(self, episode: Episode) -> None:
        with self._changed:
            self.groups[episode.group_id].episodes.append(episode)
            self._changed.notify_all()

    def drop(self, group_id: str, cause: str) -> None:
        """An episode that infrastructure failed: neither scored nor trained on, but counted by its cause."""
        with self._changed:
            self.groups[group_id].dropped += 1
            self.drops[cause] += 1
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """The rollouts cannot go on: whoever takes, now or later, gets this error."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def take(self, n: int, *, timeout: float = 600.0) -> list[Group]:
        """The next ``n`` complete groups of the oldest version, in the order asked for, episodes by sample.

        A younger group waits until all older ones are out, which bounds the staleness of each; else those with short
        episodes would go first. The wait ends with ``WaitTimeout`` when no episode at all has arrived for ``timeout``
        seconds.
        """
        progress, since = -1, time.monotonic()
        with self._changed:
            while True:
                if self._error is not None:
                    raise self._error
                oldest = min((g.version for g in self.groups.values()), default=0)
                due = [g for g in self.groups.values() if g.complete and g.version == oldest]
                ready = sorted(due, key=lambda g: g.order)[:n]
                if len(ready) == n:
                    break
                arrived = sum(len(g.episodes) + g.dropped for g in self.groups.values())
                if arrived != progress:
                    progress, since = arrived, time.monotonic()
                if not self._changed.wait(max(0.0, since + timeout - time.monotonic())):
                    raise WaitTimeout(
                        f"no episode arrived for {timeout:.0f} s: {len(ready)} of {n} groups are complete"
                    )
            return self._out(ready)

    def ready(self) -> list[Group]:
        """The groups that are complete now, in the order asked for, episodes by sample; none may be."""
        with self._changed:
            if self._error is not None:
                raise self._error
            return self._out(sorted((g for g in self.groups.values() if g.complete), key=lambda g: g.order))

    def state_dict(self) -> dict[str, Any]:
        """Groups that are not complete, and the count that orders them."""
        return {"groups": self.groups, "asked": self._asked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.groups, self._asked = dict(state["groups"]), state["asked"]

    def _out(self, groups: list[Group]) -> list[Group]:
        for group in groups:
            del self.groups[group.group_id]
            group.episodes.sort(key=lambda episode: episode.sample)
        return groups
