"""Budgets on populations that a CPU cannot train: success rates that drift as they are learnt, without a model.

A prompt's success rate is a sigmoid of its own level, which GRPO trains: advantages over the group's deviation s, each
rollout with the same weight, so that a group of n raises its level by η n s over the mean group; a share of the mean
gain reaches all prompts, as skills transfer. Hopeless prompts never succeed whatever their level. Arms spend rollouts,
all that dynamic sampling throws away included, until each has had the same number; seeds are paired. Estimates are as
stale as epochs are long; what a real model would do is another question (``benchmarks.knapsack_effect``).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.report import Report, figure_name
from rollout.environment import Row
from rollout.episode import Episode
from training.budgets import BayesKnapsack, Budget, Knapsack, Uniform

SEEDS = 3
ETA, TRANSFER = 0.5, 0.5
MAX_ROUNDS = 4  # of dynamic sampling


@dataclass(frozen=True)
class Population:
    """Levels of prompts that can be learnt are normal; a step has ``batch`` of them, ``samples`` each in the mean."""

    name: str
    prompts: int
    batch: int
    samples: int
    epochs: int
    mean: float
    spread: float
    hopeless: float  # share


POPULATIONS = (
    Population("as in the paper, late", 2048, 256, 8, 4, 1.0, 3.5, 0.2),
    Population("hard", 2048, 256, 8, 4, -3.0, 2.0, 0.1),
    Population("mixed", 2048, 256, 8, 4, -1.0, 3.0, 0.1),
    Population("easy", 2048, 256, 8, 4, 3.0, 2.0, 0.0),
    Population("half hopeless", 2048, 256, 8, 4, -1.0, 2.0, 0.5),
    Population("many prompts, few visits", 8192, 512, 8, 2, -1.0, 3.0, 0.1),
    Population("large groups", 1024, 256, 32, 4, -2.0, 3.0, 0.2),
)
ARMS: dict[str, Callable[[int], Budget]] = {
    "uniform": Uniform,
    "dynamic_sampling": Uniform,
    "knapsack": Knapsack,
    "bayes_knapsack": BayesKnapsack,
    "bayes, prior (1, 1)": lambda samples: BayesKnapsack(samples, prior=(1, 1)),
    "bayes, half-life 1 epoch": lambda samples: BayesKnapsack(samples, half_life=8.0),
}


class World:
    """Prompts whose levels rise."""

    def __init__(self, population: Population, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        n = population.prompts
        self.levels = self.rng.normal(population.mean, population.spread, n)
        self.able = self.rng.random(n) >= population.hopeless
        self.rows = [Row(f"q{i}", [], "") for i in range(n)]

    @property
    def rates(self) -> np.ndarray:
        return np.where(self.able, 1 / (1 + np.exp(-self.levels)), 0.0)

    def play(self, prompts: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Successes of so many rollouts each."""
        return self.rng.binomial(counts, self.rates[prompts])

    def learn(self, prompts: np.ndarray, pulls: np.ndarray) -> None:
        """One step: what the groups of these prompts raise their levels by."""
        own = np.zeros(len(self.levels))
        np.add.at(own, prompts, pulls)
        self.levels += own + TRANSFER * own.sum() / len(own)


