"""What a run writes down for people, and how a resumed one goes on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rollout.buffer import Group
from rollout.episode import Episode, Sequence, Status, ToolCall, ToolResult, Turn
from rollout.plots import read_jsonl
from training.episode_record import MOST_TOKENS
from training.estimates import Estimate
from training.journal import Journal
from training.packing import TrainSequence, pack


def words(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def test_rows_of_undone_steps_are_cut_and_so_is_a_torn_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path, words)
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
    estimates = [[Estimate([])] * 2, [Estimate([])] * 2, [Estimate([])] * 2]
    journal = Journal(tmp_path, words)
    journal.write_episodes(4, groups, estimates, 2)
    assert not journal.episodes.exists(), "the step may still tell more of them"
    journal.write_metrics(4, {})
    rows = read_jsonl(journal.episodes)
    assert [(row["step"], row["advantage"], row["sample"]) for row in rows] == [(4, 0.0, 0), (4, 0.0, 0)]
    call = {"name": "calculator", "arguments": {"expression": "1+1"}, "result": "2", "error": False, "seconds": 0.1}
    assert rows[0]["turns"] == [
        {"reasoning": "hm", "content": "", "calls": [call]},
        {"reasoning": "", "content": "2", "calls": []},
    ]
    assert rows[0]["group_rewards"] == [1.0, 1.0]
    assert json.loads(json.dumps(rows[0])) == rows[0] and rows[0]["status"] == "finished"


def two_turns() -> Episode:
    """A call, its result, an answer: five own tokens in one sequence."""
    sequence = Sequence.open([1, 2, 3])
    sequence.append_own([10, 11, 12], [-0.1, -0.2, -0.3], [0, 0, 0])
    sequence.append_injected([4, 5])
    sequence.append_own([13, 14], [-0.4, -0.5], [1, 2])
    asked = ToolCall("calculator", {})
    turns = [Turn("", "", [asked], [ToolResult(asked, "2", False, 0.1)]), Turn("", "2")]
    return Episode("p", "g", sequences=[sequence], turns=turns, rewards={"task": 1.0})


def test_each_own_token_has_its_text_its_advantage_and_both_log_probs(tmp_path: Path) -> None:
    episode, journal = two_turns(), Journal(tmp_path, words)
    advantages = np.array([0.5, 0.5, 0.5, 0.25, -1.0])
    journal.write_episodes(1, [Group("g", 1, 0, 0, [episode])], [[Estimate([advantages])]], 8)
    mask = np.array([False, True, True, True, True])  # the first was trained in an earlier window
    other = TrainSequence.of(episode.sequences[0].snapshot(), 7, advantages, advantages, mask=mask)
    other.token_ids = other.token_ids + 20
    mine = TrainSequence.of(episode.sequences[0], 3, advantages, advantages, mask=mask)
    batches = pack([other, mine], max_tokens=32, pad_id=0)
    journal.score(
        batches, [batch.own(batch.behaviour_logprobs) + (0.01 * batch.own(batch.targets)) for batch in batches]
    )
    journal.flush()
    (row,) = read_jsonl(journal.episodes)
    assert row["prompt"] == "w1 w2 w3"
    assert row["advantage"] == 0.5, "of its first token"
    first, second = [turn["tokens"] for turn in row["turns"]]
    assert first == {
        "text": ["w10", "w11", "w12"],
        "advantage": 0.5,
        "engine": [-0.1, -0.2, -0.3],
        "version": 0,
        "difference": [None, pytest.approx(0.11), pytest.approx(0.12)],
    }
    assert second["text"] == ["w13", "w14"] and second["advantage"] == [0.25, -1.0] and second["version"] == [1, 2]
    assert second["difference"] == pytest.approx([0.13, 0.14])


def test_a_sequence_that_was_not_trained_has_no_trainers_log_probs(tmp_path: Path) -> None:
    journal = Journal(tmp_path, words)
    journal.write_episodes(1, [Group("g", 1, 0, 0, [two_turns()])], [[Estimate([np.zeros(5)])]], 8)
    journal.score([], torch.empty(0, 0).unbind())
    journal.flush()
    (row,) = read_jsonl(journal.episodes)
    assert all("difference" not in turn["tokens"] for turn in row["turns"])


def test_a_long_episode_is_recorded_by_its_ends_and_an_open_turn_too(tmp_path: Path) -> None:
    sequence = Sequence.open([1])
    n = MOST_TOKENS + 50
    sequence.append_own(list(range(n)), [-1.0] * n, [0] * n)
    episode = Episode("p", "g", sequences=[sequence], status=Status.UNFINISHED)
    journal = Journal(tmp_path, words)
    journal.write_episodes(1, [Group("g", 1, 0, 0, [episode])], [[Estimate([np.arange(n) / n])]], 8)
    sequence.append_own([9], [-1.0], [1])  # the next window writes on while the record is held
    journal.flush()
    (row,) = read_jsonl(journal.episodes)
    (turn,) = row["turns"]
    half = MOST_TOKENS // 2
    assert turn["open"] and turn["tokens"]["gap"] == [half, 50]
    assert turn["tokens"]["text"] == [f"w{i}" for i in [*range(half), *range(n - half, n)]]
    assert len(turn["tokens"]["advantage"]) == MOST_TOKENS
