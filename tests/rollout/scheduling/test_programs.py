"""Programs, jobs and turns by their stated rules."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.scheduling import programs as module
from rollout.scheduling.latency import PERSON, ToolLatencies
from rollout.scheduling.programs import Pin, Programs, Turn


@pytest.fixture
def programs() -> Programs:
    return Programs(ToolLatencies())


class Client:
    """Plays one program's turns; times are seconds of the scheduler's clock."""

    def __init__(self, programs: Programs, name: str | None = "s") -> None:
        self.programs, self.name, self.count = programs, name, 0

    def turn(self, arrive: float, admit: float, finish: float, called: str | None, **how: object) -> Turn:
        self.count += 1
        hint = how.pop("hint", None)
        turn = self.programs.arrive(f"{self.name}{self.count}", self.name, 100 * self.count, arrive, hint)  # type: ignore[arg-type]
        self.programs.admit(turn, admit)
        self.programs.finish(turn, finish, tool=called, aborted=bool(how.get("aborted")))
        return turn


def test_a_job_runs_from_a_users_message_to_the_final_answer(programs: Programs) -> None:
    client = Client(programs)
    first = client.turn(0.0, 1.0, 3.0, "bash")
    second = client.turn(8.0, 8.5, 9.0, None)
    assert first.job is second.job and (first.first, second.first) == (True, False)
    job = first.job
    assert (job.turns, job.gaps, job.waited, job.tokens) == (2, 5.0, 1.5, 200)
    record = job.record("s", 9.0)
    assert (record.arrived, record.finished, record.delay) == (0.0, 9.0, 4.0)
    third = client.turn(100.0, 100.0, 101.0, None)
    assert third.job is not job and third.job.number == job.number + 1 and third.first
    assert programs.latencies.durations("bash") == [5.0] and programs.latencies.durations(PERSON) == [91.0]
    assert third.program.served == 2.0 + 0.5 + 1.0


def test_a_tool_that_the_client_names_overrides_what_the_output_said(programs: Programs) -> None:
    client = Client(programs)
    first = client.turn(0.0, 0.0, 1.0, None)
    assert first.program.job_ended
    second = client.turn(5.0, 5.0, 6.0, "bash", hint="search")
    assert second.job is first.job and second.job.gaps == 4.0 and not second.program.job_ended
    client.turn(9.0, 9.0, 9.0, "bash", hint="grep")
    assert programs.latencies.durations("search") == [4.0] and programs.latencies.durations("grep") == [3.0]
    assert not programs.latencies.durations("bash") and not programs.latencies.durations(PERSON)


def test_turns_that_overlap_share_a_job_and_the_gap_begins_with_the_last(programs: Programs) -> None:
    a = programs.arrive("a", "s", 10, 0.0)
    b = programs.arrive("b", "s", 10, 1.0)
    assert a.job is b.job and b.program.waiting == 2 and b.first is False
    for turn in (a, b):
        programs.admit(turn, 2.0)
    programs.finish(a, 3.0, tool=None, aborted=False)
    assert not a.program.job_ended, "another turn is still at it"
    programs.finish(b, 7.0, tool="bash", aborted=False)
    assert not a.program.job_ended and a.program.live == 0
    c = programs.arrive("c", "s", 10, 9.0)
    assert c.job is a.job and c.job.gaps == 2.0
    programs.finish(c, 9.0, tool=None, aborted=False)
    assert c.program.job_ended and (c.program.waiting, c.program.running) == (0, 0)


def test_no_gap_while_a_turn_is_in_the_engine(programs: Programs) -> None:
    turn = programs.arrive("a", "s", 10, 0.0)
    programs.arrive("b", "s", 10, 5.0, "bash")
    assert not programs.latencies.total() and turn.job.gaps == 0.0


def test_an_abort_ends_the_job(programs: Programs) -> None:
    client = Client(programs)
    first = client.turn(0.0, 0.0, 1.0, "bash", aborted=True)
    assert first.program.job_ended
    assert client.turn(2.0, 2.0, 3.0, None).job is not first.job


def test_preemption_counts_as_waiting_and_not_as_service(programs: Programs) -> None:
    turn = programs.arrive("a", "s", 10, 0.0)
    assert programs.admit(turn, 2.0) == 2.0
    programs.preempt(turn, 5.0)
    assert (turn.program.waiting, turn.program.running, turn.running) == (1, 0, False)
    assert programs.admit(turn, 9.0) == 4.0
    programs.finish(turn, 10.0, tool=None, aborted=False)
    assert (turn.job.waited, turn.program.served, turn.job.preempted) == (6.0, 4.0, 1)


def test_a_turn_may_end_while_it_waits(programs: Programs) -> None:
    turn = programs.arrive("a", "s", 10, 0.0)
    programs.finish(turn, 4.0, tool=None, aborted=True)
    assert (turn.program.waiting, turn.program.running, turn.program.served) == (0, 0, 0.0)
    assert turn.finished and not programs.turns


def test_service_counts_from_second_zero(programs: Programs) -> None:
    assert Client(programs).turn(0.0, 0.0, 3.0, None).program.served == 3.0


def test_a_clock_that_steps_back_stands_still(programs: Programs) -> None:
    client = Client(programs)
    client.turn(100.0, 100.0, 101.0, "bash")
    second = client.turn(50.0, 40.0, 30.0, "bash")
    assert second.arrived == 101.0 and programs.latencies.durations("bash") == [0.0]
    assert (second.job.waited, second.program.served) == (0.0, 1.0)
    assert programs.clock(-math.inf) == 101.0


def test_jobs_that_come_at_once_are_ordered_as_they_came(programs: Programs) -> None:
    turns = [programs.arrive(str(i), f"s{i}", 10, 0.0) for i in range(5)]
    assert [turn.job.number for turn in turns] == sorted({turn.job.number for turn in turns})
    assert [turn.order for turn in turns] == [1, 2, 3, 4, 5]


def test_a_request_without_a_name_is_a_program_of_its_own(programs: Programs) -> None:
    a, b = programs.arrive("a", None, 10, 0.0), programs.arrive("b", None, 10, 0.0)
    assert a.program is not b.program and a.program.anonymous and a.first and b.first
    programs.finish(a, 1.0, tool="bash", aborted=False)
    programs.rename(a.program, "now known")
    assert programs.get("now known") is a.program and not a.program.anonymous and len(programs) == 2
    assert programs.arrive("c", "now known", 10, 2.0).job is a.job


def test_forgetting(programs: Programs) -> None:
    turn = programs.arrive("a", "s", 10, 0.0)
    programs.forget(turn.program)
    assert programs.get("s") is turn.program, "its turn is in the engine"
    programs.last(turn.program)
    assert turn.last
    programs.finish(turn, 1.0, tool="bash", aborted=False)
    assert turn.program.job_ended
    programs.forget(turn.program)
    assert programs.get("s") is None and len(programs) == 0
    assert programs.arrive("b", "s", 10, 2.0).program is not turn.program


def test_idle_programs_beyond_the_most_are_forgotten_oldest_first(
    programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_PROGRAMS", 3)
    live = programs.arrive("live", "live", 10, 0.0)
    idle = []
    for i in range(4):
        turn = programs.arrive(f"t{i}", f"s{i}", 10, 0.0)
        programs.finish(turn, 0.0, tool="bash", aborted=False)
        idle.append(turn.program)
        if i == 0:
            pin = Pin(turn.program, [object()], (), 4, 1, 1.0, 0.0)
            turn.program.pins.append(pin)
    assert [program.id for program in programs] == ["live", "s0", "s3"], "who runs or keeps KV stays"
    assert idle[1].job_ended and live.program.live
    turn = programs.arrive("again", "s0", 10, 0.0)
    assert [program.id for program in programs] == ["live", "s3", "s0"] and turn.program is idle[0]


def test_who_is_idle_for_long_is_forgotten_a_few_in_a_go(programs: Programs) -> None:
    live = programs.arrive("live", "live", 10, 0.0)
    for i in range(20):
        turn = programs.arrive(f"t{i}", f"s{i}", 10, float(i))
        programs.finish(turn, float(i), tool="bash", aborted=False)
        if i == 3:
            turn.program.pins.append(Pin(turn.program, [object()], (), 4, 1, 1.0, 0.0))
    assert programs.states() == (1, 0, 20)
    pinned = programs.get("s3")
    now = 9.0 + module.FORGOTTEN_AFTER
    sizes = []
    for _ in range(10):
        programs.tidy(programs.clock(now))
        sizes.append(len(programs))
    assert max(a - b for a, b in itertools.pairwise([21, *sizes])) <= module.LOOKS
    assert [program.id for program in programs] == ["live", "s3", *(f"s{i}" for i in range(10, 20))]
    assert programs.states() == (1, 0, 10), "whose KV is kept is remembered, and no tool is thought to run"
    assert pinned is not None and not pinned.job_ended and live.program.live
    assert programs.arrive("again", "s3", 10, now).job is pinned.job and not pinned.away
    assert programs.states() == (2, 0, 10)
    pinned.pins.clear()
    programs.finish(programs.turns["again"], now, tool="bash", aborted=False)
    for _ in range(10):
        programs.tidy(programs.clock(now + module.FORGOTTEN_AFTER))
    assert [program.id for program in programs] == ["live"] and programs.states() == (1, 0, 0)


def test_a_pin_is_as_old_as_its_job_and_a_persons_is_the_youngest(programs: Programs) -> None:
    client = Client(programs)
    turn = client.turn(0.0, 0.0, 1.0, "bash")
    pin = Pin(turn.program, [object()], (), 4, 1, 1.0, 0.0)
    assert pin.rank == turn.job.number and not pin.returning
    programs.arrive("next", "s", 10, 2.0)
    assert pin.returning
    other = Client(programs, "other").turn(0.0, 0.0, 1.0, None)
    assert Pin(other.program, [], (), 4, 1, 1.0, 0.0).rank == math.inf


def test_a_turn_is_resident_as_long_as_its_pin_holds_blocks(programs: Programs) -> None:
    turn = programs.arrive("a", "s", 10, 0.0)
    assert not turn.resident
    turn.claim = Pin(turn.program, [object()], (), 4, 1, 1.0, 0.0)
    assert turn.resident
    turn.claim.blocks = []
    assert not turn.resident


def test_states(programs: Programs) -> None:
    waiting, running, both = (programs.arrive(name, name, 10, 0.0) for name in ("w", "r", "b"))
    programs.arrive("b2", "b", 10, 0.0)
    for turn in (running, both):
        programs.admit(turn, 0.0)
    Client(programs, "tool").turn(0.0, 0.0, 1.0, "bash")
    Client(programs, "person").turn(0.0, 0.0, 1.0, None)
    assert programs.states() == (2, 2, 1) and waiting.program.waiting == 1


def counted(programs: Programs) -> tuple[int, int, int]:
    """``states`` by a walk over all programs."""
    tools = sum(not (p.waiting or p.running or p.job_ended or p.away) for p in programs)
    return sum(p.waiting > 0 for p in programs), sum(p.running > 0 for p in programs), tools


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["arrive", "admit", "preempt", "set aside", "finish", "forget", "tidy", "pin"]),
            st.integers(0, 5),
            st.one_of(st.floats(-5, 50, allow_nan=False), st.floats(0, 9000, allow_nan=False)),
            st.sampled_from([None, "bash"]),
        ),
        max_size=80,
    )
)
def test_books_balance_over_any_life(events: list[tuple[str, int, float, str | None]]) -> None:
    programs = Programs(ToolLatencies())
    live: list[Turn] = []
    gaps: dict[int, float] = {}
    for number, (what, who, now, tool) in enumerate(events):
        turn = live[who % len(live)] if live else None
        if what == "arrive":
            live.append(programs.arrive(f"r{number}", f"s{who % 3}" if who < 5 else None, 10, now))
        elif what == "tidy":
            programs.tidy(programs.clock(now))
        elif what == "forget":
            for program in list(programs)[:1]:
                programs.forget(program)
        elif what == "pin":
            for program in list(programs)[-1:]:
                program.pins[:] = [] if program.pins else [Pin(program, [object()], (), 4, 1, 1.0, 0.0)]
        elif turn is None:
            continue
        elif what == "admit" and not turn.running:
            assert programs.admit(turn, now) >= 0
        elif what == "preempt" and turn.running:
            programs.preempt(turn, now)
        elif what == "set aside" and turn.running:
            programs.set_aside(turn, now)
        elif what == "finish":
            programs.finish(turn, now, tool=tool, aborted=False)
            live.remove(turn)
        assert programs.states() == counted(programs)
        for program in programs:
            mine = [turn for turn in live if turn.program is program]
            assert program.waiting == sum(not turn.running for turn in mine)
            assert program.running == sum(turn.running for turn in mine)
            assert program.served >= 0 and not (program.job_ended and mine)
            gaps[program.job.number] = program.job.gaps
            assert program.job.gaps >= 0 and program.job.waited >= 0
    observed = programs.latencies.durations("bash") + programs.latencies.durations(PERSON)
    assert sum(gaps.values()) <= sum(observed) + 1e-6, "persons' pauses are in no job"
