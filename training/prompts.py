"""The order of prompts: every epoch visits each row once, shuffled by seed; the state is two numbers."""

from __future__ import annotations

import random
from collections.abc import Sequence

from rollout.environment import Row
from rollout.errors import UserError


class PromptOrder:
    """Endless, seeded, resumable."""

    def __init__(self, rows: Sequence[Row], seed: int) -> None:
        if not rows:
            raise ValueError("no prompts to train on; the task's training split is empty")
        self.rows, self.seed = rows, seed
        self.epoch = self.position = 0
        self._order = self._shuffled()

    def take(self, n: int) -> list[tuple[Row, str]]:
        """The next ``n`` rows, each with the id of this visit to it."""
        taken = []
        for _ in range(n):
            if self.position == len(self.rows):
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._shuffled()
            row = self.rows[self._order[self.position]]
            taken.append((row, f"{row.id}.{self.epoch}"))
            self.position += 1
        return taken

    def _shuffled(self) -> list[int]:
        order = list(range(len(self.rows)))
        random.Random(f"{self.seed} {self.epoch}").shuffle(order)
        return order

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position, "rows": len(self.rows)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if state["rows"] != len(self.rows):
            raise UserError(f"task.size: the run began with {state['rows']} prompts, now there are {len(self.rows)}")
        self.epoch, self.position = state["epoch"], state["position"]
        self._order = self._shuffled()
