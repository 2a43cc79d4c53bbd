"""Programs, jobs and turns: what a scheduler knows of the sessions that it serves. Pure.

A *program* is a session: the key under which KV cache is kept. A *job* runs from a user's message to the final
answer: it is what ordering is fair to, so that a session opened this morning does not outrank everyone for ever. A
*turn* is one request. Stated rules:

- A turn that called no tool ends its job: what follows is a person's pause. A client that names the tool of the coming
  turn (``tool``) overrides that when the turn arrives: the job goes on.
- Turns of one program may overlap (sub-agents): they share its job, and the gap begins when the last of them ends.
- A client's abort ends the job. An abort that follows a stop string is a finished turn.
- A clock that steps back counts as one that stands still.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rollout.scheduling.counters import JobRecord
from rollout.scheduling.latency import PERSON, ToolLatencies

RELEASE = "turnstile-release:"  # an abort of a request of this id releases the program named after it
LONGEST_NAME = 256  # characters of a program's name
MOST_PROGRAMS = 65_536  # idle programs remembered beyond this many are forgotten, oldest first
FORGOTTEN_AFTER = 1800.0  # seconds without a turn: then no tool is thought to run, and who keeps no KV is forgotten
LOOKS = 4  # idle programs looked at in a go: the old ones go a few at a time, so that no step pays for many

Marks = tuple[tuple[int, Any], ...]  # (tokens, hash of the block that ends there): ends of a turn and of its prompt


def held_tokens(marks: Marks, hashes: Sequence[Any], size: int) -> int:
    """The longest of these ends that a prompt contains, in tokens; ``hashes`` of its blocks of ``size`` tokens."""
    return max((n for n, end in marks if n // size <= len(hashes) and hashes[n // size - 1] == end), default=0)


@dataclass(eq=False, slots=True)
class Job:
    """User message → final answer. Seconds are the scheduler's clock.

    Jobs are numbered by arrival, and ordered by number: those that come at once stand in the order in which they came.
    """

    number: int
    arrived: float
    turns: int = 0
    gaps: float = 0.0
    waited: float = 0.0
    reused: int = 0
    recomputed: int = 0
    preempted: int = 0
    tokens: int = 0  # of its longest turn

    def record(self, program: str, now: float) -> JobRecord:
        """The job as it ended, for the metrics."""
        return JobRecord(
            program, self.number, self.turns, self.arrived, now, self.gaps, self.waited,
            self.tokens, self.reused, self.recomputed, self.preempted,
        )  # fmt: skip


@dataclass(eq=False, slots=True)
class Pin:
    """KV blocks of a finished turn, kept for the next one. ``blocks`` belong to the plug-in; ``tokens`` would hit."""

    program: Program
    blocks: list[Any]
    marks: Marks
    tokens: int
    fresh: int  # blocks that no other pin held when it was made: siblings' common prefix is charged once
    rebuild: float  # seconds that computing those again would take
    since: float
    deadline: float = math.inf
    priority: int = 0  # of the client
    returns: float = math.inf  # when the next turn truly comes; known to the simulator alone

    @property
    def returning(self) -> bool:
        """Whether a turn of its program already waits."""
        return self.program.waiting > 0

    @property
    def rank(self) -> float:
        """Age of the claim: the number of the job in progress. One that a person has yet to start is the youngest."""
        return math.inf if self.program.job_ended else self.program.job.number


@dataclass(eq=False, slots=True)
class Program:
    """One session: its job in progress (or last), its turns in the engine, the KV kept for it."""

    id: str
    job: Job
    anonymous: bool = False  # a request that named no program: a program of one turn
    turns: int = 0
    waiting: int = 0
    running: int = 0
    served: float = 0.0  # seconds for which its turns ran (least attained service)
    seen: float = 0.0  # last sign of life
    tool: str | None = None  # what the last turn called; PERSON for none
    job_ended: bool = False
    away: bool = False  # idle for so long that it may never come back
    marks: Marks = ()  # of its last turn: what a later prompt that holds them had computed before
    pins: list[Pin] = field(default_factory=list)
    counted: tuple[bool, bool, bool] = (False, False, False)  # in ``Programs.states``

    @property
    def live(self) -> int:
        return self.waiting + self.running


@dataclass(eq=False, slots=True)
class Turn:
    """One request. ``tokens`` is its length at arrival; ``order`` breaks ties by arrival, as a queue does."""

    request_id: str
    program: Program
    job: Job
    arrived: float
    tokens: int
    order: int
    first: bool  # of its job: nothing of it was served yet
    priority: int = 0
    since: float = 0.0  # when it last began to wait
    express: bool = False
    last: bool = False
    running: bool = False  # in the running batch, as vLLM has it
    admitted: float | None = None  # when it last began to run
    known: int = 0  # tokens of its prompt that the program had computed before
    claim: Pin | None = None  # the KV kept for it
    finished: bool = False

    @property
    def resident(self) -> bool:
        return self.claim is not None and bool(self.claim.blocks)  # a pin that went holds none


class Programs:
    """All programs in memory. Every method takes ``now`` in seconds of one clock."""

    def __init__(self, latencies: ToolLatencies) -> None:
        self.latencies = latencies
        self.turns: dict[str, Turn] = {}
        self._programs: OrderedDict[str, Program] = OrderedDict()
        self._idle: OrderedDict[str, Program] = OrderedDict()  # without a turn in the engine; longest idle first
        self._states = [0, 0, 0]
        self._now = -math.inf
        self._arrivals = 0
        self._jobs = 0

    def __len__(self) -> int:
        return len(self._programs)

    def __iter__(self) -> Iterator[Program]:
        return iter(self._programs.values())

    def get(self, program_id: str) -> Program | None:
        return self._programs.get(program_id)

    def clock(self, now: float) -> float:
        """``now``, never before what was seen already."""
        self._now = max(self._now, now)
        return self._now

    def arrive(self, request_id: str, program_id: str | None, tokens: int, now: float, tool: str | None = None) -> Turn:
        """A request came. ``program_id=None``: a program of its own. ``tool``: what its prompt brings the result of."""
        now = self.clock(now)
        self._arrivals += 1
        key = program_id if program_id is not None else f"\0{request_id}"  # no client can send this name
        program = self._programs.get(key)
        if program is None:
            program = Program(key, self._job(now), anonymous=program_id is None)
            self._programs[key] = program
        elif not program.live:
            self._close_gap(program, now, tool)
            del self._idle[key]
        self._programs.move_to_end(key)
        job = program.job
        turn = Turn(request_id, program, job, now, tokens, self._arrivals, first=job.turns == 0, since=now)
        job.turns += 1
        job.tokens = max(job.tokens, tokens)
        program.turns += 1
        program.waiting += 1
        program.seen = now
        self.turns[request_id] = turn
        self._count(program)
        self.tidy(now)
        return turn

    def admit(self, turn: Turn, now: float) -> float:
        """The engine took the turn up; returns the seconds it waited since it arrived or was preempted."""
        now = self.clock(now)
        waited = now - turn.since
        turn.admitted, turn.running = now, True
        turn.job.waited += waited
        turn.program.waiting -= 1
        turn.program.running += 1
        self._count(turn.program)
        return waited

    def preempt(self, turn: Turn, now: float) -> None:
        self.set_aside(turn, now)
        turn.job.preempted += 1

    def set_aside(self, turn: Turn, now: float) -> None:
        """The turn runs no more, or not yet: preempted, or it keeps its memory and waits for KV or its client."""
        now = self.clock(now)
        assert turn.admitted is not None
        turn.running, turn.since = False, now
        turn.program.served += now - turn.admitted
        turn.program.running -= 1
        turn.program.waiting += 1
        self._count(turn.program)

    def finish(self, turn: Turn, now: float, *, tool: str | None, aborted: bool) -> None:
        """A turn left the engine. ``tool`` is what it called; with None the job is over."""
        now = self.clock(now)
        program = turn.program
        del self.turns[turn.request_id]
        turn.finished = True
        if turn.running:
            assert turn.admitted is not None
            program.running -= 1
            program.served += now - turn.admitted
        else:
            program.waiting -= 1
        program.seen = now
        program.tool = tool or PERSON
        program.job_ended = (tool is None or turn.last or aborted) and not program.live
        if not program.live:
            self._idle[program.id] = program
        self._count(program)

    def last(self, program: Program) -> None:
        """Nobody will come back to it: its turns in the engine are its last."""
        for turn in self.turns.values():
            if turn.program is program:
                turn.last = True

    def forget(self, program: Program) -> None:
        """Drop a program that is gone; one with turns in the engine stays until they end."""
        if not program.live:
            program.job_ended = program.away = True  # for a policy that still counts it
            self._programs.pop(program.id, None)
            self._idle.pop(program.id, None)
            self._count(program)

    def tidy(self, now: float) -> None:
        """Forget who has been idle for long or is one too many. Call it often: each call does little.

        Those that KV is kept for stay: they pass to the young end, to be looked at when they are at the old one again.
        """
        for _ in range(LOOKS):
            oldest = next(iter(self._idle.values()), None)
            if oldest is None:
                return
            late = now >= oldest.seen + FORGOTTEN_AFTER
            if not late and len(self._programs) <= MOST_PROGRAMS:
                return
            if oldest.pins:
                oldest.away |= late
                self._count(oldest)
                self._idle.move_to_end(oldest.id)
            else:
                self.forget(oldest)

    def rename(self, program: Program, name: str) -> None:
        """A program of one turn, which has ended, turns out to go on: it gets a name."""
        del self._programs[program.id], self._idle[program.id]
        program.id, program.anonymous = name, False
        self._programs[name] = self._idle[name] = program

    def states(self) -> tuple[int, int, int]:
        """How many programs have a turn waiting, a turn running, and neither though their job goes on."""
        waiting, running, in_tool = self._states
        return waiting, running, in_tool

    def _count(self, program: Program) -> None:
        """Keep ``states`` up to date after a change, for a walk over all programs takes longer than a step."""
        before = program.counted
        in_tool = not (program.live or program.job_ended or program.away)
        after = program.counted = (program.waiting > 0, program.running > 0, in_tool)
        if after != before:
            self._states = [n - was + is_ for n, was, is_ in zip(self._states, before, after, strict=True)]

    def _job(self, now: float) -> Job:
        self._jobs += 1
        return Job(self._jobs, now)

    def _close_gap(self, program: Program, now: float, tool: str | None) -> None:
        gap = now - program.seen
        self.latencies.observe(tool or program.tool or PERSON, gap)
        if program.job_ended and tool is None:
            program.job = self._job(now)
        else:
            program.job.gaps += gap
        program.job_ended = program.away = False
