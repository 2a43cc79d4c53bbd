"""What a run writes down for people, and how a resumed one goes on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from rollout.buffer import Group
from rollout.episode import Episode, ToolCall, ToolResult, Turn
from rollout.plots import read_jsonl
from training.estimates import Estimate
from training.journal import Journal


def test_rows_of_undone_steps_are_cut_and_so_is_a_torn_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for step in (1, 2, 3):
        journal.write_metrics(step, {"reward": step / 2, "note": "é\u2028"})
    whole = journal.metrics.read_text()
    journal.metrics.write_text(whole + '{"step": 2, "rew')  # killed in the middle of a line
    journal.cut_after(2)
    assert [row["step"] for row in read_jsonl(journal.metrics)] == [1, 2]
    assert whole.startswith(journal.metrics.read_text()), "what stays is untouched"
    journal.write_metrics(3, {"reward": 9})
    assert [row["reward"] for row in read_jsonl(journal.metrics)] == [0.5, 1.0, 9]
    journal.cut_after(0)
    assert read_jsonl(journal.metrics) == [] and not journal.episodes.exists()


def test_the_first_episode_of_each_group_can_be_read(tmp_path: Path) -> None:
    asked = ToolCall("calculator", {"expression": "1+1"})
    turns = [Turn("hm", "", [asked], [ToolResult(asked, "2", False, 0.1)]), Turn("", "2")]
    episodes = [Episode("p", "g", i, "1", turns=turns, rewards={"task": 1.0}, success=True) for i in range(2)]
    groups = [Group(f"g{i}", 2, 0, i, episodes) for i in range(3)]
    each = [[[], []], [[0.5, 0.5], [-0.5]], [[], []]]
    estimates = [[Estimate([np.array(values)]) for values in group] for group in each]
    journal = Journal(tmp_path)
    journal.write_episodes(4, groups, estimates, 2)
    rows = read_jsonl(journal.episodes)
    assert [(row["step"], row["advantage"], row["sample"]) for row in rows] == [(4, 0.0, 0), (4, 0.5, 0)]
    call = {"name": "calculator", "arguments": {"expression": "1+1"}, "result": "2", "error": False}
    assert rows[0]["turns"] == [
        {"reasoning": "hm", "content": "", "calls": [call]},
        {"reasoning": "", "content": "2", "calls": []},
    ]
    assert json.loads(json.dumps(rows[0])) == rows[0] and rows[0]["status"] == "finished"
