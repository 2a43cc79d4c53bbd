"""Pictures of runs and evaluations, drawn from the files that a run leaves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
BLUE, ORANGE, GREEN, GREY = "#3b6fb6", "#d9822b", "#3a9d5d", "#8a8a8a"


def read_jsonl(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def smoothed(values: Sequence[float], width: int = 5) -> list[float]:
    """Centred moving mean; the window shrinks at both ends."""
    half = width // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def _axes(count: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, count, figsize=(5.2 * count, 3.4), squeeze=False, layout="constrained")
    for axis in axes[0]:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def _curve(axis: Any, rows: list[Row], key: str, colour: str, label: str) -> None:
    steps = [row["step"] for row in rows if key in row]
    values = [row[key] for row in rows if key in row]
    axis.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
    axis.plot(steps, smoothed(values), color=colour, linewidth=2, label=label)


def _intervals(figures: Sequence[dict[str, Any]]) -> tuple[list[float], list[list[float]]]:
    """Accuracies, and their distances to both ends of their intervals."""
    middle = [f["accuracy"] for f in figures]
    low = [max(0.0, f["accuracy"] - f["accuracy_low"]) for f in figures]  # rounding may put the mean beyond an end
    return middle, [low, [max(0.0, f["accuracy_high"] - f["accuracy"]) for f in figures]]


def plot_reward(rows: list[Row], evaluations: list[Row], path: Path) -> None:
    """Reward of the rollouts, and accuracy on unseen questions where it was measured."""
    figure, (axis,) = _axes(1)
    _curve(axis, rows, "reward", BLUE, "reward of rollouts")
    for mode, colour in (("sampled", ORANGE), ("greedy", GREEN)):
        points = [(e["step"], e[mode]) for e in evaluations if mode in e]
        if points:
            middle, spread = _intervals([f for _, f in points])
            steps, label = [step for step, _ in points], f"accuracy on unseen questions, {mode}"
            axis.errorbar(steps, middle, spread, fmt="o", color=colour, capsize=3, label=label)
    axis.set(xlabel="step", ylabel="reward, accuracy", ylim=(0, 1.03))
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=140)


def plot_behaviour(rows: list[Row], path: Path) -> None:
    """Tool calls and tokens of an episode over the run."""
    figure, (left, right) = _axes(2)
    _curve(left, rows, "rollout/tool_calls", BLUE, "tool calls")
    _curve(left, rows, "rollout/thinking", GREY, "share that thinks")
    left.set(xlabel="step", ylabel="an episode")
    left.legend(frameon=False, fontsize=8)
    _curve(right, rows, "rollout/tokens_per_episode", GREEN, "tokens")
    right.set(xlabel="step", ylabel="own tokens an episode")
    right.set_ylim(bottom=0)
    figure.savefig(path, dpi=140)


def plot_budget(spent: Sequence[tuple[float, int, int]], path: Path) -> None:
    """Rollouts that prompts got against the success rates seen before, coloured by round."""
    figure, (axis,) = _axes(1)
    rates, rollouts, rounds = zip(*spent, strict=True)
    dots = axis.scatter(rates, rollouts, c=rounds, s=12, alpha=0.6, cmap="viridis", linewidths=0)
    figure.colorbar(dots, label="round")
    axis.set(xlabel="success rate seen before", ylabel="rollouts", xlim=(-0.03, 1.03))
    axis.set_ylim(bottom=0)
    figure.savefig(path, dpi=140)


def _legend_above(axis: Any) -> None:
    """Where bars fill the picture there is no free corner inside it."""
    axis.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)


def plot_evaluations(results: Sequence[tuple[str, dict[str, Any]]], path: Path) -> None:
    """Accuracy with its interval, in whole and by difficulty, for one or more evaluated checkpoints."""
    figure, (left, right) = _axes(2)
    names = [name for name, _ in results]
    for place, mode, colour in ((-0.18, "sampled", ORANGE), (0.18, "greedy", GREEN)):
        shown = [(i, r[mode]) for i, (_, r) in enumerate(results) if mode in r]
        if shown:
            heights, spread = _intervals([f for _, f in shown])
            left.bar([i + place for i, _ in shown], heights, 0.34, yerr=spread, capsize=3, color=colour, label=mode)
    tilt = {"rotation": 20, "ha": "right"} if len(names) > 2 else {}
    left.set_xticks(range(len(names)), names, **tilt)
    left.set(ylabel="accuracy on unseen questions", ylim=(0, 1.03))
    _legend_above(left)
    colours = (BLUE, ORANGE, GREEN, GREY)
    difficulties = list(dict.fromkeys(d for _, result in results for d in result["sampled"]["by_difficulty"]))
    width = 0.8 / len(results)
    for number, (name, result) in enumerate(results):
        parts = result["sampled"]["by_difficulty"]
        places = [difficulties.index(d) + (number - (len(results) - 1) / 2) * width for d in parts]
        right.bar(places, [f["tool_calls"] for f in parts.values()], width, color=colours[number % 4], label=name)
    right.set_xticks(range(len(difficulties)), difficulties)
    right.set(xlabel="difficulty", ylabel="tool calls an episode")
    right.set_ylim(bottom=0)
    _legend_above(right)
    figure.savefig(path, dpi=140)


ENDS = ((-1, "low"), (1, "high"))  # of an interval, and which way each lies
COSTS = {"tokens": "own tokens an episode", "tool_calls": "tool calls an episode", "thinking": "share that thinks"}


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the (cost, accuracy) pairs that no other beats: as cheap and more accurate, or cheaper and as accurate.

    In order of cost. Of equal pairs the first stands for all.
    """
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front


def plot_pareto(results: Sequence[tuple[str, dict[str, Any]]], path: Path) -> None:
    """Sampled accuracy against tokens, tool calls and thinking, with 95% intervals and the Pareto front.

    A cost that is the same for all has no panel; nothing is drawn where none differs.
    """
    found = [result["sampled"] for _, result in results]
    costs = [cost for cost in COSTS if len({figures[cost] for figures in found}) > 1]
    if not costs:
        return
    figure, axes = _axes(len(costs))
    for axis, cost in zip(axes, costs, strict=True):
        for number, (name, _) in enumerate(results):
            middle, spread = _intervals([found[number]])
            beside = [[max(0.0, sign * (found[number][f"{cost}_{end}"] - found[number][cost]))] for sign, end in ENDS]
            style = {"fmt": "o", "capsize": 2, "color": f"C{number % 10}"}
            axis.errorbar([found[number][cost]], middle, spread, beside, label=name, **style)
        points = [(figures[cost], figures["accuracy"]) for figures in found]
        front = [points[i] for i in pareto_front(points)]
        axis.plot(*zip(*front, strict=True), color=GREY, linewidth=1, zorder=0)
        axis.set(xlabel=COSTS[cost], ylabel="accuracy on unseen questions")
        axis.set_xlim(left=0)
    axes[-1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=140)
