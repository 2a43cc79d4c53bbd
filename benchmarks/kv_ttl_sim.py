"""KV retention under the virtual clock: stock, order alone, admission alone, ours and a bound, over workloads × loads.

    python -m benchmarks.kv_ttl_sim [--seeds 1] [--programs 300] [--only swe] [--full]

Paired by seed: every policy plays the same programs. Intervals are bootstrapped over the programs of all seeds (those
of one run share an engine, so the intervals are a little narrow). Each run is stored as it ends; a stopped benchmark
goes on where it was. ``--full`` adds the second hardware at all loads, and every policy at light load.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arms import STORE, commit
from benchmarks.report import Report
from benchmarks.sim_cells import KNEE, LOADS, RL, TRACE, Cell, Run, simulate_run
from benchmarks.sim_plots import Point, trade_off
from benchmarks.sim_prediction import predict

GRID = ("fcfs", "program_fcfs", "turnstile", "clairvoyant")
OTHERS = ("plas", "ski_rental", "pin_to_pressure", "infercept")
CAPS = (4, 8, 16)
RL_CAPS = (8, 12, 16, 24, 32)
TTLS = (1.0, 4.0, 16.0, 64.0)
OURS, STOCK, BOUND = "turnstile", "fcfs", "clairvoyant"
DRAWS = 2000  # of the bootstrap


def cells(full: bool, programs: int) -> list[Cell]:
    found = []
    for hardware, knees in KNEE.items():
        for load in LOADS:
            for workload in knees:
                if workload == "sessions" and not TRACE.exists():
                    continue
                few = {"programs": min(programs, 60), "scale": 32} if workload == "sessions" else {"programs": programs}
                if hardware == "h100_8b" or full or load == "knee":
                    found.append(Cell(workload, load, hardware, **few))
    return found


def runs(cell: Cell, seed: int, full: bool) -> list[Run]:
    plain = [Run(cell, policy, seed) for policy in GRID]
    capped = [Run(cell, "program_cap", seed, (("cap", n),)) for n in CAPS]
    first = cell.hardware == "h100_8b"
    if cell.load == "light" and not full:
        return plain
    if cell.load == "overload":
        return [*plain, *capped, Run(cell, "continuum", seed)]
    if not first:
        return plain + capped
    endless = [Run(replace(cell, pool=None), STOCK, seed)]
    ttls = [Run(cell, "fixed_ttl", seed, (("ttl", t),)) for t in TTLS]
    return [*plain, *capped, *(Run(cell, p, seed) for p in (*OTHERS, "continuum")), *ttls, *endless]


def rl_runs(seed: int, programs: int) -> list[Run]:
    found = []
    for hardware in RL:
        cell = Cell("rl_batch", "batch", hardware, programs)
        found += [Run(cell, policy, seed) for policy in GRID]
        found += [Run(cell, "program_cap", seed, (("cap", n),)) for n in RL_CAPS]
    return found


class Store:
    """Outcomes by run, kept on disk under the commit."""

    def __init__(self, report: Report) -> None:
        self._folder = STORE / "kv_ttl_sim" / (commit()[:12] or "no-commit")
        self._folder.mkdir(parents=True, exist_ok=True)
        self._report = report
        self.outcomes: dict[Run, dict[str, Any]] = {}

    def play(self, todo: Iterable[Run]) -> None:
        todo = list(dict.fromkeys(todo))
        missing = []
        for run in todo:
            if self._path(run).exists():
                self.outcomes[run] = json.loads(self._path(run).read_text())
            else:
                missing.append(run)
        start, workers = time.monotonic(), len(os.sched_getaffinity(0))
        os.environ["OMP_NUM_THREADS"] = "1"
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            for done, (run, outcome) in enumerate(zip(missing, pool.map(simulate_run, missing), strict=True), 1):
                self._path(run).write_text(json.dumps(outcome))
                self.outcomes[run] = outcome
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
        return list(dict.fromkeys(run.arm for run in self.outcomes if run.cell == cell))

    def of(self, cell: Cell, arm: str, field: str) -> np.ndarray:
        """One number a program (of all seeds), or one a seed."""
        found = sorted((run.seed, run) for run in self.outcomes if run.cell == cell and run.arm == arm)
        return np.concatenate([np.atleast_1d(self.outcomes[run][field]) for _, run in found])

    def mean(self, cell: Cell, arm: str, field: str) -> float:
        """Seconds a job."""
        return float(self.of(cell, arm, field).sum() / self.of(cell, arm, "jobs").sum())

    def ratio(self, cell: Cell, arm: str, field: str = "delay") -> tuple[float, float, float]:
        """Arm ÷ stock with its 95% interval: paired bootstrap over programs."""
        ours, stock = self.of(cell, arm, field), self.of(cell, STOCK, field)
        draws = np.random.default_rng(0).integers(len(ours), size=(DRAWS, len(ours)))
        spread = ours[draws].sum(1) / stock[draws].sum(1)
        return float(ours.sum() / stock.sum()), *(float(x) for x in np.quantile(spread, (0.025, 0.975)))

    def p99(self, cell: Cell, arm: str) -> float:
        return float(np.percentile(self.of(cell, arm, "first_turn"), 99))


def judge(report: Report, store: Store, grid: list[Cell]) -> None:
    """The bars over the grid."""
    upper, closed, tails, continuum = {}, {}, {}, {}
    rows = []
    for cell in grid:
        ratio, low, high = store.ratio(cell, OURS)
        bound = store.ratio(cell, BOUND)[0]
        upper[cell.name] = high
        if bound < 0.95:
            closed[cell.name] = (1 - ratio) / (1 - bound)
        tails[cell.name] = store.p99(cell, OURS) / store.p99(cell, STOCK)
        caps = [arm for arm in store.arms(cell) if arm.startswith("program_cap")]
        best = min(caps, key=lambda arm: store.ratio(cell, arm)[0], default=None)
        if cell.load == "overload":
            continuum[cell.name] = store.mean(cell, OURS, "job_time") / store.mean(cell, "continuum", "job_time")
        rows.append((
            cell.name, store.mean(cell, STOCK, "delay"), f"{ratio:.3f} [{low:.3f}, {high:.3f}]", f"{bound:.3f}",
            f"{store.ratio(cell, 'program_fcfs')[0]:.3f}",
            f"{store.ratio(cell, best)[0]:.3f} ({best.split()[1]})" if best else "", f"{tails[cell.name]:.2f}",
            f"{closed.get(cell.name, float('nan')):.2f}", f"{continuum.get(cell.name, float('nan')):.3f}",
        ))  # fmt: skip
    report.table(
        "delay ÷ stock's",
        ["cell", "stock s", "turnstile [95%]", "clairvoyant", "program_fcfs", "best cap", "first p99", "gap closed",
         "job time ÷ continuum"],
        rows,
    )  # fmt: skip
    worst = max(upper, key=upper.__getitem__)
    report.console.print(f"worst upper bound: {worst}; widest first turn: {max(tails, key=tails.__getitem__)}")
    report.figure("worst_upper_bound", upper[worst])
    report.bar("worst_upper_bound", "<=", 1.01)
    report.figure("cells", len(grid))
    report.figure("cells_above_1_01", sum(x > 1.01 for x in upper.values()))
    if closed:
        report.figure("gap_closed_median", float(np.median(list(closed.values()))))
        report.figure("gap_closed_worst", min(closed.values()))
        report.bar("gap_closed_median", ">=", 0.85)
        report.bar("gap_closed_worst", ">=", 0.60)
    long = [x for name, x in continuum.items() if name.split("/")[0] in ("long_tools", "mixed")]
    if long:
        report.figure("continuum_long_and_mixed", max(long))
        report.bar("continuum_long_and_mixed", "<=", 0.90)
    if continuum:
        report.figure("continuum_worst", max(continuum.values()))
        report.bar("continuum_worst", "<=", 1.02)
    report.figure("first_turn_p99_worst", max(tails.values()))
    report.bar("first_turn_p99_worst", "<=", 1.5)


def judge_rl(report: Report, store: Store, batches: list[Cell]) -> None:
    """Makespan of one training step's rollouts, mean over seeds."""
    rows, gains, margins = [], [], []
    for cell in batches:
        spans = {arm: float(store.of(cell, arm, "makespan").mean()) for arm in store.arms(cell)}
        best = min((arm for arm in spans if arm.startswith("program_cap")), key=spans.__getitem__)
        gains.append(spans[STOCK] / spans[OURS])
        margins.append(spans[best] / spans[OURS])
        rows.append((cell.hardware, spans[STOCK], spans["program_fcfs"], f"{spans[best]:.0f} ({best})", spans[OURS],
                     spans[BOUND], gains[-1], margins[-1]))  # fmt: skip
    report.table(
        "RL batch, makespan s",
        ["hardware", "stock", "program_fcfs", "best cap", "turnstile", "clairvoyant", "stock ÷ ours", "cap ÷ ours"],
        rows,
    )
    report.figure("rl_makespan_gain", min(gains))
    report.figure("rl_makespan_cap_over_ours", min(margins))
    report.bar("rl_makespan_gain", ">=", 1.3)
    report.bar("rl_makespan_cap_over_ours", ">=", 1.0)


