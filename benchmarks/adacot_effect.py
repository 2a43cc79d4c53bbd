"""What AdaCoT saves, and what masking the decision prevents: sums of one and three digits, real vLLM (CPU), paired.

The oracle thinks exactly where the warm start's direct answer is right with p < 0.5; savings of thinking tokens are
counted from the arm that learns the task's reward, short and long sums alike. The warm start, unlike the paper's,
thinks about two of three questions whatever their length. The skewed stage goes on from the first checkpoint of the arm
with true labels whose trigger accuracy is 0.75, as the paper's warm start has it, on questions that all need thought
and with the task's reward alone, with and without Selective Loss Masking; trigger accuracy is the mean of both classes
on unseen questions of both. Labels of its own come from rollouts that were
forced not to think. A tenth each of the prompts asks, by its system prompt, to think or not to; who obeys is measured
on 500 questions each.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from benchmarks.outcomes import (
    Outcome,
    accuracy_difference_low,
    by_class,
    direct_answers,
    evaluated,
    mean,
    outcomes,
)
from benchmarks.report import figure_name
from benchmarks.training_runs import Comparison, Run, last_checkpoint
from rollout.episode import Episode
from rollout.tasks.arithmetic import Arithmetic
from training.rewards.adacot import AdaCot

SEEDS = 3
TEST = 2400
COMMON = ["evaluation.before=false", "evaluation.every=null", "evaluation.greedy=false", f"task.test_size={TEST}"]
BALANCED = [
    "task=arithmetic",
    "task.operators=+-",
    "task.mix.1=0.5",
    "task.mix.2=0",
    "task.mix.3=0.5",
    "task.use_tool=false",
    f"task.test_size={TEST}",
    "engine.max_model_len=192",
    "engine.max_num_seqs=256",
    "limits.max_new_tokens=96",
    "evaluation.greedy=false",
]
SELF = ["reward.labels=self", "reward.least_seen=2", "reasoning.forced_never=0.25"]  # known from the first visit on
OFTEN = ["checkpoint.every=8", "checkpoint.keep_last=20", "evaluation.every=8", "evaluation.every_questions=300"]
FREE = [f"reward.{price}=0" for price in ("alpha_miss", "alpha_over", "gamma_format")]
ARMS = {
    "task": [*FREE, "reward.alpha_told=0", "advantage=group"],
    "adacot": OFTEN,
    "adacot, own labels": SELF,
    "adacot, normalised": ["advantage=group"],
}
ONCE = "adacot, normalised"  # reported, from one seed
SKILLED = 0.75  # trigger accuracy from which the skewed stage starts
UNTOLD = [f"reasoning.told_{mode}=0" for mode in ("always", "never")]
SKEWED = ["task.mix.1=0", "steps=40", *FREE, *UNTOLD, "evaluation.after=false"]
STAGES = {"skewed, unmasked": SKEWED, "skewed, masked": [*SKEWED, "reward.mask_decision=true"]}
QUICK = ["steps=2", "batch.prompts=4", "evaluation.questions=40"]


def trigger_accuracy(found: dict[str, Outcome]) -> float:
    """Mean over both classes: 0.5 for always and for never."""
    return (1 - mean(found, "thinking", "1") + mean(found, "thinking", "3")) / 2


def skilled_checkpoint(run: Path) -> Path:
    """The first of a run that decides well enough, else its last."""
    for evaluation in Run(run).evaluations:
        shares = {d: found["thinking"] for d, found in evaluation["sampled"]["by_difficulty"].items()}
        if (1 - shares["1"] + shares["3"]) / 2 >= SKILLED:
            return run / "checkpoints" / f"step-{evaluation['step']}"
    return last_checkpoint(run)


def thinking_tokens(outcome: Outcome, direct_tokens: int) -> float:
    """Own tokens beyond those of a direct answer, where it thought."""
    return max(0.0, outcome["tokens"] - direct_tokens) if outcome["thinking"] else 0.0


def label_agreement(run: Path, task: Arithmetic) -> float:
    """Share of the prompts that the policy had judged at the end whose label is the task's."""
    reward = AdaCot(labels="self", least_seen=2)
    reward.load_state_dict(torch.load(last_checkpoint(run) / "stream.pt", weights_only=False)["reward"])
    needs = [(reward.need(Episode(row.id, row.id)), row.extras["needs_thought"]) for row in task.rows("train")]
    judged = [mine == truth for mine, truth in needs if mine is not None]
    return float(np.mean(judged)) if judged else 0.0


