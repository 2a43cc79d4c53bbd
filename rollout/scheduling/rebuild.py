"""Seconds that computing lost KV again takes, learnt online by regression over engine steps. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

# One step's seconds ≈ w · (1, prefill tokens / 1e3, prefill tokens × context / 1e6, decoding requests / 1e2).
SCALES = (1.0, 1e-3, 1e-6, 1e-2)
FORGET = 0.999  # a step's weight halves after about 700 regressed steps: the fit follows drifting batches
PRIOR = (0.01, 0.1, 0.0, 0.0)  # before anything was seen: 10 ms a step, 0.1 ms a token
DOUBT = 100.0  # variance of each coefficient before anything was seen
DOUBT_CAP = 1e4  # and at most: what steps do not vary in is not forgotten further
WARM = 3  # regressed steps that do not count: an engine's first ones compile and allocate
CLIP = 3.0  # a step this many times slower than predicted (a paused process) counts as this much only; more early on
SETTLED = 20  # regressed steps after which it is believed
DECODE_STEPS = 16  # of the steps without prefill one in so many is regressed: they are all alike


class RebuildTime:
    """Recursive least squares of step seconds on what the step did; ``rebuild(n)`` reads off the share of n tokens."""

    def __init__(self) -> None:
        self._w = list(PRIOR)
        self._p = [[DOUBT * (i == j) for j in range(4)] for i in range(4)]
        self._steps = 0
        self._skipped = 0

    def observe(self, seconds: float, prefill: int, prefill_context: int, decoding: int) -> None:
        """One step took ``seconds`` for ``prefill`` tokens, Σ tokens × context of them, and ``decoding`` requests."""
        if prefill == 0:
            self._skipped += 1
            if self._skipped % DECODE_STEPS:
                return
        self._steps += 1
        if self._steps <= WARM:
            return
        x = [a * b for a, b in zip((1.0, prefill, prefill_context, decoding), SCALES, strict=True)]
        predicted = sum(a * b for a, b in zip(self._w, x, strict=True))
        if predicted > 0:
            seconds = min(seconds, CLIP * (1 + SETTLED / self._steps) * predicted)
        # A direction that is never excited would grow without bound as the others are forgotten.
        forget = FORGET if max(self._p[i][i] for i in range(4)) < DOUBT_CAP else 1.0
        px = [sum(row[j] * x[j] for j in range(4)) for row in self._p]
        scale = forget + sum(a * b for a, b in zip(x, px, strict=True))
        error = seconds - predicted
        self._w = [w + error * k / scale for w, k in zip(self._w, px, strict=True)]
        self._p = [[(self._p[i][j] - px[i] * px[j] / scale) / forget for j in range(4)] for i in range(4)]

    @property
    def settled(self) -> bool:
        """Whether enough steps were seen to believe it."""
        return self._steps >= SETTLED

    def __call__(self, tokens: int, cached: int = 0) -> float:
        """Seconds of engine time to prefill ``tokens`` tokens after ``cached`` ones that hit; never negative."""
        context = tokens * (cached + tokens / 2)
        return max(self._w[1], 0.0) * tokens * SCALES[1] + max(self._w[2], 0.0) * context * SCALES[2]


class Computed(Protocol):
    """What a step's work is read off: vLLM's request, once the step is scheduled."""

    num_computed_tokens: int

    @property
    def num_tokens(self) -> int: ...


def step_work(scheduled: Mapping[str, int], total: int, requests: Mapping[str, Computed]) -> tuple[int, int, int]:
    """(prefill tokens, Σ prefill tokens × context, decoding requests) of a step of ``scheduled`` tokens by request.

    Who decodes computes the one known token that is left, and drafts behind it if decoding is speculative; who
    resumes after a preemption computes its own answer again as it does its prompt.
    """
    if total == len(scheduled):  # one each
        return 0, 0, total
    prefill = [
        (n, request.num_computed_tokens)
        for name, n in scheduled.items()
        if n > 1 and (request := requests[name]).num_computed_tokens - n < request.num_tokens - 1
    ]
    tokens = sum(n for n, _ in prefill)
    return tokens, sum(n * (done - n // 2) for n, done in prefill), len(scheduled) - len(prefill)
