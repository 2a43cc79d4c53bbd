"""Who waits takes pins if they are enough and none if they are not: told beforehand, as the allocation will tell."""

from __future__ import annotations

import random
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from rollout.scheduling.shortage import missing_blocks
from tests.rollout.scheduling.driver import BLOCK, EOS, Driver, attention, build, check, request

SHARED = [10] * 24  # tokens of six blocks that prompts have in common


class Refused(Driver):
    """A pool in which ``busy`` runs for long, and a head of the queue that may take from anyone."""

    def __init__(self, blocks: int, **how: Any) -> None:
        super().__init__(build({"policy": "pin_to_pressure"}, num_blocks=blocks + 1, **how))

    def busy(self, prompt: list[int]) -> None:
        last = {"last_turn": True}
        self.add(request("busy", prompt, 20, session="busy", extra_args=last), [9] * 20)
        self.step()

    def ask_for(self, blocks: int, prompt: tuple[int, ...] = ()) -> tuple[int, bool]:
        """The head asks for so many blocks: pins that went, and whether it got them."""
        tokens = [*prompt, *[11] * (blocks * BLOCK - 1)]
        self.add(request("head", tokens, 2, session="head"), [12, EOS])
        self.scheduler.programs.turns["head"].job.number = 0
        self.step()
        check(self.scheduler)
        return self.scheduler.counters.pressure_releases, "head" in {r.request_id for r in self.scheduler.running}


def test_blocks_that_a_running_request_uses_do_not_come_free() -> None:
    driver = Refused(20)
    driver.busy([*SHARED, 20])
    driver.ask("kept", [*SHARED, *[21] * 9], session="kept")  # eight blocks, six of them of busy's
    assert len(free(driver)) == 20 - 7 - 2
    assert driver.ask_for(14) == (0, False), "13 would be free"


@pytest.mark.parametrize(("blocks", "granted"), [(14, True), (15, False)])
def test_blocks_that_siblings_share_come_free_with_the_last_of_them(blocks: int, granted: bool) -> None:
    driver = Refused(20)
    driver.busy([20] * 18)
    for name in "abc":
        driver.ask(name, [*SHARED, *[ord(name)] * 9], session=name)
    pins = list(driver.scheduler.pins)
    assert [pin.fresh for pin in pins] == [8, 2, 2]
    driver.scheduler.pins.drop(pins[:1], "release")  # the others' common blocks were charged to it
    assert len(free(driver)) == 20 - 6 - 6 - 2 * 2
    assert driver.ask_for(blocks) == ((2, True) if granted else (0, False))


def free(driver: Driver) -> list[Any]:
    return driver.scheduler.kv_cache_manager.block_pool.free_block_queue.get_all_free_blocks()


@pytest.mark.parametrize(("watermark", "granted"), [(0.0, True), (0.15, False)])
def test_the_watermark_counts(watermark: float, granted: bool) -> None:
    driver = Refused(20, watermark=watermark)
    driver.busy([20] * 17)
    driver.ask("kept", [21] * 25, session="kept")
    assert len(free(driver)) == 20 - 5 - 6
    assert driver.ask_for(14) == ((1, True) if granted else (0, False))


def test_what_the_request_hits_does_not_come_free_for_it() -> None:
    driver = Refused(20)
    driver.busy([20] * 21)
    driver.ask("kept", SHARED + [21] * 9, session="kept")  # eight blocks, six of them the head's own
    assert driver.ask_for(9, tuple(SHARED)) == (0, False) and len(free(driver)) == 20 - 6 - 8
    driver.abort("head")
    assert driver.ask_for(8, tuple(SHARED)) == (1, True)


@pytest.mark.parametrize("seed", range(12))
def test_it_is_what_the_allocation_lacks(seed: int) -> None:
    """Every allocation of a waiting request fails if and only if blocks were missing, by our own count."""
    draw = random.Random(seed)
    groups = draw.choice([(), (attention(), attention(sliding_window=8))])
    driver = Driver(
        build(
            {"policy": draw.choice(["turnstile", "pin_to_pressure"])},
            num_blocks=draw.choice([20, 30]) * max(1, len(groups)),
            seqs=4,
            budget=draw.choice([8, 32]),
            watermark=draw.choice([0.0, 0.1]),
            groups=groups,
            remote=not groups and draw.random() < 0.5,
        )
    )
    scheduler, kept, failed = driver.scheduler, dict[str, list[int]](), 0
    scheduler.num_lookahead_tokens = draw.choice([0, 3])
    stock = scheduler._stock_allocate

    def allocate(made: Any, tokens: int, **how: Any) -> Any:
        nonlocal failed
        if made.status == RequestStatus.RUNNING:
            return stock(made, tokens, **how)
        before = missing_blocks(scheduler.kv_cache_manager, made, tokens, how)
        blocks = stock(made, tokens, **how)
        assert (blocks is None) == (before > 0)
        failed += blocks is None
        return blocks

    scheduler._stock_allocate = allocate
    for number in range(150):
        session = f"s{draw.randrange(6)}"
        if session not in {made.session_id for made in driver.live.values()}:
            prompt = kept.get(session, [])[:32] + [draw.randrange(8, 99) for _ in range(draw.randrange(1, 20))]
            answer = [draw.randrange(8, 99) for _ in range(draw.randrange(12))] + [EOS]
            kept[session] = prompt + answer
            remote = {"kv_transfer_params": {"remote": len(prompt) // 8 * 4}}
            driver.add(request(f"r{number}", prompt, len(answer), session=session, extra_args=remote), answer)
        driver.came |= {
            name
            for name, made in driver.live.items()
            if made.status == RequestStatus.WAITING_FOR_REMOTE_KVS and name not in scheduler.finished_recving_kv_req_ids
        }
        driver.step()
        check(scheduler)
    assert failed > 10
