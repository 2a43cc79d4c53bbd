"""Whatever clients do, no block is lost, every account balances after every step, and everyone gets an answer."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from vllm.v1.core.sched.interface import PauseState

from rollout.scheduling.policies import POLICIES
from rollout.scheduling.programs import RELEASE
from tests.rollout.scheduling.driver import EOS, Driver, attention, build, check, free_ids, request, said, tokenizer

SETTINGS: dict[str, dict[str, Any]] = {
    "program_cap": {"cap": 2, "idle_limit": 5.0},
    "turnstile": {"express_after": 0.2},
}
SESSIONS = ["a", "b", "c", "d"]
ANSWERS = ["<tool_call>ls", "<tool_call>search it", "ok", "well, STOP and more"]
USABLE = 19  # blocks of each group: 76 tokens
LONGEST = 48  # tokens of a prompt, which fits with any answer
PATIENCE = 3 * SETTINGS["program_cap"]["idle_limit"]  # seconds without work after which a cap has locked itself
COUNTED = ("pins", "claims", "expiries", "pressure_releases", "refusals", "preemptions", "string_stops", "jobs")


class Clients:
    """Sessions of one engine, as rude as they come."""

    def __init__(self, policy: str, *, depth: int, infer: bool, max_pinned: float, groups: bool, **how: Any) -> None:
        options = {"policy": policy, "infer_programs": infer, "max_pinned": max_pinned, **SETTINGS.get(policy, {})}
        kinds = (attention(), attention(sliding_window=8)) if groups else ()
        self.usable = USABLE * max(1, len(kinds))
        how |= {"groups": kinds, "asynchronous": depth > 1}
        self.scheduler = build(options, num_blocks=self.usable + 1, **how)
        self.driver = Driver(self.scheduler, depth)
        if policy == "clairvoyant":
            self.scheduler.true_gap = lambda request: float(len(request.request_id))
        self.said: dict[str | None, list[int]] = {}  # by session, when its last turn ended
        self.seen: Counter[str] = Counter()
        self.count = self.waited = 0
        self.worked = 0.0

    def arrive(
        self, session: str | None, before: float, prompt: list[int], answer: str, stops: bool, **how: Any
    ) -> None:
        """A turn that brings so much of what was said ``before``, and a ``prompt`` of its own."""
        kept = self.said.get(session, [])
        kept = kept[: round(len(kept) * before)][: LONGEST - len(prompt)]
        output = [*said(answer), EOS]
        if stops:
            how["stop"] = ["STOP"]
        self.driver.add(request(f"r{self.count}", kept + prompt, len(output), session=session, **how), output)
        self.count += 1
        check(self.scheduler)

    def step(self, seconds: float) -> None:
        scheduler, live = self.scheduler, dict(self.driver.live)
        output = self.driver.step(seconds)
        for name, made in live.items():
            stops = made.sampling_params is not None and made.sampling_params.stop
            if stops and "STOP" in tokenizer().decode(list(made.output_token_ids)) and name in self.driver.live:
                self.driver.abort(name)  # as the front end does
            if name not in self.driver.live:
                self.said[made.session_id] = list(made.all_token_ids)
        check(scheduler)
        idle = live and not output.total_num_scheduled_tokens and scheduler.pause_state == PauseState.UNPAUSED
        now = scheduler.load.now  # a clock that steps back stands still there
        self.waited, self.worked = (self.waited + 1, self.worked) if idle else (0, now)
        locked = now - self.worked > PATIENCE if scheduler.options.policy == "program_cap" else self.waited > 3
        assert not locked, f"deadlock: {sorted(live)} wait, {len(scheduler.pins)} pins"

    def abort(self, name: str) -> None:
        self.driver.abort(name)
        check(self.scheduler)

    def reset(self, running: bool) -> None:
        assert self.scheduler.reset_prefix_cache(reset_running_requests=running) or self.scheduler.running
        assert not self.scheduler.pins
        check(self.scheduler)

    def pause(self, state: PauseState) -> None:
        self.scheduler.set_pause_state(state)
        check(self.scheduler)

    def end(self) -> None:
        """Everyone gets an answer in a bounded number of steps, and nothing is left."""
        scheduler = self.scheduler
        scheduler.set_pause_state(PauseState.UNPAUSED)
        for _ in range(2000):
            if self.driver.live:
                self.step(0.25)
        self.driver.drain()
        assert not self.driver.live and len(self.driver.finished) == self.count
        assert not scheduler.programs.turns and not any(program.anonymous for program in scheduler.programs)
        check(scheduler)
        self.seen.update({what: getattr(scheduler.counters, what) for what in COUNTED})
        self.seen.update(scheduler.counters.drops)
        scheduler.shutdown()
        check(scheduler)
        assert not scheduler.pins and len(free_ids(scheduler)) == self.usable
        for session in SESSIONS:
            scheduler.release(session)
        assert all(program.id.startswith("inferred-") for program in scheduler.programs)


# ---- lives as agents lead them, and some accidents


def live(policy: str, seed: int, steps: int) -> Counter[str]:
    draw = random.Random(f"{policy} {seed}")
    clients = Clients(
        policy,
        depth=draw.choice([1, 2]),
        infer=draw.random() < 0.3,
        max_pinned=draw.choice([1.0, 1.0, 0.3]),
        groups=draw.random() < 0.25,
        seqs=draw.choice([1, 2, 4]),
        budget=draw.choice([8, 32]),
        by=draw.choice(["fcfs", "fcfs", "priority"]),
        tokenizer=draw.choice([tokenizer(), tokenizer(), None]),
    )
    driver = clients.driver
    for _ in range(steps):
        busy = {made.session_id for made in driver.live.values()}
        if len(driver.live) < 6 and draw.random() < 0.35:
            session: str | None = draw.choice([name for name in SESSIONS if name not in busy] or SESSIONS)
            if draw.random() < 0.1:
                session = draw.choice([*SESSIONS, None])  # a sub-agent, or nobody we know
            full = len(clients.said.get(session, [])) > LONGEST - 7
            clients.arrive(
                session,
                draw.choice([0.0, 0.5]) if full else draw.choices([1.0, 0.5, 0.0], [20, 1, 1])[0],
                [draw.randrange(8, 40) for _ in range(draw.randrange(1, 7))],
                draw.choices(ANSWERS, [5, 1, 2, 1])[0],
                draw.random() < 0.5,
                priority=draw.randrange(3),
                extra_args=draw.choice([None, None, None, {"tool": "ls"}, {"last_turn": True}]),
            )
        event = draw.random()
        if event < 0.015 and driver.live:
            clients.abort(draw.choice(sorted(driver.live)))
        elif event < 0.025:
            clients.abort(RELEASE + draw.choice([*SESSIONS, "never seen"]))
        elif event < 0.03:
            clients.reset(draw.random() < 0.7)
        elif event < 0.04:
            clients.pause(draw.choice(list(PauseState)))
        elif event < 0.3:
            clients.pause(PauseState.UNPAUSED)
        clients.step(draw.choices([0.05, 0.25, 0.0, 3.0, -1.0], [9, 3, 1, 1, 1])[0])
    clients.end()
    return clients.seen


def lives(policy: str, seeds: range, steps: int) -> None:
    seen: Counter[str] = Counter()
    for seed in seeds:
        seen += live(policy, seed, steps)
    assert seen["jobs"] > 10 * len(seeds) and seen["preemptions"] and seen["string_stops"]
    if policy in ("fixed_ttl", "pin_to_pressure", "turnstile", "clairvoyant"):
        assert seen["claims"] > 5 * len(seeds) and seen["pressure_releases"] and seen["refusals"]
        assert seen["compaction"] and seen["abort"] and seen["reset"] and seen["pause"] and seen["release"]


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_lost_in_the_lives_of_agents(policy: str) -> None:
    lives(policy, range(8), 250)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_lost_in_many_long_lives(policy: str) -> None:
    lives(policy, range(100, 160), 1500)


# ---- lives that Hypothesis thinks of


tokens = st.lists(st.integers(8, 40), min_size=1, max_size=12)


class Machine(RuleBasedStateMachine):
    policy = ""

    @initialize(
        depth=st.sampled_from([1, 2]),
        infer=st.booleans(),
        groups=st.booleans(),
        max_pinned=st.sampled_from([1.0, 0.5, 0.1]),
        seqs=st.sampled_from([1, 2, 4]),
        budget=st.sampled_from([8, 32]),
        by=st.sampled_from(["fcfs", "priority"]),
        decodes=st.booleans(),
    )
    def begin(self, decodes: bool, **how: Any) -> None:
        self.clients = Clients(self.policy, tokenizer=tokenizer() if decodes else None, **how)

    @rule(
        session=st.sampled_from([*SESSIONS, *SESSIONS, None]),
        before=st.sampled_from([1.0, 1.0, 1.0, 0.5, 0.0]),
        prompt=tokens,
        answer=st.sampled_from(ANSWERS),
        extra_args=st.fixed_dictionaries({}, optional={"tool": st.just("ls"), "last_turn": st.booleans()}),
        stops=st.booleans(),
        priority=st.integers(0, 2),
    )
    def arrive(self, **how: Any) -> None:
        self.clients.arrive(**how)

    @rule(seconds=st.sampled_from([0.0, 0.05, 0.25, 0.25, 3.0, -1.0]), steps=st.integers(1, 12))
    def steps(self, seconds: float, steps: int) -> None:
        for _ in range(steps):
            self.clients.step(seconds)

    @precondition(lambda self: self.clients.driver.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.clients.abort(data.draw(st.sampled_from(sorted(self.clients.driver.live))))

    @rule(session=st.sampled_from([*SESSIONS, "never seen"]))
    def release(self, session: str) -> None:
        self.clients.abort(RELEASE + session)

    @rule(running=st.booleans())
    def reset(self, running: bool) -> None:
        self.clients.reset(running)

    @rule(state=st.sampled_from([*PauseState, PauseState.UNPAUSED]))
    def pause(self, state: PauseState) -> None:
        self.clients.pause(state)

    def teardown(self) -> None:
        if hasattr(self, "clients"):
            self.clients.end()


def play(policy: str, examples: int, steps: int) -> None:
    how = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.reuse, Phase.generate],  # to shrink a failure takes longer than a test may: its steps are printed
    )
    run_state_machine_as_test(type("Machine", (Machine,), {"policy": policy}), settings=how)


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_lost_whatever_clients_do(policy: str) -> None:
    play(policy, 10, 40)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_lost_however_long_they_do_it(policy: str) -> None:
    play(policy, 600, 100)
