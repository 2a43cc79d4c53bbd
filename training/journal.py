"""What a run writes down for people: metrics.jsonl, episodes.jsonl, and the row of a step that was undone is cut."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rollout.buffer import Group
from rollout.episode import Episode
from training.estimates import Estimate


class Journal:
    """Appends JSON lines; each line carries its ``step``."""

    def __init__(self, run_dir: Path) -> None:
        self.metrics, self.episodes = run_dir / "metrics.jsonl", run_dir / "episodes.jsonl"

    def cut_after(self, step: int) -> None:
        """Drop the rows of later steps: the resumed run writes them again."""
        for path in (self.metrics, self.episodes):
            if path.exists():
                lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
                scratch = path.with_suffix(".tmp")
                scratch.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
                scratch.replace(path)  # a kill in this moment must not cost the whole file

    def write_metrics(self, step: int, values: dict[str, Any]) -> None:
        _append(self.metrics, [{"step": step, **values}])

    def write_episodes(
        self, step: int, groups: Sequence[Group], estimates: Sequence[Sequence[Estimate]], n: int
    ) -> None:
        """One episode of each of the first ``n`` groups, with its advantage."""
        rows = [
            {"step": step, "advantage": _first(each[0].advantages), **episode_record(group.episodes[0])}
            for group, each in list(zip(groups, estimates, strict=True))[:n]
        ]
        _append(self.episodes, rows)


def episode_record(episode: Episode) -> dict[str, Any]:
    """An episode as a person reads it: turns, calls and results, without token arrays."""
    turns = [
        {
            "reasoning": turn.reasoning,
            "content": turn.content,
            "calls": [
                {"name": r.call.name, "arguments": r.call.arguments, "result": r.content, "error": r.error}
                for r in turn.results
            ],
        }
        for turn in episode.turns
    ]
    return {
        "prompt_id": episode.prompt_id,
        "sample": episode.sample,
        "difficulty": episode.difficulty,
        "success": episode.success,
        "rewards": episode.rewards,
        "status": str(episode.status),
        "tokens": episode.own_tokens,
        "turns": turns,
    }


def _first(sequences: Sequence[np.ndarray]) -> float:
    return next((float(values[0]) for values in sequences if len(values)), 0.0)


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
