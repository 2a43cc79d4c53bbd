"""The cells of ``kv_ttl_sim``: workload × load × hardware, and one simulation of a cell under one policy."""

from __future__ import annotations

import functools
import json
import logging
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

TRACE = Path(__file__).parents[2] / "shared/traces/claude_code_sessions.jsonl.gz"  # beside the repository
POOL = (
    400_000  # tokens of KV cache: what is left beside the weights, H100 with 8B (52 GB) and 4 × H100 with 70B (131 GB)
)
SCALE = 16  # real tokens behind a simulated one

# Programs a second at which stock's mean delay is two to four times that of an idle engine, in runs of 100 programs.
# Thrashing feeds itself: in longer runs stock collapses at lower rates, which is why the knee is taken below these.
KNEE = {
    "h100_8b": {
        "swe": 0.072, "bfcl": 0.24, "long_tools": 0.038, "mixed": 0.046, "swe_chat": 0.06, "drift": 0.07,
        "sessions": 0.004, "no_tools": 3.0, "chat": 12.0, "cheap_prefill": 0.15,
    },
    "h100x4_70b": {
        "swe": 0.032, "bfcl": 0.11, "long_tools": 0.017, "mixed": 0.021, "swe_chat": 0.026, "drift": 0.031,
        "no_tools": 1.2, "chat": 5.0, "cheap_prefill": 0.06,
    },
}  # fmt: skip
LOADS = {"light": 0.5, "knee": 0.8, "overload": 2.0}
# Paired seeds: 20 where a run takes less than a second of one core, 3 below 4 s, else what 45 minutes on 2 cores leave.
SEEDS = {
    "chat": 20, "bfcl": 3, "no_tools": 3, "rl_batch": 3, "swe": 2, "sessions": 2, "drift": 1, "cheap_prefill": 1,
    "long_tools": 1, "mixed": 1, "swe_chat": 1,
}  # fmt: skip
FIRST = "h100_8b"  # the hardware on which every policy plays
RL = (FIRST, "h100x4_70b")
STOCK = "fcfs"


@dataclass(frozen=True)
class Cell:
    """One workload at one load on one hardware; ``pool`` None is memory without end."""

    workload: str
    load: str
    hardware: str = "h100_8b"
    programs: int = 300
    pool: int | None = POOL
    scale: int = SCALE

    @property
    def name(self) -> str:
        return f"{self.workload}/{self.load}/{self.hardware}"


@dataclass(frozen=True)
class Run:
    """A cell under a policy with its settings, one seed. ``hints``: clients name tools and last turns."""

    cell: Cell
    policy: str
    seed: int = 0
    settings: tuple[tuple[str, Any], ...] = ()
    hints: bool = False

    @property
    def arm(self) -> str:
        """The policy with its settings, as tables name it."""
        return self.policy + "_hints" * self.hints + "".join(f" {value}" for _, value in self.settings)

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


@dataclass
class Outcome:
    """What is compared. Lists hold one number a program, by index: Σ of its jobs' seconds."""

    job_time: list[float] = field(default_factory=list)
    delay: list[float] = field(default_factory=list)
    first_turn: list[float] = field(default_factory=list)
    jobs: int = 0
    makespan: float = 0.0
    recomputed: float = 0.0
    preemptions: int = 0
    p95_job_time: float = 0.0
    seconds: float = 0.0  # of one core, that the run took


def simulate_run(run: Run) -> dict[str, Any]:
    """Play one run; in a process of its own, with one thread."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    from rollout.scheduling.simulator import simulate
    from rollout.scheduling.vllm_plugin import program_scheduler

    started = time.process_time()
    result = simulate(
        workload(run.cell, run.seed),
        hardware=hardware(run.cell),
        pool_tokens=run.cell.pool,
        scheduler=functools.partial(program_scheduler, simulated=True),
        options={"turnstile": {"policy": run.policy, **dict(run.settings)}},
        scale=run.cell.scale,
        hints=run.hints,
    )
    times: dict[int, float] = {}
    delays: dict[int, float] = {}
    first: dict[int, float] = {}
    for job in result.jobs:
        times[job.program] = times.get(job.program, 0.0) + job.time
        delays[job.program] = delays.get(job.program, 0.0) + job.delay
        if job.opens_program:
            first[job.program] = job.first_token - job.arrival
    order = sorted(times)
    return asdict(
        Outcome(
            [times[p] for p in order], [delays[p] for p in order], [first[p] for p in order], len(result.jobs),
            result.makespan, result.recomputed_tokens, result.preemptions, float(np.percentile(result.job_times, 95)),
            time.process_time() - started,
        )
    )  # fmt: skip


def workload(cell: Cell, seed: int) -> Any:
    from rollout.scheduling.traces import read_trace
    from rollout.scheduling.workloads import generate

    if cell.workload == "rl_batch":
        return generate("rl_batch", programs=cell.programs, seed=seed, group_size=8)
    rate = KNEE[cell.hardware][cell.workload] * LOADS[cell.load]
    if cell.workload == "sessions":
        return read_trace(TRACE, programs=cell.programs, rate=rate, seed=seed)
    name = "swe" if cell.workload == "cheap_prefill" else cell.workload
    return generate(name, programs=cell.programs, rate=rate, seed=seed)


def hardware(cell: Cell) -> Any:
    from rollout.scheduling import costs

    changes = {"prefill_scale": 0.25} if cell.workload == "cheap_prefill" else {}
    return getattr(costs, cell.hardware)(**changes)
