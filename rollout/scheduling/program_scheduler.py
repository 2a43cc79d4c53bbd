"""vLLM's scheduler with programs in mind: retention and order. The mixin behind ``vllm_plugin.program_scheduler``.

What is decided is in ``policies.py`` and ``turnstile.py``; here it is carried out. Pins are references in the block
pool. A running request that needs a block takes those pins that the policy grants it before vLLM preempts anyone:
``Turnstile`` grants what is past its break-even, and younger jobs' than the youngest that runs; of the rest none goes
while another request runs that can be preempted. The last one that runs, and who is admitted where nothing runs, may
take any. Pins go on weight update, pause, reset and shutdown too; nothing ever waits for a pin to end.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from rollout.scheduling.counters import Counters
from rollout.scheduling.identity import Identity
from rollout.scheduling.latency import ToolLatencies
from rollout.scheduling.latency_file import LatencyFile
from rollout.scheduling.metrics import Publisher
from rollout.scheduling.options import Options
from rollout.scheduling.pins import Pins
from rollout.scheduling.policy import Load
from rollout.scheduling.program_queue import ProgramQueue
from rollout.scheduling.programs import RELEASE, Job, Marks, Pin, Program, Programs, Turn, held_tokens
from rollout.scheduling.rebuild import RebuildTime, step_work
from rollout.scheduling.shortage import missing_blocks

log = logging.getLogger(__name__)
RUNNING_STEPS = 64  # steps over which the mean of running requests moves
WAITING = (RequestStatus.WAITING, RequestStatus.PREEMPTED)


class ProgramMixin(Scheduler):
    """Over ``Scheduler`` or ``AsyncScheduler``; ``adopt`` completes the construction."""

    def adopt(self, options: Options) -> None:
        self.clock: Callable[[], float] = time.monotonic
        self.true_gap: Callable[[Request], float] | None = None  # the simulator's, for ``clairvoyant``
        self.identity = Identity(self.structured_output_manager, self.hash_block_size, infer=options.infer_programs)
        self.tool_of: Callable[[Request], str | None] = self.identity.tool_after
        self.options = options
        self.rule = options.build()
        self.latencies = ToolLatencies()
        if options.latencies is not None:
            self.latencies.load(options.latencies)
        self.latency_file = LatencyFile(self.latencies, options.save_latencies)
        self.programs = Programs(self.latencies)
        self.counters = Counters()
        self.rebuild = RebuildTime()
        self.active = False  # a program has appeared
        pool = self.kv_cache_manager.block_pool
        self._pool_blocks = pool.num_gpu_blocks - 1  # one is vLLM's null block
        self.pins = Pins(pool, options.max_pinned * self._pool_blocks, self.counters)
        self.load = Load(self.rebuild, self.latencies, self._context, pool_tokens=self._pool_blocks * self.block_size)
        self._joined = True  # requests were admitted since the running ones were sorted
        self._in_flight: deque[tuple[float, int, int, int]] = deque()  # of each step: start, and what it does
        self._updated = -math.inf
        self._stock_allocate = self.kv_cache_manager.allocate_slots
        self.publisher = Publisher(
            self.counters,
            self.gauges,
            path=options.metrics_path,
            port=options.metrics_port,
            engine=self.parallel_config.data_parallel_index,
        )
        # One of several engines says it. Those of a dense model believe that they are alone, but for their index.
        if self.parallel_config.data_parallel_index == 1:
            log.warning(
                "several engines: a session's KV lies in the engine that served it, but vLLM sends each turn to any; "
                "send all turns of a session with the same X-data-parallel-rank"
            )

    # ---- vLLM's hooks

    def add_request(self, request: Request) -> None:
        if request.request_id not in self.requests:
            name = self.identity.program(request)
            if name is not None and not self.active:
                self._activate()
            if self.active:
                self._arrive(request, name)
        else:
            self._continue(request)
        super().add_request(request)

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        if request_ids is not None:
            request_ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
            for name in (x[len(RELEASE) :] for x in request_ids if x.startswith(RELEASE)):
                self.release(name)
        finished = super().finish_requests(request_ids, finished_status)
        if not self.requests:  # no step follows
            self._publish(self.load.now)
        return finished

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        now = self.load.now = self.programs.clock(self.clock())
        if self.active:
            self._prepare(now)
        output = super().schedule(throttle_prefills)
        if total := output.total_num_scheduled_tokens:
            self._in_flight.append((now, *step_work(output.num_scheduled_tokens, total, self.requests)))
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: Any) -> Any:
        now = self.load.now = self.programs.clock(self.clock())
        if scheduler_output.total_num_scheduled_tokens and self._in_flight:
            started, *work = self._in_flight.popleft()
            # With two batches in flight a step lasts from the end of the one before it.
            self.rebuild.observe(now - max(started, self._updated), *work)
            self._updated = now
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._publish(now)
        return outputs

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        self.pins.drop(self.pins, "reset")
        for program in self.programs:
            program.marks = ()  # what has to be computed again now is nobody's loss
        for turn in self.programs.turns.values():
            turn.known = 0
        return super().reset_prefix_cache(reset_running_requests, reset_connector)

    def set_pause_state(self, pause_state: PauseState) -> None:
        if pause_state != PauseState.UNPAUSED:
            self.pins.drop(self.pins, "pause")
        super().set_pause_state(pause_state)

    def shutdown(self) -> None:
        self.pins.drop(self.pins, "shutdown")
        self.latency_file.save()
        self.publisher.close()
        super().shutdown()

    def _preempt_request(self, request: Request, timestamp: float, drop_stale_output: bool = False) -> None:
        turn = self.programs.turns.get(request.request_id)
        if turn is not None and turn.running:
            self.programs.preempt(turn, self.load.now)
            self.counters.preemptions += 1
        super()._preempt_request(request, timestamp, drop_stale_output)

    def _handle_stopped_request(self, request: Request) -> bool:
        finished = super()._handle_stopped_request(request)
        turn = self.programs.turns.get(request.request_id)
        if not finished and turn is not None and turn.running:  # its client streams the prompt, and goes on
            self.programs.set_aside(turn, self.load.now)
        return finished

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> Any:
        turn = self.programs.turns.get(request.request_id)
        if turn is not None:
            self._leave(turn, request)
        else:
            self.identity.finished(request, None)
        return super()._free_request(request, delay_free_blocks)

    # ---- programs come and go

    def release(self, name: str) -> None:
        """The client will not come back: what is kept for the program goes, and with it its history."""
        program = self.programs.get(name)
        if program is not None:
            self.pins.drop(program.pins, "release")
            self.identity.forget(name)
            self.programs.last(program)
            if not (program.live or program.job_ended):
                self._job_ended(program, program.job, self.programs.clock(self.clock()))
            self.programs.forget(program)

    def _activate(self) -> None:
        """The first program: from here on the policy orders. What is in the engine already is programs of one turn."""
        self.active = True
        self.kv_cache_manager.allocate_slots = self._allocator()  # type: ignore[method-assign]
        stock = list(self.waiting)
        self.waiting = ProgramQueue(self.rule, self.programs.turns, self.policy == SchedulingPolicy.PRIORITY)
        present = [*self.running, *self.kv_holding_waiting, *stock]
        if self.policy == SchedulingPolicy.PRIORITY:
            present.sort(key=lambda request: request.arrival_time)
        for request in present:
            self._arrive(request, None)
            if request.status == RequestStatus.RUNNING:
                self.programs.admit(self.programs.turns[request.request_id], self.load.now)
        self.waiting.prepend_requests(stock)

    def _arrive(self, request: Request, name: str | None) -> None:
        now = self.programs.clock(self.clock())
        tool = self.identity.tool_before(request)
        turn = self.programs.arrive(request.request_id, name, request.num_tokens, now, tool)
        turn.priority, turn.last = request.priority, self.identity.last_turn(request)
        if name is not None:
            self.counters.programs += turn.program.turns == 1
            if tool is None and turn.program.turns > 1:
                self.identity.goes_on_unsaid()
            self.counters.turns += 1
        if self.policy == SchedulingPolicy.PRIORITY:
            request.arrival_time = float(turn.job.number)  # vLLM preempts the last by (priority, arrival)
        self._claim(turn, request)
        self.rule.arrived(turn)

    def _continue(self, request: Request) -> None:
        """The next words of a turn whose prompt its client streams: from here on the turn waits for the engine."""
        turn, known = self.programs.turns.get(request.request_id), self.requests[request.request_id]
        if turn is not None:
            if known.status == RequestStatus.WAITING_FOR_STREAMING_REQ:
                turn.since = self.programs.clock(self.clock())
            if self.policy == SchedulingPolicy.PRIORITY:
                request.arrival_time = float(turn.job.number)  # vLLM takes it over

    def _claim(self, turn: Turn, request: Request) -> None:
        """Find the KV that was kept for this turn, and how much of its prompt was computed before."""
        program = turn.program
        shared = {pin: self._held(request, pin.marks) for pin in program.pins}
        claim = max(shared, key=shared.__getitem__, default=None)
        if claim is not None and shared[claim]:
            turn.claim = claim
        elif program.live == 1:  # no sub-agent beside it: its prefix has shrunk (compaction), what was kept is dead
            self.pins.drop(program.pins, "compaction")
        turn.known = self._held(request, program.marks)

    def _held(self, request: Request, marks: Marks) -> int:
        return held_tokens(marks, request.block_hashes, self.hash_block_size)

    def _leave(self, turn: Turn, request: Request) -> None:
        now = self.load.now = self.programs.clock(self.clock())
        program, job = turn.program, turn.job
        aborted = request.status in (RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_ERROR)
        matters = not program.anonymous or self.options.infer_programs  # else it goes, whatever it has written
        if aborted and matters and self.identity.stopped_by_string(request):
            aborted = False
            self.counters.string_stops += not program.anonymous
        tool = self.tool_of(request) if matters and not (aborted or turn.last) else None
        computed = turn.running and request.num_computed_tokens > 0
        self.programs.finish(turn, now, tool=tool, aborted=aborted)
        name = self.identity.finished(request, None if program.anonymous else program.id)
        if program.anonymous:
            if name is None or tool is None:
                self.programs.forget(program)
                return
            # A call by a request that named no program: its next turn will extend it.
            self.programs.rename(program, name)
        self.counters.aborts += aborted
        if aborted or turn.last:
            if not program.live:
                self.pins.drop(program.pins, "abort" if aborted else "release")
        elif computed:
            self._keep(turn, request, tool)
        if program.job_ended:
            self._job_ended(program, job, now)
        if turn.last:
            self.programs.last(program)  # sub-agents that outlive it
            self.programs.forget(program)

    def _job_ended(self, program: Program, job: Job, now: float) -> None:
        self.counters.jobs += 1
        self.rule.ended(job)
        self.publisher.record(job.record(program.id, now), now)

    def _keep(self, turn: Turn, request: Request, tool: str | None) -> None:
        """Mark how far the turn was computed and, if the policy says so, pin its blocks."""
        program, size, load = turn.program, self.hash_block_size, self.load
        tokens = self.kv_cache_manager.estimate_cached_tokens(request)
        ends = {tokens // size, min(tokens, request.num_prompt_tokens) // size}
        program.marks = marks = tuple((n * size, request.block_hashes[n - 1]) for n in sorted(ends) if n)
        if not self.rule.pins or not marks:
            return
        load.waiting = len(self.waiting)
        seconds = self.rule.hold(turn, tool, tokens, load)
        if seconds <= 0:
            return
        groups = self.kv_cache_manager.get_blocks(request.request_id).blocks
        blocks = self.pins.usable(groups)
        fresh = self.pins.fresh(blocks)
        shared = tokens - tokens * fresh // max(len(blocks), 1)
        pin = Pin(program, blocks, marks, tokens, fresh, self.rebuild(tokens - shared, shared), load.now)
        pin.deadline, pin.priority = load.now + seconds, turn.priority
        if self.true_gap is not None:
            pin.returns = load.now + self.true_gap(request)
        older = [p for p in program.pins if self._held(request, p.marks[-1:])]  # whose end it goes beyond
        if self.pins.add(pin):
            self.pins.drop(older, "replaced")

    # ---- one step

    def _prepare(self, now: float) -> None:
        """Bring order and load up to date before vLLM's loop reads them."""
        load, turns = self.load, self.programs.turns
        self.pins.expire(now)
        self.programs.tidy(now)
        load.waiting = len(self.waiting)
        if self.running:
            load.running += (len(self.running) - load.running) / RUNNING_STEPS
        if self.rule.promote(load) or self.pins.changed:
            self.waiting.sort()  # who waited for a pin that went is resident no more
            self.pins.changed = False
        if self._joined and self.rule.pressed:
            # vLLM preempts the last of the running (FCFS): let that be the youngest job.
            self.running.sort(key=lambda request: turns[request.request_id].job.number)
            self._joined = False

    def _allocator(self) -> Callable[..., KVCacheBlocks | None]:
        """vLLM's ``allocate_slots``; where it fails, pins go first, as far as the policy lets them."""
        stock, ours = self._stock_allocate, self._allocate

        def allocate(
            request: Request, num_new_tokens: int, num_lookahead_tokens: int = 0, **kwargs: Any
        ) -> KVCacheBlocks | None:
            if kwargs:  # who waits
                kwargs["num_lookahead_tokens"] = num_lookahead_tokens
                return ours(stock(request, num_new_tokens, **kwargs), request, num_new_tokens, kwargs)
            # In each step this is called for each running request, and nearly always that is all.
            blocks = stock(request, num_new_tokens, num_lookahead_tokens=num_lookahead_tokens)
            if blocks is not None:
                return blocks
            return ours(None, request, num_new_tokens, {"num_lookahead_tokens": num_lookahead_tokens})

        return allocate

    def _allocate(
        self, blocks: KVCacheBlocks | None, request: Request, num_new_tokens: int, kwargs: dict[str, Any]
    ) -> KVCacheBlocks | None:
        """What vLLM's allocation gave, or what it gives once pins have gone; a turn that gets memory is admitted."""
        turn = self.programs.turns[request.request_id]
        if blocks is None and self.pins:
            blocks = self._release_for(turn, request, num_new_tokens, kwargs)
        if blocks is None:
            self.load.short = self.load.now
        if blocks is not None and not turn.running and request.status in WAITING:
            self._admitted(turn, request, kwargs.get("num_new_computed_tokens", 0))
            if kwargs.get("delay_cache_blocks"):  # it holds memory, and runs once a KV connector has filled it
                self.programs.set_aside(turn, self.load.now)
        return blocks

    def _release_for(self, turn: Turn, request: Request, tokens: int, kwargs: dict[str, Any]) -> KVCacheBlocks | None:
        """Release pins in the policy's order until the allocation succeeds; for who waits, none if all are too few."""
        load, running = self.load, request.status == RequestStatus.RUNNING
        load.idle = len(self.running) == running  # nothing else runs: whom vLLM could preempt is the request itself
        if running:
            load.youngest = max(self.programs.turns[r.request_id].job.number for r in self.running)
        victims = self._victims(turn, running)
        if victims and not (running or load.idle):
            hits = kwargs.get("new_computed_blocks") or self.kv_cache_manager.empty_kv_cache_blocks
            missing = missing_blocks(self.kv_cache_manager, request, tokens, kwargs)
            if not self.pins.suffice(victims, missing, hits.blocks):
                return None
        for pin in victims:
            self.pins.remove(pin)
            self.counters.pressure_releases += 1
            blocks = self._stock_allocate(request, tokens, **kwargs)
            if blocks is not None:
                return blocks
        return None

    def _victims(self, turn: Turn, running: bool) -> list[Pin]:
        """The pins that may go for ``turn``, first to go first."""
        pins = list(self.pins)
        if turn.claim in self.pins:
            pins.remove(turn.claim)
        lower: list[Pin] = []
        if self.policy == SchedulingPolicy.PRIORITY:  # of clients who matter less: the policy has no say in that
            lower = [pin for pin in pins if pin.priority > turn.priority]
            lower.sort(key=lambda pin: (pin.priority, pin.rank), reverse=True)
            pins = [pin for pin in pins if pin.priority <= turn.priority]
        victims = [*lower, *self.rule.victims(turn, running, pins, self.load)]
        if self.load.idle and turn.claim is not None and turn.resident:
            victims.append(turn.claim)  # at last its own: the answer in it may have been written anew, and never hits
        return victims

    def _admitted(self, turn: Turn, request: Request, hits: int) -> None:
        resumed = turn.admitted is not None
        waited = self.programs.admit(turn, self.load.now)
        self._joined = True
        if not resumed:
            lost = max(min(turn.known, request.num_prompt_tokens - 1) - hits, 0)
            turn.job.recomputed += lost
            self.counters.tokens_recomputed += lost
            self.rule.started(turn, waited, lost)
        if turn.claim is not None:
            pin, turn.claim = turn.claim, None
            if pin in self.pins:
                self.pins.remove(pin)
                self.counters.claims += 1
                self.counters.tokens_reused += hits
                turn.job.reused += hits

    def _context(self) -> int:
        return sum(request.num_computed_tokens for request in self.running)

    def _publish(self, now: float) -> None:
        """Let out what has changed: soon where the engine falls idle, for it may be killed in its sleep."""
        idle = not self.requests
        self.publisher.tick(now, idle=idle)
        self.latency_file.tick(now, idle=idle)

    def gauges(self) -> dict[str, float | None]:
        """What the metrics show of this moment."""
        pins, blocks = self.pins.count(self.load.now)
        waiting, running, in_tool = self.programs.states()
        return {
            "pins_now": pins,
            "pinned_blocks": blocks,
            "pinned_tokens": blocks * self.block_size,
            "pool_blocks": self._pool_blocks,
            "programs_waiting": waiting,
            "programs_running": running,
            "programs_in_tool": in_tool,
            "mean_running": self.load.running,
            "rebuild_seconds_per_1k_tokens": self.rebuild(1000) if self.rebuild.settled else None,
        }
