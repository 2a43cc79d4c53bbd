"""Recorded traces: what a line says is what the session does."""

import gzip
import json
from pathlib import Path

import pytest

from rollout.errors import UserError
from rollout.scheduling.traces import read_trace
from rollout.scheduling.workloads import Turn

RECORDED = Path(__file__).parents[4] / "shared" / "traces"


def request(t, tokens, out, stop, gap, ranges):
    return {"t": t, "in": tokens, "out": out, "stop": stop, "gap": gap, "hash_ranges": ranges}


SESSION = {
    "block_size": 64,
    "requests": [
        request(0, 640, 50, "tool_use", 0.0, [[1, 10]]),
        request(9, 800, 30, "end_turn", 3.0, [[1, 10], [12, 13]]),  # extends: 640 + 50 are there, 110 are new
        request(99, 900, 20, "tool_use", 5000.0, [[1, 10], [12, 14]]),  # after a person's pause, cut at 600 s
        request(120, 500, 20, "tool_use", 2.0, [[1, 4], [20, 23]]),  # compaction: 4 blocks stay
        request(130, 505, 20, "", None, [[1, 4], [20, 23]]),  # the answer was not kept: the prompt of before stays
    ],
}


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "sessions.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(SESSION).encode() + b"\n\n"))
    return path


def test_gaps_prompts_and_compaction_are_read(trace):
    (session,) = read_trace(trace, programs=1, concurrency=1).sessions
    assert session.turns == (
        Turn(640, 50, 3.0, "tool"),
        Turn(110, 30, 600.0, None),
        Turn(70, 20, 2.0, "tool"),
        Turn(244, 20, 10.0, "tool", keep=256),  # a gap that was not recorded: from arrival to arrival
        Turn(5, 20, 0.0, None, keep=500),
    )
    assert session.named and not session.says_last


def test_lengths_scale(trace):
    (session,) = read_trace(trace, programs=1, concurrency=1, tokens=0.5, longest_gap=50).sessions
    assert session.turns[1] == Turn(55, 15, 50, None) and session.turns[3].keep == 128


def test_more_programs_than_sessions_start_again(trace):
    workload = read_trace(trace, programs=5, rate=1.0, seed=2)
    assert len({session.turns for session in workload.sessions}) == 1
    times = [session.arrival for session in workload.sessions]
    assert times == sorted(times) and len(set(times)) == 5


def test_requests_without_sessions_keep_their_order_and_share_their_prefixes(tmp_path):
    path = tmp_path / "requests.jsonl"
    lines = [(0, 1000, 6, [1, 2]), (100, 600, 7, [1, 3]), (400, 512, 8, [1])]
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    path.write_text("\n".join(json.dumps(dict(zip(names, line, strict=True))) for line in lines))
    sessions = read_trace(path, programs=3, rate=0.5).sessions
    assert [session.arrival for session in sessions] == pytest.approx([0, 1.5, 6])  # three in 6 s, stretched alike
    assert [session.prefix for session in sessions] == [
        (("1", 512), ("2", 488)),
        (("1", 512), ("3", 88)),
        (("1", 512),),
    ]
    assert [session.turns for session in sessions] == [(Turn(1000, 6),), (Turn(600, 7),), (Turn(512, 8),)]
    assert not any(session.named or session.says_last for session in sessions)


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "line 1: neither"),
        ("[1]", "line 1: neither"),
        ('{"requests": []}', "line 1"),
        ("", "no line"),
        ("\x00\xff", "line 1"),
    ],
)
def test_what_is_no_trace_is_refused_by_line(tmp_path, text, words):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        read_trace(path, programs=1, rate=1.0)
    with pytest.raises(UserError, match="no such file"):
        read_trace(tmp_path / "none", programs=1, rate=1.0)


@pytest.mark.skipif(not RECORDED.is_dir(), reason="no recorded traces beside the checkout")
def test_the_recorded_sessions():
    sessions = read_trace(RECORDED / "claude_code_sessions.jsonl.gz", programs=100, rate=0.1).sessions
    turns = [turn for session in sessions for turn in session.turns]
    assert len(turns) == 3881
    assert 50 < sum(turn.keep is not None for turn in turns) < 600  # compaction and dropped thinking are the exception
    assert max(session.tokens for session in sessions) < 140_000
    # 3,342 turns stopped for a tool; those that end their session have nothing after them
    assert sum(turn.tool == "tool" for turn in turns) == 3300
