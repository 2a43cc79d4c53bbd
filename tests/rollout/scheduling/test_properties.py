"""Whatever clients do, no block is lost, every account balances after every step, and everyone gets an answer."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from vllm.v1.core.sched.interface import PauseState

from rollout.scheduling.policies import POLICIES
from tests.rollout.scheduling.driver import EOS, Driver, attention, build, check, free_ids, request, said, tokenizer

SETTINGS: dict[str, dict[str, Any]] = {
    "program_cap": {"cap": 2, "idle_limit": 5.0},
    "turnstile": {"express_after": 0.2},
}
SESSIONS = ["a", "b", "c", "d"]
ANSWERS = ["ok", "<tool_call>ls", "well, STOP and more", "<tool_call>search it"]
USABLE = 19  # blocks of each group: 76 tokens
LONGEST = 48  # tokens of a prompt, which fits with any answer
PATIENCE = 60  # steps of 0.25 s in which something must be scheduled: three of program_cap's idle limits

tokens = st.lists(st.integers(8, 40), min_size=1, max_size=12)


class Clients(RuleBasedStateMachine):
    """Sessions of one engine, as rude as they come."""

    policies: tuple[str, ...] = tuple(POLICIES)

    @initialize(data=st.data())
    def start(self, data: st.DataObject) -> None:
        draw = data.draw
        policy = draw(st.sampled_from(self.policies), "policy")
        asynchronous = draw(st.booleans(), "async")
        options = {"policy": policy, "infer_programs": draw(st.booleans(), "infer"), **SETTINGS.get(policy, {})}
        options["max_pinned"] = draw(st.sampled_from([1.0, 1.0, 0.5, 0.1]), "cap on pins")
        groups = draw(st.sampled_from([(), (), (attention(), attention(sliding_window=8))]), "groups")
        self.usable = USABLE * max(1, len(groups))
        self.scheduler = build(
            options,
            num_blocks=self.usable + 1,
            groups=groups,
            seqs=draw(st.sampled_from([1, 2, 4]), "seqs"),
            budget=draw(st.sampled_from([8, 32]), "budget"),
            by=draw(st.sampled_from(["fcfs", "fcfs", "priority"]), "by"),
            asynchronous=asynchronous,
            tokenizer=draw(st.sampled_from([tokenizer(), tokenizer(), None]), "tokenizer"),
        )
        self.driver = Driver(self.scheduler, depth=2 if asynchronous else 1)
        if policy == "clairvoyant":
            self.scheduler.true_gap = lambda request: float(len(request.request_id))
        self.ended: dict[str, list[int]] = {}  # by session: what it said last
        self.count = 0
        self.waited = 0

    @rule(
        session=st.sampled_from([*SESSIONS, *SESSIONS, None]),
        said_before=st.sampled_from([1.0, 1.0, 1.0, 0.5, 0.0]),
        prompt=tokens,
        answer=st.sampled_from(ANSWERS),
        extra=st.fixed_dictionaries({}, optional={"tool": st.just("ls"), "last_turn": st.booleans()}),
        stops=st.booleans(),
        priority=st.integers(0, 2),
    )
    def arrive(
        self,
        session: str | None,
        said_before: float,
        prompt: list[int],
        answer: str,
        extra: Any,
        stops: bool,
        priority: int,
    ) -> None:
        before = self.ended.get(session or "", [])
        before = before[: round(len(before) * said_before)][: LONGEST - len(prompt)]
        output = [*said(answer), EOS]
        how: dict[str, Any] = {"stop": ["STOP"]} if stops else {}
        made = request(
            f"r{self.count}", before + prompt, len(output), session=session, priority=priority, extra_args=extra, **how
        )
        self.count += 1
        self.driver.add(made, output)
        check(self.scheduler)

    @rule(seconds=st.sampled_from([0.0, 0.05, 0.25, 0.25, 3.0, -1.0]))
    def step(self, seconds: float) -> None:
        scheduler = self.scheduler
        live = dict(self.driver.live)
        output = self.driver.step(seconds)
        for name, made in live.items():
            stops = made.sampling_params is not None and made.sampling_params.stop
            if stops and "STOP" in tokenizer().decode(list(made.output_token_ids)) and name in self.driver.live:
                self.driver.abort(name)  # as the front end does
            if name not in self.driver.live:
                self.ended[made.session_id or ""] = list(made.all_token_ids)
        check(scheduler)
        idle = not output.total_num_scheduled_tokens and scheduler.pause_state == PauseState.UNPAUSED
        self.waited = self.waited + 1 if idle and live else 0
        patience = PATIENCE if scheduler.options.policy == "program_cap" else 4
        assert self.waited < patience or seconds < 0.25, f"deadlock: {sorted(live)} wait, {len(scheduler.pins)} pins"

    @precondition(lambda self: self.driver.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.driver.abort(data.draw(st.sampled_from(sorted(self.driver.live))))
        check(self.scheduler)

    @rule(session=st.sampled_from([*SESSIONS, "never seen"]))
    def release(self, session: str) -> None:
        self.scheduler.finish_requests([f"turnstile-release:{session}"], 9)
        check(self.scheduler)

    @rule(running=st.booleans())
    def reset(self, running: bool) -> None:
        assert self.scheduler.reset_prefix_cache(reset_running_requests=running) or self.scheduler.running
        assert not self.scheduler.pins
        check(self.scheduler)

    @rule(state=st.sampled_from([*PauseState, PauseState.UNPAUSED]))
    def pause(self, state: PauseState) -> None:
        self.scheduler.set_pause_state(state)
        check(self.scheduler)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        scheduler = self.scheduler
        scheduler.set_pause_state(PauseState.UNPAUSED)
        self.waited = 0
        for _ in range(2000):
            if not self.driver.live:
                break
            self.step(0.25)
        assert not self.driver.live, "no end in sight"
        self.driver.drain()
        assert len(self.driver.finished) == self.count
        assert not scheduler.programs.turns and not any(program.anonymous for program in scheduler.programs)
        check(scheduler)
        scheduler.shutdown()
        check(scheduler)
        assert not scheduler.pins and len(free_ids(scheduler)) == self.usable
        for session in SESSIONS:
            scheduler.release(session)
        assert all(program.id.startswith("inferred-") for program in scheduler.programs)


def play(policies: tuple[str, ...], examples: int, steps: int) -> None:
    machine = type("Machine", (Clients,), {"policies": policies})
    how = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.reuse, Phase.generate],  # to shrink a failure takes longer than a test may: its steps are printed
    )
    run_state_machine_as_test(machine, settings=how)


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_lost_whatever_clients_do(policy: str) -> None:
    play((policy,), 30, 50)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_lost_however_long_they_do_it(policy: str) -> None:
    play((policy,), 1000, 100)
