"""Generators against the statistics that were published, and against their own promises."""

import math
import statistics

import numpy as np
import pytest

from rollout.errors import UserError
from rollout.scheduling.workloads import NAMES, Session, Turn, generate

MANY = 1500


def gaps_of(workload):
    return [turn.gap for session in workload.sessions for turn in session.turns[:-1]]


@pytest.mark.parametrize(
    "name, turns, gap, tokens",
    [
        ("swe", (10.9, 2.1), (0.925, 3.55), (70_126, 19_732)),
        ("bfcl", (6.3, 2.3), (1.923, 2.133), (0.4 * 93_256, 0.4 * 68_687)),
    ],
)
def test_agents_have_the_published_statistics(name, turns, gap, tokens):
    workload = generate(name, programs=MANY, rate=1.0)
    counts = [len(session.turns) for session in workload.sessions]
    totals = [session.tokens for session in workload.sessions]
    gaps = gaps_of(workload)
    assert statistics.mean(counts) == pytest.approx(turns[0], rel=0.03)
    assert statistics.stdev(counts) == pytest.approx(turns[1], rel=0.1)
    assert statistics.mean(totals) == pytest.approx(tokens[0], rel=0.05)
    assert statistics.stdev(totals) == pytest.approx(tokens[1], rel=0.1)
    assert statistics.mean(gaps) == pytest.approx(gap[0], rel=0.06)
    assert statistics.stdev(gaps) == pytest.approx(gap[1], rel=0.2)  # a heavy tail


def test_long_tools_have_a_median_of_ten_seconds():
    assert statistics.median(gaps_of(generate("long_tools", programs=MANY, rate=1))) == pytest.approx(10, rel=0.05)


def test_mixed_is_half_and_half():
    sessions = generate("mixed", programs=400, rate=1).sessions
    tools = [{turn.tool for turn in session.turns} for session in sessions]
    assert sum("build" in names or "test" in names or "browse" in names for names in tools) == 200


def test_a_tool_drifts_half_way_and_no_other():
    steady, drifting = (generate(name, programs=200, rate=1).sessions for name in ("swe", "drift"))
    for i, (a, b) in enumerate(zip(steady, drifting, strict=True)):
        for x, y in zip(a.turns, b.turns, strict=True):
            factor = 10 if i >= 100 and x.tool == "python" else 1
            assert y.gap == pytest.approx(x.gap * factor)


def test_arrivals_are_poisson_and_start_at_once():
    times = [session.arrival for session in generate("chat", programs=4000, rate=0.5).sessions]
    between = np.diff(times)
    assert times[0] == 0 and (between >= 0).all()
    assert between.mean() == pytest.approx(2.0, rel=0.05)
    assert between.std() == pytest.approx(2.0, rel=0.08)  # exponential


def test_the_closed_loop_has_no_arrivals():
    workload = generate("swe", programs=5, concurrency=2)
    assert workload.concurrency == 2 and all(session.arrival is None for session in workload.sessions)


def test_chats_come_beside_the_agents_and_name_no_session():
    workload = generate("swe_chat", programs=50, rate=0.1, chat_rate=2.0)
    chats = [session for session in workload.sessions if not session.named]
    end = max(session.arrival for session in workload.sessions if session.named)
    assert len(workload.sessions) - len(chats) == 50
    assert len(chats) == pytest.approx(2 * end, rel=0.1)
    assert all(len(chat.turns) == 1 and 0 <= chat.arrival <= end for chat in chats)


def test_people_pause_without_a_tool():
    sessions = generate("no_tools", programs=MANY, rate=1).sessions
    turns = [turn for session in sessions for turn in session.turns]
    assert all(turn.tool is None for turn in turns) and not any(session.says_last for session in sessions)
    assert len(turns) / MANY == pytest.approx(6.66, rel=0.1)
    assert statistics.mean(turn.prompt for turn in turns) == pytest.approx(256, rel=0.05)
    assert statistics.mean(turn.output for turn in turns) == pytest.approx(277, rel=0.05)


def test_siblings_share_their_prompt_and_start_together():
    sessions = generate("rl_batch", programs=64, group_size=16, seed=3).sessions
    assert {session.arrival for session in sessions} == {0.0}
    prompts = [session.turns[0].prompt for session in sessions]
    assert [len(set(prompts[i : i + 16])) for i in range(0, 64, 16)] == [1, 1, 1, 1]
    assert len({session.prefix for session in sessions}) == 4
    assert all(session.prefix[0][1] == session.turns[0].prompt for session in sessions)
    totals = [sum(turn.output for turn in session.turns) for session in sessions]
    assert max(totals) > 3 * statistics.median(totals)


@pytest.mark.parametrize("name", NAMES)
def test_a_session_depends_on_seed_and_index_alone(name):
    def turns(**load):
        return [session.turns for session in generate(name, **load).sessions[:20]]

    load = {} if name == "rl_batch" else {"rate": 0.2}
    first = turns(programs=40, seed=5, **load)
    assert first == turns(programs=40, seed=5, **load)
    assert first != turns(programs=40, seed=6, **load)
    if load:
        assert first == turns(programs=40, seed=5, rate=3.0) == turns(programs=40, seed=5, concurrency=4)


@pytest.mark.parametrize("name", NAMES)
def test_turns_are_whole(name):
    for session in generate(name, programs=60, **({} if name == "rl_batch" else {"rate": 1})).sessions:
        assert all(turn.prompt >= 1 and turn.output >= 1 and 0 <= turn.gap < math.inf for turn in session.turns)
        assert session.turns[-1].gap == 0 and session.turns[-1].tool is None


def test_lengths_scale_and_a_system_prompt_comes_on_top():
    plain = generate("swe", programs=20, rate=1).sessions
    small = generate("swe", programs=20, rate=1, tokens=0.25, system_tokens=500).sessions
    for a, b in zip(plain, small, strict=True):
        assert b.tokens == pytest.approx(a.tokens / 4 + 500, abs=2 * len(a.turns))
        assert b.prefix == (("system", 500),)


def test_the_longest_context_counts_what_compaction_leaves():
    session = Session((Turn(100, 10, 1.0, "x"), Turn(50, 10, 1.0, "x", keep=20), Turn(30, 10)))
    assert session.tokens == 120  # 110, then 20 + 60, then + 40


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"name": "swee", "programs": 1, "rate": 1}, "no generator 'swee'; there are: swe"),
        ({"name": "swe", "programs": 0, "rate": 1}, "at least 1"),
        ({"name": "swe", "programs": 1}, "one of them"),
        ({"name": "swe", "programs": 1, "rate": 1, "concurrency": 1}, "one of them"),
        ({"name": "swe", "programs": 1, "rate": math.nan}, "above 0"),
        ({"name": "swe", "programs": 1, "concurrency": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_is_refused(arguments, words):
    with pytest.raises(UserError, match=words):
        generate(**arguments)
