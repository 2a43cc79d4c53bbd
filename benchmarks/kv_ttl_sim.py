"""KV retention under the virtual clock: stock, order alone, admission alone, ours and a bound, over workloads × loads.

    python -m benchmarks.kv_ttl_sim [--seeds N] [--programs 300] [--only swe] [--load overload] [--full]

Clients name their session and tell the scheduler nothing else. That a tool was called, or that an answer is the last of
its job, it learns as from an output in a known format: synthetic tokens say nothing, so the simulator tells it when the
output is there. At the knee ``turnstile_hints`` stands beside it, whose clients also name tools and last turns.

Paired by seed: every policy plays the same programs. The number of seeds is the cell's (``sim_cells.SEEDS``: more where
runs are cheap). Intervals are bootstrapped: seeds are drawn first, then programs of each; with one seed the programs
alone, which share an engine, so that those intervals are a little narrow. Each run is stored as it ends; a stopped
benchmark goes on where it was. ``--full`` adds overload on the second hardware, and every policy at light load.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.report import OPERATORS, Report
from benchmarks.sim_cells import FIRST, KNEE, LOADS, RL, SEEDS, STOCK, TRACE, Cell, Run
from benchmarks.sim_outcomes import Outcomes
from benchmarks.sim_plots import Point, trade_off
from benchmarks.sim_prediction import predict

GRID = ("fcfs", "program_fcfs", "turnstile", "clairvoyant")
OTHERS = ("plas", "ski_rental", "pin_to_pressure", "infercept")
CAPS = (4, 8, 16)
RL_CAPS = (8, 12, 16, 24, 32)
TTLS = (1.0, 4.0, 16.0, 64.0)
OURS, HINTS, BOUND = "turnstile", "turnstile_hints", "clairvoyant"


def cells(full: bool, programs: int) -> list[Cell]:
    found = []
    for hardware, knees in KNEE.items():
        for load in LOADS:
            for workload in knees:
                if workload == "sessions" and not TRACE.exists():
                    continue
                few = {"programs": min(programs, 60), "scale": 32} if workload == "sessions" else {"programs": programs}
                if hardware == FIRST or full or load != "overload":
                    found.append(Cell(workload, load, hardware, **few))
    return found


def runs(cell: Cell, seed: int, full: bool) -> list[Run]:
    """The grid at every seed; what is only shown beside it at the first."""
    grid = [Run(cell, policy, seed) for policy in GRID]
    grid += [Run(cell, "program_cap", seed, (("cap", n),)) for n in CAPS]
    if cell.load == "overload":
        return [*grid, Run(cell, "continuum", seed)]
    if seed or cell.hardware != FIRST or not (full or cell.load == "knee"):
        return grid
    endless = [Run(replace(cell, pool=None), STOCK, seed)]
    ttls = [Run(cell, "fixed_ttl", seed, (("ttl", t),)) for t in TTLS]
    hints = [Run(cell, OURS, seed, hints=True)]
    return [*grid, *hints, *(Run(cell, p, seed) for p in (*OTHERS, "continuum")), *ttls, *endless]


def rl_runs(seed: int, programs: int) -> list[Run]:
    found = []
    for hardware in RL:
        cell = Cell("rl_batch", "batch", hardware, programs)
        found += [Run(cell, policy, seed) for policy in GRID]
        found += [Run(cell, "program_cap", seed, (("cap", n),)) for n in RL_CAPS]
    return found


def judge(report: Report, store: Outcomes, grid: list[Cell]) -> None:
    """The bars over the grid."""
    upper, closed, tails, continuum = {}, {}, {}, {}
    rows = []
    for cell in grid:
        name = cell.name
        ratio, low, upper[name] = store.ratio(cell, OURS)
        bound = store.ratio(cell, BOUND)[0]
        if bound < 0.95:
            closed[name] = (1 - ratio) / (1 - bound)
        tails[name] = store.p99(cell, OURS) / store.p99(cell, STOCK)
        caps = [arm for arm in store.arms(cell) if arm.startswith("program_cap")]
        best = min(caps, key=lambda arm: store.ratio(cell, arm)[0])
        if cell.load == "overload":
            continuum[name] = store.mean(cell, OURS, "job_time") / store.mean(cell, "continuum", "job_time")
        played = store.seeds(cell, OURS, "seconds")
        rows.append((
            name, f"{len(played)} × {np.mean([*played.values()]):.1f} s", store.mean(cell, STOCK, "delay"),
            f"{ratio:.3f} [{low:.3f}, {upper[name]:.3f}]", f"{bound:.3f}",
            f"{store.ratio(cell, 'program_fcfs')[0]:.3f}", f"{store.ratio(cell, best)[0]:.3f} ({best.split()[1]})",
            f"{tails[name]:.2f}", f"{closed.get(name, float('nan')):.2f}", f"{continuum.get(name, float('nan')):.3f}",
        ))  # fmt: skip
    report.table(
        "delay ÷ stock's",
        ["cell", "seeds × a run", "stock s", "turnstile [95%]", "clairvoyant", "program_fcfs", "best cap", "first p99",
         "gap closed", "job time ÷ continuum"],
        rows,
    )  # fmt: skip
    report.figure("cells", len(grid))
    report.figure("cells_above_1_01", sum(x > 1.01 for x in upper.values()))
    worst(report, "worst_upper_bound", "<=", 1.01, upper)
    if closed:
        report.figure("gap_closed_median", float(np.median([*closed.values()])))
        report.bar("gap_closed_median", ">=", 0.85)
        worst(report, "gap_closed_worst", ">=", 0.60, closed)
    long = {name: x for name, x in continuum.items() if name.split("/")[0] in ("long_tools", "mixed")}
    worst(report, "continuum_long_and_mixed", "<=", 0.90, long)
    worst(report, "continuum_worst", "<=", 1.02, continuum)
    worst(report, "first_turn_p99_worst", "<=", 1.5, tails)


def worst(report: Report, figure: str, op: str, bound: float, cells: dict[str, float]) -> None:
    """A bar that every cell must clear; those that do not are named."""
    if not cells:  # --only another workload
        return
    report.figure(figure, max(cells.values()) if op == "<=" else min(cells.values()))
    report.bar(figure, op, bound)
    for name, value in cells.items():
        if not OPERATORS[op](value, bound):
            report.console.print(f"{figure}: {name} {value:.3f}", highlight=False)


def judge_rl(report: Report, store: Outcomes, batches: list[Cell]) -> None:
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


def show_others(report: Report, store: Outcomes, grid: list[Cell]) -> None:
    """At the knee of the first hardware, where one seed plays everything: what the bars do not ask for."""
    rows = []
    for cell in (c for c in grid if c.load == "knee" and c.hardware == FIRST):
        ttls = {arm: store.ratio(cell, arm)[0] for arm in store.arms(cell) if arm.startswith("fixed_ttl")}
        best = min(ttls, key=ttls.__getitem__)
        endless = store.ratio(replace(cell, pool=None), STOCK, stock=cell)[0]
        others = [f"{store.ratio(cell, arm, only=0)[0]:.3f}" for arm in (OURS, HINTS, *OTHERS, "continuum")]
        rows.append((cell.workload, *others, f"{ttls[best]:.3f} ({best.split()[1]} s)", f"{endless:.3f}"))
    columns = ["workload", OURS, HINTS, *OTHERS, "continuum", "best fixed TTL", "memory without end"]
    report.table("knee, delay ÷ stock's, the first seed alone", columns, rows)


def trade_offs(store: Outcomes, grid: list[Cell]) -> dict[str, list[Point]]:
    """The overload cells of the first hardware; caps by number make a curve."""
    cells = {}
    for cell in (c for c in grid if c.load == "overload" and c.hardware == FIRST):
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
    parser.add_argument("--seeds", type=int, help="in every cell")
    parser.add_argument("--programs", type=int, default=300)
    parser.add_argument("--only", choices=[*KNEE[FIRST], "rl_batch"], help="this workload alone")
    parser.add_argument("--load", choices=LOADS, help="this load alone: no bars")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write the picture there")
    args = parser.parse_args()
    report = Report("kv_ttl_sim")
    programs = 10 if args.quick else args.programs
    grid = [c for c in cells(args.full, programs) if args.only in (None, c.workload) and args.load in (None, c.load)]
    if args.quick:
        grid = [c for c in grid if c.workload == "swe" and c.hardware == FIRST]
    store = Outcomes(report)
    rl = args.only in (None, "rl_batch") and args.load is None
    seeds = {workload: 1 if args.quick else args.seeds or count for workload, count in SEEDS.items()}
    todo = [run for cell in grid for seed in range(seeds[cell.workload]) for run in runs(cell, seed, args.full)]
    if rl:
        todo += [run for seed in range(seeds["rl_batch"]) for run in rl_runs(seed, 16 if args.quick else 256)]
    store.play(todo)
    if args.only in (None, "sessions"):
        report.input("recorded_sessions", TRACE, "the cells of the workload sessions were not played")
    if grid:
        judge(report, store, grid)
        show_others(report, store, grid)
        if args.plots:
            args.plots.mkdir(parents=True, exist_ok=True)
            trade_off(args.plots / "kv_ttl_sim_overload.png", trade_offs(store, grid))
    if rl:
        judge_rl(report, store, list({run.cell: None for run in store.by_run if run.cell.load == "batch"}))
    if args.only is None and args.load is None and not args.quick:
        predict(report)
    store.clear()
    report.finish(args.quick or args.load is not None)


if __name__ == "__main__":
    main()
