"""Pins in vLLM's real block pool: references, the cap, deadlines, and the place to which a released block returns."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock, make_block_hash_with_group_id

from rollout.scheduling.counters import Counters
from rollout.scheduling.latency import ToolLatencies
from rollout.scheduling.pins import Pins
from rollout.scheduling.programs import Pin, Program, Programs

TOKENS = 4


def hashed(pool: BlockPool, block: KVCacheBlock, name: str) -> None:
    """As if the tokens of ``name`` and all before had filled it."""
    pool._insert_block_hash(make_block_hash_with_group_id(name.encode(), 0), block, num_tokens=TOKENS)  # type: ignore[arg-type]


def take(pool: BlockPool, name: str, count: int) -> list[KVCacheBlock]:
    """The blocks of a request that computed ``count`` full ones."""
    blocks = pool.get_new_blocks(count)
    for i, block in enumerate(blocks):
        hashed(pool, block, f"{name}/{i}")
    return blocks


def free(pool: BlockPool) -> list[int]:
    return [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]


class Kept:
    """A pool with pins, and programs that have none of their own."""

    def __init__(self, blocks: int = 17, capacity: float = 16.0) -> None:
        self.pool = BlockPool(blocks, True, TOKENS)
        self.counters = Counters()
        self.pins = Pins(self.pool, capacity, self.counters)
        self.programs = Programs(ToolLatencies())
        self.count = itertools.count()

    def program(self) -> Program:
        turn = self.programs.arrive(f"r{next(self.count)}", f"s{next(self.count)}", 1, 0.0)
        self.programs.finish(turn, 0.0, tool="bash", aborted=False)
        return turn.program

    def pin(self, blocks: Sequence[KVCacheBlock], program: Program | None = None, deadline: float = 1e9) -> Pin:
        usable = self.pins.usable([blocks])
        owner = program or self.program()
        return Pin(owner, usable, (), 0, self.pins.fresh(usable), 1.0, 0.0, deadline=deadline)


def test_a_pin_holds_its_blocks_beyond_the_request() -> None:
    kept = Kept()
    blocks = take(kept.pool, "a", 3) + kept.pool.get_new_blocks(1)  # the last is not full: it can never hit
    pin = kept.pin([*blocks, kept.pool.null_block])
    assert pin.blocks == blocks[:3] and kept.pins.add(pin)
    kept.pool.free_blocks(reversed(blocks))
    assert [block.ref_cnt for block in blocks] == [1, 1, 1, 0] and len(free(kept.pool)) == 13
    assert pin in kept.pins and list(kept.pins) == pin.program.pins == [pin] and len(kept.pins) == 1
    kept.pins.remove(pin)
    assert not kept.pins.changed and not pin.program.pins and not pin.blocks
    assert all(block.ref_cnt == 0 for block in blocks) and len(free(kept.pool)) == 16
    assert free(kept.pool)[-3:] == [3, 2, 1], "where vLLM puts them: the tail of a chain is evicted first"


def test_it_is_told_when_a_pin_goes_that_a_turn_waits_for() -> None:
    kept = Kept()
    pin = kept.pin(take(kept.pool, "a", 3))
    assert kept.pins.add(pin)
    pin.program.waiting = 1
    kept.pins.remove(pin)
    assert kept.pins.changed


def test_a_block_that_several_pins_hold_counts_once_against_the_cap() -> None:
    kept = Kept(capacity=5)
    prefix = take(kept.pool, "p", 2)
    branches = []
    for name in "abc":
        kept.pool.touch(prefix)
        branches.append(prefix + take(kept.pool, name, 2))
    pins = []
    for blocks in branches:
        pin = kept.pin(blocks)
        pins.append((kept.pins.add(pin), pin.fresh))
        kept.pool.free_blocks(reversed(blocks))
    assert pins == [(True, 4), (False, 2), (False, 2)]
    assert (kept.counters.pins, kept.counters.refusals) == (1, 2) and kept.pins.count(0.0) == (1, 4)
    kept.pool.free_blocks(reversed(prefix))
    assert [block.ref_cnt for block in prefix] == [1, 1]


def test_pins_of_other_pools_blocks_are_not_ours_to_make() -> None:
    kept, other = Kept(), BlockPool(5, True, TOKENS)
    foreign = take(other, "x", 2)
    mine = take(kept.pool, "a", 1)
    assert kept.pins.usable([foreign, mine]) == mine
    kept.pool.free_blocks([*foreign, *mine])  # vLLM sends each to its own pool
    assert [block.ref_cnt for block in (*foreign, *mine)] == [0, 0, 0]


def test_deadlines() -> None:
    kept = Kept()
    late, early = (kept.pin(take(kept.pool, name, 2), deadline=at) for name, at in (("a", 9.0), ("b", 5.0)))
    for pin in (late, early):
        assert kept.pins.add(pin)
        kept.pool.free_blocks(reversed(pin.blocks))
    assert kept.pins.count(4.9) == (2, 4) and kept.pins.count(5.0) == (1, 2), "expired ones are not shown"
    kept.pins.expire(4.9)
    assert len(kept.pins) == 2
    kept.pins.expire(5.0)
    assert list(kept.pins) == [late] and kept.counters.expiries == 1
    turn = kept.programs.arrive("back", late.program.id, 1, 8.0)
    for now in (9.0, 10.0, 11.0):
        kept.pins.expire(now)
    assert list(kept.pins) == [late], "its turn waits already"
    kept.programs.finish(turn, 12.0, tool=None, aborted=True)
    kept.pins.expire(12.0)
    assert not kept.pins and kept.counters.expiries == 2


def test_drops_are_counted_by_cause() -> None:
    kept = Kept()
    program = kept.program()
    for name in "ab":
        blocks = take(kept.pool, name, 2)
        assert kept.pins.add(kept.pin(blocks, program))
        kept.pool.free_blocks(reversed(blocks))
    kept.pins.drop(program.pins, "abort")
    assert not kept.pins and kept.counters.drops["abort"] == 2 and len(free(kept.pool)) == 16


def test_a_block_that_lost_its_hash_meanwhile_goes_first() -> None:
    kept = Kept(blocks=6)
    blocks = take(kept.pool, "a", 3)
    pin = kept.pin(blocks)
    kept.pins.add(pin)
    kept.pool.free_blocks(reversed(blocks))
    kept.pool.evict_blocks({2})  # a connector reports it invalid
    kept.pins.remove(pin)
    assert free(kept.pool) == [2, 4, 5, 3, 1]


@pytest.mark.parametrize("seed", range(60))
def test_a_released_pin_lies_where_it_would_lie_without(seed: int) -> None:
    """A twin that pins nothing; requests share prefixes, hit what is cached, and evict what neither pins."""
    draw = random.Random(seed)
    kept, plain = Kept(blocks=60, capacity=60), BlockPool(60, True, TOKENS)
    running: list[tuple[list[KVCacheBlock], list[KVCacheBlock]]] = []
    evicted = released = 0
    for step in range(250):
        held = {block.block_id for pin in kept.pins for block in pin.blocks}
        event = draw.random()
        if event < 0.45 and len(running) < 4:
            family, length = draw.randrange(4), draw.randrange(1, 9)
            names = [f"{family}/{i}" for i in range(draw.randrange(6))] + [f"own {step}/{i}" for i in range(length)]
            sides = []
            for pool in (kept.pool, plain):
                hits: list[KVCacheBlock] = []
                for name in names:
                    found = pool.get_cached_block(name.encode(), [0])  # type: ignore[arg-type]
                    if not found:
                        break
                    hits += found
                sides.append((pool, hits))
            assert [b.block_id for b in sides[0][1]] == [b.block_id for b in sides[1][1]]
            hit = {block.block_id for block in sides[1][1]}
            rest = names[len(hit) :]
            next_free = [i for i in free(plain) if i not in hit][: len(rest) + 1]
            if len(next_free) <= len(rest) or held.intersection(next_free):
                continue  # from here on the two would hold different things
            both = []
            for pool, hits in sides:
                pool.touch(hits)
                evicted += sum(plain.blocks[i].block_hash is not None for i in next_free)
                fresh = pool.get_new_blocks(len(rest) + 1)
                for name, block in zip(rest, fresh, strict=False):
                    hashed(pool, block, name)
                both.append(hits + fresh)
            running.append((both[0], both[1]))
        elif event < 0.8 and running:
            ours, theirs = running.pop(draw.randrange(len(running)))
            if draw.random() < 0.7:
                kept.pins.add(kept.pin(ours))
            kept.pool.free_blocks(reversed(ours))
            plain.free_blocks(reversed(theirs))
        elif len(kept.pins):
            kept.pins.remove(draw.choice(list(kept.pins)))
            released += 1
        held = {block.block_id for pin in kept.pins for block in pin.blocks}
        assert free(kept.pool) == [i for i in free(plain) if i not in held]
    kept.pins.drop(list(kept.pins), "release")
    assert free(kept.pool) == free(plain) and released > 20 and evicted > 20
