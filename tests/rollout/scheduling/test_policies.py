"""Each policy by cases computed by hand, and by oracles that share no code with it."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.scheduling.latency import PERSON, ToolLatencies
from rollout.scheduling.policies import (
    POLICIES,
    STOCK,
    Continuum,
    Eta,
    FixedTtl,
    InferCept,
    PinToPressure,
    Plas,
    ProgramCap,
    ProgramFcfs,
    SkiRental,
    optimal_ttl,
)
from rollout.scheduling.policy import Load, Policy
from rollout.scheduling.programs import Pin, Programs, Turn
from rollout.scheduling.turnstile import Clairvoyant, Turnstile


class World:
    """Programs, and a load in which computing n tokens takes n milliseconds."""

    def __init__(self, pool: int = 1000, context: int = 0) -> None:
        self.latencies = ToolLatencies()
        self.programs = Programs(self.latencies)
        self.load = Load(lambda tokens: tokens / 1000, self.latencies, lambda: context, pool_tokens=pool)
        self.count = 0

    def arrive(self, name: str | None = None, tokens: int = 10, now: float = 0.0) -> Turn:
        self.count += 1
        return self.programs.arrive(f"r{self.count}", name or f"s{self.count}", tokens, now)

    def pin(
        self,
        *,
        idle: float = 0.0,
        rebuild: float = 1.0,
        person: bool = False,
        waits: bool = False,
        returns: float = 0.0,
    ) -> Pin:
        """What a program keeps ``idle`` seconds after its turn; programs grow younger from call to call."""
        turn = self.arrive()
        self.programs.finish(turn, 0.0, tool=None if person else "bash", aborted=False)
        pin = Pin(turn.program, [object()], (), 100, 1, rebuild, self.load.now - idle, returns=self.load.now + returns)
        if waits:
            self.arrive(turn.program.id)
        return pin


def names(policy: Policy, *turns: Turn) -> list[str]:
    return [turn.request_id for turn in sorted(turns, key=policy.key)]


# ---- orders


@pytest.mark.parametrize("policy", [ProgramFcfs(), InferCept()])
def test_jobs_stand_in_the_order_of_their_arrival(policy: Policy) -> None:
    world = World()
    a, b = world.arrive("a"), world.arrive("b")
    world.programs.finish(a, 1.0, tool="bash", aborted=False)
    again = world.arrive("a", now=2.0)
    assert names(policy, b, again) == [again.request_id, b.request_id]
    world.programs.finish(again, 3.0, tool=None, aborted=False)
    afresh = world.arrive("a", now=4.0)
    assert names(policy, b, afresh) == [b.request_id, afresh.request_id], "a new job has no seniority"


def test_least_attained_service_first() -> None:
    world = World()
    a, b = world.arrive("a"), world.arrive("b")
    world.programs.admit(a, 0.0)
    world.programs.finish(a, 9.0, tool="bash", aborted=False)
    again = world.arrive("a", now=10.0)
    assert names(Plas(), again, b) == [b.request_id, again.request_id]


@pytest.mark.parametrize("policy", [FixedTtl(), SkiRental(), PinToPressure(), Continuum(), Turnstile()])
def test_whose_kv_is_kept_goes_first(policy: Policy) -> None:
    world = World()
    policy.pressed = True
    older, resident = world.arrive(), world.arrive()
    resident.claim = world.pin()
    assert names(policy, older, resident) == [resident.request_id, older.request_id]
    resident.claim.blocks = []
    assert names(policy, older, resident) == [older.request_id, resident.request_id]


def test_continuum_serves_preempted_turns_before_all() -> None:
    world = World()
    resident, preempted = world.arrive(), world.arrive()
    resident.claim = world.pin()
    world.programs.admit(preempted, 0.0)
    world.programs.preempt(preempted, 0.0)
    assert names(Continuum(), resident, preempted) == [preempted.request_id, resident.request_id]


def test_turnstile_leaves_stocks_order_until_memory_is_short() -> None:
    world = World()
    policy = Turnstile()
    older, resident = world.arrive(), world.arrive()
    resident.claim = world.pin()
    assert not policy.promote(world.load) and names(policy, resident, older) == [older.request_id, resident.request_id]
    world.load.now = world.load.short = 5.0
    assert policy.promote(world.load) and not policy.promote(world.load)
    assert names(policy, resident, older) == [resident.request_id, older.request_id]
    world.load.now += policy.calm
    assert policy.promote(world.load) and not policy.pressed


# ---- the cap


def test_the_cap_admits_so_many_jobs_and_no_more() -> None:
    world = World()
    policy = ProgramCap(2)
    turns = [world.arrive() for _ in range(3)]
    for turn in turns[:2]:
        assert policy.may_start(turn)
        policy.started(turn, 0.0, 0)
    assert not policy.may_start(turns[2])
    world.programs.finish(turns[0], 1.0, tool="bash", aborted=False)
    assert not policy.promote(world.load) and not policy.may_start(turns[2]), "its tool runs: the place is taken"
    again = world.arrive(turns[0].program.id, now=2.0)
    assert policy.may_start(again)
    assert names(policy, turns[2], again) == [again.request_id, turns[2].request_id]
    world.programs.finish(again, 3.0, tool=None, aborted=False)
    assert policy.promote(world.load) and policy.may_start(turns[2])


def test_who_sleeps_too_long_gives_up_the_place() -> None:
    world = World()
    policy = ProgramCap(1, idle_limit=30.0)
    sleeper, other = world.arrive(), world.arrive()
    policy.started(sleeper, 0.0, 0)
    world.programs.finish(sleeper, 10.0, tool="bash", aborted=False)
    world.load.now = 40.0
    assert not policy.promote(world.load)
    world.load.now = 40.1
    assert policy.promote(world.load) and policy.may_start(other)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ProgramCap(0),
        lambda: ProgramCap(-1),
        lambda: ProgramCap(2.5),  # type: ignore[arg-type]
        lambda: ProgramCap(True),
        lambda: ProgramCap(2, idle_limit=0.0),
        lambda: ProgramCap(2, idle_limit=math.nan),
        lambda: FixedTtl(-1.0),
        lambda: FixedTtl(math.nan),
        lambda: Turnstile(k=0.0),
        lambda: Turnstile(k_person=-1.0),
        lambda: Turnstile(k=math.nan),
        lambda: Turnstile(express_after=-1.0),
        lambda: Turnstile(express_share=1.5),
        lambda: Turnstile(calm=math.nan),
        lambda: Turnstile(forsaken=0.5),
        lambda: Turnstile(patience=0.0),
    ],
)
def test_impossible_settings_are_refused(make: Any) -> None:
    with pytest.raises(ValueError):
        make()


# ---- how long to keep


def test_times_to_live_by_hand() -> None:
    world = World(context=900)
    turn = world.arrive()
    assert ProgramFcfs().hold(turn, "bash", 100, world.load) == 0.0
    assert FixedTtl().hold(turn, "bash", 100, world.load) == 2.0
    assert SkiRental().hold(turn, "bash", 100, world.load) == 0.1  # R(100)
    assert PinToPressure().hold(turn, None, 100, world.load) == math.inf
    assert Turnstile().hold(turn, None, 100, world.load) == math.inf


def test_infercept_preserves_where_that_wastes_less() -> None:
    world = World(context=900)
    turn = world.arrive()
    # Preserving wastes 100 · gap, discarding R(100) · (100 + 900) = 100: equal at a gap of 1 s.
    assert InferCept().hold(turn, "bash", 100, world.load) == 1.0
    for seconds in (0.5, 1.5):
        world.latencies.observe("bash", seconds)
    assert InferCept().hold(turn, "bash", 100, world.load) == 1.0
    world.latencies.observe("bash", 1.6)
    assert InferCept().hold(turn, "bash", 100, world.load) == 0.0
    world.latencies.observe(PERSON, 60.0)
    assert InferCept().hold(turn, None, 100, world.load) == 0.0
    assert InferCept().hold(turn, "other", 100, world.load) == 1.0


def test_continuum_cold_then_by_all_tools_then_by_its_own() -> None:
    world = World()
    policy, turn = Continuum(), world.arrive()
    assert policy.hold(turn, "bash", 900, world.load) == 0.0  # ln 0.9 < 0
    assert policy.hold(turn, "bash", 5000, world.load) == pytest.approx(math.log(5))
    policy.started(turn, 3.0, lost=0)  # nothing was evicted: no evidence of T
    policy.started(turn, 4.0, lost=10)
    policy.started(turn, 8.0, lost=10)
    assert policy.hold(turn, "bash", 1000, world.load) == pytest.approx(math.log(6 + 1))
    for _ in range(101):
        world.latencies.observe("ls", 0.5)
    assert policy.hold(turn, "bash", 1000, world.load) == 0.5, "the durations of all tools"
    for _ in range(101):
        world.latencies.observe("bash", 3.0)
    assert policy.hold(turn, "bash", 1000, world.load) == 3.0
    # A person of whom little is known: of all tools half take 0.5 s, so 0.5 · 7 − 0.5 = 3 against 7 − 3 = 4.
    assert policy.hold(turn, None, 1000, world.load) == 3.0
    for turns in (1, 2, 4, 8, 16) * 4:
        turn.job.turns = turns
        policy.ended(turn.job)
    reload, eta = 1.0, policy._eta.value
    assert 0 < eta < 1
    assert policy.hold(turn, "bash", 1000, world.load) == (3.0 if 6 * eta + reload > 3 else 0.0)


def test_continuum_forgets_old_waits() -> None:
    world = World()
    policy, turn = Continuum(), world.arrive()
    policy.started(turn, 1e9, lost=1)
    for _ in range(policy.window):
        policy.started(turn, 2.0, lost=1)
    assert policy.hold(turn, "bash", 1000, world.load) == pytest.approx(math.log(3))


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), max_size=12))
def test_eta_is_minus_a_correlation(jobs: list[int]) -> None:
    eta = Eta()
    for turns in jobs:
        eta.observe(turns)
    done = [k for turns in jobs for k in range(1, turns + 1)]
    left = [turns - k for turns in jobs for k in range(1, turns + 1)]
    if len(set(done)) < 2 or len(set(left)) < 2:
        assert eta.value == 1.0
    else:
        assert eta.value == pytest.approx(-np.corrcoef(done, left)[0, 1], abs=1e-9)


def test_eta_of_equal_jobs_is_one_and_of_geometric_ones_near_zero() -> None:
    equal, geometric = Eta(), Eta()
    draws = np.random.default_rng(0).geometric(0.2, size=20_000)
    for turns in draws:
        equal.observe(7)
        geometric.observe(int(turns))
    assert equal.value == pytest.approx(1.0) and abs(geometric.value) < 0.03


# ---- optimal_ttl


def brute(durations: list[Fraction], benefit: Fraction) -> Fraction:
    """Eq. 2 as it stands, in exact numbers: the smallest of the best."""

    def value(ttl: Fraction) -> Fraction:
        return Fraction(sum(d <= ttl for d in durations), len(durations)) * benefit - ttl

    candidates = sorted({Fraction(0), *durations})
    return max(candidates, key=lambda ttl: (value(ttl), -ttl))


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([1, 2, 4, 8, 16]).flatmap(lambda n: st.lists(st.integers(0, 8), min_size=n, max_size=n)),
    st.integers(0, 16),
)
def test_optimal_ttl_is_the_smallest_of_the_best(durations: list[int], benefit: int) -> None:
    expected = brute([Fraction(d) for d in durations], Fraction(benefit)) if benefit else Fraction(0)
    assert optimal_ttl(durations, benefit) == expected


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=30), st.floats(1e-3, 1e4))
def test_optimal_ttl_is_as_good_as_brute_force(durations: list[float], benefit: float) -> None:
    ttl = optimal_ttl(durations, benefit)
    best = brute([Fraction(d) for d in durations], Fraction(benefit))

    def value(t: float) -> float:
        return sum(d <= t for d in durations) / len(durations) * benefit - t

    assert ttl in (0.0, *durations)
    assert value(ttl) == pytest.approx(value(float(best)), abs=1e-9 * (benefit + 1e4))


def test_optimal_ttl_at_its_edges() -> None:
    assert optimal_ttl([], 5.0) == optimal_ttl([1.0], 0.0) == optimal_ttl([1.0], -3.0) == 0.0
    assert optimal_ttl([2.0], 2.0) == 0.0, "a tie goes to the smallest"
    assert optimal_ttl([2.0], 2.1) == 2.0
    assert optimal_ttl([0.0, 0.0, 9.0], 3.0) == 0.0
    assert optimal_ttl((1.0, 1.0, 1.0, 100.0), 10.0) == 1.0
    for durations, benefit in (([-1.0], 1.0), ([math.nan], 1.0), ([math.inf], 1.0), ([1.0], math.nan), ([], math.inf)):
        with pytest.raises(ValueError, match="optimal_ttl"):
            optimal_ttl(durations, benefit)


# ---- whose memory goes


def test_the_base_gives_up_the_youngest_to_who_runs_and_nothing_to_who_waits() -> None:
    world = World()
    pins = [world.pin() for _ in range(3)]
    turn = world.arrive()
    world.load.idle = False
    assert list(FixedTtl().victims(turn, True, pins, world.load)) == pins[::-1]
    assert not list(FixedTtl().victims(turn, False, pins, world.load))
    world.load.idle = True
    assert list(FixedTtl().victims(turn, False, pins, world.load)) == pins[::-1]


def test_pin_to_pressure_gives_the_youngest_to_whoever_is_older() -> None:
    world = World()
    old, person = world.pin(), world.pin(person=True)
    turn = world.arrive()
    young = world.pin()
    pins = [old, person, young]
    world.load.idle = False
    assert list(PinToPressure().victims(turn, False, pins, world.load)) == [person, young]
    assert list(PinToPressure().victims(turn, True, pins, world.load)) == [person, young, old]
    world.load.idle = True
    assert list(PinToPressure().victims(turn, False, pins, world.load)) == [person, young, old]


def rule(**how: float) -> Turnstile:
    policy = Turnstile(**({"k": 1.0, "k_person": 1.0} | how))
    policy.pressed = True
    return policy


def test_bad_is_idle_time_over_the_break_even() -> None:
    world = World()
    world.load.now, world.load.running = 100.0, 4.0
    assert rule().bad(world.pin(idle=6.0, rebuild=3.0), world.load) == 0.5  # 6 / (1 · 3 · 4)
    assert rule(k=2.0).bad(world.pin(idle=6.0, rebuild=3.0), world.load) == 0.25
    assert rule(k=2.0).bad(world.pin(idle=6.0, rebuild=3.0, person=True), world.load) == 0.5
    assert rule().bad(world.pin(idle=6.0, rebuild=3.0, waits=True), world.load) == 0.0
    world.load.running = 0.2
    assert rule().bad(world.pin(idle=6.0, rebuild=3.0), world.load) == 2.0, "B is at least 1"
    assert rule().bad(world.pin(idle=6.0, rebuild=0.0), world.load) == pytest.approx(6e9), "free to rebuild"
    pin = world.pin(idle=6.0, rebuild=3.0, returns=9.0)
    assert Clairvoyant(k=1.0, k_person=1.0).bad(pin, world.load) == 3.0
    assert Clairvoyant().bad(world.pin(returns=math.inf), world.load) == math.inf


def test_turnstiles_victims_case_by_case() -> None:
    world = World()
    world.load.now, world.load.idle = 100.0, False
    bad, worse, fresh, waits = (world.pin(idle=i) for i in (2.0, 3.0, 0.5, 0.0))
    world.arrive(waits.program.id)
    middle = world.arrive()
    young_bad, young_fresh = world.pin(idle=2.5), world.pin(idle=0.1)
    pins = [bad, worse, fresh, waits, young_bad, young_fresh]

    def go(turn: Turn, running: bool = False) -> list[Pin]:
        return list(rule().victims(turn, running, pins, world.load))

    # A newcomer: the younger ones past their break-even, and nothing else.
    assert go(middle) == [young_bad]
    # Resident: all past their break-even, then the younger ones, youngest first.
    middle.claim = world.pin()
    assert go(middle) == [worse, young_bad, bad, young_fresh]
    middle.claim = None
    # Running: the same, but what is younger than all that run goes before vLLM preempts.
    world.load.youngest = middle.job.number
    assert go(middle, True) == [worse, young_bad, bad, young_fresh]
    world.load.youngest = -math.inf
    assert go(middle, True) == [worse, young_bad, bad, young_fresh, waits, fresh]
    world.load.youngest = math.inf
    assert go(middle, True) == [worse, young_bad, bad]
    # Express: whoever's turn does not wait, worst first; then any.
    middle.express = True
    assert go(middle) == [worse, young_bad, bad, fresh, young_fresh, waits]
    middle.express = False
    # Nothing runs: everything, those who wait last.
    world.load.idle = True
    assert go(middle) == [worse, young_bad, bad, fresh, young_fresh, waits]


def study(turn: Turn, running: bool, pins: list[Pin], load: Load) -> list[Pin]:
    """The rule "Lg" as the study states it: one victim, and again."""
    left, gone = list(pins), []

    def bad(v: Pin) -> float:
        return 0.0 if v.program.waiting else (load.now - v.since) / (v.rebuild * max(1.0, load.running))

    def age(v: Pin) -> float:
        return math.inf if v.program.job_ended else float(v.program.job.number)

    while left:
        waits = [v for v in left if v.program.waiting]
        idle = [v for v in left if not v.program.waiting]
        if load.idle or turn.express:
            victim: Pin | None = max(idle, key=bad) if idle else waits[0]
        elif running or turn.claim is not None:
            victim = max(left, key=bad)
            if bad(victim) <= 1:
                victim = max(left, key=age)
                if age(victim) <= (load.youngest if running else turn.job.number):
                    victim = None
        else:
            choice = [v for v in idle if age(v) > turn.job.number and bad(v) > 1]
            victim = max(choice, key=bad, default=None)
        if victim is None:
            break
        gone.append(victim)
        left.remove(victim)
    return gone


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 9), st.floats(0.1, 3), st.sampled_from(["tool", "tool", "person", "waits"])),
        min_size=1,
        max_size=8,
        unique_by=lambda x: x[0] / x[1],
    ),
    st.sampled_from(["running", "resident", "express", "new"]),
    st.integers(0, 8),
    st.booleans(),
    st.integers(-1, 9),
)
def test_turnstiles_victims_are_those_of_the_study(
    kept: list[tuple[float, float, str]], kind: str, place: int, idle: bool, youngest: int
) -> None:
    world = World()
    world.load.now, world.load.running, world.load.idle = 1000.0, 2.0, idle
    pins, turn = [], None
    for number, (seconds, rebuild, state) in enumerate(kept):
        if number == place:
            turn = world.arrive()
        pins.append(world.pin(idle=seconds, rebuild=rebuild, person=state == "person", waits=state == "waits"))
    turn = turn or world.arrive()
    world.load.youngest = turn.job.number + youngest
    turn.express = kind == "express"
    turn.claim = world.pin() if kind == "resident" else None
    endless = rule(forsaken=math.inf)  # the study bounds nothing
    ours = list(endless.victims(turn, kind == "running", pins, world.load))
    theirs = study(turn, kind == "running", pins, world.load)

    def order(victims: list[Pin]) -> list[Any]:
        """Among those that the rule does not tell apart, the order is free."""
        return [v.program.id if not v.program.waiting and v.rank < math.inf else None for v in victims]

    assert set(ours) == set(theirs) and order(ours) == order(theirs)


# ---- bounds on what retention may cost others


def test_kv_idle_far_past_its_break_even_is_anybodys() -> None:
    world, policy = World(), rule(k=1.0, forsaken=4.0)
    world.load.now, world.load.idle = 100.0, False
    dead, late = world.pin(idle=4.1), world.pin(idle=3.9)
    newcomer = world.arrive()
    assert list(policy.victims(newcomer, False, [dead, late], world.load)) == [dead], "both are of older jobs"


def test_the_oldest_that_waited_too_long_goes_first_and_may_take_any_pin_one_at_a_time() -> None:
    world, policy = World(), rule(patience=60.0, express_share=0.0, forsaken=math.inf)
    policy.pressed = True
    world.load.idle = False
    pins = [world.pin(), world.pin(waits=True)]
    starved, next_one, resident = world.arrive(), world.arrive(), world.arrive()
    resident.claim = world.pin()
    for turn in (starved, next_one, resident):
        policy.arrived(turn)

    def at(now: float) -> list[str]:
        world.load.now = world.load.short = now
        policy.promote(world.load)
        return names(policy, starved, next_one, resident)

    ids = [turn.request_id for turn in (starved, next_one, resident)]
    assert at(0.0) == at(59.0) == [ids[2], ids[0], ids[1]]
    assert not list(policy.victims(starved, False, pins, world.load))
    assert at(60.5) == [ids[0], ids[2], ids[1]]
    assert list(policy.victims(starved, False, pins, world.load)) == pins, "those that are waited for come last"
    world.programs.admit(starved, 60.5)
    at(62.0)
    assert names(policy, next_one, resident) == [ids[2], ids[1]], "the next one's wait as the oldest begins only now"
    at(123.0)
    assert names(policy, next_one, resident) == [ids[1], ids[2]]


# ---- the express lane


def test_first_turns_that_waited_become_express_by_arrival_within_the_share() -> None:
    world = World(pool=1000)
    policy = rule(express_after=1.0, express_share=0.1)
    turns = [world.arrive(tokens=tokens, now=float(i)) for i, tokens in enumerate((60, 30, 20, 5))]
    for turn in turns:
        policy.arrived(turn)
    world.load.short = 0.0

    def promoted(now: float) -> list[bool]:
        world.load.now = now
        policy.promote(world.load)
        return [turn.express for turn in turns]

    assert promoted(0.9) == [False] * 4
    assert promoted(1.0) == [True, False, False, False]
    assert promoted(9.0) == [True, True, False, False], "60 + 30 + 20 > 100, and nobody overtakes"
    world.programs.admit(turns[0], 9.0)
    assert promoted(9.5) == [True, True, False, False], "it counts until it ends"
    world.programs.finish(turns[0], 10.0, tool="bash", aborted=False)
    assert promoted(10.0) == [True] * 4
    assert names(policy, *turns[1:]) == [turn.request_id for turn in turns[1:]]


def test_who_is_longer_than_the_lane_waits_its_turn_and_holds_up_nobody() -> None:
    world = World(pool=1000)
    policy = rule(express_share=0.1)
    long, other = world.arrive(tokens=101), world.arrive(tokens=100)
    policy.arrived(long)
    policy.arrived(other)
    world.load.now = 5.0
    assert policy.promote(world.load) and other.express and not long.express


def test_who_was_served_meanwhile_or_is_resident_takes_no_room_in_the_lane() -> None:
    world = World(pool=1000)
    policy = rule()
    admitted, ended, resident, waiting = (world.arrive(tokens=90) for _ in range(4))
    for turn in (admitted, ended, resident, waiting):
        policy.arrived(turn)
    world.programs.admit(admitted, 0.5)
    world.programs.finish(ended, 0.5, tool=None, aborted=True)
    resident.claim = world.pin()
    world.load.now = 2.0
    policy.promote(world.load)
    assert [turn.express for turn in (admitted, ended, resident, waiting)] == [False, False, False, True]


def test_only_first_turns_ride_the_lane_and_they_keep_nothing_while_others_wait() -> None:
    world = World()
    policy = rule()
    first = world.arrive("s")
    world.programs.finish(first, 0.0, tool="bash", aborted=False)
    second = world.arrive("s")
    policy.arrived(second)
    world.load.now = 50.0
    policy.promote(world.load)
    assert not second.express
    second.express, world.load.waiting = True, 1
    assert policy.hold(second, "bash", 100, world.load) == 0.0
    world.load.waiting = 0
    assert policy.hold(second, "bash", 100, world.load) == math.inf


def test_every_policy_has_its_name() -> None:
    assert set(POLICIES) | set(STOCK) == {
        "fcfs", "priority", "program_fcfs", "program_cap", "plas", "fixed_ttl", "ski_rental", "pin_to_pressure",
        "infercept", "continuum", "turnstile", "clairvoyant",
    }  # fmt: skip
