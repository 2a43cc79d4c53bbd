"""The virtual engine against closed forms, and what must hold whatever the scheduler."""

import json
import os
import sys
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler

from rollout.errors import UserError
from rollout.scheduling.clients import Deadlock
from rollout.scheduling.costs import Linear, Roofline, h100_8b, h100x4_70b
from rollout.scheduling.simulator import main, simulate
from rollout.scheduling.vllm_plugin import program_scheduler
from rollout.scheduling.workloads import Session, Turn, Workload, generate

SECOND = Linear(a=1.0, b=0.0, d=0.0)  # every step takes a second
PREFILL = Linear(a=0.0, b=1.0, d=0.0, load=0.25)  # a second for each prompt token, a quarter for a loaded one


def play(*sessions, concurrency=None, **settings):
    given = {"hardware": SECOND, "pool_tokens": 4096} | settings
    return simulate(Workload("test", sessions, concurrency), **given)


def one(*turns, at=0.0, **facts):
    return Session(turns, arrival=at, **facts)


def roofline_by_hand(turns, cost: Roofline, block=16, chunk=8192):
    """Seconds of one program alone: its prompts in chunks, but for the whole blocks it has, then token by token."""

    def step(first, last):
        bytes_, new = cost.weight_bytes + cost.kv_bytes * last, last - first
        flops = sum(cost.flops + cost.attention_flops * (first + i + 1) for i in range(new))
        return max(bytes_ / cost.bandwidth, flops / cost.peak) + cost.overhead

    seconds = context = computed = 0
    for turn in turns:
        context += turn.prompt
        done = min(computed, context - 1) // block * block
        while done < context:
            seconds += step(done, min(done + chunk, context))
            done = min(done + chunk, context)
        for _ in range(turn.output - 1):
            seconds += step(done, done + 1)
            done += 1
        context, computed = context + turn.output, done
        seconds += turn.gap
    return seconds


@pytest.mark.parametrize("cost", [h100_8b(), h100x4_70b()])
def test_one_program_alone_takes_the_sum_of_its_steps_and_gaps(cost):
    turns = (Turn(20_000, 7, 2.5, "grep"), Turn(333, 40, 0.25, "sed"), Turn(1, 1, 3.0, "grep"), Turn(9000, 12))
    result = play(one(*turns, at=1.5), hardware=cost, pool_tokens=40_000)
    (job,) = result.jobs
    assert job.time == pytest.approx(roofline_by_hand(turns, cost), rel=1e-12)
    assert job.arrival == 1.5 and result.makespan == pytest.approx(1.5 + job.time, rel=1e-12)
    assert job.gaps == 5.75 and job.delay == pytest.approx(job.time - 5.75)
    assert result.preemptions == 0 and result.recomputed_tokens < 16 * len(turns)  # tails of blocks


def test_steps_are_shared_and_those_who_come_within_one_wait_for_its_end():
    a = one(Turn(10, 3, 0.5, "x"), Turn(4, 2))  # steps 0-1, 1-2, 2-3, a gap to 3.5, then 4-5, 5-6
    b = one(Turn(10, 4), at=0.5)  # joins at 1, ends at 5
    result = play(a, b)
    assert [(job.arrival, job.finish, job.gaps) for job in result.jobs] == [(0, 6, 0.5), (0.5, 5, 0)]
    assert result.first_turn_latencies.tolist() == [1, 1.5]
    assert result.makespan == result.steps == 6


def test_a_person_ends_a_job_and_the_next_one_begins_with_the_message():
    result = play(one(Turn(10, 2, 1.0, "x"), Turn(10, 1, 30.0, None), Turn(10, 1)))
    assert [(job.arrival, job.finish, job.gaps, job.opens_program) for job in result.jobs] == [
        (0, 4, 1, True),
        (34, 35, 0, False),
    ]
    assert len(result.first_turn_latencies) == 1


def test_the_closed_loop_keeps_its_number_in_progress():
    result = play(*[Session((Turn(5, 2, 3.0, "x"), Turn(5, 1))) for _ in range(7)], concurrency=2)
    events = sorted((t, d) for job in result.jobs for t, d in ((job.arrival, 1), (job.finish, -1)))
    level = [sum(d for _, d in events[: i + 1]) for i in range(len(events))]
    assert max(level) == 2 and result.makespan == pytest.approx(4 * 6)


