"""T-PPO against PPO on heavy-tailed answers, real vLLM on CPU: the same task, warm start, batch and critic.

Every arm is ``python -m training experiment=long_chain`` in a process of its own, from one warm start. Pairs by seed,
in turns. Seconds are from the start of training, the critic's warm-up included, to the step at which the mean reward of
the last 512 finished episodes reaches the target. Windows favour short answers in their first steps, which that mean
forgets. Beside the pairs, one seed each of other windows and other ways to keep an engine busy. Runs are kept: a
benchmark that was stopped goes on from there.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from benchmarks.training_runs import Comparison, Run

SEEDS = 5
LONGEST = 512  # own tokens of an episode
WINDOW = LONGEST // 2
MEAN = 95  # own tokens of an episode
BATCH = 16  # episodes at a time: few enough that the rollouts take longer than the training, as they do at scale
TARGET = 0.8
SMOOTHED = 512  # finished episodes
PPO_STEPS = 112
LEARNING_RATE = 1.5e-4  # for PPO's optimizer steps of BATCH x MEAN tokens; others by the root of theirs
COMMON = [
    "budget.samples=1",
    f"batch.prompts={BATCH}",
    "critic.optimizer.learning_rate=1e-3",
    "evaluation.before=false",
    "evaluation.greedy=false",
    "evaluation.questions=null",
]
OFF_POLICY = ["correction=tis", "anchor=recomputed"]

PPO = ["algorithm=ppo", *COMMON, f"steps={PPO_STEPS}", f"optimizer.learning_rate={LEARNING_RATE}"]
QUICK = ["batch.prompts=8", "steps=3", "evaluation.questions=8", "critic.warmup_rounds=1"]


def windowed(length: int) -> list[str]:
    """About as many own tokens in all as PPO's steps write."""
    rate = LEARNING_RATE * math.sqrt(length / MEAN)
    steps = math.ceil(PPO_STEPS * MEAN / length)
    scaled = [f"steps={steps}", f"optimizer.learning_rate={rate:.3g}"]
    return ["algorithm=tppo", *COMMON, f"window.length={length}", *scaled]


