"""What a step did, as the rebuild time learns it: what is computed of prompts, or once more, and who decodes."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.v1.outputs import DraftTokenIds

from tests.rollout.scheduling.driver import Driver, build, request

DRAFTS = 3


class Speculating(Driver):
    """Every request that decodes is given drafts, and none of them is accepted."""

    def __init__(self, depth: int, drafts: int, **how: Any) -> None:
        super().__init__(build({"policy": "turnstile"}, asynchronous=depth > 1, budget=8, **how), depth)
        self.drafts = self.scheduler.num_spec_tokens = drafts
        self.work: list[tuple[int, int, int]] = []
        self.scheduler.rebuild.observe = lambda seconds, *work: self.work.append(work)

    def land(self) -> Any:
        result = super().land()
        if self.depth == 1:  # else the scheduler itself puts placeholders there
            names = [made.request_id for made in self.scheduler.running]
            self.scheduler.update_draft_token_ids(DraftTokenIds(names, [[9] * self.drafts for _ in names]))
        return result


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("drafts", [0, DRAFTS])
def test_a_chunk_of_a_prompt_is_prefill_and_drafts_are_not(depth: int, drafts: int) -> None:
    driver = Speculating(depth, drafts)
    driver.ask("one", [10] * 20, [11] * 10, session="s")
    assert driver.work[:3] == [(8, 8 * 4, 0), (8, 8 * 12, 0), (4, 4 * 18, 0)], "tokens × context in their middle"
    assert len(driver.work) >= 12 and set(driver.work[3:]) == {(0, 0, 1)}


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("drafts", [0, DRAFTS])
def test_an_answer_that_is_computed_again_is_prefill(depth: int, drafts: int) -> None:
    driver = Speculating(depth, drafts)
    made = driver.add(request("one", [10] * 4, 20, session="s"), [11] * 20)
    while made.num_output_tokens < 10:
        driver.step()
    driver.drain()
    known = made.num_tokens
    driver.work.clear()
    driver.scheduler.reset_prefix_cache(reset_running_requests=True)
    driver.run()
    again = [prefill for prefill, _, _ in driver.work if prefill]
    assert sum(again) == known and max(again) == 8
    assert driver.work[: len(again)] == [work for work in driver.work if work[0]]
    assert set(driver.work[len(again) :]) == {(0, 0, 1)}
