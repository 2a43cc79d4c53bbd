"""What ``benchmarks.kv_ttl`` plays: sessions by seed, and the pools that they meet."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from rollout.scheduling.workloads import Session, Turn, Workload

BLOCK = 32  # tokens
BATCH: dict[str, Any] = {"max_num_seqs": 256, "max_num_batched_tokens": 2048}  # what stock vLLM serves with on CPU
TOOL = "tool"


@dataclass(frozen=True)
class Case:
    """Programs that start within ``arrivals`` seconds, each of ``turns`` turns. Ranges: tokens, seconds of a tool."""

    programs: int
    turns: int
    arrivals: float
    first: tuple[int, int] = (700, 1300)  # tokens of the first prompt: instructions and a task
    result: tuple[int, int] = (60, 180)  # of a tool's result
    output: tuple[int, int] = (14, 27)  # of a tool call
    gap: tuple[float, float] = (0.2, 5.0)  # log-uniform: most tools are short


PINNED = Case(12, 6, arrivals=10.0)  # the issue's, a third of whose working set is
POOL = 220  # blocks
SHORT = Case(8, 4, arrivals=5.0)  # of the curve over pool sizes
QUICK = Case(3, 2, arrivals=0.1, first=(60, 90), result=(30, 60), output=(4, 8), gap=(0.02, 0.1))
QUICK_POOL = 9  # blocks, of the 14 that they fill


def workload(case: Case, seed: int) -> Workload:
    """The sessions of a case by arrival, the same for every arm."""

    def session(index: int) -> Session:
        rng = np.random.default_rng([seed, index])
        turns = []
        for number in range(case.turns):
            prompt = int(rng.integers(*(case.result if number else case.first)))
            output, gap = int(rng.integers(*case.output)), float(np.exp(rng.uniform(*np.log(case.gap))))
            last = number + 1 == case.turns
            turns.append(Turn(prompt, output, 0.0 if last else gap, None if last else TOOL))
        return Session(tuple(turns), arrival=float(rng.uniform(0, case.arrivals)))

    sessions = sorted((session(i) for i in range(case.programs)), key=lambda session: session.arrival or 0.0)
    return Workload("kv_ttl", tuple(sessions))


def real_case_workload(seed: int) -> Workload:
    """The pinned case. ``real_case_engine`` is the engine that it runs on."""
    return workload(PINNED, seed)


def real_case_engine() -> dict[str, Any]:
    """Pool, blocks and batches of the pinned case, as ``rollout.scheduling.simulator.simulate`` takes them."""
    return {"pool_tokens": (POOL - 1) * BLOCK, "block_size": BLOCK, **BATCH}  # one block is vLLM's null block


def working_set(load: Workload) -> int:
    """Blocks that hold all sessions at their longest."""
    return sum(-(-session.tokens // BLOCK) for session in load.sessions)


def pool_blocks(load: Workload, share: float) -> int:
    """Blocks of a pool of that share of the working set, though no smaller than its longest session needs."""
    longest = max(-(-session.tokens // BLOCK) for session in load.sessions)
    return max(math.ceil(share * working_set(load)), longest + 2) + 1  # one block is vLLM's null block
