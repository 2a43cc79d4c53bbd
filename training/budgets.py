"""How many rollouts each prompt gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rollout.environment import Row


class Budget(Protocol):
    """A member of the ``budget`` group."""

    def __call__(self, rows: Sequence[Row]) -> list[int]:
        """The number of rollouts of each row, in their order."""


class Uniform:
    """The same number for every prompt."""

    def __init__(self, samples: int = 8) -> None:
        self.samples = samples

    def __call__(self, rows: Sequence[Row]) -> list[int]:
        return [self.samples] * len(rows)