def draw(path: Path, played: dict[str, list[dict[str, Outcome]]]) -> None:
    """Share that thinks, by length of the numbers, of each arm and seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for place, runs in enumerate(played.values()):
        for i, (digits, colour) in enumerate((("1", "#3b6fb6"), ("3", "#d9822b"))):
            shares = [mean(found, "thinking", digits) for found in runs]
            where = place + 0.4 * i - 0.2
            label = f"{digits} digit{'s' * (digits != '1')}" if place == 0 else None
            axis.bar(where, np.mean(shares), 0.36, color=colour, alpha=0.6, label=label)
            axis.scatter([where] * len(shares), shares, color=colour, s=14, zorder=3)
    axis.set_xticks(range(len(played)), [name.replace(", ", ",\n") for name in played])
    axis.set(ylabel="share of unseen questions that it thinks about", ylim=(0, 1.03))
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    what = __doc__.splitlines()[0]
    comparison = Comparison("adacot_effect", what, experiment="adacot", seeds=SEEDS, quick=QUICK)
    report, quick = comparison.report, comparison.quick
    played: dict[str, list[dict[str, Outcome]]] = {name: [] for name in [*ARMS, *STAGES]}
    obedient: dict[str, list[dict[str, Outcome]]] = {"always": [], "never": []}
    agreements = []
    task = Arithmetic(operators="+-", mix={"1": 0.5, "3": 0.5}, use_tool=False, test_size=TEST)
    few = ["evaluation.questions=40"] if quick else ["evaluation.questions=null"]
    start = comparison.start()
    for seed in range(comparison.seeds):
        for name, settings in ARMS.items():
            if seed and name == ONCE:
                continue
            folder = comparison.run(f"{name}, seed {seed}", [*COMMON, *few, *settings, f"seed={seed}"])
            played[name].append(outcomes(folder))
            if name == "adacot":
                skilled = skilled_checkpoint(folder)
                for mode, runs in obedient.items():
                    told = [*BALANCED, f"told={mode}", f"evaluation.questions={40 if quick else 500}"]
                    runs.append(evaluated(folder, told, f"told_{mode}"))
            if settings == SELF:
                agreements.append(label_agreement(folder, task))
        for name, settings in STAGES.items():
            stage = [*COMMON, *settings, f"model.path={skilled}", f"seed={seed}"]
            folder = comparison.run(f"{name}, seed {seed}", stage)
            played[name].append(evaluated(folder, [*BALANCED, *few], "balanced"))
    first = evaluated(start, [*BALANCED, *few], "balanced")
    direct = direct_answers(start, task)
    difficulty = {question: outcome["difficulty"] for question, outcome in first.items()}

    def tokens(found: dict[str, Outcome]) -> float:
        return by_class(found, lambda question, outcome: thinking_tokens(outcome, direct[question][1]))

    thoughts = [(difficulty[q], thinking_tokens(o, direct[q][1])) for f in played["task"] for q, o in f.items()]
    price = {d: float(np.mean([n for each, n in thoughts if each == d and n] or [0.0])) for d in ("1", "3")}
    base = report.figure("task_thinking_tokens", float(np.mean([tokens(found) for found in played["task"]])))
    oracle = by_class(first, lambda question, o: price[o["difficulty"]] * (direct[question][0] < 0.5))
    report.figure("oracle_thinking_tokens", oracle)
    report.figure("warm_start_trigger_accuracy", trigger_accuracy(first))
    rows = [("warm start", mean(first, "accuracy"), "", trigger_accuracy(first), tokens(first), "")]
    for name, runs in played.items():
        key = figure_name(name)
        accuracy = report.figure(f"{key}_accuracy", float(np.mean([mean(found, "accuracy") for found in runs])))
        trigger = report.figure(f"{key}_trigger_accuracy", float(np.mean([*map(trigger_accuracy, runs)])))
        spent = float(np.mean([*map(tokens, runs)]))
        saved = (base - spent) / max(base - oracle, 1e-9)
        low = accuracy_difference_low(runs, played["task"][: len(runs)])
        rows.append((name, accuracy, low, trigger, spent, saved))
        if name in ARMS and name != "task":
            report.figure(f"{key}_saving_of_oracle", saved)
            report.figure(f"{key}_accuracy_difference_low", low)
    report.figure("own_labels_agreement", float(np.mean(agreements)))
    for mode, runs in obedient.items():
        shares = [mean(found, "thinking") for found in runs]
        report.figure(f"obeys_{mode}", float(np.mean(shares if mode == "always" else [1 - s for s in shares])))
    report.table(
        f"sums of 1 and 3 digits, {len(difficulty):,} unseen questions sampled, {comparison.seeds} seeds; the oracle "
        f"spends {oracle:.1f} thinking tokens; labels of its own agree with the task's on {np.mean(agreements):.3f}",
        ["arm", "accuracy", "difference, low", "trigger accuracy", "thinking tokens", "share of the oracle's saving"],
        rows,
    )
    if not quick:
        report.bar("adacot_saving_of_oracle", ">=", 0.8)
        report.bar("adacot_accuracy_difference_low", ">", -0.02)
        for mode in obedient:
            report.bar(f"obeys_{mode}", ">=", 0.9)
        report.bar("skewed_unmasked_trigger_accuracy", "<=", 0.6)
        report.bar("skewed_masked_trigger_accuracy", ">=", 0.7)
    comparison.finish(lambda path: draw(path, played))


if __name__ == "__main__":
    main()