def test_what_was_evicted_is_computed_again_and_counted():
    a = one(Turn(320, 1, 1000.0, "x"), Turn(16, 1))
    b = one(Turn(600, 1), at=400.0)  # its 38 blocks leave the first 2 of a's 20, in a pool of 40
    thrashed, kept = (play(a, b, hardware=PREFILL, pool_tokens=n) for n in (640, 2000))
    assert kept.recomputed_tokens == 0 and kept.jobs[0].delay == 320 + 17  # the answer's one token was never computed
    assert thrashed.recomputed_tokens == 288 and thrashed.jobs[0].delay == 320 + 288 + 17
    assert thrashed.prefill_tokens - kept.prefill_tokens == 288


def test_what_was_evicted_is_found_in_the_tier_at_the_price_of_loading():
    a = one(Turn(320, 1, 1000.0, "x"), Turn(16, 1))
    b = one(Turn(600, 1), at=400.0)
    result = play(a, b, hardware=PREFILL, pool_tokens=640, offload_tokens=1600)
    assert (result.loaded_tokens, result.recomputed_tokens) == (288, 0)
    assert result.jobs[0].delay == 320 + 17 + 288 / 4
    small = play(a, b, hardware=PREFILL, pool_tokens=640, offload_tokens=42 * 16)  # beside b's 37 blocks, 5 of a's
    assert (small.loaded_tokens, small.recomputed_tokens) == (48, 240)


def test_a_common_prefix_is_computed_once():
    siblings = [one(Turn(100, 1), at=200.0 * i, prefix=(("system", 40), ("group", 24))) for i in range(3)]
    other = one(Turn(100, 1), at=900.0, prefix=(("system", 40), ("another", 24)))
    result = play(*siblings, other, hardware=PREFILL)
    assert [job.time for job in result.jobs] == [100, 36, 36, 68]  # 64 shared; then the two whole blocks of the system
    assert result.recomputed_tokens == 0  # the others' work, not its own


def test_compaction_keeps_a_prefix_and_what_it_drops_is_not_recomputed():
    result = play(one(Turn(320, 1, 1.0, "x"), Turn(100, 1, keep=160)), hardware=PREFILL)
    assert result.jobs[0].delay == 320 + 100 and result.recomputed_tokens == 0


def test_the_pool_without_a_bound_recomputes_tails_alone():
    workload = generate("swe", programs=12, rate=1.0, seed=4)
    result = simulate(workload, hardware=h100_8b(), pool_tokens=None, scale=8)
    turns = sum(len(session.turns) for session in workload.sessions)
    assert result.recomputed_tokens < 8 * 16 * turns and result.preemptions == 0


SMALL = generate("swe", programs=16, rate=0.2, seed=1)


def test_the_same_arguments_give_the_same_result():
    def play_it():
        return simulate(SMALL, hardware=h100_8b(), pool_tokens=250_000, scale=16)

    first, second = play_it().figures(), play_it().figures()
    del first["steps_per_second"], second["steps_per_second"]
    assert first == second


def test_the_token_scale_changes_ratios_little():
    ratios = {}
    for scale in (4, 8, 16):
        runs = [
            simulate(SMALL, hardware=h100_8b(), pool_tokens=pool, scale=scale, block_size=64 // scale,
                     max_num_batched_tokens=2048 * scale, max_num_seqs=64)
            for pool in (250_000, None)
        ]  # fmt: skip
        ratios[scale] = runs[0].job_times.mean() / runs[1].job_times.mean()
    assert ratios[4] > 1.2  # the small pool hurts
    assert ratios[8] == pytest.approx(ratios[4], rel=0.1) and ratios[16] == pytest.approx(ratios[4], rel=0.15)


