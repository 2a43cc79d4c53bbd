"""The outcomes of ``kv_ttl_sim``: played once, kept on disk until all are there, compared in pairs by seed."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arms import STORE, code
from benchmarks.report import Report
from benchmarks.sim_cells import STOCK, Cell, Run, simulate_run

DRAWS = 2000  # of the bootstrap


class Outcomes:
    """Outcomes by run, kept on disk under the code that made them."""

    def __init__(self, report: Report) -> None:
        self._folder = STORE / "kv_ttl_sim" / (code() or "no-commit")
        self._folder.mkdir(parents=True, exist_ok=True)
        self._report = report
        self.by_run: dict[Run, dict[str, Any]] = {}

    def play(self, todo: Iterable[Run]) -> None:
        todo = list(dict.fromkeys(todo))
        missing = []
        for run in todo:
            if self._path(run).exists():
                self.by_run[run] = json.loads(self._path(run).read_text())
            else:
                missing.append(run)
        start, workers = time.monotonic(), len(os.sched_getaffinity(0))
        os.environ["OMP_NUM_THREADS"] = "1"
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            for done, (run, outcome) in enumerate(zip(missing, pool.map(simulate_run, missing), strict=True), 1):
                self._path(run).write_text(json.dumps(outcome))
                self.by_run[run] = outcome
                rate = done / (time.monotonic() - start)
                self._report.console.print(
                    f"{done}/{len(missing)} {run.cell.name} {run.arm} seed {run.seed}; "
                    f"{(len(missing) - done) / rate / 60:.1f} min left", style="dim", highlight=False
                )  # fmt: skip

    def clear(self) -> None:
        """A benchmark that ended leaves nothing to go on from."""
        shutil.rmtree(self._folder)

    def _path(self, run: Run) -> Path:
        return self._folder / f"{hashlib.sha256(run.key.encode()).hexdigest()[:20]}.json"

    def arms(self, cell: Cell) -> list[str]:
        return list(dict.fromkeys(run.arm for run in self.by_run if run.cell == cell))

    def seeds(self, cell: Cell, arm: str, field: str) -> dict[int, np.ndarray]:
        """One number a program, or one a run, by seed."""
        found = sorted((run.seed, run) for run in self.by_run if run.cell == cell and run.arm == arm)
        return {seed: np.atleast_1d(self.by_run[run][field]) for seed, run in found}

    def of(self, cell: Cell, arm: str, field: str) -> np.ndarray:
        """Those of all seeds."""
        return np.concatenate([*self.seeds(cell, arm, field).values()])

    def mean(self, cell: Cell, arm: str, field: str) -> float:
        """Seconds a job."""
        return float(self.of(cell, arm, field).sum() / self.of(cell, arm, "jobs").sum())

    def ratio(
        self, cell: Cell, arm: str, *, stock: Cell | None = None, only: int | None = None
    ) -> tuple[float, float, float]:
        """Delay ÷ stock's in the same cell (or in ``stock``), and its 95% interval.

        Of the seeds that the arm played, or of one ``only``.
        """
        theirs = self.seeds(stock or cell, STOCK, "delay")
        ours = self.seeds(cell, arm, "delay").items()
        return bootstrap([(delays, theirs[seed]) for seed, delays in ours if only in (None, seed)])

    def p99(self, cell: Cell, arm: str) -> float:
        return float(np.percentile(self.of(cell, arm, "first_turn"), 99))


def bootstrap(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float, float]:
    """Σ ours ÷ Σ theirs with its 95% interval. A pair is a seed, with a number a program on both sides.

    Seeds are drawn with replacement, then the programs of each seed that was drawn, in pairs.
    """
    rng = np.random.default_rng(0)
    sums = np.empty((2, len(pairs), DRAWS))  # of programs drawn again, a seed
    for seed, arms in enumerate(pairs):
        draws = rng.integers(len(arms[0]), size=(DRAWS, len(arms[0])))
        sums[:, seed] = [values[draws].sum(1) for values in arms]
    # A seed that is drawn twice brings two independent draws of its programs.
    seeds, which = rng.integers(len(pairs), size=(DRAWS, len(pairs))), rng.integers(DRAWS, size=(DRAWS, len(pairs)))
    ours, theirs = sums[:, seeds, which].sum(2)
    total = sum(ours.sum() for ours, _ in pairs) / sum(theirs.sum() for _, theirs in pairs)
    low, high = np.quantile(ours / theirs, (0.025, 0.975))
    return float(total), float(low), float(high)
