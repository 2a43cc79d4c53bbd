"""What RL adds to the quickstart, against a control that spends the same seconds on more supervised steps.

The control has the same demonstrations, seed and schedule shape, stretched over warm-start seconds plus RL seconds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.arms import code
from benchmarks.report import Report

QUICK = ["warm_start.steps=20", "steps=2", "evaluation.questions=40"]


def train(run_dir: Path, overrides: list[str]) -> dict[str, Any]:
    """One run in a process of its own; a finished one is not run again."""
    if not (run_dir / "summary.json").exists():
        command = [sys.executable, "-m", "training", "experiment=quickstart", f"run_dir={run_dir}", *overrides]
        subprocess.run(command, check=True, timeout=1800)
    return json.loads((run_dir / "summary.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run: no bars")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/quickstart"), help="where arms are kept")
    arguments, overrides = parser.parse_known_args()
    overrides += QUICK if arguments.quick else []
    report = Report("quickstart")
    out = arguments.out / (code() + ("-quick" if arguments.quick else ""))
    ours = train(out / "rl", overrides)
    seconds = ours["seconds_by_stage"]
    warm = next((int(x.split("=")[1]) for x in overrides if x.startswith("warm_start.steps=")), 400)
    steps = round(warm * (1 + seconds["training"] / seconds["warm_start"]))
    more = [*overrides, f"warm_start.steps={steps}", "steps=1", "evaluation.after=false"]
    control = train(out / "control", more)
    for name in ("accuracy_before", "accuracy_after", "greedy_before", "greedy_after", "seconds_total"):
        report.figure(name, ours[name])
    report.figure("control_accuracy", control["accuracy_before"])
    report.figure("control_greedy", control["greedy_before"])
    report.figure("control_steps", steps)
    report.figure("gain_over_warm_start", ours["accuracy_after"] - ours["accuracy_before"])
    report.figure("gain_over_control", ours["accuracy_after"] - control["accuracy_before"])
    report.table(
        "quickstart: accuracy on unseen questions",
        ("arm", "sampled", "greedy"),
        [
            (f"warm start, {warm} steps", ours["accuracy_before"], ours["greedy_before"]),
            (f"control, {steps} steps", control["accuracy_before"], control["greedy_before"]),
            ("warm start and RL", ours["accuracy_after"], ours["greedy_after"]),
        ],
    )
    if not arguments.quick:  # the README's picture
        shutil.copy(out / "rl" / "reward.png", Path(__file__).parent / "results" / "quickstart.png")
    report.bar("seconds_total", "<=", 360)
    report.bar("accuracy_after", ">=", 0.90)
    report.bar("greedy_after", ">=", 0.97)
    report.bar("gain_over_warm_start", ">=", 0.30)
    report.bar("gain_over_control", ">=", 0.10)
    report.finish(quick=arguments.quick)


if __name__ == "__main__":
    main()
