"""Two policies on the same questions: paired differences, and what an oracle of the warm start would do."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.training_runs import last_checkpoint
from rollout.plots import read_jsonl

Outcome = dict[str, Any]


def outcomes(run: Path) -> dict[str, Outcome]:
    """By question, what the last evaluation of a run, or an evaluation alone, sampled there."""
    files = sorted(run.glob("outcomes/step-*.jsonl"), key=lambda path: int(path.stem.partition("-")[2]))
    rows = read_jsonl(files[-1] if files else run / "outcomes.jsonl")
    return {row["prompt_id"]: row for row in rows if row["mode"] == "sampled"}


def mean(found: dict[str, Outcome], measure: str, difficulty: str | None = None) -> float:
    """Over the questions, or those of a difficulty."""
    return float(np.mean([o[measure] for o in found.values() if difficulty in (None, o["difficulty"])]))


def _classes(found: dict[str, Outcome], value: Callable[[str, Outcome], float]) -> list[list[float]]:
    parts: dict[str, list[float]] = {}
    for question, outcome in found.items():
        parts.setdefault(outcome["difficulty"], []).append(value(question, outcome))
    return list(parts.values())


def by_class(found: dict[str, Outcome], value: Callable[[str, Outcome], float]) -> float:
    """Mean over the difficulties' means: each counts alike, however many unseen questions there are of it."""
    return float(np.mean([np.mean(part) for part in _classes(found, value)]))


def figures_by_class(found: dict[str, Outcome], measures: Sequence[str]) -> dict[str, float]:
    """Each measure's ``by_class``, with its 95% interval (normal) as ``_low`` and ``_high``."""
    figures: dict[str, float] = {}
    for measure in measures:
        parts = _classes(found, lambda question, outcome, measure=measure: outcome[measure])
        middle = float(np.mean([np.mean(part) for part in parts]))
        spread = 1.96 * math.sqrt(sum(np.var(part, ddof=1) / len(part) for part in parts)) / len(parts)
        figures |= {measure: middle, f"{measure}_low": middle - spread, f"{measure}_high": middle + spread}
    return figures


def evaluated(run: Path, overrides: Sequence[str], name: str) -> dict[str, Outcome]:
    """Outcomes of a run's last checkpoint, or of a checkpoint, on questions that it was not trained for."""
    folder = run / name
    if not (folder / "outcomes.jsonl").exists():
        checkpoint = last_checkpoint(run) if (run / "checkpoints").exists() else run
        command = [
            sys.executable,
            "-m",
            "rollout.evaluate",
            f"checkpoint={checkpoint}",
            f"run_dir={folder}",
            "threads=1",
        ]
        done = subprocess.run([*command, *overrides], stdout=subprocess.DEVNULL, timeout=900, check=False)
        if done.returncode:
            sys.exit(f"error: the evaluation of {checkpoint} ended with exit code {done.returncode}")
    return outcomes(folder)


def accuracy_difference_low(ours: Sequence[dict[str, Outcome]], theirs: Sequence[dict[str, Outcome]]) -> float:
    """Lower 95% bound of the mean accuracy difference, paired by seed and question: normal, over all pairs."""
    differences = np.array([
        a[question]["accuracy"] - b[question]["accuracy"]
        for a, b in zip(ours, theirs, strict=True)
        for question in a.keys() & b.keys()
    ])  # fmt: skip
    return float(differences.mean() - 1.96 * differences.std(ddof=1) / math.sqrt(len(differences)))


def direct_answers(checkpoint: Path, task: Any) -> dict[str, tuple[float, int]]:
    """For each test question, the probability that the checkpoint's direct answer is right, and the tokens it takes.

    Direct: an empty think block and no tool call; the right answer is the plain gold text. Exact, by scoring it.
    """
    from rollout.chat import THINK, THINK_END, Chat
    from rollout.weights import model_logprobs
    from training.models import load_policy

    model, tokenizer = load_policy(checkpoint)
    chat = Chat(tokenizer)
    call = chat.encode("<tool_call>")[:1]
    found = {}
    for row in task.rows("test"):
        prompt = chat.open(row.messages, task.tools(), "never")
        answer = [*chat.encode(str(row.answer)), chat.end_of_turn_id]
        right, calls = model_logprobs(model, [prompt + answer, prompt + call])
        probability = math.exp(sum(right[-len(answer) :])) / max(1 - math.exp(calls[-1]), 1e-9)
        found[row.id] = probability, len(answer) + len((THINK, THINK_END))  # an empty block takes a token a tag
    return found
