"""What the scheduler counts, each number with what to do about it. Pure.

The help texts are what Prometheus and Grafana show beside a number.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

DROP_CAUSES = ("release", "compaction", "replaced", "abort", "reset", "pause", "shutdown")


def _count(text: str) -> Any:
    return field(default=0, metadata={"help": text})


def _drops() -> Counter[str]:
    return Counter(dict.fromkeys(DROP_CAUSES, 0))  # zeros too: a rate needs a beginning


@dataclass(slots=True)
class Counters:
    """Totals since the engine started; the scheduler adds to the fields. Tokens are prompt tokens."""

    programs: int = _count("Programs (sessions) seen. Zero while clients run: they name none; send a session_id.")
    jobs: int = _count(
        "Jobs that ended (user message to final answer). Zero while programs come and go: last turns look like tool "
        "calls; send last_turn."
    )
    turns: int = _count(
        "Turns (requests) of programs. Far below vllm:request_success_total: many clients name no program."
    )
    pins: int = _count("Times that the KV blocks of a finished turn were kept for the next one.")
    claims: int = _count(
        "Pins that the next turn came back to. Below half of the pins: tools outlast what the pool can hold."
    )
    expiries: int = _count(
        "Pins whose time ran out. Many beside claims: the time-to-live is shorter than the tools are."
    )
    pressure_releases: int = _count(
        "Pins given up because a request needed their blocks. Many beside claims: the pool is too small for this load; "
        "give the KV cache more memory, or admit fewer programs (policy program_cap)."
    )
    refusals: int = _count("Pins not made because of the cap. Raise the cap if pressure releases stay few.")
    drops: Counter[str] = field(
        default_factory=_drops,
        metadata={
            "help": "Pins dropped, by cause. Many by abort: clients give up; see the queue time. Many by compaction: "
            "agents rewrite their prompts, and what was kept matches no more."
        },
    )
    preemptions: int = _count("Running requests thrown out for lack of blocks. Steady growth: lower max-num-seqs.")
    tokens_reused: int = _count("Prompt tokens served from claimed pins: recomputation avoided.")
    tokens_recomputed: int = _count(
        "Prompt tokens that their program had computed before and that were computed again. Many beside tokens reused: "
        "the pool is too small, or prompts change at their beginning."
    )
    aborts: int = _count("Requests of programs that their clients aborted. Growth under load: time-outs of clients.")
    string_stops: int = _count("Turns that ended at a stop string, which are aborts to the engine core but not to us.")


GAUGES = {
    "pinned_blocks": "KV blocks that pins hold, each counted once. Zero under load: nothing is retained.",
    "pinned_tokens": "Tokens in those blocks.",
    "pool_blocks": "KV blocks of the pool.",
    "pins_now": "Pins at the moment: programs whose KV is kept.",
    "programs_waiting": "Programs with a turn in the waiting queue. Endless growth: overload; add an engine.",
    "programs_running": "Programs with a turn in the running batch.",
    "programs_in_tool": "Programs in a job but without a turn in the engine: a tool runs. Counted for half an hour.",
    "mean_running": "Moving mean of running requests, as the policy sees it.",
    "rebuild_seconds_per_1k_tokens": "Seconds to compute 1,000 tokens again, as learnt. Absent until steps were seen.",
}


@dataclass(frozen=True, slots=True)
class JobRecord:
    """One finished job. ``arrived`` and ``finished`` are on the scheduler's clock; all times are seconds.

    ``tokens`` is the length of its longest turn; ``reused`` and ``recomputed`` are prompt tokens, ``preempted`` times.
    """

    program: str
    job: int
    turns: int
    arrived: float
    finished: float
    gaps: float
    waited: float
    tokens: int
    reused: int
    recomputed: int
    preempted: int

    @property
    def delay(self) -> float:
        """Seconds that the engine took, and not the tools."""
        return self.finished - self.arrived - self.gaps
