"""Training runs as arms of a benchmark, each ``python -m training`` in a process of its own; finished ones are kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from rollout.plots import read_jsonl


def train(folder: Path, experiment: str, overrides: list[str], *, timeout_s: float = 1800.0) -> Path:
    """One run; a finished one is read back. What it cannot do ends the benchmark."""
    if not (folder / "summary.json").exists():
        command = [sys.executable, "-m", "training", f"experiment={experiment}", f"run_dir={folder}", "overwrite=true"]
        done = subprocess.run([*command, *overrides], stdout=subprocess.DEVNULL, timeout=timeout_s, check=False)
        if done.returncode:
            sys.exit(f"error: {folder.name} ended with exit code {done.returncode}; its engine.log lies in {folder}")
    return folder


def warm_start(folder: Path, experiment: str, overrides: list[str]) -> list[str]:
    """Make the experiment's warm start once; gives the overrides with which a run begins from it."""
    off = [f"evaluation.{name}=false" for name in ("before", "after")]
    train(folder, experiment, [*off, "steps=1", "batch.prompts=4", *overrides])
    return ["model=hf", f"model.path={folder / 'checkpoints' / 'warm_start'}", "warm_start=none"]


class Run:
    """What a run left behind: ``rows`` of metrics.jsonl and its summary."""

    def __init__(self, folder: Path) -> None:
        self.rows = read_jsonl(folder / "metrics.jsonl")
        self.summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
        self.evaluations: list[dict[str, Any]] = json.loads((folder / "stages.json").read_text())["evaluations"]

    def mean(self, name: str) -> float:
        return float(np.mean([row[name] for row in self.rows if name in row]))