def run(population: Population, arm: str, seed: int) -> tuple[np.ndarray, float, int]:
    """Mean success after each unit of rollouts (an epoch's hundredth), the effective-gradient ratio after the first
    epoch of rollouts, and the largest group."""
    world = World(population, seed)
    order = np.random.default_rng([seed, 1])
    budget = ARMS[arm](population.samples)
    epoch = population.prompts * population.samples
    curve: list[float] = []
    spent, used, effective, largest = 0, 0, 0, 0
    queue: list[int] = []
    visit = 0
    while spent < population.epochs * epoch:
        varied: list[int] = []
        pulls: list[float] = []
        for _ in range(MAX_ROUNDS if arm == "dynamic_sampling" else 1):
            wanted = population.batch - len(varied)
            while len(queue) < wanted:
                queue += order.permutation(population.prompts).tolist()
            prompts, queue = np.array(queue[:wanted]), queue[wanted:]
            counts = np.array(budget([world.rows[i] for i in prompts]))
            right = world.play(prompts, counts)
            visit += 1
            if budget.history is not None:
                budget.observe([
                    Episode(f"q{i}", f"q{i}.{visit}", success=sample < successes)
                    for i, n, successes in zip(prompts, counts, right, strict=True)
                    for sample in range(n)
                ])  # fmt: skip
            vary = (right > 0) & (right < counts)
            if spent > epoch:
                used, effective = used + int(counts.sum()), effective + int(counts[vary].sum())
            spent += int(counts.sum())
            largest = max(largest, int(counts.max()))
            share = right[vary] / counts[vary]
            pulls += (ETA * counts[vary] * np.sqrt(share * (1 - share)) / population.samples).tolist()
            varied += prompts[vary].tolist()
            if len(varied) >= population.batch:
                break
        world.learn(np.array(varied, dtype=int), np.array(pulls))
        curve += [float(world.rates.mean())] * (min(100 * spent // epoch, 100 * population.epochs) - len(curve))
    return np.array(curve), effective / max(used, 1), largest


def draw(path: Path, curves: dict[str, dict[str, np.ndarray]]) -> None:
    """Mean success against rollouts, a panel for each population."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(15, 6.5), layout="constrained")
    for axis, (name, arms) in zip(axes.flat, curves.items(), strict=False):
        for number, (arm, curve) in enumerate(arms.items()):
            axis.plot(np.arange(1, len(curve) + 1) / 100, curve, color=f"C{number}", label=arm)
        axis.set_title(name, fontsize=10)
    for axis in axes.flat[len(curves) :]:
        axis.axis("off")
    axes[0, 0].set(xlabel="epochs' worth of rollouts", ylabel="mean success rate")
    axes.flat[-1].legend(*axes[0, 0].get_legend_handles_labels(), loc="center", fontsize=9)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one small population, one seed")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write the picture there")
    arguments = parser.parse_args()
    report = Report("knapsack_drift")
    populations = (Population("quick", 64, 16, 4, 2, -1.0, 2.0, 0.2),) if arguments.quick else POPULATIONS
    seeds = 1 if arguments.quick else SEEDS
    shown: dict[str, dict[str, np.ndarray]] = {}
    for population in populations:
        rows = []
        curves: dict[str, np.ndarray] = {}
        for arm in ARMS:
            runs = [run(population, arm, seed) for seed in range(seeds)]
            curves[arm] = np.mean([curve for curve, *_ in runs], axis=0)
            start = float(np.mean([World(population, seed).rates.mean() for seed in range(seeds)]))
            reached = np.flatnonzero(curves[arm] >= curves["uniform"][-1])
            ratio = float(np.mean([effective for _, effective, _ in runs]))
            key = figure_name(f"{population.name} {arm}")
            report.figure(f"{key}_gain", float(curves[arm][-1]) - start)
            report.figure(f"{key}_effective", ratio)
            share = "never"
            if len(reached):
                share = f"{report.figure(f'{key}_rollouts', (reached[0] + 1) / len(curves[arm])):.2f}"
            rows.append((arm, start, float(curves[arm][-1]), share, ratio, max(n for *_, n in runs)))
        columns = [
            "arm",
            "success before",
            "after",
            "rollouts ÷ uniform's",
            "effective after 1st epoch",
            "largest group",
        ]
        report.table(f"{population.name}: {population.prompts} prompts, {population.epochs} epochs", columns, rows)
        shown[population.name] = curves
    if arguments.plots:
        arguments.plots.mkdir(parents=True, exist_ok=True)
        draw(arguments.plots / "knapsack_drift.png", shown)
    report.finish(arguments.quick)


if __name__ == "__main__":
    main()
