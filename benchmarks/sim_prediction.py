"""The simulator against the real engine: the pinned case of ``kv_ttl``, predicted from the costs of its own steps."""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np

from benchmarks.keep import RESULTS
from benchmarks.kv_ttl import SEEDS
from benchmarks.kv_ttl_cases import real_case_engine, real_case_workload
from benchmarks.report import Report

ARMS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "program_fcfs": {"policy": "program_fcfs"},
    "program_cap_4": {"policy": "program_cap", "cap": 4},
    "turnstile": {"policy": "turnstile"},
}


def predict(report: Report) -> None:
    """Mean job times of the same sessions under the virtual clock, beside the measured ones that were kept."""
    kept = RESULTS / "kv_ttl.json"
    if not report.input("kv_ttl_results", kept, "run python -m benchmarks.keep kv_ttl first"):
        return
    measured = json.loads(kept.read_text())["figures"]
    costs = {name: measured[f"step_{name}"] for name in "abcd"}
    predicted = {arm: mean_job_time(options, costs) for arm, options in ARMS.items()}
    rows = []
    for arm, seconds in predicted.items():
        real = measured[f"{arm}_mean_job_time"]
        rows.append(
            (
                arm,
                seconds,
                real,
                predicted["stock"] / seconds,
                measured["stock_mean_job_time"] / real,
                seconds / real - 1,
            )
        )
    columns = ["arm", "simulated s", "measured s", "ratio simulated", "ratio measured", "error of seconds"]
    report.table("the real CPU runs, predicted from the costs of their steps", columns, rows)
    report.figure("cpu_ratio_predicted", predicted["stock"] / predicted["turnstile"])
    report.figure("cpu_ratio_measured", measured["ratio_mean_job_time"])
    report.figure(
        "cpu_ratio_error", abs(report.figures["cpu_ratio_predicted"] / report.figures["cpu_ratio_measured"] - 1)
    )
    report.bar("cpu_ratio_error", "<=", 0.15)


def mean_job_time(options: dict[str, Any] | None, costs: dict[str, float]) -> float:
    """Seconds, over the seeds that ``kv_ttl`` plays; ``options`` None is stock."""
    from rollout.scheduling.costs import Linear
    from rollout.scheduling.simulator import simulate
    from rollout.scheduling.vllm_plugin import program_scheduler

    ours: dict[str, Any] = {}
    if options is not None:
        scheduler = functools.partial(program_scheduler, simulated=True)
        ours = {"scheduler": scheduler, "options": {"turnstile": options}}
    played = [
        simulate(real_case_workload(seed), hardware=Linear(**costs), hints=False, **ours, **real_case_engine())
        for seed in range(SEEDS)
    ]
    return float(np.mean([result.job_times.mean() for result in played]))
