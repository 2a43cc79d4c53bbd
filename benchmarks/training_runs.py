"""Training runs as arms of a benchmark, each ``python -m training`` in a process of its own; finished ones are kept."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from benchmarks.arms import STORE, code
from benchmarks.report import Report
from rollout.plots import read_jsonl


def train(folder: Path, experiment: str, overrides: list[str], *, timeout_s: float = 1800.0) -> Path:
    """One run; a finished one is read back. What it cannot do ends the benchmark."""
    if not (folder / "summary.json").exists():
        command = [sys.executable, "-m", "training", f"experiment={experiment}", f"run_dir={folder}", "overwrite=true"]
        done = subprocess.run([*command, *overrides], stdout=subprocess.DEVNULL, timeout=timeout_s, check=False)
        if done.returncode:
            sys.exit(f"error: {folder.name} ended with exit code {done.returncode}; its engine.log lies in {folder}")
    return folder


def last_checkpoint(run: Path) -> Path:
    """The newest of a finished run, which has one."""
    from training.checkpoint import latest  # imports torch, which most of a benchmark's life does without

    found = latest(run / "checkpoints")
    assert found is not None
    return found


class Comparison:
    """A benchmark that compares training runs of one experiment from one warm start: flags, report and runs.

    Runs are stored under the code that made them: one that was stopped goes on from there.
    """

    def __init__(self, name: str, what: str, *, experiment: str, seeds: int, quick: list[str]) -> None:
        parser = argparse.ArgumentParser(description=what)
        parser.add_argument("--quick", action="store_true", help="a smoke run of one seed: no bars")
        parser.add_argument("--seeds", type=int, default=seeds)
        parser.add_argument("--plots", type=Path, metavar="DIR", help="write the picture there")
        given, self.overrides = parser.parse_known_args()
        self.quick, self.seeds, self.plots = given.quick, 1 if given.quick else given.seeds, given.plots
        self.overrides = [*(quick if self.quick else []), *self.overrides]
        self.experiment, self.report = experiment, Report(name)
        self.root = STORE / name / (code() + ("-quick" if self.quick else ""))

    def start(self) -> Path:
        """The checkpoint that every run starts from."""
        checkpoint = self.root / "warm" / "checkpoints" / "warm_start"
        if not checkpoint.exists():
            self.report.console.print("warm start …", style="dim")
            short = ["warm_start.steps=20"] if self.quick else []
            off = [f"evaluation.{name}=false" for name in ("before", "after")]
            train(self.root / "warm", self.experiment, [*off, *short, "steps=1", "batch.prompts=4"])
        return checkpoint

    def run(self, label: str, settings: list[str]) -> Path:
        """The folder of a run, with the flags' overrides, from the warm start."""
        start = ["model=hf", f"model.path={self.start()}", "warm_start=none"]
        self.report.console.print(f"{label} …", style="dim")
        name = label.replace(", ", "-").replace(" ", "_")
        return train(self.root / name, self.experiment, [*start, *settings, *self.overrides])

    def finish(self, draw: Callable[[Path], None]) -> NoReturn:
        """The picture where it was asked for, and the last line."""
        if self.plots:
            self.plots.mkdir(parents=True, exist_ok=True)
            draw(self.plots / f"{self.report.name}.png")
        if self.quick:
            shutil.rmtree(self.root)
        self.report.finish(self.quick)


class Run:
    """What a run left behind: ``rows`` of metrics.jsonl and its summary."""

    def __init__(self, folder: Path) -> None:
        self.rows = read_jsonl(folder / "metrics.jsonl")
        self.summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
        self.evaluations: list[dict[str, Any]] = json.loads((folder / "stages.json").read_text())["evaluations"]

    def mean(self, name: str) -> float:
        return float(np.mean([row[name] for row in self.rows if name in row]))