def show_others(report: Report, store: Store, grid: list[Cell]) -> None:
    """At the knee of the first hardware: every policy, the best fixed TTL, memory without end."""
    rows = []
    for cell in (c for c in grid if c.load == "knee" and c.hardware == "h100_8b"):
        ttls = {arm: store.ratio(cell, arm)[0] for arm in store.arms(cell) if arm.startswith("fixed_ttl")}
        best = min(ttls, key=ttls.__getitem__)
        endless = store.of(replace(cell, pool=None), STOCK, "delay").sum() / store.of(cell, STOCK, "delay").sum()
        others = [f"{store.ratio(cell, policy)[0]:.3f}" for policy in (*OTHERS, "continuum")]
        rows.append((cell.workload, *others, f"{ttls[best]:.3f} ({best.split()[1]} s)", f"{endless:.3f}"))
    report.table(
        "knee, delay ÷ stock's", ["workload", *OTHERS, "continuum", "best fixed TTL", "memory without end"], rows
    )


def trade_offs(store: Store, grid: list[Cell]) -> dict[str, list[Point]]:
    """The overload cells of the first hardware; caps by number make a curve."""
    cells = {}
    for cell in (c for c in grid if c.load == "overload" and c.hardware == "h100_8b"):
        stock = store.mean(cell, STOCK, "job_time"), store.p99(cell, STOCK)
        cells[cell.workload] = [
            Point(policy, store.mean(cell, arm, "job_time") / stock[0], store.p99(cell, arm) / stock[1], label)
            for arm in store.arms(cell)
            if arm not in (STOCK, BOUND)
            for policy, _, label in [arm.partition(" ")]
        ]
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--programs", type=int, default=300)
    parser.add_argument("--only", help="this workload alone")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write the picture there")
    args = parser.parse_args()
    report = Report("kv_ttl_sim")
    programs = 20 if args.quick else args.programs
    grid = [c for c in cells(args.full, programs) if args.only in (None, c.workload)]
    if args.quick:
        grid = [c for c in grid if c.workload == "swe" and c.hardware == "h100_8b"]
    store = Store(report)
    rl = args.only in (None, "rl_batch")
    store.play(
        run
        for seed in range(args.seeds)
        for run in [
            *(run for cell in grid for run in runs(cell, seed, args.full)),
            *(rl_runs(seed, 32 if args.quick else 256) if rl else []),
        ]
    )
    if grid:
        judge(report, store, grid)
        show_others(report, store, grid)
        if args.plots:
            args.plots.mkdir(parents=True, exist_ok=True)
            trade_off(args.plots / "kv_ttl_sim_overload.png", trade_offs(store, grid))
    if rl:
        judge_rl(report, store, list({run.cell: None for run in store.outcomes if run.cell.load == "batch"}))
    if args.only is None and not args.quick:
        predict(report)
    store.clear()
    report.finish(args.quick)


if __name__ == "__main__":
    main()
