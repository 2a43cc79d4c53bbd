"""Retention and ordering policies: what to keep, whom to serve first, whose memory goes. Pure, one small class each.

A policy sees the records of ``programs.py`` and a ``Load``; it returns choices and changes nothing but a turn's
``express`` flag. Without memory pressure or a backlog none of them differs from stock.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence

from rollout.scheduling.latency import PERSON
from rollout.scheduling.policy import Key, Load, Policy, Resident, rank_of
from rollout.scheduling.programs import Job, Pin, Program, Turn
from rollout.scheduling.turnstile import Clairvoyant, Turnstile


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


class FixedTtl(Resident):
    """Keep for ``ttl`` seconds: the rule in Continuum's released code (2 s)."""

    def __init__(self, ttl: float = 2.0) -> None:
        if not ttl >= 0:
            raise ValueError(f"ttl={ttl!r} must be a number of seconds >= 0")
        self.ttl = ttl

    def hold(self, turn: Turn, tool: str | None, tokens: int, load: Load) -> float:
        return self.ttl


class SkiRental(Resident):
    """Keep for as long as a rebuild would take: never more than twice the cost of knowing the gap."""

    def hold(self, turn: Turn, tool: str | None, tokens: int, load: Load) -> float:
        return load.rebuild(tokens)


class PinToPressure(Resident):
    """Keep until memory is short; then the youngest job's goes, to whoever is older."""

    def hold(self, turn: Turn, tool: str | None, tokens: int, load: Load) -> float:
        return math.inf

    def victims(self, turn: Turn, running: bool, pins: Sequence[Pin], load: Load) -> Iterator[Pin]:
        mine = running or load.idle
        return iter(sorted((p for p in pins if mine or p.rank > turn.job.number), key=rank_of, reverse=True))


class InferCept(Resident):
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


class Continuum(Resident):
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
