"""Job times of tool-calling programs on real vLLM (CPU), our scheduler against stock: one pool, then pools by size.

The pinned case: 12 programs of 6 turns on a model of 31.5M random weights, tools of 0.2 to 5 s (real waiting), a KV
pool of 220 blocks of 32 tokens, which is a third of what all programs hold at their longest. Then a curve over pools
of a quarter, half, one and two working sets, of shorter runs in pairs. Stock is vLLM as it comes: FCFS, prefix caching
and chunked prefill on. The engine runs in this process and on one thread. Two engines of equal settings differ by
several percent in speed: the arms of a seed share one, and each run gets a scheduler and a cache of its own, warmed up
before it is timed. Arms take turns: each seed is played by all of them, in an order that rotates, with the same tokens,
lengths, arrivals and tools. A run is stored as it ends, and a benchmark that was stopped goes on from there.

Clients name their session and tell the scheduler nothing else, in every arm of ours. The model's outputs would be
noise; they are held to the marker of a tool call, or in a program's last turn to a word, which the plug-in reads off
the tokens as it would on a server. So a program's end shows in its last answer alone: its KV stays until it is idle
past its break-even, or wanted. ``--full`` adds ``turnstile_hints``, whose clients also name the tool and the last turn.

Job time is from the arrival of a program to its last token, delay is job time less its tools. Recomputed are prompt
tokens that the same program had had computed before, from vLLM's own count of cached tokens; "all again" counts what
preemptions cost too, from the scheduler's outputs. The best cap of ``program_cap`` is chosen after the fact.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arms import STORE, code
from benchmarks.kv_ttl_arms import BIG, SMALL, RealEngine, build_model, play
from benchmarks.kv_ttl_cases import PINNED, POOL, QUICK, QUICK_POOL, SHORT, Case, pool_blocks, workload
from benchmarks.report import Report
from rollout.engines.vllm import stderr_to

ARMS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "program_fcfs": {"policy": "program_fcfs"},
    **{f"program_cap_{n}": {"policy": "program_cap", "cap": n} for n in (3, 4, 6)},
    "turnstile": {"policy": "turnstile"},
}
MORE_ARMS: dict[str, dict[str, Any] | None] = {  # of --full
    **{f"program_cap_{n}": {"policy": "program_cap", "cap": n} for n in (2, 5)},
    **{name: {"policy": name} for name in ("continuum", "fixed_ttl", "pin_to_pressure")},
    "turnstile_hints": {"policy": "turnstile"},
}
SEEDS, PAIRS = 3, 5
SHARES = (0.25, 0.5, 1.0, 2.0)  # pool ÷ working set
BARS = (
    ("ratio_mean_job_time", ">=", 2.0),
    ("ratio_p95_job_time", ">=", 1.7),
    ("recomputed_share", "<=", 0.25),
    ("curve_lowest_median", ">=", 0.97),
)
Played = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One arm's turn at a seed. ``share`` is that of the curve; None in the pinned case."""

    arm: str
    seed: int
    case: Case
    blocks: int
    share: float | None = None

    @property
    def hints(self) -> bool:
        return self.arm.endswith("_hints")

    @property
    def name(self) -> str:
        return f"{'pinned' if self.share is None else f'curve-{self.share:g}'}-{self.seed}-{self.arm}"


def plan(options: argparse.Namespace) -> list[Run]:
    """All runs in order: a seed's arms stand together, and nobody is always first."""
    pair = ["stock", "turnstile"]
    if options.quick:
        return [Run(arm, 0, QUICK, QUICK_POOL, share) for share in (None, 0.5) for arm in pair]
    arms = [*ARMS, *(MORE_ARMS if options.full else ())]
    runs = [Run(arm, seed, PINNED, POOL) for seed in range(SEEDS) for arm in _rotated(arms, seed)]
    for seed in range(options.pairs):
        for share in SHARES:
            blocks = pool_blocks(workload(SHORT, seed), share)
            runs += [Run(arm, seed, SHORT, blocks, share) for arm in _rotated(pair, seed)]
    return runs


def _rotated(arms: Sequence[str], by: int) -> list[str]:
    by %= len(arms)
    return [*arms[by:], *arms[:by]]


