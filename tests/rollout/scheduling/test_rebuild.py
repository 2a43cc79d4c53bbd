"""The rebuild time finds the coefficients of a machine that it knows nothing of, and survives what engines do."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.scheduling.rebuild import DECODE_STEPS, SETTLED, WARM, RebuildTime


class Machine:
    """Seconds of a step = a + b · prefill + c · prefill · context + d · decoding, with noise."""

    def __init__(self, scale: float = 1.0, noise: float = 0.05, seed: int = 0) -> None:
        self.a, self.b, self.c, self.d = 8e-3 * scale, 4e-5 * scale, 1e-9 * scale, 1e-4 * scale
        self.noise, self.draw = noise, random.Random(seed)

    def run(self, learner: RebuildTime, steps: int) -> None:
        for _ in range(steps):
            prefill = self.draw.choice([0, 0, 0, self.draw.randrange(1, 2048)])
            self.step(learner, prefill, prefill * self.draw.randrange(30_000), self.draw.randrange(60))

    def step(self, learner: RebuildTime, prefill: int, context: int, decoding: int) -> None:
        seconds = self.a + self.b * prefill + self.c * context + self.d * decoding
        learner.observe(seconds * max(1 + self.draw.gauss(0, self.noise), 0.1), prefill, context, decoding)

    def rebuild(self, tokens: int, cached: int = 0) -> float:
        return self.b * tokens + self.c * tokens * (cached + tokens / 2)


def close(learner: RebuildTime, machine: Machine, within: float) -> bool:
    pairs = [(learner(n, cached), machine.rebuild(n, cached)) for n in (200, 2000, 20_000) for cached in (0, 8000)]
    return all(found == pytest.approx(true, rel=within) for found, true in pairs)


@pytest.mark.parametrize("scale", [0.1, 1.0, 15.0, 100.0])  # an H100 is near 1, this project's test models near 15
def test_coefficients_are_recovered_from_noisy_steps(scale: float) -> None:
    learner, machine = RebuildTime(), Machine(scale)
    machine.run(learner, 100)
    assert learner.settled and close(learner, machine, 0.2)
    machine.run(learner, 2000)
    assert close(learner, machine, 0.06)


def test_before_anything_was_seen_a_token_takes_a_tenth_of_a_millisecond() -> None:
    learner = RebuildTime()
    assert not learner.settled
    assert learner(1000) == pytest.approx(0.1) and learner(0) == 0.0 and learner(10, 1_000_000) == pytest.approx(1e-3)


@pytest.mark.parametrize("tokens", [1, 16, 512, 2048])
def test_a_first_step_that_compiles_is_no_measure(tokens: int) -> None:
    learner, machine = RebuildTime(), Machine()
    learner.observe(30.0, tokens, 0, 0)
    machine.run(learner, 200)
    assert close(learner, machine, 0.1)


@pytest.mark.parametrize(("when", "within"), [(100, 1.5), (500, 0.4), (3000, 0.3)])
def test_one_huge_outlier_moves_little(when: int, within: float) -> None:
    learner, machine = RebuildTime(), Machine(seed=1)
    machine.run(learner, when)
    learner.observe(1000.0, 2048, 2048 * 1000, 10)
    machine.run(learner, 200)
    assert close(learner, machine, within)
    machine.run(learner, 3000)
    assert close(learner, machine, 0.1)


def test_it_follows_a_machine_that_changes() -> None:
    learner, fast, slow = RebuildTime(), Machine(1.0), Machine(4.0)
    fast.run(learner, 3000)
    slow.run(learner, 12_000)
    assert close(learner, slow, 0.15)


@pytest.mark.parametrize("alike", [(0, 0, 20), (2028, 0, 20), (1, 1, 0)])
def test_steps_that_are_all_alike_for_hours_unlearn_nothing(alike: tuple[int, int, int]) -> None:
    learner, machine = RebuildTime(), Machine()
    machine.run(learner, 1000)
    for _ in range(30_000 * (1 if alike[0] else DECODE_STEPS)):
        machine.step(learner, *alike)
    assert learner(8000) == pytest.approx(machine.rebuild(8000), rel=0.5)
    machine.run(learner, 200)
    assert close(learner, machine, 0.2)


def test_of_the_steps_without_prefill_few_are_regressed() -> None:
    learner = RebuildTime()
    for _ in range(DECODE_STEPS * SETTLED - 1):
        learner.observe(0.01, 0, 0, 8)
    assert not learner.settled
    learner.observe(0.01, 0, 0, 8)
    assert learner.settled and WARM < SETTLED


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 1e4), st.integers(0, 10**5), st.integers(0, 10**6), st.integers(0, 1000)), max_size=60
    ),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
)
def test_it_is_a_finite_number_and_never_negative(
    steps: list[tuple[float, int, int, int]], tokens: int, cached: int
) -> None:
    learner = RebuildTime()
    for seconds, prefill, context, decoding in steps:
        learner.observe(seconds, prefill, prefill * context, decoding)
    found = learner(tokens, cached)
    assert math.isfinite(found) and found >= 0
    assert learner(2 * tokens, cached) >= found
