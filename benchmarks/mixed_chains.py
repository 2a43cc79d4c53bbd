"""Prompts of four kinds in equal parts, for budgets: chains that hardly ever, seldom, often and nearly always succeed.

A chain's success rate falls with its length (``rollout.tasks.long_chain``). The hopeless ones are of medium length,
and their gold answer is none that can be given, as with a broken verifier: only the verifier's word tells them apart.
The test set has the two kinds that can be learnt.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

from rollout.environment import Row
from rollout.tasks import Split
from rollout.tasks.long_chain import STARTS, WORDINGS, LongChain, held_out

COUNTS = {"trivial": (1, 2), "medium": (7, 9), "hard": (20, 28), "hopeless": (7, 9)}
NO_ANSWER = -1


class MixedChains(LongChain):
    """``size`` training rows, a quarter of each kind; ``test_size`` rows, half medium and half hard."""

    def __init__(self, *, name: str = "mixed_chains", size: int = 256, test_size: int = 1000, seed: int = 0) -> None:
        super().__init__(name=name, seed=seed)
        self._mixed = {
            "train": self._rows_of("train", dict.fromkeys(COUNTS, size // 4), Random(f"train {seed}")),
            "test": self._rows_of("test", dict.fromkeys(("medium", "hard"), test_size // 2), Random("test")),
        }

    def rows(self, split: Split) -> list[Row]:
        return self._mixed[split]

    def _rows_of(self, split: Split, sizes: dict[str, int], rng: Random) -> list[Row]:
        rows: dict[str, Row] = {}
        for kind, size in sizes.items():
            wanted = len(rows) + size
            while len(rows) < wanted:
                start, count = rng.choice(STARTS), rng.randint(*COUNTS[kind])
                row = self._row(start, count, rng.choice(WORDINGS))
                if held_out(start, count) == (split == "test") and row.id not in rows:
                    answer = NO_ANSWER if kind == "hopeless" else row.answer
                    rows[row.id] = replace(row, difficulty=kind, answer=answer)
        shuffled = [*rows.values()]
        rng.shuffle(shuffled)
        return shuffled
