"""Pareto fronts of accuracy against tokens, tool calls and thinking: OTC and AdaCoT swept, real vLLM (CPU), one seed.

Prices of a needless thought and strictness of the economy of calls (``experiment=pareto``), from one warm start, and
three policies to beat: the warm start, the same made to think always, and the one that learnt the task's reward, which
calls the calculator always. One, two and three digits count alike, one-digit facts too: there the choice is. The front
lies above another policy in a cost if a point's accuracy is higher beyond the intervals, or if its cost is lower beyond
them and its accuracy not lower.
"""

from __future__ import annotations

import itertools
from typing import Any

from benchmarks.outcomes import Outcome, evaluated, figures_by_class, outcomes
from benchmarks.report import figure_name
from benchmarks.training_runs import Comparison
from rollout.plots import COSTS, pareto_front, plot_pareto

COMMON = [
    "evaluation.before=false",
    "evaluation.every=null",
    "evaluation.greedy=false",
    "task.test_size=2500",
    "steps=80",
]
SWEPT = ["reward=otc_adacot", "advantage=decoupled", "reward.adacot.labels=self", "reasoning.forced_never=0.25"]
GRID = {"reward.adacot.alpha_over": (0.1, 0.3, 0.9), "reward.otc.max_calls": (1, 4)}
EVALUATION = [
    "task.test_size=2500",
    "limits.max_new_tokens=96",
    "limits.max_tool_calls=2",
    "limits.max_turns=3",
    "engine.max_model_len=192",
    "engine.max_num_seqs=256",
    "evaluation.greedy=false",
]
QUICK = ["steps=2", "batch.prompts=4", "evaluation.questions=40"]


def above(ours: dict[str, Any], theirs: dict[str, Any], cost: str) -> bool:
    """More accurate beyond the intervals, or cheaper beyond them and not less accurate."""
    better = ours["accuracy_low"] > theirs["accuracy_high"]
    worse = ours["accuracy_high"] < theirs["accuracy_low"]
    return better or (ours[f"{cost}_high"] < theirs[f"{cost}_low"] and not worse)


def point(found: dict[str, Outcome]) -> dict[str, Any]:
    """As an evaluation writes it down, with every question."""
    figures = figures_by_class(found, ["accuracy", *COSTS])
    return {"sampled": {**figures, "e3": figures["accuracy"] ** 2 / figures["tokens"]}}


def main() -> None:
    comparison = Comparison("pareto", __doc__.splitlines()[0], experiment="otc", seeds=1, quick=QUICK)
    report, quick = comparison.report, comparison.quick
    few = ["evaluation.questions=40"] if quick else ["evaluation.questions=null"]
    points: list[tuple[str, dict[str, Any]]] = []
    start = comparison.start()
    for name, mode in (("warm start", "auto"), ("always thinks", "always")):
        points.append((name, point(evaluated(start, [*EVALUATION, *few, f"reasoning={mode}"], mode))))
    runs = {"task reward": ["reward=task"]}
    for values in itertools.product(*GRID.values()):
        chosen = dict(zip(GRID, values, strict=True))
        label = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in chosen.items())
        runs[label] = [*SWEPT, *(f"{key}={value}" for key, value in chosen.items())]
    for name, settings in runs.items():
        folder = comparison.run(name, [*COMMON, *few, *settings])
        points.append((name, point(outcomes(folder))))
    others, swept = points[:3], points[3:]
    columns = ["policy", "accuracy", *COSTS, "E³ · 1000", "on the front of"]
    rows = []
    fronts = {
        cost: {points[i][0] for i in pareto_front([(p["sampled"][cost], p["sampled"]["accuracy"]) for _, p in points])}
        for cost in COSTS
    }
    for name, each in points:
        figures = each["sampled"]
        on = " ".join(cost for cost in COSTS if name in fronts[cost])
        rows.append((name, figures["accuracy"], *(figures[cost] for cost in COSTS), 1000 * figures["e3"], on))
    report.table(
        "arithmetic with a calculator, 2,500 unseen questions sampled, one seed; digits count alike", columns, rows
    )
    report.figure("points", len(swept))
    for name, theirs in others:
        key = figure_name(name)
        beaten = [cost for cost in COSTS if any(above(p["sampled"], theirs["sampled"], cost) for _, p in swept)]
        report.figure(f"{key}_below_in", len(beaten))
    if not quick:
        report.bar("points", ">=", 6)
        for name, _ in others:
            report.bar(f"{figure_name(name)}_below_in", ">=", 2)
    comparison.finish(lambda path: plot_pareto(points, path))


if __name__ == "__main__":
    main()