PAIR = {"ppo": PPO, "tppo": windowed(WINDOW)}
AHEAD = "one step off"  # its rollouts' seconds are hidden behind the training's: it has no rate of its own
OTHERS = {
    **{f"tppo, window {n}": windowed(n) for n in (LONGEST // 8, LONGEST // 4, LONGEST // 2, LONGEST) if n != WINDOW},
    "tppo, kept KV": [*windowed(WINDOW), "engine.keep_cache=true"],
    "partial rollouts, IS": [*windowed(WINDOW), "advantage=gae", *OFF_POLICY],
    AHEAD: [*PPO, "max_staleness=1", *OFF_POLICY],
    "over-provisioned": [*PPO, "window=over_provisioned"],
}


class Arm(Run):
    """A run and its speed."""

    @property
    def tokens_per_second(self) -> float:
        """Of the rollouts alone, the first round left out: the engine compiles and warms up in it."""
        rows = [row for row in self.rows if row.get("rollout/tokens_per_second")][1:]
        tokens = sum(row["rollout/tokens"] for row in rows)
        return tokens / sum(row["rollout/tokens"] / row["rollout/tokens_per_second"] for row in rows)

    @property
    def seconds(self) -> float:
        """Of the whole training."""
        return float(self.rows[-1]["time/elapsed"])

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Seconds and the mean reward of the last finished episodes."""
        seconds, smoothed, last = [], [], []
        for row in self.rows:
            if row.get("rollout/episodes"):
                last.append((row["rollout/episodes"], row["reward"]))
            while sum(n for n, _ in last[1:]) >= SMOOTHED:
                last.pop(0)
            seconds.append(row["time/elapsed"])
            smoothed.append(sum(n * reward for n, reward in last) / max(sum(n for n, _ in last), 1))
        return np.array(seconds), np.array(smoothed)

    @property
    def seconds_to_target(self) -> float:
        """Infinite where it was never reached."""
        seconds, smoothed = self.curve()
        reached = np.flatnonzero(smoothed >= TARGET)
        return float(seconds[reached[0]]) if len(reached) else math.inf


def difference_low(ppo: list[Arm], tppo: list[Arm]) -> float:
    """Lower 95% bound of T-PPO's gain in accuracy over all questions of all seeds: normal, as if they were unpaired."""
    accuracies = np.array([[arm.summary["accuracy_after"] for arm in arms] for arms in (ppo, tppo)])
    questions = sum(arm.evaluations[-1]["sampled"]["questions"] for arm in ppo)
    variance = (accuracies * (1 - accuracies)).mean(1).sum() / questions
    return float((accuracies[1] - accuracies[0]).mean() - 1.96 * math.sqrt(variance))


def difference_low_by_seed(ppo: list[Arm], tppo: list[Arm]) -> float:
    """The same if other seeds were drawn: Student's t over the pairs' differences."""
    from scipy.stats import t

    pairs = zip(ppo, tppo, strict=True)
    differences = np.array([b.summary["accuracy_after"] - a.summary["accuracy_after"] for a, b in pairs])
    n = len(differences)
    spread = differences.std(ddof=1) / math.sqrt(n) if n > 1 else 0.0
    return float(differences.mean() - t.ppf(0.975, max(n - 1, 1)) * spread)


def draw(path: Path, arms: dict[str, list[Arm]]) -> None:
    """Reward over time: every seed of the pair, and the others thin."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for number, (name, runs) in enumerate(arms.items()):
        for i, run in enumerate(runs):
            style = {"lw": 2.0 if name in PAIR else 1.0, "ls": "-" if name in PAIR else "--", "alpha": 0.8}
            axes.plot(*run.curve(), color=f"C{number}", label=name if i == 0 else None, **style)
    axes.axhline(TARGET, color="grey", lw=0.8)
    axes.set_xlabel("seconds of training, critic warm-up included")
    axes.set_ylabel(f"mean reward of the last {SMOOTHED:,} episodes")
    axes.set_title("long_chain, answers of up to 512 tokens (median 64), 16 at a time, on CPU")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    comparison = Comparison("tppo_vs_ppo", __doc__.splitlines()[0], experiment="long_chain", seeds=SEEDS, quick=QUICK)
    report, quick, seeds = comparison.report, comparison.quick, comparison.seeds
    played: dict[str, list[Arm]] = {}
    plan = [(name, seed) for seed in range(seeds) for name in (PAIR if seed % 2 == 0 else reversed(PAIR))]
    plan += [] if quick else [(name, 0) for name in OTHERS]
    for name, seed in plan:
        folder = comparison.run(f"{name}, seed {seed}", [*(PAIR | OTHERS)[name], f"seed={seed}"])
        played.setdefault(name, []).append(Arm(folder))
    rows = []
    for name, arms in played.items():
        rows.append((
            name, len(arms), "–" if name == AHEAD else float(np.mean([arm.tokens_per_second for arm in arms])),
            "–" if name == AHEAD else float(np.mean([arm.mean("rollout/occupancy") for arm in arms])),
            " ".join(f"{arm.seconds_to_target:.0f}" for arm in arms),
            float(np.mean([arm.seconds for arm in arms])),
            float(np.mean([arm.summary["accuracy_after"] for arm in arms])),
        ))  # fmt: skip
    columns = ["arm", "seeds", "tokens/s of rollouts", "occupancy", f"s to {TARGET}", "s in all", "accuracy after"]
    report.table("long_chain", columns, rows)
    ppo, tppo = played["ppo"], played["tppo"]
    rate = [b.tokens_per_second / a.tokens_per_second for a, b in zip(ppo, tppo, strict=True)]
    report.figure("tokens_per_second_ratio", float(np.median(rate)))
    for name, arms in (("ppo", ppo), ("tppo", tppo)):
        report.figure(f"{name}_occupancy", float(np.mean([arm.mean("rollout/occupancy") for arm in arms])))
        report.figure(f"{name}_accuracy", float(np.mean([arm.summary["accuracy_after"] for arm in arms])))
    report.figure("accuracy_difference_low", difference_low(ppo, tppo))
    report.figure("accuracy_difference_low_by_seed", difference_low_by_seed(ppo, tppo))
    if not quick:
        # A PPO arm that never got there counts with all its time: that can only make the ratio smaller.
        speed = [min(a.seconds_to_target, a.seconds) / b.seconds_to_target for a, b in zip(ppo, tppo, strict=True)]
        report.figure("ppo_never_at_target", sum(math.isinf(arm.seconds_to_target) for arm in ppo))
        report.figure("time_to_target_ratio", float(np.exp(np.mean(np.log(speed)))))
        report.bar("tokens_per_second_ratio", ">=", 2.0)
        report.bar("time_to_target_ratio", ">=", 1.8)
        report.bar("accuracy_difference_low", ">", -0.02)
    comparison.finish(lambda path: draw(path, played))


if __name__ == "__main__":
    main()
