"""Samples a second of two training processes on two cores against one process with two threads, quickstart's loop.

The engine is a process of its own in both arms (vLLM, CPU). Arms take turns; a step is timed from row to row of
metrics.jsonl, the first two of a run are left out.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.arms import STORE, code
from benchmarks.report import Report
from rollout.plots import read_jsonl

SETTINGS = [
    "experiment=quickstart",
    "engine=vllm_process",
    "evaluation.before=false",
    "evaluation.after=false",
    "evaluation.every=null",
    "checkpoint.every=1000",
]
ARMS = {"one_process": (1, "threads=2"), "two_processes": (2, "threads=1")}


def run(folder: Path, processes: int, settings: list[str]) -> Path:
    """One run from the warm start, finished ones are kept."""
    if not (folder / "summary.json").exists():
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *(launcher if processes > 1 else []), "-m", "training", f"run_dir={folder}"]
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "2" if processes == 1 else "1"}
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_suffix(".log").open("w") as log:
            done = subprocess.run(
                [*command, *SETTINGS, *settings], stdout=log, stderr=log, env=environment, timeout=900, check=False
            )
        if done.returncode:
            sys.exit(f"error: {folder.name} ended with exit code {done.returncode}; see {folder.with_suffix('.log')}")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round of few steps, no bars")
    quick = parser.parse_args().quick
    report = Report("process_throughput")
    root = STORE / "process_throughput" / (code() + ("-quick" if quick else ""))
    short = ["warm_start.steps=20", "batch.prompts=4"] if quick else []
    report.console.print("warm start …", style="dim")
    run(root / "warm", 1, ["steps=1", "threads=1", *short])
    warm = ["model=hf", f"model.path={root}/warm/checkpoints/warm_start", "warm_start=none"]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS}
    for number in range(1 if quick else 3):
        for name, (processes, threads) in ARMS.items():
            report.console.print(f"{name}, round {number} …", style="dim")
            steps = "steps=4" if quick else "steps=14"
            folder = run(root / f"{name}-{number}", processes, [*warm, threads, steps, *short[1:]])
            rows = read_jsonl(folder / "metrics.jsonl")[2:]
            samples = [row["rollout/episodes"] / row["time/step"] for row in rows]
            parts = {part: float(np.median([row[f"time/{part}"] for row in rows])) for part in ("generate", "train")}
            found[name].append({"samples": float(np.median(samples)), **parts})
    rows = []
    for name, rounds in found.items():
        each = {key: float(np.median([r[key] for r in rounds])) for key in rounds[0]}
        report.figure(f"{name}_samples_per_second", each["samples"])
        rows.append((name.replace("_", " "), *(f"{each[key]:.2f}" for key in ("samples", "generate", "train"))))
    ratios = [two["samples"] / one["samples"] for one, two in zip(*found.values(), strict=True)]
    report.figure("samples_per_second_ratio", float(np.median(ratios)))
    report.table("medians over rounds", ["arm", "samples/s", "generate s", "train s"], rows)
    if quick:
        shutil.rmtree(root)
    else:
        report.bar("samples_per_second_ratio", ">=", 0.8)
    report.finish(quick)


if __name__ == "__main__":
    main()
