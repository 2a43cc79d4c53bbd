"""What a run writes down for people: metrics.jsonl, episodes.jsonl, and the row of a step that was undone is cut."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rollout.buffer import Group
from rollout.episode import Episode
from training.episode_record import Decode, add_scores, episode_record, scored
from training.estimates import Estimate
from training.packing import MicroBatch


class Journal:
    """Appends JSON lines; each line carries its ``step``. ``decode`` gives the text of token ids.

    Episodes are held back until their step has been trained, which may tell the trainer's log-probs of their tokens.
    """

    def __init__(self, run_dir: Path, decode: Decode) -> None:
        self.metrics, self.episodes = run_dir / "metrics.jsonl", run_dir / "episodes.jsonl"
        self.decode = decode
        self._held: list[tuple[dict[str, Any], Episode]] = []

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
        self.flush()

    def write_episodes(
        self, step: int, groups: Sequence[Group], estimates: Sequence[Sequence[Estimate]], n: int
    ) -> None:
        """Take note of one episode of each of the first ``n`` groups, as it now is, with its advantages."""
        for group, each in list(zip(groups, estimates, strict=True))[:n]:
            episode = group.episodes[0].snapshot()
            row = {"step": step, **episode_record(episode, each[0], self.decode)}
            row["group_rewards"] = [round(member.reward, 4) for member in group.episodes]
            self._held.append((row, episode))

    def score(self, micro_batches: Sequence[MicroBatch], logprobs: Sequence[torch.Tensor]) -> None:
        """Note the trainer's log-probs of the episodes that are held back; flat, as ``MicroBatch.own`` gives them."""
        scores = scored(micro_batches, logprobs) if self._held else {}
        for row, episode in self._held:
            add_scores(row, episode, scores)

    def flush(self) -> None:
        """Write what is held back."""
        _append(self.episodes, [row for row, _ in self._held])
        self._held = []


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    if rows:
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
