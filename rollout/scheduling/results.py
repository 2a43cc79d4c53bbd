"""What a simulation found: jobs, their delays, and the figures that policies are compared by."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rollout.scheduling.plots import Interval


@dataclass(slots=True)
class Job:
    """User message → final answer, in seconds of the virtual clock."""

    program: int
    arrival: float
    opens_program: bool  # its first turn is the program's first
    first_token: float = math.nan  # end of the step that gave the first token of its first turn
    finish: float = math.nan
    gaps: float = 0.0  # Σ seconds of its tools

    @property
    def time(self) -> float:
        """From the arrival of its first turn to the end of its last."""
        return self.finish - self.arrival

    @property
    def delay(self) -> float:
        """Job time less its gaps: what the engine is answerable for."""
        return self.time - self.gaps


@dataclass
class Result:
    """Jobs by arrival, and counts in real tokens. ``wall``: real seconds; ``scheduler``: the object that ran."""

    jobs: list[Job]
    makespan: float
    steps: int
    prefill_tokens: int  # computed of prompts, recomputed ones included
    recomputed_tokens: int  # computed of prompts that this program had had computed before; tails of blocks always are
    loaded_tokens: int  # from the offload tier
    preemptions: int
    mean_running: float  # requests in a step, over the seconds of steps
    stalled: float  # seconds in which requests waited and none was scheduled
    wall: float
    intervals: list[Interval] = field(default_factory=list)
    scheduler: Any = None

    @property
    def job_times(self) -> np.ndarray:
        return np.array([job.time for job in self.jobs])

    @property
    def delays(self) -> np.ndarray:
        return np.array([job.delay for job in self.jobs])

    @property
    def first_turn_latencies(self) -> np.ndarray:
        """Arrival to first token, of the first turn of each program."""
        return np.array([job.first_token - job.arrival for job in self.jobs if job.opens_program])

    def figures(self) -> dict[str, float]:
        """Numbers by name: seconds, real tokens, counts."""
        times, delays, first = self.job_times, self.delays, self.first_turn_latencies
        return {
            "jobs": len(self.jobs),
            "mean_job_time": float(times.mean()),
            "p95_job_time": float(np.percentile(times, 95)),
            "mean_delay": float(delays.mean()),
            "p95_delay": float(np.percentile(delays, 95)),
            "mean_first_turn_latency": float(first.mean()),
            "p99_first_turn_latency": float(np.percentile(first, 99)),
            "makespan": self.makespan,
            "prefill_tokens": self.prefill_tokens,
            "recomputed_tokens": self.recomputed_tokens,
            "loaded_tokens": self.loaded_tokens,
            "preemptions": self.preemptions,
            "mean_running": self.mean_running,
            "stalled": self.stalled,
            "steps": self.steps,
            "steps_per_second": self.steps / max(self.wall, 1e-9),
        }
