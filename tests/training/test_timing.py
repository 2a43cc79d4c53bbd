"""Parts of a step: they never overlap and make up the whole."""

from __future__ import annotations

import pytest

from training.timing import PARTS, remaining, rollout_seconds

BEFORE = {"generate": 10.0, "tools": 2.0, "reward": 1.0}
AFTER = {"generate": 13.0, "tools": 2.5, "reward": 1.25}


def test_seconds_of_rollouts_are_told_apart_and_the_rest_is_waiting() -> None:
    found = rollout_seconds(BEFORE, AFTER, 4.0, ahead=False)
    assert found == {"time/generate": 3.0, "time/tools": 0.5, "time/reward": 0.25, "time/wait": 0.25}


def test_rollouts_that_go_on_while_the_trainer_works_are_only_waited_for() -> None:
    assert rollout_seconds(BEFORE, AFTER, 1.0, ahead=True) == {"time/reward": 0.25, "time/wait": 0.75}


def test_the_parts_of_a_row_make_up_its_step() -> None:
    row = {f"time/{part}": 1.0 for part in PARTS if part != "other"} | {"time/step": 12.0, "time/elapsed": 99.0}
    assert remaining(row) == pytest.approx(12.0 - len(PARTS) + 1)
    assert remaining({"time/step": 1.0, "time/train": 1.0 + 1e-9}) == 0.0
