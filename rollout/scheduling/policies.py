"""Retention and ordering policies: what to keep, whom to serve first, whose memory goes. Pure, one small class each.

A policy sees the records of ``programs.py`` and a ``Load``; it returns choices and changes nothing but a turn's
``express`` flag. Without memory pressure or a backlog none of them differs from stock.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rollout.scheduling.latency import PERSON, ToolLatencies
from rollout.scheduling.programs import Job, Pin, Program, Turn

Key = tuple[float, ...]


@dataclass(slots=True)
class Load:
    """The engine now. The plug-in keeps it up to date; times in seconds, memory in tokens."""

    rebuild: Callable[[int], float]  # R(n): seconds to compute n tokens again
    latencies: ToolLatencies
    context: Callable[[], int]  # tokens held by running requests
    pool_tokens: int
    now: float = 0.0
    running: float = 1.0  # moving mean B of running requests
    waiting: int = 0
    idle: bool = True  # nothing runs
    short: float = -math.inf  # when memory was last asked for in vain
    youngest: float = -math.inf  # number of the youngest job that runs: whom stock preempts if no pin goes


class Policy:
    """Jobs by arrival, first come first served, nothing kept: the base of all."""

    pins = False
    pressed = True  # whether the order applies now: of waiting requests, and of whom vLLM preempts first

    def key(self, turn: Turn) -> Key:
        """Place in the waiting queue, smallest first."""
        return (turn.job.number,)

    def arrived(self, turn: Turn) -> None:
        """A turn joins the queue."""

    def promote(self, load: Load) -> bool:
        """Once a step, before the queue is read. True if keys have changed."""
        return False

    def may_start(self, turn: Turn) -> bool:
        """Whether the head of the queue may be admitted now."""
        return True

    def started(self, turn: Turn, waited: float, lost: int) -> None:
        """The turn was admitted for the first time after ``waited`` seconds; ``lost`` tokens must be computed again."""

    def ended(self, job: Job) -> None:
        """A job is over."""

    def hold(self, turn: Turn, tool: str | None, tokens: int, load: Load) -> float:
        """Seconds for which a finished turn's KV is kept: 0 for not at all, inf until memory is short."""
        return 0.0

    def victims(self, turn: Turn, running: bool, pins: Sequence[Pin], load: Load) -> Iterator[Pin]:
        """The pins that may go so that ``turn`` gets memory, first to go first. ``pins`` holds none of its own.

        Here the youngest job's goes, before a running request is preempted and where nothing runs (Continuum §4.3, read
        as its released code does: in our simulator letting every newcomer take pins costs it up to half of its gain).
        """
        return iter(sorted(pins, key=_rank, reverse=True) if running or load.idle else ())


class ProgramFcfs(Policy):
    """Continuum's order alone: jobs by arrival."""


class ProgramCap(Policy):
    """Admission control alone: at most ``cap`` jobs in progress; their turns go first, by job arrival.

    A job that sleeps longer than ``idle_limit`` seconds between turns gives up its place, so that a program that never
    returns blocks nobody for ever.
    """

    def __init__(self, cap: int, idle_limit: float = 300.0) -> None:
        if isinstance(cap, bool) or not isinstance(cap, int) or cap < 1 or not idle_limit > 0:
            raise ValueError(f"cap={cap!r} must be a whole number >= 1, and idle_limit={idle_limit!r} above 0")
        self.cap, self.idle_limit = cap, idle_limit
        self._active: set[Program] = set()

    def key(self, turn: Turn) -> Key:
        return (turn.program not in self._active, turn.job.number)

    def promote(self, load: Load) -> bool:
        late = load.now - self.idle_limit
        stay = {p for p in self._active if p.live or not (p.job_ended or p.seen < late)}
        changed, self._active = len(stay) < len(self._active), stay
        return changed

    def may_start(self, turn: Turn) -> bool:
        return turn.program in self._active or len(self._active) < self.cap

    def started(self, turn: Turn, waited: float, lost: int) -> None:
        self._active.add(turn.program)


class Plas(Policy):
    """Program-level least attained service (Autellix §4): programs that ran least so far go first."""

    def key(self, turn: Turn) -> Key:
        return (turn.program.served, turn.job.number)


class _Resident(Policy):
    """Pinned turns first, then job arrival: what every retention policy needs (pins without order collapse)."""

    pins = True

    def key(self, turn: Turn) -> Key:
        return (not turn.resident, turn.job.number)


class FixedTtl(_Resident):
    """Keep for ``ttl`` seconds: the rule in Continuum's released code (2 s)."""

    def __init__(self, ttl: float = 2.0) -> None:
        if not ttl >= 0:
            raise ValueError(f"ttl={ttl!r} must be a number of seconds >= 0")
        self.ttl = ttl

    def hold(self, turn: Turn, tool: str | None, tokens: int, load: Load) -> float:
        return self.ttl


class SkiRental(_Resident):
    """Keep for as long as a rebuild would take: never more than twice the cost of knowing the gap."""

    def hold(self, turn: Turn, tool: str | None, tokens: int, load: Load) -> float:
        return load.rebuild(tokens)


class PinToPressure(_Resident):
    """Keep until memory is short; then the youngest job's goes, to whoever is older."""

    def hold(self, turn: Turn, tool: str | None, tokens: int, load: Load) -> float:
        return math.inf

    def victims(self, turn: Turn, running: bool, pins: Sequence[Pin], load: Load) -> Iterator[Pin]:
        mine = running or load.idle
        return iter(sorted((p for p in pins if mine or p.rank > turn.job.number), key=_rank, reverse=True))


