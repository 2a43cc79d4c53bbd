"""``python -m rollout.evaluate url=``: the same agent loop against a running server, tools run by the client."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rollout.agent import run_episode
from rollout.chat_client import Server
from rollout.config import LimitsConfig
from rollout.environment import Row
from rollout.episode import Episode
from rollout.errors import UserError
from rollout.tasks import ToolEnvironment
from rollout.tools.calculator import calculator
from tests.serving.lessons import EASY, HARD, question

pytestmark = pytest.mark.timeout(400)
LIMITS = LimitsConfig(max_new_tokens=48)


def server(client: Any, temperature: float = 0.0, seed: int | None = None, model: str | None = None) -> Server:
    return Server(str(client.base_url), model, temperature, seed, "auto", 60.0)


def play(server: Server, rows: list[Row], samples: int = 1, tools: bool = True) -> list[Episode]:
    async def all_of_them() -> list[Episode]:
        await server.connect()
        jobs = [(row, sample) for row in rows for sample in range(samples)]
        environments = [ToolEnvironment([calculator] * tools, lambda a, gold: a == gold) for _ in jobs]
        each = zip(jobs, environments, strict=True)
        return await asyncio.gather(*(run_episode(r, e, server.speaker(), LIMITS, r.id, i) for (r, i), e in each))

    return asyncio.run(all_of_them())


def test_a_tool_episode_through_chat_completions(client: Any) -> None:
    (episode,) = play(server(client), [Row("hard", question(HARD), "It is 408.")])
    assert episode.success and [r.content for r in episode.tool_results] == ["408"]
    assert episode.turns[0].reasoning.strip() == "12*34 is hard" and episode.own_tokens > 10
    (episode,) = play(server(client), [Row("easy", question(EASY), "It is 4.")], tools=False)
    assert episode.success and not episode.tool_results


def said(episodes: list[Episode]) -> list[str]:
    return [repr([(turn.reasoning, turn.content) for turn in episode.turns]) for episode in episodes]


def test_samples_of_one_question_differ_and_come_again(client: Any) -> None:
    """On a question that the parrot was never taught: equal samples would make pass@k the same as accuracy."""
    rows = [Row("new", question("12 12 hard 34 is It?"), "")]
    hot = server(client, temperature=2.0, seed=1)
    texts = said(play(hot, rows, samples=4, tools=False))
    again = said(play(server(client, temperature=2.0, seed=1), rows, samples=4, tools=False))
    assert again == texts
    assert len(set(texts)) > 1


def test_many_seeded_requests_at_once(client: Any) -> None:
    """More prompt tokens than one batch holds: each request has 200 of them, and comes with a seed."""
    rows = [Row(f"{i}", question(f"{i} " + "1 2 " * 40), "") for i in range(40)]
    assert len(play(server(client, temperature=1.0, seed=1), rows, tools=False)) == 40


def test_a_dead_address_and_an_unknown_model_are_one_line(client: Any) -> None:
    with pytest.raises(UserError, match=r"model: http://\S+ does not serve 'gpt', only parrot"):
        asyncio.run(server(client, model="gpt").connect())
    dead = Server("http://127.0.0.1:9/v1", None, 0.0, None, "auto", 5.0)
    with pytest.raises(UserError, match=r"url: nothing answers at http://127\.0\.0\.1:9/v1 .*python -m serving"):
        asyncio.run(dead.connect())


def test_the_command_evaluates_a_server(client: Any, tmp_path: Path) -> None:
    overrides = [
        f"url={client.base_url}",
        f"run_dir={tmp_path / 'run'}",
        "evaluation.questions=12",
        "evaluation.samples=2",
        "limits.max_new_tokens=24",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "rollout.evaluate", *overrides], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "accuracy on unseen questions" in done.stdout and not done.stderr
    record = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert record["checkpoint"] is None and record["task"] == "arithmetic" and "arithmetic" in record["name"]
    sampled = record["sampled"]
    assert sampled["dropped"] == 0 and 0 <= sampled["accuracy"] <= sampled["pass@2"] <= 1 and sampled["tokens"] > 0
    assert sampled["questions"] + sampled["facts"]["questions"] == 12 and "pass@2" not in record["greedy"]
    assert (tmp_path / "run" / "evaluation.png").stat().st_size > 5000
    assert (tmp_path / "run" / "config.yaml").exists()
