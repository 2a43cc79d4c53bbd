"""What budgets save: the same task, warm start and expected rollouts a step, real vLLM on CPU, paired by seed.

A quarter each of the prompts is hopeless, hard, medium and trivial (``benchmarks.mixed_chains``); a step has 32
rollouts, few enough that their noise limits what is learnt. Arms are uniform groups, DAPO's dynamic sampling (resample
until enough groups vary, every generated token counted), the published knapsack and ours over posteriors, whose budget
is in tokens. Sampled accuracy on 500 unseen medium and hard questions is measured every so many steps, on 1,000 at the
end, and smoothed over three; tokens are all that the rollouts generated until an arm's curve first reaches the accuracy
at which the uniform arm of its seed ended (all of its own, where it never did). The learning rate is constant, so that
an arm does not profit from where it stops.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.training_runs import Comparison, Run
from rollout.plots import smoothed

SEEDS = 5
ROWS, PROMPTS, SAMPLES, STEPS, EVERY = 128, 8, 4, 144, 18
EPOCH = ROWS // PROMPTS  # steps
SETTINGS = [
    "task=custom",
    "task._target_=benchmarks.mixed_chains.MixedChains",
    f"+task.size={ROWS}",
    f"batch.prompts={PROMPTS}",
    f"budget.samples={SAMPLES}",
    f"steps={STEPS}",
    "optimizer.learning_rate=2e-4",
    "optimizer.lr_scheduler_type=constant",
    "advantage.clip=5.0",
    f"evaluation.every={EVERY}",
    "evaluation.questions=1000",
    "evaluation.every_questions=500",
    "evaluation.greedy=false",
    "limits.max_new_tokens=256",
    "engine.max_model_len=320",
]
ARMS = {
    "uniform": ["budget=uniform"],
    # Its steps take three times the tokens: a third of them, for the same tokens in all.
    "dynamic_sampling": [
        "budget=uniform",
        "selection=dynamic_sampling",
        f"steps={STEPS // 3}",
        f"evaluation.every={EVERY // 3}",
    ],
    "knapsack": ["budget=knapsack"],
    "bayes_knapsack": ["budget=bayes_knapsack", "budget.cost=tokens"],
}
QUICK = [
    "steps=2",
    "batch.prompts=4",
    "evaluation.questions=8",
    "evaluation.every_questions=8",
    "evaluation.every=1",
    "+task.test_size=16",
]


class Arm(Run):
    """A run's accuracy against what it generated."""

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Generated tokens and smoothed accuracy at each evaluation."""
        tokens = np.cumsum([0.0, *(row["rollout/tokens"] for row in self.rows)])
        at = [tokens[e["step"]] for e in self.evaluations]
        raw = [e["sampled"]["accuracy"] for e in self.evaluations]
        return np.array(at), np.array([np.mean(raw[max(0, i - 1) : i + 2]) for i in range(len(raw))])

    def tokens_to(self, accuracy: float) -> float:
        """Tokens at which the curve first reaches it, by straight lines between evaluations; all of them if never."""
        tokens, curve = self.curve()
        reached = np.flatnonzero(curve >= accuracy)
        if not len(reached):
            return float(tokens[-1])
        i = int(reached[0])
        return float(1.0 if i == 0 else np.interp(accuracy, curve[i - 1 : i + 1], tokens[i - 1 : i + 1]))

    def effective(self, *, first_epoch: bool) -> float:
        """Mean effective-gradient ratio within the first epoch, or after it."""
        return float(np.mean([
            row["effective_gradient_ratio"] for row in self.rows
            if (row["step"] <= EPOCH) == first_epoch and "effective_gradient_ratio" in row
        ] or [0.0]))  # fmt: skip


def interval(differences: list[float]) -> tuple[float, float]:
    """95% of the mean of paired differences, by bootstrap over seeds."""
    rng = np.random.default_rng(0)
    means = rng.choice(differences, (4000, len(differences))).mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def draw(path: Path, played: dict[str, list[Arm]]) -> None:
    """Accuracy against generated tokens, and the effective-gradient ratio by step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for number, (name, arms) in enumerate(played.items()):
        for i, arm in enumerate(arms):
            tokens, curve = arm.curve()
            left.plot(tokens / 1e3, curve, color=f"C{number}", alpha=0.7, label=name if i == 0 else None)
        ratio = np.mean([[row.get("effective_gradient_ratio", 0.0) for row in arm.rows] for arm in arms], axis=0)
        right.plot(range(1, len(ratio) + 1), smoothed(ratio.tolist(), 9), color=f"C{number}", label=name)
    left.set(xlabel="thousand generated tokens", ylabel="accuracy on unseen medium and hard questions")
    right.axvline(EPOCH, color="grey", lw=0.8)
    right.set(
        xlabel="step (line: end of the first epoch of uniform groups)", ylabel="effective-gradient ratio", ylim=(0, 1)
    )
    left.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    what = __doc__.splitlines()[0]
    comparison = Comparison("knapsack_effect", what, experiment="long_chain", seeds=SEEDS, quick=QUICK)
    report, quick, seeds = comparison.report, comparison.quick, comparison.seeds
    played: dict[str, list[Arm]] = {name: [] for name in ARMS}
    for seed in range(seeds):
        for name in [*ARMS][seed % len(ARMS) :] + [*ARMS][: seed % len(ARMS)]:
            folder = comparison.run(f"{name}, seed {seed}", [*SETTINGS, *ARMS[name], f"seed={seed}"])
            played[name].append(Arm(folder))
    ends = [arm.curve()[1][-1] for arm in played["uniform"]]
    rows = []
    tokens = {name: [arm.tokens_to(end) for arm, end in zip(arms, ends, strict=True)] for name, arms in played.items()}
    for name, arms in played.items():
        ratios = [mine / uniform for mine, uniform in zip(tokens[name], tokens["uniform"], strict=True)]
        figures = {
            "tokens_ratio": float(np.exp(np.mean(np.log(ratios)))),
            "effective_first_epoch": float(np.mean([arm.effective(first_epoch=True) for arm in arms])),
            "effective_after": float(np.mean([arm.effective(first_epoch=False) for arm in arms])),
            "accuracy_after": float(np.mean([arm.curve()[1][-1] for arm in arms])),
            "reached": float(sum(arm.curve()[1].max() >= end for arm, end in zip(arms, ends, strict=True))),
            "tokens_a_step": float(np.mean([arm.mean("rollout/tokens") for arm in arms])),
        }
        for key, value in figures.items():
            report.figure(f"{name}_{key}", value)
        rows.append((name, *figures.values(), " ".join(f"{ratio:.2f}" for ratio in ratios)))
    columns = [
        "arm",
        "tokens ÷ uniform's",
        "effective, 1st epoch",
        "after",
        "accuracy",
        "reached",
        "tokens a step",
        "by seed",
    ]
    report.table(f"to the accuracy at which uniform ended, {seeds} seeds", columns, rows)
    found = report.figures
    report.figure(
        "effective_gain", found["bayes_knapsack_effective_after"] / max(found["uniform_effective_after"], 1e-9)
    )
    report.figure("tokens_to_uniform", found["bayes_knapsack_tokens_ratio"])
    report.figure(
        "tokens_to_dynamic_sampling", found["bayes_knapsack_tokens_ratio"] / found["dynamic_sampling_tokens_ratio"]
    )
    for when, first in (("first_epoch", True), ("after", False)):
        pairs = zip(played["bayes_knapsack"], played["knapsack"], strict=True)
        differences = [a.effective(first_epoch=first) - b.effective(first_epoch=first) for a, b in pairs]
        report.figure(f"bayes_less_knapsack_{when}_high", interval(differences)[1])
    if not quick:
        report.bar("effective_gain", ">=", 1.25)
        report.bar("tokens_to_uniform", "<=", 0.65)
        report.bar("tokens_to_dynamic_sampling", "<=", 0.9)
        report.bar("bayes_less_knapsack_first_epoch_high", ">=", 0)
        report.bar("bayes_less_knapsack_after_high", ">=", 0)
    comparison.finish(lambda path: draw(path, played))


if __name__ == "__main__":
    main()