class InferCept(_Resident):
    """Preserve or discard by the smaller waste of memory × time (InferCept §4); order by original arrival.

    Preserving n tokens for a gap wastes n · gap; discarding wastes R(n) · (n + tokens of the others). The gap is the
    mean of the tool's history (0 when unknown); a gap that outlasts the break-even loses its memory, as there, where
    decisions are taken again every iteration.
    """

    def key(self, turn: Turn) -> Key:
        return (turn.job.number,)

    def hold(self, turn: Turn, tool: str | None, tokens: int, load: Load) -> float:
        even = load.rebuild(tokens) * (tokens + load.context()) / max(tokens, 1)
        durations = load.latencies.durations(tool or PERSON)
        mean = sum(durations) / len(durations) if durations else 0.0
        return even if mean <= even else 0.0


class Continuum(_Resident):
    """Continuum's Eq. 2: argmax over τ of P(gap ≤ τ) · (T · η + reload) − τ, with its cold start (§4.1, §4.2)."""

    cold = 100  # K: durations needed before a distribution is believed
    window = 100  # evicted turns over which the queueing delay T is averaged (the paper does not say)

    def __init__(self) -> None:
        self._waits: deque[float] = deque(maxlen=self.window)
        self._eta = Eta()

    def started(self, turn: Turn, waited: float, lost: int) -> None:
        if lost:
            self._waits.append(waited)

    def ended(self, job: Job) -> None:
        self._eta.observe(job.turns)

    def key(self, turn: Turn) -> Key:
        preempted = turn.admitted is not None
        return (0 if preempted else 1 if turn.resident else 2, turn.job.number)

    def hold(self, turn: Turn, tool: str | None, tokens: int, load: Load) -> float:
        reload = load.rebuild(tokens)
        own = load.latencies.durations(tool or PERSON)
        if len(own) <= self.cold:
            own = load.latencies.everything()
        queueing = sum(self._waits) / len(self._waits) if self._waits else 0.0
        if len(own) <= self.cold:  # Exp(1 s) gaps and η = 1: d/dτ gives ln B
            return math.log(queueing + reload) if queueing + reload > 1 else 0.0
        return optimal_ttl(own, queueing * self._eta.value + reload)


class Eta:
    """η = −Corr(k, N−k) over turns k of finished jobs of N turns (Continuum §4.1): 1 for equal N, 0 for geometric."""

    def __init__(self) -> None:
        self._n = self._k = self._r = self._kk = self._rr = self._kr = 0.0

    def observe(self, turns: int) -> None:
        for k in range(1, min(turns, 1000) + 1):
            left = turns - k
            self._n += 1
            self._k, self._r = self._k + k, self._r + left
            self._kk, self._rr, self._kr = self._kk + k * k, self._rr + left * left, self._kr + k * left

    @property
    def value(self) -> float:
        """1 until the jobs seen say otherwise."""
        spread = (self._n * self._kk - self._k**2) * (self._n * self._rr - self._r**2)
        return -(self._n * self._kr - self._k * self._r) / math.sqrt(spread) if spread > 0 else 1.0


class Turnstile(_Resident):
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
                yield from sorted(rest, key=_rank, reverse=True)


class Clairvoyant(Turnstile):
    """The same index with the true time to the next turn in place of the idle time. Simulator only: no policy."""

    def bad(self, pin: Pin, load: Load) -> float:
        if pin.returning:
            return 0.0
        return (pin.returns - load.now) / self.even(pin, load)


def _rank(pin: Pin) -> float:
    return pin.rank


def optimal_ttl(durations: Sequence[float], benefit: float) -> float:
    """Continuum's Eq. 2: the τ in {0} ∪ durations with the largest P(D ≤ τ) · benefit − τ, in seconds.

    Args:
        durations: seconds that a tool took, any order, at least none.
        benefit: seconds saved if the next turn comes before τ: T · η + reload.

    Returns:
        The smallest such τ; 0 for no durations or a benefit that is not positive.

    Raises:
        ValueError: a duration or the benefit is not finite, or a duration is negative.
    """
    if not math.isfinite(benefit) or not all(math.isfinite(d) and d >= 0 for d in durations):
        raise ValueError("optimal_ttl: durations must be finite and >= 0, and benefit finite; drop what is not")
    if benefit <= 0 or not durations:
        return 0.0
    best, ttl = sum(d == 0 for d in durations) / len(durations) * benefit, 0.0
    for count, duration in enumerate(sorted(durations), 1):
        # Of equal durations the last one counts: P(D ≤ τ) is whole there.
        value = count / len(durations) * benefit - duration
        if value > best:
            best, ttl = value, duration
    return ttl


POLICIES: dict[str, type[Policy]] = {
    "program_fcfs": ProgramFcfs,
    "program_cap": ProgramCap,
    "plas": Plas,
    "fixed_ttl": FixedTtl,
    "ski_rental": SkiRental,
    "pin_to_pressure": PinToPressure,
    "infercept": InferCept,
    "continuum": Continuum,
    "turnstile": Turnstile,
    "clairvoyant": Clairvoyant,
}
STOCK = ("fcfs", "priority")  # vLLM's own classes, untouched