def play_all(runs: Sequence[Run], shape: dict[str, Any], note: Callable[[str], None]) -> tuple[dict[Run, Played], int]:
    """What each run gave, and the parameters of the model. Runs that a stopped benchmark left are read back."""
    text = json.dumps([[asdict(run) for run in runs], ARMS, MORE_ARMS, shape, code()])
    folder = STORE / "kv_ttl" / hashlib.sha256(text.encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    played: dict[Run, Played] = {}
    log = STORE / "kv_ttl.log"  # what transformers and vLLM say when they start
    with tempfile.TemporaryDirectory() as scratch:
        with stderr_to(log):
            parameters = build_model(Path(scratch), shape)
        engine: RealEngine | None = None
        for number, run in enumerate(runs, 1):
            path = folder / f"{run.name}.json"
            if not path.exists():
                note(f"{number} of {len(runs)}: {run.name} …")
                with stderr_to(log):
                    if engine is None or engine.blocks != run.blocks:
                        if engine is not None:
                            engine.close()
                        engine = RealEngine(Path(scratch), run.blocks)
                    engine.use((ARMS | MORE_ARMS)[run.arm])
                path.write_text(json.dumps(play(engine, workload(run.case, run.seed), run.seed, hints=run.hints)))
            played[run] = json.loads(path.read_text())
        if engine is not None:
            engine.close()
    shutil.rmtree(folder)
    return played, parameters


def job_times(played: Played) -> np.ndarray:
    return np.array(played["finishes"]) - np.array(played["arrivals"])


def first_waits(played: Played) -> list[float]:
    """Seconds from a program's arrival until it first runs."""
    first: dict[int, float] = {}
    for program, _, start, end in played["intervals"]:
        first.setdefault(program, end - start)
    return list(first.values())


def p95(values: Any) -> float:
    return float(np.percentile(values, 95))


def interval(times: list[np.ndarray], others: list[np.ndarray], of: Callable[[Any], Any]) -> tuple[float, float]:
    """95% of bootstrapped ratios of a statistic of two arms: the programs of each seed are drawn again, in pairs."""
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(2000):
        draws = [rng.integers(0, len(x), len(x)) for x in times]
        ours, theirs = (np.concatenate([x[d] for x, d in zip(arm, draws, strict=True)]) for arm in (others, times))
        ratios.append(of(theirs) / of(ours))
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)


def fit_steps(steps: np.ndarray) -> dict[str, float]:
    """a, b, c, d of ``rollout.scheduling.costs.Linear`` by least squares; what comes out negative is 0.

    steps: (n, 4), of prefill tokens, Σ of their contexts, running requests, seconds.
    """
    design = np.c_[np.ones(len(steps)), steps[:, :3]]
    columns = list(range(4))
    while True:
        weights = np.linalg.lstsq(design[:, columns], steps[:, 3], rcond=None)[0]
        if weights.min() >= 0:
            return dict.fromkeys("abcd", 0.0) | {"abcd"[i]: float(w) for i, w in zip(columns, weights, strict=True)}
        del columns[int(weights.argmin())]


def pinned_case(report: Report, played: dict[Run, Played]) -> dict[str, list[Played]]:
    """Figures of the pinned case; gives the arms that are shown: of the caps the best alone."""
    every: dict[str, list[Played]] = {}
    for run in sorted((run for run in played if run.share is None), key=lambda run: run.seed):
        every.setdefault(run.arm, []).append(played[run])
    times = {arm: [job_times(x) for x in seeds] for arm, seeds in every.items()}
    mean = {arm: float(np.mean([x.mean() for x in seeds])) for arm, seeds in times.items()}
    late = {arm: p95(np.concatenate(seeds)) for arm, seeds in times.items()}
    again = {arm: float(np.mean([x["recomputed"] for x in seeds])) for arm, seeds in every.items()}
    rows = []
    for arm, seeds in every.items():
        waits = [second for x in seeds for second in first_waits(x)]
        delay = mean[arm] - float(np.mean([x["gaps"] for x in seeds]))
        figures = {
            "mean_job_time": mean[arm],
            "p95_job_time": late[arm],
            "mean_delay": delay,
            "recomputed_tokens": again[arm],
            "computed_again_tokens": float(np.mean([x["computed_again"] for x in seeds])),
            "preemptions": float(np.mean([x["preemptions"] for x in seeds])),
            "mean_first_wait": float(np.mean(waits)),
        }
        for name, value in figures.items():
            report.figure(f"{arm}_{name}", value)
        by_seed = " ".join(f"{x.mean():.1f}" for x in times[arm])
        rows.append((arm, *figures.values(), by_seed))
    columns = [
        "arm",
        "mean s",
        "p95 s",
        "delay s",
        "recomputed",
        "all again",
        "preempted",
        "1st wait s",
        "mean by seed",
    ]
    report.table(f"job times in the pinned case, {len(times['stock'])} seeds", columns, rows)

    report.figure("ratio_mean_job_time", mean["stock"] / mean["turnstile"])
    report.figure("ratio_p95_job_time", late["stock"] / late["turnstile"])
    for name, statistic in (("mean", np.mean), ("p95", p95)):
        for end, value in zip(("low", "high"), interval(times["stock"], times["turnstile"], statistic), strict=True):
            report.figure(f"ratio_{name}_job_time_{end}", value)
    report.figure("recomputed_share", again["turnstile"] / max(again["stock"], 1.0))
    caps = sorted((mean[arm], arm) for arm in every if arm.startswith("program_cap"))
    if caps:
        report.figure("best_program_cap", int(caps[0][1].rpartition("_")[2]))
    steps = fit_steps(np.concatenate([x["steps"] for seeds in every.values() for x in seeds]))
    for name, value in steps.items():
        report.figure(f"step_{name}", value)
    return {arm: seeds for arm, seeds in every.items() if arm not in {name for _, name in caps[1:]}}


