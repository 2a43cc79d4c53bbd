"""Turns that hold memory and do not run: their KV is on its way from elsewhere, or their client streams the prompt."""

from __future__ import annotations

import random
from typing import Any

import pytest
from vllm.v1.request import Request, RequestStatus

from tests.rollout.scheduling.driver import EOS, Driver, build, check, request

PINNING = ("turnstile", "pin_to_pressure", "fixed_ttl")
POLICIES = (*PINNING, "plas", "continuum")


def driven(policy: str, depth: int = 1, **how: Any) -> Driver:
    return Driver(build({"policy": policy}, asynchronous=depth > 1, **how), depth)


def loading(name: str, prompt: list[int], remote: int, outputs: int = 1, **how: Any) -> Request:
    """A request the first ``remote`` tokens of which a connector brings."""
    return request(name, prompt, outputs, extra_args={"kv_transfer_params": {"remote": remote}}, **how)


def part(name: str, prompt: list[int], outputs: int, last: bool = False, **how: Any) -> Request:
    """A piece of a prompt that its client streams."""
    made = request(name, prompt, outputs, **how)
    made.resumable = not last
    return made


def steps(driver: Driver, count: int) -> None:
    for _ in range(count):
        driver.step()
        check(driver.scheduler)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_turn_whose_kv_came_takes_pins_where_nothing_runs(policy: str) -> None:
    driver = driven(policy, num_blocks=11, remote=True)
    scheduler = driver.scheduler
    driver.add(request("b", [10] * 4, 26, session="b"), [11] * 25 + [EOS])
    driver.step()
    loaded = driver.add(loading("a", [20] * 24, 8, session="a"), [EOS])
    steps(driver, 1)
    assert loaded.status == RequestStatus.WAITING_FOR_REMOTE_KVS
    assert [program.running for program in scheduler.programs] == [1, 0], "who waits for KV does not run"
    while "b" in driver.live:
        steps(driver, 1)
    driver.came = {"a"}
    steps(driver, 3)
    assert driver.finished.keys() == {"a", "b"}
    assert scheduler.programs.get("a").job.waited > 0.5
    assert scheduler.counters.pressure_releases == (policy in PINNING)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_turn_that_goes_on_takes_pins_where_nothing_runs(policy: str) -> None:
    driver = driven(policy, num_blocks=11)
    scheduler = driver.scheduler
    driver.answers["stream"] = [11] * 3 + [EOS]
    scheduler.add_request(part("stream", [10] * 8, 4, session="s"))
    steps(driver, 8)
    program = scheduler.programs.get("s")
    assert (program.waiting, program.running) == (1, 0) and program.served == pytest.approx(0.2)
    driver.now += 60.0
    driver.ask("other", [20] * 25, session="t")
    waited = program.job.waited
    scheduler.add_request(part("stream", [12] * 16, 4))
    driver.answers["stream"] = [13] * 3 + [EOS]
    steps(driver, 8)
    assert program.turns == 1 and program.job.waited == waited, "its client's pause is nobody's wait"
    assert program.served == pytest.approx(0.4) and not scheduler.running
    assert scheduler.counters.pressure_releases == (policy in PINNING)
    driver.abort("stream")
    check(scheduler)


def test_a_streamed_turn_keeps_its_place_among_client_priorities() -> None:
    driver = driven("turnstile", by="priority")
    scheduler = driver.scheduler
    driver.answers["stream"] = [11] * 3 + [EOS]
    scheduler.add_request(part("stream", [10] * 8, 4, session="s", arrival=5e9))
    number = scheduler.programs.get("s").job.number
    for prompt in ([12] * 8, [13] * 8):  # the first of these comes while the turn runs
        scheduler.add_request(part("stream", prompt, 4, arrival=6e9))
        steps(driver, 10)
        assert scheduler.requests["stream"].arrival_time == number


def live(policy: str, seed: int, depth: int) -> Driver:
    """Sessions some of whose turns load or stream, and clients that leave."""
    draw = random.Random(f"{policy} {seed}")
    driver = driven(policy, depth, num_blocks=20, remote=True, seqs=draw.choice([2, 4]), budget=32)
    scheduler, kept, count = driver.scheduler, dict[str, list[int]](), 0
    for _ in range(300):
        session = f"s{draw.randrange(4)}"
        busy = {made.session_id for made in driver.live.values()}
        if session not in busy and draw.random() < 0.4:
            prompt = kept.get(session, [])[:40] + [draw.randrange(8, 99) for _ in range(draw.randrange(1, 9))]
            answer = [draw.randrange(8, 99) for _ in range(draw.randrange(6))] + [EOS]
            kept[session] = prompt + answer
            name, kind = f"r{count}", draw.choice(["plain", "load", "stream"])
            count += 1
            if kind == "load":
                made = loading(name, prompt, len(prompt) // 8 * 4, len(answer), session=session)
            else:
                made = part(name, prompt, len(answer), kind == "plain", session=session)
            driver.add(made, answer)
        for name, made in list(driver.live.items()):
            if made.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
                if draw.random() < 0.3 and name not in scheduler.finished_recving_kv_req_ids:
                    driver.came.add(name)
            elif made.status == RequestStatus.WAITING_FOR_STREAMING_REQ and draw.random() < 0.3:
                driver.answers[name] = [9, EOS]
                scheduler.add_request(part(name, [draw.randrange(8, 99)] * 5, 2, draw.random() < 0.5))
            elif draw.random() < 0.01:
                driver.abort(name)
        driver._collect()
        driver.step(draw.choice([0.05, 0.5]))
        check(scheduler)
    for name in list(driver.live):
        if driver.live[name].status == RequestStatus.WAITING_FOR_STREAMING_REQ:
            driver.abort(name)
    return driver


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("depth", [1, 2])
def test_no_account_goes_wrong_while_turns_load_and_stream(policy: str, depth: int) -> None:
    claims = releases = 0
    for seed in range(6):
        driver = live(policy, seed, depth)
        count = driver.scheduler.counters
        assert len(driver.finished) > 20
        claims, releases = claims + count.claims, releases + count.pressure_releases
    assert (claims and releases) or policy not in PINNING
