"""Without programs the plug-in is vLLM's scheduler, step by step; with them, as long as memory suffices; and a pin that
went leaves no trace in the LRU order."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from vllm.v1.core.sched.interface import PauseState

from rollout.scheduling.policies import POLICIES
from rollout.scheduling.programs import RELEASE
from tests.rollout.scheduling.driver import EOS, Driver, build, check, free_ids, request


class Stream:
    """Random requests and what happens to them, the same for every scheduler that it is played to."""

    def __init__(self, seed: int) -> None:
        draw = self.draw = random.Random(seed)
        self.by = draw.choice(["fcfs", "priority"])
        self.chunked = draw.random() < 0.8
        self.budget = draw.choice([8, 16, 48]) if self.chunked else 96
        self.seqs = draw.choice([1, 2, 4, 8])
        self.blocks = draw.choice([20, 22, 26, 48])  # 19 blocks hold the longest request
        self.long_prefill = draw.choice([0, 0, 5])
        self.watermark = draw.choice([0.0, 0.0, 0.1])
        self.families = [[draw.randrange(10, 99) for _ in range(28)] for _ in range(3)]
        self.count = draw.randrange(3, 10)

    def scheduler(self, options: dict[str, Any] | None, asynchronous: bool) -> Any:
        return build(
            options,
            num_blocks=self.blocks,
            seqs=self.seqs,
            budget=self.budget,
            by=self.by,
            asynchronous=asynchronous,
            chunked=self.chunked,
            long_prefill=self.long_prefill if self.chunked else 0,
            watermark=self.watermark,
        )

    def arrivals(self, drivers: list[Driver], number: int) -> None:
        draw = self.draw
        shared = draw.choice(self.families)[: draw.randrange(29)]
        prompt = shared + [draw.randrange(10, 99) for _ in range(draw.randrange(1, 24))]
        answer = [draw.randrange(10, 99) for _ in range(draw.randrange(1, 20))] + [EOS] * draw.randrange(2)
        outputs = draw.randrange(1, len(answer) + 1)
        how: dict[str, Any] = {"arrival": draw.randrange(4), "priority": draw.randrange(3)}
        for driver in drivers:
            driver.add(request(f"r{number}", prompt, outputs, **how), answer)

    def play(self, stock: Any, ours: Any, depth: int) -> int:
        """Both side by side; gives the number of steps."""
        draw, drivers, arrived = self.draw, [Driver(stock, depth), Driver(ours, depth)], 0
        for step in itertools.count():
            while arrived < self.count and (draw.random() < 0.3 or not drivers[0].live):
                self.arrivals(drivers, arrived)
                arrived += 1
            event = draw.random()
            live = sorted(drivers[0].live)
            for driver in drivers:
                if event < 0.04 and live:
                    driver.abort(live[int(event * 1e6) % len(live)])
                elif event < 0.05:
                    driver.scheduler.reset_prefix_cache(reset_running_requests=event < 0.045)
                elif event < 0.06:
                    driver.scheduler.set_pause_state(PauseState.PAUSED_NEW)
                elif event < 0.07:
                    driver.scheduler.set_pause_state(PauseState.PAUSED_ALL)
                elif event < 0.5:
                    driver.scheduler.set_pause_state(PauseState.UNPAUSED)
            theirs, own = (driver.step() for driver in drivers)
            assert theirs == own  # dataclasses: every field, block ids and all
            assert list(theirs.num_scheduled_tokens) == list(own.num_scheduled_tokens)
            assert drivers[0].live.keys() == drivers[1].live.keys()
            if step % 4 == 0:
                assert free_ids(stock) == free_ids(ours)
            if arrived == self.count and not drivers[0].live:
                assert drivers[0].finished == drivers[1].finished
                return step
        raise AssertionError


def compare(seeds: range, asynchronous: bool) -> tuple[int, int]:
    """(steps, preemptions) over all streams."""
    steps = preemptions = 0
    policies = [name for name in POLICIES if name != "program_cap"]
    for seed in seeds:
        stream = Stream(seed)
        ours = stream.scheduler({"policy": policies[seed % len(policies)]}, asynchronous)
        stock = stream.scheduler(None, asynchronous)
        seen: list[str] = []
        preempt = stock._preempt_request
        stock._preempt_request = lambda *a, seen=seen, preempt=preempt, **k: (seen.append(a[0]), preempt(*a, **k))
        steps += stream.play(stock, ours, depth=2 if asynchronous else 1)
        assert not ours.active and not ours.programs.turns
        preemptions += len(seen)
    return steps, preemptions


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_streams_without_programs_are_scheduled_as_by_vllm(asynchronous: bool) -> None:
    steps, preemptions = compare(range(1000), asynchronous)
    assert steps > 20_000 and preemptions > 300


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_many_more_streams(asynchronous: bool) -> None:
    compare(range(1000, 7000), asynchronous)


class Twins:
    """Sessions without a backlog, played to a scheduler that pins and to one that does not.

    Its free list must be the other's without the blocks that are pinned, at every step, until the one that does not pin
    reuses a pinned block: from there on they hold different things.
    """

    def __init__(self, seed: int, policy: str, asynchronous: bool, groups: tuple[Any, ...] = ()) -> None:
        draw = self.draw = random.Random(seed)
        how: dict[str, Any] = {"num_blocks": draw.choice([60, 90, 140]) * max(1, len(groups)), "seqs": 32}
        how |= {"budget": 512, "asynchronous": asynchronous, "groups": groups}
        self.pinning = Driver(build({"policy": policy}, **how), 2 if asynchronous else 1)
        # Each policy beside one of the same order: turnstile's is stock's until memory is short.
        order = None if policy == "turnstile" else {"policy": "program_fcfs"}
        self.plain = Driver(build(order, **how), 2 if asynchronous else 1)
        self.families = [[draw.randrange(10, 99) for _ in range(40)] for _ in range(3)]
        self.said: dict[str, list[int]] = {}
        self.reused = 0  # cached blocks off the free list that were hit or given away

    def both(self) -> list[Driver]:
        return [self.pinning, self.plain]

    def arrive(self, number: int) -> None:
        draw = self.draw
        name = f"s{draw.randrange(5)}"
        if any(r.session_id == name for r in self.plain.live.values()):
            return
        before = self.said.get(name) or draw.choice(self.families)[: draw.randrange(41)]
        if draw.random() < 0.1:
            before = before[: len(before) // 2]  # compaction
        before = before[:90] + [draw.randrange(10, 99) for _ in range(draw.randrange(1, 9))]
        answer = [draw.randrange(10, 99) for _ in range(draw.randrange(1, 14))] + [EOS]
        self.said[name] = before + answer
        for driver in self.both():
            driver.add(request(f"{name}/{number}", before, len(answer), session=name), answer)

    def play(self) -> bool:
        """Whether the two came to the end alike."""
        draw, ours, plain = self.draw, self.pinning.scheduler, self.plain.scheduler
        for step in range(120):
            if step < 90 and draw.random() < 0.4:
                self.arrive(step)
            event = draw.random()
            if event < 0.05 and self.said:
                name = draw.choice(sorted(self.said))
                if not any(r.session_id == name for r in self.plain.live.values()):
                    for driver in self.both():
                        driver.abort(f"{RELEASE}{name}")  # stock knows no such request
            elif event < 0.1 and self.plain.live:
                name = draw.choice(sorted(self.plain.live))
                for driver in self.both():
                    driver.abort(name)
            pinned = {block.block_id for pin in ours.pins for block in pin.blocks}
            free = free_ids(plain)
            cached = {i for i in free if plain.kv_cache_manager.block_pool.blocks[i].block_hash is not None}
            seconds = draw.choice([0.05, 0.05, 1.0])
            theirs, own = self.plain.step(seconds), self.pinning.step(seconds)
            taken = set(free) - set(free_ids(plain))
            if ours.counters.pressure_releases or (theirs != own and taken & pinned):
                return False
            given = [i for new in theirs.scheduled_new_reqs for group in new.block_ids for i in group]
            self.reused += len(cached.intersection(given))
            assert theirs == own
            check(ours)
            pinned = {block.block_id for pin in ours.pins for block in pin.blocks}
            assert free_ids(ours) == [i for i in free_ids(plain) if i not in pinned]
        for driver in self.both():
            driver.run()
        ours.pins.drop(ours.pins, "release")
        assert free_ids(ours) == free_ids(plain)
        return True


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_pin_that_went_leaves_the_free_list_as_if_it_had_never_been(asynchronous: bool) -> None:
    alike = reused = pins = 0
    for seed in range(60):
        twins = Twins(seed, ["pin_to_pressure", "fixed_ttl", "turnstile"][seed % 3], asynchronous)
        alike += twins.play()
        reused += twins.reused
        pins += twins.pinning.scheduler.counters.pins
    assert alike > 20 and reused > 500 and pins > 500, (alike, reused, pins)


@pytest.mark.parametrize("by", ["fcfs", "priority"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_sessions_are_scheduled_as_by_vllm_while_memory_suffices(by: str, asynchronous: bool) -> None:
    claims = waited = 0
    for seed in range(40):
        draw = random.Random(seed)
        how: dict[str, Any] = {"num_blocks": 1500, "seqs": draw.choice([2, 4]), "budget": draw.choice([16, 64])}
        pair = [build(options, by=by, asynchronous=asynchronous, **how) for options in ({"policy": "turnstile"}, None)]
        drivers = [Driver(scheduler, 2 if asynchronous else 1) for scheduler in pair]
        kept: dict[str, list[int]] = {}
        for step in itertools.count():
            name = f"s{draw.randrange(8)}"
            if step < 60 and draw.random() < 0.4 and not any(r.session_id == name for r in drivers[0].live.values()):
                prompt = kept.get(name, [])[:300] + [draw.randrange(10, 99) for _ in range(draw.randrange(1, 30))]
                answer = [draw.randrange(10, 99) for _ in range(draw.randrange(1, 14))] + [EOS]
                kept[name] = prompt + answer
                priority = draw.randrange(3)
                for driver in drivers:
                    made = request(f"{name}-{step}", prompt, 16, session=name, arrival=float(step), priority=priority)
                    driver.add(made, answer)
            ours, stock = (driver.step(0.5) for driver in drivers)
            assert ours == stock and list(ours.num_scheduled_tokens) == list(stock.num_scheduled_tokens)
            waited += len(pair[1].waiting)
            if step > 60 and not drivers[1].live:
                break
        claims += pair[0].counters.claims
        check(pair[0])
    assert claims > 200 and waited > 2000, (claims, waited)