def curve(report: Report, played: dict[Run, Played]) -> dict[float, tuple[float, float, float]]:
    """Median of the paired ratios of mean job time at each pool size, with the lowest and the highest pair."""
    points = {}
    rows = []
    for share in sorted({run.share for run in played if run.share is not None}):
        means: dict[str, dict[int, float]] = {"stock": {}, "turnstile": {}}
        for run, result in played.items():
            if run.share == share:
                means[run.arm][run.seed] = float(job_times(result).mean())
        ratios = [means["stock"][seed] / means["turnstile"][seed] for seed in means["stock"]]
        points[share] = float(np.median(ratios)), min(ratios), max(ratios)
        report.figure(f"curve_{share:g}", points[share][0])
        rows.append((f"{share:g}", *(float(np.mean([*x.values()])) for x in means.values()), *points[share]))
    columns = ["pool", "stock s", "turnstile s", "ratio (median)", "lowest", "highest"]
    report.table("mean job time by pool ÷ working set", columns, rows)
    report.figure("curve_lowest_median", min(median for median, *_ in points.values()))
    return points


def draw(
    folder: Path, shown: dict[str, list[Played]], points: dict[float, tuple[float, float, float]], pairs: int
) -> None:
    """The three pictures; in them stock is called by its policy's name."""
    from rollout.scheduling.plots import Interval, delay_cdf, ratio_curve, timeline

    folder.mkdir(parents=True, exist_ok=True)
    named = {"fcfs" if arm == "stock" else arm: seeds for arm, seeds in shown.items()}
    delays = {arm: [d for x in seeds for d in job_times(x) - np.array(x["gaps"])] for arm, seeds in named.items()}
    case = "12 programs × 6 turns, 31.5M parameters on CPU, pool a third of the working set"
    delay_cdf(folder / "kv_ttl_delays.png", delays, case)
    panels = {arm: [Interval(*x) for x in named[arm][0]["intervals"]] for arm in ("fcfs", "turnstile")}
    timeline(folder / "kv_ttl_timeline.png", panels, case)
    title = f"8 programs × 4 turns; pairs at each point: {pairs}; median and extremes"
    ratio_curve(folder / "kv_ttl_curve.png", list(points), {"turnstile": list(points.values())}, title=title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three programs on a tiny model, no bars")
    parser.add_argument("--full", action="store_true", help="more caps, other retention, and ours with hints")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="paired runs at each point of the curve")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write the pictures there")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads wait for each other: steps get longer and less even
    report = Report("kv_ttl")
    runs = plan(options)
    shape = SMALL if options.quick else BIG
    played, parameters = play_all(runs, shape, lambda text: report.console.print(text, style="dim"))
    report.figure("parameters", parameters)
    shown = pinned_case(report, played)
    points = curve(report, played)
    for bar in BARS:
        report.bar(*bar)
    if options.plots:
        draw(options.plots, shown, points, options.pairs)
    report.finish(options.quick)


if __name__ == "__main__":
    main()
