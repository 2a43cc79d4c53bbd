"""Accuracy and its company over a set of questions: pure figures of episodes, and the rollouts that give them."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rollout.agent import Speaker
from rollout.config import EvaluationConfig
from rollout.environment import Row
from rollout.episode import Episode
from rollout.errors import UserError
from rollout.runner import Job, Runner

Figures = dict[str, Any]


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of P(at least one of k samples is right) from n samples (arXiv 2107.03374 §2.1); k <= n."""
    if not 0 < k <= n or not 0 <= correct <= n:
        raise ValueError(f"pass@{k} of {correct} right in {n} samples: k must be in 1..n and right in 0..n")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def bootstrap(
    values: Sequence[float], resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean of ``values``, one for each question."""
    array = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    chunks = max(1, 4_000_000 // max(len(array), 1))
    means: list[np.ndarray] = []
    while (left := resamples - sum(map(len, means))) > 0:
        means.append(array[rng.integers(0, len(array), (min(left, chunks), len(array)))].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


MEASURES: dict[str, Callable[[Episode], float]] = {  # each has an interval, and a place in outcomes
    "accuracy": lambda episode: float(episode.success),
    "tokens": lambda episode: float(episode.own_tokens),
    "tool_calls": lambda episode: float(len(episode.tool_results)),
    "thinking": lambda episode: float(episode.thought),
}


def trigger(episodes: Sequence[Episode]) -> Figures | None:
    """How well thinking met the need for it, over decisions with a label (arXiv 2505.11896 Table 1); None without any.

    Positive is a need for thought. ``f1`` hides a collapse to always thinking: ``accuracy`` and ``precision`` show it.
    Each is null where its denominator is 0.
    """
    decisions = [d for e in episodes for d in e.decisions(e.needs_thought) if d[1] is not None]
    if not decisions:
        return None
    hits = sum(thought and need for thought, need in decisions)
    thoughts, needs = sum(thought for thought, _ in decisions), sum(bool(need) for _, need in decisions)
    right = sum(thought == need for thought, need in decisions)
    return {
        "decisions": len(decisions),
        "accuracy": right / len(decisions),
        "precision": hits / thoughts if thoughts else None,
        "recall": hits / needs if needs else None,
        "f1": 2 * hits / (thoughts + needs) if thoughts + needs else None,
    }


def figures(episodes: Sequence[Episode], samples: int = 1) -> Figures:
    """What a set of episodes shows. Questions with several samples count by their mean.

    Accuracy, own ``tokens``, ``tool_calls`` and ``thinking`` (the share that thinks, AdaCoT's trigger rate) have 95%
    intervals, ``_low`` and ``_high``. ``tool_productivity`` is right answers per tool call (arXiv 2504.14870 §4.1),
    null where nothing was called; ``e3`` is accuracy² per token (arXiv 2505.16122). ``trigger``: see ``trigger``.
    """
    by_question: dict[str, list[Episode]] = defaultdict(list)
    for episode in episodes:
        by_question[episode.prompt_id].append(episode)
    calls = sum(len(e.tool_results) for e in episodes)
    n = len(episodes)
    result: Figures = {"questions": len(by_question)}
    for name, value in MEASURES.items():
        means = [sum(map(value, group)) / len(group) for group in by_question.values()]
        result[name] = sum(means) / len(means)
        result[f"{name}_low"], result[f"{name}_high"] = bootstrap(means)
    result |= {
        "tool_productivity": sum(e.success for e in episodes) / calls if calls else None,
        "e3": result["accuracy"] ** 2 / result["tokens"] if result["tokens"] else None,
        "trigger": trigger(episodes),
        "tool_errors": sum(r.error for e in episodes for r in e.tool_results) / n,
        "ill_formed": sum(not e.well_formed for e in episodes) / n,
        "truncated": sum(e.status == "truncated" for e in episodes) / n,
    }
    for k in (2**i for i in range(1, int(math.log2(samples)) + 1)) if samples > 1 else ():
        if whole := [group for group in by_question.values() if len(group) >= k]:  # lost samples may leave none
            result[f"pass@{k}"] = sum(pass_at_k(len(g), sum(e.success for e in g), k) for g in whole) / len(whole)
    return result


def by_difficulty(episodes: Sequence[Episode], samples: int = 1) -> dict[str, Figures]:
    """The same figures for each difficulty."""
    parts: dict[str, list[Episode]] = defaultdict(list)
    for episode in episodes:
        parts[episode.difficulty or "all"].append(episode)
    return {difficulty: figures(part, samples) for difficulty, part in sorted(parts.items())}


def report(episodes: Sequence[Episode], rows: Sequence[Row], samples: int = 1) -> Figures:
    """Figures over unseen questions; those that a task marks as ``memorised`` are reported apart, in ``facts``."""
    facts = {row.id for row in rows if row.extras.get("memorised")}
    unseen = [e for e in episodes if e.prompt_id not in facts] or list(episodes)
    result = figures(unseen, samples)
    result["by_difficulty"] = by_difficulty(episodes, samples)
    if facts and len(unseen) < len(episodes):
        result["facts"] = figures([e for e in episodes if e.prompt_id in facts], samples)
    return result


def write_outcomes(episodes: dict[str, list[Episode]], path: Path) -> None:
    """JSON lines, one for each episode by mode: what two evaluations of the same questions can be compared by."""
    lines = [
        {"mode": mode, "prompt_id": e.prompt_id, "sample": e.sample, "difficulty": e.difficulty}
        | {name: value(e) for name, value in MEASURES.items()}
        for mode, played in episodes.items()
        for e in played
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


class Evaluated(Protocol):
    """A policy behind an engine, or behind somebody's server."""

    def at(self, temperature: float, seed: int | None) -> Evaluated: ...

    def speaker(self) -> Speaker: ...


def evaluate(
    runner: Runner,
    policy: Evaluated,
    rows: Sequence[Row],
    config: EvaluationConfig,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[dict[str, Figures], dict[str, list[Episode]]]:
    """Play every row: ``sampled`` at the temperature, seeded by question and sample, and ``greedy``.

    The engine's version does not enter the seeds: two checkpoints meet the same randomness. Each report holds the
    number of ``dropped`` episodes; nothing left to report is refused.
    """
    modes = {"sampled": (config.temperature, config.samples)} | ({"greedy": (0.0, 1)} if config.greedy else {})
    results: dict[str, Figures] = {}
    episodes: dict[str, list[Episode]] = {}
    for mode, (temperature, samples) in modes.items():
        speaking = policy.at(temperature, config.seed if temperature > 0 else None)
        jobs = [Job(row, f"{mode}/{row.id}", sample) for row in rows for sample in range(samples)]
        total = len(jobs)
        episodes[mode] = runner.play(
            jobs, speaking.speaker, lambda done, mode=mode, total=total: progress(mode, done, total)
        )
        if not episodes[mode]:
            lost = dict(runner.lost)
            raise UserError(f"evaluation: all {total} episodes were lost to {lost}; mend that and try again")
        results[mode] = report(episodes[mode], rows, samples) | {"dropped": total - len(episodes[mode])}
    return results, episodes