class Watched(Scheduler):
    """Stock, with the attributes that the simulator sets, noting what a client sent."""

    clock = tool_of = true_gap = None

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.told, self.asked = [], []
        self.options = self.vllm_config.additional_config

    def add_request(self, request):
        extra = request.sampling_params.extra_args
        self.told.append((self.clock(), request.arrival_time, request.session_id, extra, request.num_tokens))
        super().add_request(request)

    def _free_request(self, request, delay_free_blocks=False):
        self.asked.append(
            (self.clock(), self.tool_of(request), self.true_gap(request), request.get_finished_reason().name)
        )
        return super()._free_request(request, delay_free_blocks)


def test_a_scheduler_sees_the_virtual_clock_and_what_clients_send():
    session = one(Turn(10, 2, 1.5, "grep"), Turn(5, 1, 9.0, None), Turn(5, 1))
    chat = one(Turn(7, 1), at=20.0, named=False, says_last=False)
    watched = play(session, chat, scheduler=Watched, options={"x": 1}).scheduler
    assert watched.options == {"x": 1}
    assert watched.told == [
        (0, 0, "s0", None, 10),
        (3.5, 3.5, "s0", {"tool": "grep"}, 17),
        (13.5, 13.5, "s0", {"last_turn": True}, 23),
        (20, 20, None, None, 7),
    ]
    infinite = float("inf")
    assert watched.asked == [
        (2, "grep", 1.5, "STOP"),
        (4.5, None, 9.0, "STOP"),
        (14.5, None, infinite, "STOP"),
        (21, None, infinite, "STOP"),
    ]


def test_clients_may_send_less():
    session = one(Turn(10, 2, 1.5, "grep"), Turn(5, 1))
    bare = play(session, scheduler=Watched, hints=False).scheduler.told
    assert [(name, extra) for _, _, name, extra, _ in bare] == [("s0", None)] * 2
    nameless = play(session, scheduler=Watched, names=False).scheduler.told
    assert [(name, extra) for _, _, name, extra, _ in nameless] == [
        (None, None),
        (None, {"tool": "grep", "last_turn": True}),
    ]


def paused(**kwargs):
    scheduler = Scheduler(**kwargs)
    scheduler.set_pause_state(PauseState.PAUSED_NEW)
    return scheduler


def test_a_scheduler_that_stops_for_ever_is_caught_and_says_who_waits():
    with pytest.raises(
        Deadlock, match=r"since 0\.000 s nothing runs.*2 requests wait: 0-0 \(10 tokens\), 1-0 \(12 tokens\)"
    ):
        play(one(Turn(10, 1)), one(Turn(12, 1), at=30.0), scheduler=paused)


class Admits(Scheduler):
    """Admits nobody before second 5."""

    clock = None

    def schedule(self, throttle_prefills=False):
        self.set_pause_state(PauseState.UNPAUSED if self.clock() >= 5 else PauseState.PAUSED_NEW)
        return super().schedule(throttle_prefills)


def test_a_wait_that_a_client_ends_is_no_deadlock():
    result = play(one(Turn(10, 1)), one(Turn(10, 1), at=8.0), scheduler=Admits)
    assert result.stalled == pytest.approx(5, abs=0.02) and result.jobs[0].finish == pytest.approx(6, abs=0.02)


class Hesitates(Scheduler):
    """Schedules nothing in every other step, as vLLM does after it preempted the only one that ran."""

    def schedule(self, throttle_prefills=False):
        self.set_pause_state(PauseState.UNPAUSED if self.current_step % 2 else PauseState.PAUSED_ALL)
        return super().schedule(throttle_prefills)


def test_an_empty_step_is_no_deadlock():
    result = play(one(Turn(10, 3)), scheduler=Hesitates)
    assert result.steps == 3 and result.makespan == pytest.approx(3.003) and result.stalled == pytest.approx(0.003)


def test_intervals_tile_each_program_s_life():
    result = simulate(SMALL, hardware=h100_8b(), pool_tokens=250_000, scale=16, record=True)
    for program in range(len(SMALL.sessions)):
        mine = [x for x in result.intervals if x.program == program]
        mine.sort(key=lambda x: (x.start, x.end))
        (job,) = [job for job in result.jobs if job.program == program]
        assert (mine[0].start, mine[-1].end) == (job.arrival, job.finish)
        assert all(a.end == b.start for a, b in pairwise(mine))
        tools = sum(x.end - x.start for x in mine if x.state == "tool")
        assert tools == pytest.approx(job.gaps)


