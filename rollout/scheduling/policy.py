"""What a policy is asked, and what it sees: the base of all, and of those that keep memory between turns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rollout.scheduling.latency import ToolLatencies
from rollout.scheduling.programs import Job, Pin, Turn

Key = tuple[float, ...]


@dataclass(slots=True)
class Load:
    """The engine now. The plug-in keeps it up to date; times in seconds, memory in tokens."""

    rebuild: Callable[[int], float]  # R(n): seconds to compute n tokens again
    latencies: ToolLatencies
    context: Callable[[], int]  # tokens held by running requests
    pool_tokens: int
    now: float = 0.0
    running: float = 1.0  # moving mean B of running requests
    waiting: int = 0
    idle: bool = True  # nothing runs
    short: float = -math.inf  # when memory was last asked for in vain
    youngest: float = -math.inf  # number of the youngest job that runs: whom stock preempts if no pin goes


class Policy:
    """Jobs by arrival, first come first served, nothing kept: the base of all."""

    pins = False
    pressed = True  # whether the order applies now: of waiting requests, and of whom vLLM preempts first

    def key(self, turn: Turn) -> Key:
        """Place in the waiting queue, smallest first."""
        return (turn.job.number,)

    def arrived(self, turn: Turn) -> None:
        """A turn joins the queue."""

    def promote(self, load: Load) -> bool:
        """Once a step, before the queue is read. True if keys have changed."""
        return False

    def may_start(self, turn: Turn) -> bool:
        """Whether the head of the queue may be admitted now."""
        return True

    def started(self, turn: Turn, waited: float, lost: int) -> None:
        """The turn was admitted for the first time after ``waited`` seconds; ``lost`` tokens must be computed again."""

    def ended(self, job: Job) -> None:
        """A job is over."""

    def hold(self, turn: Turn, tool: str | None, tokens: int, load: Load) -> float:
        """Seconds for which a finished turn's KV is kept: 0 for not at all, inf until memory is short."""
        return 0.0

    def victims(self, turn: Turn, running: bool, pins: Sequence[Pin], load: Load) -> Iterator[Pin]:
        """The pins that may go so that ``turn`` gets memory, first to go first. ``pins`` holds none of its own.

        Here the youngest job's goes, before a running request is preempted and where nothing runs (Continuum §4.3, read
        as its released code does: in our simulator letting every newcomer take pins costs it up to half of its gain).
        """
        return iter(sorted(pins, key=rank_of, reverse=True) if running or load.idle else ())


class Resident(Policy):
    """Pinned turns first, then job arrival: what every retention policy needs (pins without order collapse)."""

    pins = True

    def key(self, turn: Turn) -> Key:
        return (not turn.resident, turn.job.number)


def rank_of(pin: Pin) -> float:
    return pin.rank
