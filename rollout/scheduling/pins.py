"""The pins: references to KV blocks in vLLM's block pool, returned to their true place in the LRU order."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rollout.scheduling.counters import Counters
from rollout.scheduling.programs import Pin

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock


class Pins:
    """All pins, at most ``capacity`` blocks; a block that several hold counts once.

    Stock ``free_blocks`` puts cached blocks at the tail of the free list, which is in LRU order. A pin that is released
    long after its turn would outlive hotter prefixes there. So every call of ``free_blocks`` stamps its blocks, also
    those of a pinned turn, and a released block is put back behind the last one with an older or equal stamp: exactly
    where it would lie without the pin.

    What only pins hold is as good as free: it goes when somebody needs it. vLLM's usage is told without it, or an idle
    server would look full to those who watch it, and to vLLM's balancer over several engines. Allocation does not ask
    for the usage.
    """

    def __init__(self, pool: BlockPool, capacity: float, counters: Counters) -> None:
        self.changed = False  # one has gone for which a turn waits, since the flag was last lowered
        self._pool, self._capacity, self._counters = pool, capacity, counters
        self._free_blocks, self._touch = pool.free_blocks, pool.touch
        self._alone = 0  # blocks that only pins hold
        self._pins: dict[Pin, None] = {}  # oldest first
        self._deadlines: list[tuple[float, int, Pin]] = []
        self._held: dict[int, int] = {}  # block id → pins that hold it
        self._stamps: dict[int, int] = {}
        self._stamp = 0
        pool.free_blocks = self._stamped_free  # type: ignore[method-assign]
        pool.touch = self._counted_touch  # type: ignore[method-assign]
        pool.get_usage = self.usage  # type: ignore[method-assign]

    def __len__(self) -> int:
        return len(self._pins)

    def __iter__(self) -> Iterator[Pin]:
        return iter(self._pins)

    def __contains__(self, pin: object) -> bool:
        return pin in self._pins

    def count(self, now: float) -> tuple[int, int]:
        """(pins, unique blocks) not expired yet: an idle engine is not called, so expired ones may still be here."""
        live = [pin for pin in self._pins if pin.deadline > now]
        if len(live) == len(self._pins):
            return len(live), len(self._held)
        return len(live), len({block.block_id for pin in live for block in pin.blocks})

    def usage(self) -> float:
        """Share of the pool that requests hold, 0 to 1. One block is vLLM's null block."""
        return 1 - (self._pool.get_num_free_blocks() + self._alone) / max(self._pool.num_gpu_blocks - 1, 1)

    def usable(self, groups: Iterable[Iterable[KVCacheBlock]]) -> list[KVCacheBlock]:
        """The blocks that can hit and lie in the main pool (some exotic groups bring their own)."""
        return [block for group in groups for block in group if block.block_hash is not None and self._mine(block)]

    def fresh(self, blocks: Iterable[KVCacheBlock]) -> int:
        """How many of these no pin holds yet."""
        return sum(block.block_id not in self._held for block in blocks)

    def suffice(self, pins: Sequence[Pin], missing: int, hits: Iterable[Iterable[KVCacheBlock]]) -> bool:
        """Whether ``missing`` blocks come free if all these pins go.

        A block comes free with the last reference to it. The ``hits`` of the request that asks do not: it takes them.
        """
        if sum(len(pin.blocks) for pin in pins) < missing:
            return False
        taken = {block.block_id for group in hits for block in group}
        left: dict[int, int] = {}  # references to the blocks that have several
        for pin in pins:
            for block in pin.blocks:
                references = block.ref_cnt
                if references > 1:
                    references = left[block.block_id] = left.get(block.block_id, references + 1) - 1
                missing -= references == 1 and block.block_id not in taken
            if missing <= 0:
                return True
        return missing <= 0

    def add(self, pin: Pin) -> bool:
        """Take one reference to each block, which its request still references. False beyond the capacity."""
        if len(self._held) + pin.fresh > self._capacity:
            self._counters.refusals += 1
            return False
        self._touch(pin.blocks)
        for block in pin.blocks:
            self._held[block.block_id] = self._held.get(block.block_id, 0) + 1
        self._pins[pin] = None
        pin.program.pins.append(pin)
        if pin.deadline < math.inf:
            heapq.heappush(self._deadlines, (pin.deadline, id(pin), pin))
        self._counters.pins += 1
        return True

    def remove(self, pin: Pin) -> None:
        """Give the references back; freed blocks go to where the LRU order has them."""
        del self._pins[pin]
        pin.program.pins.remove(pin)
        self.changed |= pin.returning
        freed: list[KVCacheBlock] = []
        held = self._held
        for block in reversed(pin.blocks):
            others = held.pop(block.block_id) - 1
            if others:
                held[block.block_id] = others
            block.ref_cnt -= 1
            if block.ref_cnt == 0:
                freed.append(block)
        pin.blocks = []
        self._alone -= len(freed)
        self._put_back(freed)

    def drop(self, pins: Iterable[Pin], cause: str) -> None:
        for pin in list(pins):
            self.remove(pin)
            self._counters.drops[cause] += 1

    def expire(self, now: float) -> None:
        """Remove the pins whose time is over, but for those whose next turn already waits: these when it does not."""
        late = []
        while self._deadlines and self._deadlines[0][0] <= now:
            entry = heapq.heappop(self._deadlines)
            pin = entry[2]
            if pin not in self._pins:
                continue
            if pin.returning:
                late.append(entry)
            else:
                self.remove(pin)
                self._counters.expiries += 1
        for entry in late:
            heapq.heappush(self._deadlines, entry)

    def _mine(self, block: KVCacheBlock) -> bool:
        return not block.is_null and (block.pool is None or block.pool is self._pool)

    def _stamped_free(self, ordered_blocks: Iterable[KVCacheBlock]) -> None:
        self._stamp += 1
        blocks = list(ordered_blocks)
        self._stamps.update((block.block_id, self._stamp) for block in blocks if self._mine(block))
        self._free_blocks(blocks)
        if self._held:
            self._alone += self._of_pins(block for block in blocks if self._mine(block))

    def _counted_touch(self, blocks: Sequence[KVCacheBlock]) -> None:
        if self._held:
            self._alone -= self._of_pins(blocks)
        self._touch(blocks)

    def _of_pins(self, blocks: Iterable[KVCacheBlock]) -> int:
        """How many of these blocks are held by pins and nobody else."""
        held = self._held.get
        return sum([block.ref_cnt == held(block.block_id) for block in blocks])

    def _age(self, block: KVCacheBlock) -> int:
        return self._stamps.get(block.block_id, 0)

    def _put_back(self, freed: list[KVCacheBlock]) -> None:
        """Insert blocks into the free list by stamp: those that were freed together tails first, as stock does."""
        queue = self._pool.free_block_queue
        queue.prepend_n([block for block in freed if block.block_hash is None])  # evicted meanwhile: never hits
        runs: dict[int, list[KVCacheBlock]] = {}
        for block in freed:
            if block.block_hash is not None:
                runs.setdefault(self._age(block), []).append(block)
        place: Any = queue.fake_free_list_tail.prev_free_block
        for stamp in sorted(runs, reverse=True):
            while place.block_hash is not None and self._age(place) > stamp:  # unhashed ones, and the head, stay first
                place = place.prev_free_block
            _insert_after(place, runs[stamp])
            queue.num_free_blocks += len(runs[stamp])


def _insert_after(place: KVCacheBlock, blocks: list[KVCacheBlock]) -> None:
    following = place.next_free_block
    for block in blocks:
        place.next_free_block, block.prev_free_block = block, place
        place = block
    place.next_free_block, following.prev_free_block = following, place  # type: ignore[union-attr]