POLICIES = ["stock", "program_fcfs", "fixed_ttl", "pin_to_pressure", "continuum", "turnstile", "clairvoyant"]


def with_policy(name):
    return {} if name == "stock" else {"scheduler": program_scheduler, "options": {"turnstile": {"policy": name}}}


@pytest.mark.parametrize("policy", POLICIES)
def test_every_program_finishes_and_nothing_leaks(policy):
    workload = generate("mixed", programs=14, rate=0.3, seed=7, tokens=0.5)
    result = simulate(workload, hardware=h100_8b(), pool_tokens=90_000, scale=16, **with_policy(policy))
    assert len(result.jobs) == 14 and (result.delays > 0).all()
    if policy == "stock":
        pool = result.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


def test_pins_are_seen_in_the_timeline():
    sessions = [one(Turn(160, 2, 5.0, "x"), Turn(16, 2)) for _ in range(2)]
    result = play(*sessions, record=True, **with_policy("turnstile"))
    pinned = [x for x in result.intervals if x.state == "pinned"]
    assert {x.program for x in pinned} == {0, 1} and all(x.end >= x.start + 5 for x in pinned)


turn = st.builds(Turn, st.integers(1, 150), st.integers(1, 12), st.floats(0, 20), st.sampled_from([None, "a", "b"]),
                 st.none() | st.integers(0, 200))  # fmt: skip
session = st.builds(
    Session,
    st.lists(turn, min_size=1, max_size=4).map(tuple),
    arrival=st.floats(0, 30),
    prefix=st.sampled_from([(), (("p", 40),)]),
    named=st.booleans(),
    says_last=st.booleans(),
)


@settings(max_examples=50, deadline=None)
@given(st.lists(session, min_size=1, max_size=8), st.sampled_from(POLICIES), st.sampled_from([1, 3]), st.booleans())
def test_any_workload_ends_with_its_books_balanced(sessions, policy, scale, offload):
    sessions = [s if s.turns[0].prompt > 40 else Session(s.turns, s.arrival, (), s.named) for s in sessions]
    result = play(
        *sessions,
        hardware=Linear(a=0.1, b=0.01, d=0.01),
        pool_tokens=max(s.tokens for s in sessions) + 4 * 16 * scale,
        scale=scale,
        max_num_batched_tokens=256 * scale,
        max_num_seqs=4,
        offload_tokens=800 if offload and policy == "stock" else 0,
        **with_policy(policy),
    )
    gaps = sum(t.gap for s in sessions for t in s.turns[:-1] if t.tool is not None)
    assert sum(job.gaps for job in result.jobs) == pytest.approx(gaps)
    assert all(job.first_token <= job.finish and job.delay > 0 for job in result.jobs)
    assert len(result.jobs) == sum(1 + sum(t.tool is None for t in s.turns[:-1]) for s in sessions)
    assert max(job.finish for job in result.jobs) == result.makespan
    assert 0 <= result.recomputed_tokens <= result.prefill_tokens


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"pool_tokens": 100}, "pool_tokens: 100 cannot hold the longest session, 210 tokens"),
        ({"scale": 64}, "max_num_batched_tokens: 8192 at scale 64"),
    ],
)
def test_sizes_that_cannot_be_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        play(one(Turn(200, 10)), **settings)


def test_the_command_ends_with_one_json_object(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr(sys, "argv", ["simulator", "workload=chat", "workload.programs=20", "timeline=true"])
    main()
    assert "HYDRA_FULL_ERROR" not in os.environ  # the command's own, which would change every later child's errors
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(last) == {"benchmark", "machine", "seconds", "figures", "bars"} and last["benchmark"] == "simulator"
    wanted = {"mean_job_time", "p95_job_time", "mean_delay", "p99_first_turn_latency", "recomputed_tokens", "makespan"}
    assert wanted <= set(last["figures"]) and last["figures"]["jobs"] == 20 and last["bars"] == []
    (folder,) = (tmp_path / "outputs" / "simulator").iterdir()
    assert {file.name for file in folder.iterdir()} == {"config.yaml", "result.json", "timeline.png"}
