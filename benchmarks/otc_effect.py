"""What OTC saves: tool calls of OTC's two forms against the task's reward, arithmetic on real vLLM (CPU), paired.

The oracle calls exactly where the warm start's direct answer is right with p < 0.5; both savings are counted from the
arm that learns the task's reward, from the same warm start, one, two and three digits alike. Both forms are normalised
as GRPO does it, and as the paper has them. Reported from one seed: the GRPO form without division by the group's
standard deviation, which pushes less where all of a group are right, and the additive reward, the paper's negative
control. The warm start can call the tool perfectly: what RL moves is the choice.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.outcomes import Outcome, accuracy_difference_low, by_class, direct_answers, mean, outcomes
from benchmarks.report import figure_name
from benchmarks.training_runs import Comparison
from rollout.tasks.arithmetic import Arithmetic

SEEDS = 3
COMMON = ["evaluation.before=false", "evaluation.every=null", "evaluation.greedy=false", "task.test_size=2500"]
ARMS = {
    "task": ["reward=task"],
    "otc, grpo form": [],
    "otc, ppo form": ["reward.form=ppo"],
    "otc, grpo form, not normalised": ["advantage.normalize=false"],
    "additive": ["reward=task", "reward._target_=benchmarks.additive_otc.AdditiveOtc"],
}
FORMS = ("otc, grpo form", "otc, ppo form")
QUICK = ["steps=2", "batch.prompts=4", "evaluation.questions=40"]


def calls_of(found: dict[str, Outcome]) -> float:
    return by_class(found, lambda question, outcome: outcome["tool_calls"])


def draw(path: Path, played: dict[str, list[dict[str, Outcome]]], oracle: dict[str, float]) -> None:
    """Calls by difficulty, and accuracy, of each arm."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    width = 0.8 / (len(played) + 1)
    shown = {name: [np.mean([mean(f, "tool_calls", d) for f in runs]) for d in "123"] for name, runs in played.items()}
    for number, (name, heights) in enumerate((shown | {"oracle": [oracle[d] for d in "123"]}).items()):
        left.bar(np.arange(3) + (number - len(played) / 2) * width, heights, width, label=name, color=f"C{number}")
    left.set_xticks(range(3), ["one digit", "two digits", "three digits"])
    left.set(ylabel="tool calls a question")
    figure.legend(fontsize=8, ncols=6, loc="outside upper center", frameon=False)
    for number, runs in enumerate(played.values()):
        right.scatter([mean(f, "tool_calls") for f in runs], [mean(f, "accuracy") for f in runs], color=f"C{number}")
    right.set(xlabel="tool calls a question", ylabel="accuracy")
    figure.savefig(path, dpi=130)


def main() -> None:
    what = __doc__.splitlines()[0]
    comparison = Comparison("otc_effect", what, experiment="otc", seeds=SEEDS, quick=QUICK)
    report, quick = comparison.report, comparison.quick
    played: dict[str, list[dict[str, Outcome]]] = {name: [] for name in ARMS}
    for seed in range(comparison.seeds):
        for name, settings in ARMS.items():
            if seed and name not in (*FORMS, "task"):
                continue
            folder = comparison.run(f"{name}, seed {seed}", [*COMMON, *settings, f"seed={seed}"])
            played[name].append(outcomes(folder))
    direct = direct_answers(comparison.start(), Arithmetic(test_size=2500))
    difficulty = {question: o["difficulty"] for question, o in played["task"][0].items()}
    needed = {question: float(direct[question][0] < 0.5) for question in difficulty}
    oracle = {d: float(np.mean([n for q, n in needed.items() if difficulty[q] == d] or [0.0])) for d in "123"}
    oracle_calls = report.figure("oracle_calls", float(np.mean([*oracle.values()])))
    rows = []
    base = float(np.mean([calls_of(found) for found in played["task"]]))
    for name, runs in played.items():
        calls = float(np.mean([calls_of(found) for found in runs]))
        accuracy = float(np.mean([mean(found, "accuracy") for found in runs]))
        low = accuracy_difference_low(runs, played["task"][: len(runs)])
        saved = (base - calls) / max(base - oracle_calls, 1e-9)
        by_digits = " ".join(f"{np.mean([mean(found, 'tool_calls', d) for found in runs]):.2f}" for d in "123")
        rows.append((name, accuracy, low, calls, by_digits, saved, accuracy / calls if calls else float("inf")))
        key = figure_name(name)
        for figure, value in (("accuracy", accuracy), ("calls", calls), ("productivity", accuracy / max(calls, 1e-9))):
            report.figure(f"{key}_{figure}", value)
        if name != "task":
            report.figure(f"{key}_saving_of_oracle", saved)
            report.figure(f"{key}_accuracy_difference_low", low)
    report.table(
        f"arithmetic, {len(difficulty):,} unseen questions sampled, {comparison.seeds} seeds; the oracle calls "
        f"{oracle_calls:.3f} times a question ({', '.join(f'{d}: {c:.2f}' for d, c in oracle.items())})",
        ["arm", "accuracy", "difference, low", "calls", "by digits", "share of the oracle's saving", "right / call"],
        rows,
    )
    if not quick:
        for name in FORMS:
            key = figure_name(name)
            report.bar(f"{key}_saving_of_oracle", ">=", 0.8)
            report.bar(f"{key}_accuracy_difference_low", ">", -0.02)
    comparison.finish(lambda path: draw(path, played, oracle))


if __name__ == "__main__":
    main()
