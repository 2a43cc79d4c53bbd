"""Our own policy, and its twin that knows the future."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence

from rollout.scheduling.policy import Key, Load, Resident, rank_of
from rollout.scheduling.programs import Pin, Turn


class Turnstile(Resident):
    """Ours: no timers, no histories, no tool names.

    Every finished turn is kept. Who waits takes no memory from an older job: stock's thrashing is newcomers evicting
    those who are about to return. Pins that may go are those idle for longer than k · R(n) · B: losing n tokens costs
    R(n) seconds of the engine, while the memory they hold would let one more request run, which is worth 1/B of an
    engine second each second. ``k`` is for tools, ``k_person`` for pauses of persons, who seldom come back soon. First
    turns that waited ``express_after`` seconds get a lane of their own, of at most ``express_share`` of the memory. One
    that is longer than the lane waits its turn: its KV is lost after it, and in a small pool that is dear. While memory
    has sufficed for ``calm`` seconds the order is stock's.

    Two bounds on what that could cost. A pin idle for ``forsaken`` times its break-even may be taken by anybody: its
    program died, or ended on a tool call. And who has been the oldest that waits for ``patience`` seconds, passed by
    residents and short first turns, goes first of all and may take any pin; one at a time.
    """

    def __init__(
        self,
        k: float = 5.0,
        k_person: float = 1.0,
        express_after: float = 1.0,
        express_share: float = 0.1,
        calm: float = 60.0,
        forsaken: float = 8.0,
        patience: float = 60.0,
    ) -> None:
        if not (k > 0 and k_person > 0):
            raise ValueError(f"k={k} and k_person={k_person} must be above 0")
        if not (express_after >= 0 and 0 <= express_share <= 1):
            raise ValueError(f"express_after={express_after} must be >= 0 and express_share={express_share} in [0, 1]")
        if not calm >= 0:
            raise ValueError(f"calm={calm} must be a number of seconds >= 0")
        if not (forsaken >= 1 and patience > 0):
            raise ValueError(f"forsaken={forsaken} must be >= 1, and patience={patience} seconds above 0")
        self.forsaken, self.patience = forsaken, patience
        self.k, self.k_person, self.calm, self.pressed = k, k_person, calm, False
        self.express_after, self.express_share = express_after, express_share
        self._first: deque[Turn] = deque()  # first turns that wait, by arrival
        self._express: set[Turn] = set()
        self._live: list[Turn] = []  # turns in the engine, some of them gone
        self._oldest: Turn | None = None  # of those that wait
        self._oldest_since = self._looked = -math.inf
        self._overdue: Turn | None = None
        self._forsaken: set[Pin] = set()
        self._weighed = -math.inf
        self._newest: Pin | None = None  # of the pins that were all within their break-even
        self._due, self._due_running = -math.inf, 0.0  # until then they are, unless fewer run

    def key(self, turn: Turn) -> Key:
        if not self.pressed:
            return (turn.order,)
        return (0 if turn is self._overdue else 1 if turn.resident else 2 if turn.express else 3, turn.job.number)

    def arrived(self, turn: Turn) -> None:
        self._live.append(turn)
        if turn.first:
            self._first.append(turn)

    def promote(self, load: Load) -> bool:
        pressed = load.now - load.short < self.calm
        changed, self.pressed = pressed != self.pressed, pressed
        if load.now >= self._looked + 1.0:  # a look at all of them, not in every step
            changed |= self._look(load.now)
        late, first = load.now - self.express_after, self._first
        if not first or first[0].arrived > late:
            return changed
        self._express = {turn for turn in self._express if not turn.finished}
        lane = self.express_share * load.pool_tokens
        room = lane - sum(turn.tokens for turn in self._express)
        while first and first[0].arrived <= late:
            turn = first[0]
            if turn.finished or turn.admitted is not None or turn.resident or turn.tokens > lane:
                first.popleft()
                continue
            if turn.tokens > room:
                break
            first.popleft()
            turn.express = changed = True
            self._express.add(turn)
            room -= turn.tokens
        return changed

    def _look(self, now: float) -> bool:
        """Who has waited longest is overdue in the end. True if that has changed somebody's place."""
        self._looked = now
        self._live = [turn for turn in self._live if not turn.finished]
        oldest = min((turn for turn in self._live if not turn.running), key=lambda t: t.job.number, default=None)
        if oldest is not self._oldest:
            self._oldest, self._oldest_since = oldest, now
        overdue = oldest if now >= self._oldest_since + self.patience else None
        changed, self._overdue = overdue is not self._overdue, overdue
        return changed

    def hold(self, turn: Turn, tool: str | None, tokens: int, load: Load) -> float:
        return 0.0 if turn.express and load.waiting else math.inf

    def bad(self, pin: Pin, load: Load) -> float:
        """Idle time over break-even; 0 for a pin whose next turn already waits."""
        if pin.returning:
            return 0.0
        return (load.now - pin.since) / self.even(pin, load)

    def even(self, pin: Pin, load: Load) -> float:
        """Break-even in seconds."""
        k = self.k_person if pin.program.job_ended else self.k
        return max(k * pin.rebuild * max(1.0, load.running), 1e-9)

    def _any_due(self, pins: Sequence[Pin], load: Load) -> bool:
        """False if no pin is past its break-even. The queue's head asks in every step: what was found holds a while."""
        if not pins:
            return False
        if pins[-1] is self._newest and load.now < self._due and load.running >= self._due_running:
            return False
        evens = [(pin.since, self.even(pin, load)) for pin in pins]
        self._newest, self._due_running = pins[-1], 0.95 * load.running  # a break-even is in proportion to B, or less
        self._due = min(since + 0.95 * even for since, even in evens)
        return any(load.now - since > even for since, even in evens)

    def victims(self, turn: Turn, running: bool, pins: Sequence[Pin], load: Load) -> Iterator[Pin]:
        anyones = turn.express or turn is self._overdue
        if not (running or turn.resident or anyones or load.idle):  # who waits takes nothing from older jobs
            if not self._any_due(pins, load):
                return
            if load.now >= self._weighed + 1.0:  # the head asks in every step, and is refused in most
                self._weighed = load.now
                self._forsaken = {pin for pin in pins if self.bad(pin, load) > self.forsaken}
            pins = [pin for pin in pins if pin.rank > turn.job.number or pin in self._forsaken]
        bad = {pin: self.bad(pin, load) for pin in pins}
        worst = sorted(pins, key=bad.__getitem__, reverse=True)
        if load.idle:  # progress before everything else
            yield from (pin for pin in worst if not pin.returning)
            yield from (pin for pin in reversed(worst) if pin.returning)
        elif anyones:
            yield from (pin for pin in worst if not pin.returning)
            yield from (pin for pin in worst if pin.returning)
        else:
            yield from (pin for pin in worst if bad[pin] > 1)  # 0 if its next turn waits
            if running or turn.resident:
                # Then the youngest job, unless a younger one runs: that vLLM preempts.
                younger = load.youngest if running else turn.job.number
                rest = (pin for pin in pins if bad[pin] <= 1 and pin.rank > younger)
                yield from sorted(rest, key=rank_of, reverse=True)


class Clairvoyant(Turnstile):
    """The same index with the true time to the next turn in place of the idle time. Simulator only: no policy."""

    def bad(self, pin: Pin, load: Load) -> float:
        if pin.returning:
            return 0.0
        return (pin.returns - load.now) / self.even(pin, load)
