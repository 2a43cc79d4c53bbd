"""Prompts of four kinds in equal parts, for budgets: chains that hardly ever, seldom, often and nearly always succeed.

A chain's success rate falls with its length (``rollout.tasks.long_chain``). The hopeless ones are as long as the hard
ones, and their gold answer is none that can be given, as with a broken verifier: only the verifier's word tells them
apart.
The test set has the two kinds that can be learnt.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from random import Random

from rollout.environment import Row
from rollout.tasks import Split
from rollout.tasks.long_chain import STARTS, WORDINGS, LongChain, held_out

COUNTS = {"trivial": (1, 2), "medium": (6, 10), "hard": (20, 28), "hopeless": (20, 28)}
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
        rows: list[Row] = []
        for kind, size in sizes.items():
            low, high = COUNTS[kind]
            chains = [
                chain for chain in itertools.product(STARTS, range(low, high + 1), WORDINGS)
                if held_out(*chain[:2]) == (split == "test")
            ]  # fmt: skip
            taken = {row.id for row in rows}  # by the hard ones, which have the hopeless ones' counts
            free = [row for row in (self._row(*chain) for chain in chains) if row.id not in taken]
            for row in rng.sample(free, size):
                rows.append(replace(row, difficulty=kind, answer=NO_ANSWER if kind == "hopeless" else row.answer))
        rng.shuffle(rows)
        return rows
