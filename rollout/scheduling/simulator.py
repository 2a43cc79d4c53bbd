"""The very same scheduler class under a virtual clock: vLLM's scheduler and KV cache manager, no model, no waiting."""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rollout.errors import UserError
from rollout.scheduling.costs import Cost, Work
from rollout.scheduling.workloads import Session, Turn, Workload

POLL = 0.01  # seconds between looks at a scheduler that has requests but schedules none


class Deadlock(RuntimeError):
    """Requests wait, nothing runs, and nothing will happen that could change it."""


@dataclass
class Job:
    """User message → final answer. Seconds of the virtual clock; delay is what the engine is responsible for."""

    program: int
    arrival: float
    first_token: float = math.nan  # end of the step that gave the first token of the job's first turn
    opens_program: bool = False
    finish: float = math.nan
    gaps: float = 0.0

    @property
    def time(self) -> float:
        return self.finish - self.arrival

    @property
    def delay(self) -> float:
        return self.time - self.gaps


@dataclass
class Result:
    """What happened. Tokens are real tokens. ``intervals``: (program, state, from, to), where they were asked for."""

    jobs: list[Job]
    makespan: float
    steps: int
    recomputed_tokens: int
    prefill_tokens: int
    preemptions: int
    mean_running: float  # requests in a step, over time
    stalled: float  # seconds with requests waiting and none scheduled
    wall: float  # seconds of real time that the simulation took
    intervals: list[tuple[int, str, float, float]] = field(default_factory=list)
    scheduler: Any = None

    @property
    def job_times(self) -> np.ndarray:
        return np.array([job.time for job in self.jobs])

    @property
    def delays(self) -> np.ndarray:
        return np.array([job.delay for job in self.jobs])

    @property
    def first_turn_latencies(self) -> np.ndarray:
        return np.array([job.first_token - job.arrival for job in self.jobs if job.opens_program])

    def figures(self) -> dict[str, float]:
        times, delays, first = self.job_times, self.delays, self.first_turn_latencies
        return {
            "jobs": len(self.jobs),
            "mean_job_time": float(times.mean()),
            "p95_job_time": float(np.percentile(times, 95)),
            "mean_delay": float(delays.mean()),
            "p95_delay": float(np.percentile(delays, 95)),
            "mean_first_turn_latency": float(first.mean()),
            "p99_first_turn_latency": float(np.percentile(first, 99)),
            "recomputed_tokens": float(self.recomputed_tokens),
            "prefill_tokens": float(self.prefill_tokens),
            "preemptions": float(self.preemptions),
            "mean_running": self.mean_running,
            "makespan": self.makespan,
            "stalled": self.stalled,
            "steps": float(self.steps),
            "steps_per_second": self.steps / max(self.wall, 1e-9),
        }


