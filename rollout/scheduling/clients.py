"""Clients, tools and people around a virtual engine: who asks what, when."""

from __future__ import annotations

import heapq
import itertools
import math
import time
from typing import Any

from rollout.errors import EngineDied
from rollout.scheduling.plots import Interval, State
from rollout.scheduling.results import Job, Result
from rollout.scheduling.virtual_engine import Context, InFlight, VirtualEngine
from rollout.scheduling.workloads import Session, Turn, Workload

EMPTY_STEP = 1e-3  # seconds of a step that schedules nothing (vLLM's after a preemption); doubled with each in a row
LONGEST_EMPTY = 0.016
PATIENCE = 60.0  # seconds of empty steps in a row, with no client left to act, that count as for ever


class Deadlock(EngineDied):
    """Requests wait, none runs, no client will do anything that could change it, and time alone did not."""


class Program:
    """One session as it plays."""

    __slots__ = ("context", "index", "job", "session", "since", "state", "turn")

    def __init__(self, index: int, session: Session, context: Context) -> None:
        self.index, self.session, self.context = index, session, context
        self.turn = -1
        self.job: Job | None = None
        self.state: State = "waiting"
        self.since = 0.0

    @property
    def last(self) -> bool:
        return self.turn + 1 == len(self.session.turns)


