"""Which replica serves a program's next turn: the one that holds its KV cache. Pure; the caller gives the time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass

LIVE_S = 60.0  # a program that pauses counts as load of its replica for so long
FORGET_S = 3600.0  # and keeps its place for so long: what an engine then still holds is not worth an entry


@dataclass(slots=True)
class _Home:
    replica: int
    seen: float  # when its last turn began or ended, s
    running: int = 0  # requests now


@dataclass(frozen=True, slots=True)
class Visit:
    """One request at a replica."""

    replica: int
    program: str | None
    home: _Home | None


class Homes:
    """Programs and their replicas: the least loaded at first sight, the same from then on, while that one is up.

    The load of a replica is its running requests and the programs that paused within ``LIVE_S``: a request count alone
    takes a replica whose agents all wait for tools for an idle one. Hashing names would need no table, but 64 programs
    on 8 replicas then put 12 or more on one of them, which the others wait for. A program whose replica fails gets
    another and stays there: the first one's cache is gone. A request without a name goes to the least loaded.
    """

    def __init__(self, replicas: int) -> None:
        self._running = [0] * replicas
        self._homes: OrderedDict[str, _Home] = OrderedDict()  # in the order of ``seen``

    def begin(self, program: str | None, up: Collection[int], now: float) -> Visit:
        """Choose the replica for a request that starts now. ``up``: those there are, at least one, else ValueError."""
        if not up:
            raise ValueError("no replica is up")
        self._forget(now)
        home = self._homes.get(program) if program is not None else None
        replica = home.replica if home is not None and home.replica in up else self._least_loaded(up, now)
        self._running[replica] += 1
        if program is not None:
            if home is None or home.replica != replica:
                home = self._homes[program] = _Home(replica, now)
            home.running += 1
            self._see(program, home, now)
        return Visit(replica, program, home)

    def end(self, visit: Visit, now: float) -> None:
        """The request of a ``begin`` is over, however it ended; once for each."""
        self._running[visit.replica] -= 1
        if visit.program is not None and visit.home is not None:
            visit.home.running -= 1
            if self._homes.get(visit.program) is visit.home:
                self._see(visit.program, visit.home, now)

    def release(self, program: str) -> None:
        """The program will not come back; if it does, it is a new one."""
        self._homes.pop(program, None)

    def _see(self, program: str, home: _Home, now: float) -> None:
        home.seen = now
        self._homes.move_to_end(program)

    def _forget(self, now: float) -> None:
        while self._homes:
            home = next(iter(self._homes.values()))
            if home.seen > now - FORGET_S:
                return
            self._homes.popitem(last=False)

    def _least_loaded(self, up: Collection[int], now: float) -> int:
        load = dict.fromkeys(sorted(up), 0)
        for home in reversed(self._homes.values()):
            if home.seen <= now - LIVE_S:
                break
            if home.replica in load and not home.running:
                load[home.replica] += 1
        return min(load, key=lambda replica: load[replica] + self._running[replica])