class Hashes:
    """Block hashes of one session's context: unique, equal where the context is, without hashing any token."""

    def __init__(self, session: int, group: str | None, shared_blocks: int, counter: itertools.count) -> None:
        self._counter = counter
        self.blocks: list[bytes] = [f"{group}/{i}".encode() for i in range(shared_blocks)] if group else []
        self.context = 0  # tokens of the context so far

    def extend(self, keep: int, tokens: int, block_size: int) -> int:
        """Keep so many tokens of the context, add so many; gives the new length."""
        if keep < self.context:
            del self.blocks[keep // block_size :]
        self.context = keep + tokens
        missing = self.context // block_size - len(self.blocks)
        if missing > 0:
            self.blocks.extend(next(self._counter).to_bytes(8, "big") for _ in range(missing))
        return self.context


class _Program:
    """One session as it plays."""

    __slots__ = ("computed", "hashes", "index", "job", "session", "turn")

    def __init__(self, index: int, session: Session, hashes: Hashes) -> None:
        self.index, self.session, self.hashes = index, session, hashes
        self.turn = -1
        self.computed = 0  # tokens of the present context that were computed at some time
        self.job: Job | None = None


class _Live:
    """A request in the engine."""

    __slots__ = ("last_output", "program", "request", "seen", "state", "turn")

    def __init__(self, request: Any, program: _Program, turn: Turn, outputs: int) -> None:
        self.request, self.program, self.turn, self.last_output = request, program, turn, outputs
        self.state, self.seen = "waiting", 0.0


class Simulation:
    """One run. Sizes that enter in real tokens are divided by ``scale`` once, here."""

    def __init__(
        self,
        workload: Workload,
        *,
        hardware: Cost,
        pool_tokens: int,
        scheduler: Callable[..., Any] | None,
        options: dict[str, Any] | None,
        scale: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        policy: str,
        hints: bool,
        names: bool,
        record: bool,
    ) -> None:
        from rollout.scheduling.virtual_engine import build_scheduler

        self.workload, self.cost, self.scale, self.block = workload, hardware, scale, block_size
        self.hints, self.names, self.record = hints, names, record
        blocks = pool_tokens // (scale * block_size)
        longest = max((session.tokens for session in workload.sessions), default=0)
        if longest + 2 * scale * block_size > pool_tokens:
            raise UserError(
                f"pool_tokens: {pool_tokens} cannot hold the longest session ({longest} tokens); enlarge the pool"
            )
        self.scheduler = build_scheduler(
            scheduler,
            num_blocks=blocks + 1,  # one is vLLM's null block
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max(max_num_batched_tokens // scale, 1),
            policy=policy,
            additional_config=options,
        )
        self.now = 0.0
        self.live: dict[str, _Live] = {}
        if hasattr(self.scheduler, "clock"):
            self.scheduler.clock = lambda: self.now
        if hasattr(self.scheduler, "tool_of"):
            self.scheduler.tool_of = lambda request: self.live[request.request_id].turn.tool
        if hasattr(self.scheduler, "true_gap"):
            self.scheduler.true_gap = self._true_gap
        self.events: list[tuple[float, int, _Program]] = []
        self._order = itertools.count()
        self._counter = itertools.count()
        self._backlog: list[_Program] = []
        self.jobs: list[Job] = []
        self.steps = self.recomputed = self.prefilled = self.preemptions = 0
        self.busy = self.running_seconds = self.stalled = 0.0
        self.intervals: list[tuple[int, str, float, float]] = []

    def _true_gap(self, request: Any) -> float:
        live = self.live[request.request_id]
        last = live.program.turn + 1 == len(live.program.session.turns)
        return math.inf if last else live.turn.gap

    def run(self) -> Result:
        started = time.perf_counter()
        self._start()
        scheduler = self.scheduler
        events, live = self.events, self.live
        while events or live:
            while events and events[0][0] <= self.now:
                self._submit(heapq.heappop(events)[2])
            if not live:
                self.now = events[0][0]
                continue
            output = scheduler.schedule()
            if output.total_num_scheduled_tokens:
                self._step(output)
            else:
                self._stall(output)
        return Result(
            self.jobs,
            self.now,
            self.steps,
            self.recomputed * self.scale,
            self.prefilled * self.scale,
            self.preemptions,
            self.running_seconds / max(self.busy, 1e-12),
            self.stalled,
            time.perf_counter() - started,
            self.intervals,
            scheduler,
        )

    def _start(self) -> None:
        programs = []
        for index, session in enumerate(self.workload.sessions):
            shared = session.shared // (self.scale * self.block)
            programs.append(_Program(index, session, Hashes(index, session.group, shared, self._counter)))
        for program in programs:
            if program.session.arrival is not None:
                self._at(program.session.arrival, program)
            else:
                self._backlog.append(program)
        self._backlog.reverse()
        for _ in range(min(self.workload.concurrency or 0, len(self._backlog))):
            self._at(0.0, self._backlog.pop())

    def _at(self, second: float, program: _Program) -> None:
        heapq.heappush(self.events, (second, next(self._order), program))

    def _submit(self, program: _Program) -> None:
        """The program's next turn reaches the engine."""
        from rollout.scheduling.virtual_engine import make_request

        program.turn += 1
        turns = program.session.turns
        turn = turns[program.turn]
        scale, hashes = self.scale, program.hashes
        before = hashes.context
        keep = before if turn.keep is None else min(before, turn.keep // scale)
        program.computed = min(program.computed, keep)
        prompt, outputs = max(1, round(turn.prompt / scale)), max(1, round(turn.output / scale))
        total = hashes.extend(keep, prompt + outputs, self.block)
        if program.job is None:
            program.job = Job(program.index, self.now, opens_program=program.turn == 0)
            self.jobs.append(program.job)
        extra: dict[str, Any] = {}
        if self.hints and program.session.named:
            tool = turns[program.turn - 1].tool if program.turn else None
            if tool is not None:
                extra["tool"] = tool
            if program.session.says_last and program.turn + 1 == len(turns):
                extra["last_turn"] = True
        request = make_request(
            f"{program.index}-{program.turn}",
            prompt_tokens=total - outputs,
            outputs=outputs,
            session_id=f"s{program.index}" if self.names and program.session.named else None,
            extra_args=extra,
            arrival_time=self.now,
            hashes=hashes.blocks,
            block_size=self.block,
        )
        live = self.live[request.request_id] = _Live(request, program, turn, outputs)
        live.seen = self.now
        self.scheduler.add_request(request)

    def _step(self, output: Any) -> None:
        """Charge the step's seconds, sample its tokens, end its turns."""
        from rollout.scheduling.virtual_engine import EOS, FILLER, finish_step

        scale, live = self.scale, self.live
        scheduled = output.num_scheduled_tokens
        prefill = prefill_context = decode = decode_context = read = 0
        tokens: dict[str, list[int]] = {}
        sampled: list[_Live] = []
        filler, nothing = [FILLER], []
        for rid, n in scheduled.items():
            entry = live[rid]
            request, program = entry.request, entry.program
            end = request.num_computed_tokens
            start = end - n
            read += end
            if n == 1 and program.computed == start and request.num_output_tokens:
                decode += 1
                decode_context += end
            else:
                prefill += n
                prefill_context += n * (start + end + 1)
                if start < program.computed:
                    self.recomputed += min(end, program.computed) - start
            if end > program.computed:
                program.computed = end
            if end == request.num_tokens:
                done = request.num_output_tokens + 1
                tokens[rid] = [EOS] if done == entry.last_output else filler
                if done == 1 or done == entry.last_output:
                    sampled.append(entry)
            else:
                tokens[rid] = nothing
        work = Work(
            rounds=scale if any(tokens.values()) else 1,
            prefill=prefill * scale,
            decode=decode * scale,
            prefill_context=prefill_context * scale * scale / 2,
            decode_context=decode_context * scale * scale,
            read=read * scale,
            running=len(scheduled),
        )
        seconds = self.cost.seconds(work)
        if self.record:
            self._note(scheduled)
        self.now += seconds
        self.busy += seconds
        self.running_seconds += seconds * len(scheduled)
        self.prefilled += prefill
        self.steps += 1
        finish_step(self.scheduler, output, tokens)
        for entry in sampled:
            job = entry.program.job
            if math.isnan(job.first_token):
                job.first_token = self.now
            if tokens[entry.request.request_id][0] == EOS:
                self._end_turn(entry)

    def _note(self, scheduled: dict[str, int]) -> None:
        """Timeline: requests that started to run, or stopped, at this step."""
        for rid, entry in self.live.items():
            state = "running" if rid in scheduled else "waiting"
            if state != entry.state:
                self.intervals.append((entry.program.index, entry.state, entry.seen, self.now))
                entry.state, entry.seen = state, self.now

    def _end_turn(self, entry: _Live) -> None:
        program, turn = entry.program, entry.turn
        self.preemptions += entry.request.num_preemptions
        del self.live[entry.request.request_id]
        if self.record:
            self.intervals.append((program.index, entry.state, entry.seen, self.now))
        job = program.job
        last = program.turn + 1 == len(program.session.turns)
        if last or turn.tool is None:
            job.finish = self.now
            program.job = None
        else:
            job.gaps += turn.gap
        if not last:
            self._at(self.now + turn.gap, program)
            if self.record:
                state = "person" if turn.tool is None else "tool"
                self.intervals.append((program.index, state, self.now, self.now + turn.gap))
        elif self._backlog:
            self._at(self.now, self._backlog.pop())

    def _stall(self, output: Any) -> None:
        """Requests wait and none is scheduled. A real engine would look again; time passes until something happens."""
        from rollout.scheduling.virtual_engine import finish_step

        finish_step(self.scheduler, output, {})
        if not self.events:
            waits = ", ".join(f"{rid} ({e.request.num_tokens} tokens)" for rid, e in list(self.live.items())[:8])
            pool = self.scheduler.kv_cache_manager.block_pool
            raise Deadlock(
                f"at {self.now:.3f} s nothing runs and nothing will return, but {len(self.live)} requests wait: {waits}; "
                f"{pool.get_num_free_blocks()} of {pool.num_gpu_blocks} blocks of {self.block} tokens are free"
            )
        step = min(POLL, self.events[0][0] - self.now)
        self.now += step
        self.stalled += step


def simulate(
    workload: Workload,
    *,
    hardware: Cost,
    pool_tokens: int,
    scheduler: Callable[..., Any] | None = None,
    options: dict[str, Any] | None = None,
    scale: int = 1,
    block_size: int = 16,
    max_num_seqs: int = 256,
    max_num_batched_tokens: int = 8192,
    policy: str = "fcfs",
    hints: bool = True,
    names: bool = True,
    record: bool = False,
) -> Result:
    """Play a workload through a scheduler class (None: vLLM's own) and give what happened.

    hardware: what a step costs. pool_tokens, max_num_batched_tokens: real tokens. options: the additional_config that
    the scheduler reads. scale: real tokens that one simulated token stands for; a step in which a request decodes then
    stands for ``scale`` forward passes, so that a chunk budget of 8192 at scale 4 mixes prefill and decode as 2048 does.
    block_size: simulated tokens. policy: stock's queue order. hints: clients send tool names and last-turn flags; names:
    session ids. record: keep the intervals of a timeline. Raises Deadlock, and UserError for a pool that is too small.
    """
    simulation = Simulation(
        workload,
        hardware=hardware,
        pool_tokens=pool_tokens,
        scheduler=scheduler,
        options=options,
        scale=scale,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        policy=policy,
        hints=hints,
        names=names,
        record=record,
    )
    return simulation.run()