class Simulation:
    """Clients of one engine: each session sends its next turn when its gap is over."""

    def __init__(self, workload: Workload, engine: VirtualEngine, *, hints: bool, names: bool, record: bool) -> None:
        self.workload, self.engine = workload, engine
        self.hints, self.names, self.record = hints, names, record
        self.jobs: list[Job] = []
        self.intervals: list[Interval] = []
        self.preemptions = 0
        self.stalled = 0.0
        self._idle_since: float | None = None  # when the row of empty steps began
        self._events: list[tuple[float, int, Program]] = []
        self._order = itertools.count()
        self._backlog: list[Program] = []  # of a closed loop, last first
        self._pinned: dict[str, float] = {}
        scheduler = engine.scheduler
        if hasattr(scheduler, "tool_of"):  # the truth, for synthetic tokens say nothing: what a known format would show
            scheduler.tool_of = lambda request: self._turn(request).tool
        if hasattr(scheduler, "true_gap"):
            scheduler.true_gap = self._true_gap

    def run(self) -> Result:
        """Play to the end."""
        started = time.perf_counter()
        engine, events = self.engine, self._events
        self._open()
        while events or engine.live:
            while events and events[0][0] <= engine.now:
                second, _, program = heapq.heappop(events)
                self._ask(program, second)
            if not engine.live:
                engine.now = events[0][0]
                continue
            before = engine.now
            notable = engine.step()
            if notable is None:
                self._stall()
                continue
            self._idle_since = None
            if self.record:
                self._note(before)
            for entry in notable:
                self._answered(entry)
        self._unpinned(set(self._pinned), engine.now)
        scale = engine.scale
        return Result(
            jobs=self.jobs,
            makespan=engine.now,
            steps=engine.steps,
            prefill_tokens=engine.prefilled * scale,
            recomputed_tokens=engine.recomputed * scale,
            loaded_tokens=engine.loaded * scale,
            preemptions=self.preemptions,
            mean_running=engine.running_seconds / engine.busy,
            stalled=self.stalled,
            wall=time.perf_counter() - started,
            intervals=self.intervals,
            scheduler=engine.scheduler,
        )

    def _open(self) -> None:
        for index, session in enumerate(self.workload.sessions):
            prefix = [(name, round(tokens / self.engine.scale)) for name, tokens in session.prefix]
            program = Program(index, session, self.engine.context(prefix))
            if session.arrival is not None:
                self._at(session.arrival, program)
            else:
                self._backlog.insert(0, program)
        for _ in range(min(self.workload.concurrency or 0, len(self._backlog))):
            self._at(0.0, self._backlog.pop())

    def _at(self, second: float, program: Program) -> None:
        heapq.heappush(self._events, (second, next(self._order), program))

    def _ask(self, program: Program, now: float) -> None:
        """The program's next turn was sent at ``now``; an engine takes it in after the step that ran then."""
        scale, session = self.engine.scale, program.session
        before = session.turns[program.turn].tool if program.turn >= 0 else None
        program.turn += 1
        turn = session.turns[program.turn]
        if program.job is None:
            program.job = Job(program.index, now, opens_program=program.turn == 0)
            self.jobs.append(program.job)
        outputs = max(1, round(turn.output / scale))
        keep = None if turn.keep is None else turn.keep // scale
        given = sum(tokens for _, tokens in session.prefix) if program.turn == 0 else 0
        prompt = program.context.ask(keep, max(1, round((turn.prompt - given) / scale)), outputs)
        extra: dict[str, Any] = {}
        if self.hints and session.named:
            if before is not None:
                extra["tool"] = before
            if session.says_last and program.last:
                extra["last_turn"] = True
        program.state, program.since = "waiting", now
        self.engine.submit(
            f"{program.index}-{program.turn}",
            program.context,
            prompt,
            outputs,
            owner=program,
            arrival=now,
            session_id=f"s{program.index}" if self.names and session.named else None,
            extra_args=extra or None,
        )

    def _answered(self, entry: InFlight) -> None:
        """A first token came, or the last."""
        program: Program = entry.owner
        job, now = program.job, self.engine.now
        assert job is not None
        if math.isnan(job.first_token):
            job.first_token = now
        if entry.answered < entry.outputs:
            return
        turn = program.session.turns[program.turn]
        self.preemptions += entry.request.num_preemptions
        if self.record:
            self.intervals.append(Interval(program.index, program.state, program.since, now))
        if program.last or turn.tool is None:
            job.finish = now
            program.job = None
        else:
            job.gaps += turn.gap
        if not program.last:
            self._at(now + turn.gap, program)
            if self.record:
                pause: State = "person" if turn.tool is None else "tool"
                self.intervals.append(Interval(program.index, pause, now, now + turn.gap))
        elif self._backlog:
            self._at(now, self._backlog.pop())

    def _stall(self) -> None:
        """A real engine would look again at once, and again."""
        engine = self.engine
        if self._idle_since is None:
            self._idle_since = engine.now
        row = engine.now - self._idle_since
        if not self._events and row >= PATIENCE:
            pool = engine.scheduler.kv_cache_manager.block_pool
            waits = ", ".join(f"{name} ({x.request.num_tokens} tokens)" for name, x in list(engine.live.items())[:8])
            raise Deadlock(
                f"scheduler: since {self._idle_since:.3f} s nothing runs, no client will return, and "
                f"{len(engine.live)} requests wait: {waits}; {pool.get_num_free_blocks()} of {pool.num_gpu_blocks} "
                f"blocks of {engine.block_size} tokens are free"
            )
        seconds = min(max(EMPTY_STEP, row), LONGEST_EMPTY)
        if self._events:
            seconds = min(seconds, self._events[0][0] - engine.now)
        engine.now += seconds
        self.stalled += seconds

    def _turn(self, request: Any) -> Turn:
        program: Program = self.engine.live[request.request_id].owner
        return program.session.turns[program.turn]

    def _true_gap(self, request: Any) -> float:
        program: Program = self.engine.live[request.request_id].owner
        return math.inf if program.last else program.session.turns[program.turn].gap

    def _note(self, before: float) -> None:
        """Who began or ceased to run with the step that began at ``before``, and whose KV the scheduler pins."""
        for name, entry in self.engine.live.items():
            program: Program = entry.owner
            state: State = "running" if name in self.engine.scheduled else "waiting"
            if state != program.state:
                self.intervals.append(Interval(program.index, program.state, program.since, before))
                program.state, program.since = state, before
        pinned = {program.id for program in getattr(self.engine.scheduler, "programs", ()) if program.pins}
        for name in pinned - self._pinned.keys():
            self._pinned[name] = before
        self._unpinned(self._pinned.keys() - pinned, before)

    def _unpinned(self, names: set[str], now: float) -> None:
        for name in sorted(names):
            self.intervals.append(Interval(int(name[1:]), "pinned", self._pinned.pop(name), now))
