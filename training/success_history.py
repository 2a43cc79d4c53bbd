"""What became of each prompt's rollouts: what adaptive budgets estimate success rates and lengths from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rollout.episode import Episode
from rollout.errors import UserError

FILE = "success_history.json"


@dataclass
class Visit:
    """The rollouts that a prompt got at one time. ``round``: in which they ended; ``tokens``: own, of all of them."""

    group_id: str
    round: int
    rollouts: int = 0
    successes: int = 0
    tokens: int = 0


class SuccessHistory:
    """The last ``keep`` visits of each prompt, by the task's stable prompt id. ``now`` counts rounds."""

    def __init__(self, keep: int = 8) -> None:
        self.keep = keep
        self.now = 0
        self.visits: dict[str, list[Visit]] = {}

    def add(self, episodes: Iterable[Episode]) -> None:
        """Count finished episodes, by the verifier's word and not by their shaped rewards; groups may come in parts."""
        for episode in episodes:
            visits = self.visits.setdefault(episode.prompt_id, [])
            visit = next((v for v in visits if v.group_id == episode.group_id), None)
            if visit is None:
                visit = Visit(episode.group_id, self.now)
                visits.append(visit)
                del visits[: -self.keep]
            visit.rollouts += 1
            visit.successes += episode.success
            visit.tokens += episode.own_tokens

    def counts(self, prompt_ids: Sequence[str], half_life: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Successes and failures of each prompt, (n,) each; ``half_life`` rounds ago they count half."""
        found = []
        for prompt_id in prompt_ids:
            successes = failures = 0.0
            for visit in self.visits.get(prompt_id, ()):
                weight = 1.0 if half_life is None else 0.5 ** ((self.now - visit.round) / half_life)
                successes += weight * visit.successes
                failures += weight * (visit.rollouts - visit.successes)
            found.append((successes, failures))
        both = np.array(found).reshape(-1, 2)
        return both[:, 0], both[:, 1]

    def last_rates(self, prompt_ids: Sequence[str], least: int) -> np.ndarray:
        """Success rates over the last visits that have ``least`` rollouts together, (n,); nan where there are fewer."""
        rates = np.full(len(prompt_ids), np.nan)
        for i, prompt_id in enumerate(prompt_ids):
            rollouts = successes = 0
            for visit in reversed(self.visits.get(prompt_id, ())):
                rollouts, successes = rollouts + visit.rollouts, successes + visit.successes
                if rollouts >= least:
                    rates[i] = successes / rollouts
                    break
        return rates

    def tokens(self, prompt_ids: Sequence[str]) -> np.ndarray:
        """Own tokens that a rollout of each prompt takes, (n,); of one never seen, as the mean of all; at least 1."""
        means = {
            prompt_id: sum(v.tokens for v in visits) / sum(v.rollouts for v in visits)
            for prompt_id, visits in self.visits.items()
        }
        usual = float(np.mean([*means.values()])) if means else 1.0
        return np.maximum([means.get(prompt_id, usual) for prompt_id in prompt_ids], 1.0)

    def spent(self) -> list[tuple[float, int, int]]:
        """Of each visit after a prompt's first: success rate as seen before it, rollouts, round."""
        points = []
        for visits in self.visits.values():
            rollouts = successes = 0
            for visit in visits:
                if rollouts:
                    points.append((successes / rollouts, visit.rollouts, visit.round))
                rollouts, successes = rollouts + visit.rollouts, successes + visit.successes
        return points

    def merge(self, other: SuccessHistory) -> None:
        """Take in what another process or run has seen; a visit that both know counts once."""
        self.now = max(self.now, other.now)
        for prompt_id, visits in other.visits.items():
            known = {visit.group_id: visit for visit in self.visits.get(prompt_id, ())}
            both = known | {v.group_id: v for v in visits if v.rollouts > getattr(known.get(v.group_id), "rollouts", 0)}
            self.visits[prompt_id] = sorted(both.values(), key=lambda v: (v.round, v.group_id))[-self.keep :]

    def state_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {"now": self.now, "visits": {key: [asdict(v) for v in visits] for key, visits in self.visits.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.now = state["now"]
        self.visits = {key: [Visit(**visit) for visit in visits] for key, visits in state["visits"].items()}

    def write(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(self.state_dict()))

    @classmethod
    def read(cls, path: Path, keep: int = 8) -> SuccessHistory:
        """Of a checkpoint's folder, or the file itself; visits are from then on of an earlier run.

        Raises:
            UserError: there is no such file, or it holds something else.
        """
        history, file = cls(keep), path / FILE if path.is_dir() else path
        try:
            history.load_state_dict(json.loads(file.read_text()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"budget.history: {file} is no history of success rates ({type(error).__name__}: {error}); give a "
                f"checkpoint of a run with an adaptive budget, or its {FILE}"
            ) from error
        for visits in history.visits.values():
            for visit in visits:
                visit.group_id = f"{visit.group_id}@{file.resolve()}"  # ids of visits count epochs and so repeat
        return history
