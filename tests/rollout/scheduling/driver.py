"""A scheduler driven by hand: vLLM's own scheduler and KV cache manager, answers known beforehand, one batch or two in
flight, and the accounts that must balance after every step."""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections import Counter, deque
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from vllm import SamplingParams
from vllm.config import KVTransferConfig
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from rollout.scheduling.offload_tier import OffloadTier
from rollout.scheduling.virtual_engine import EOS, FIRST_TOKEN, build_scheduler
from rollout.scheduling.vllm_plugin import program_scheduler

init_none_hash(sha256)
logging.getLogger("vllm").setLevel(logging.CRITICAL)  # each reset and pause is told
BLOCK = 4
FACTORY = functools.partial(program_scheduler, simulated=True)  # the bound that knows the future is tested too


@cache
def _parts(num_blocks: int, block_size: int, seqs: int, budget: int) -> dict[str, Any]:
    """What the engine core hands to a scheduler; building it takes longer than a test's whole life."""
    return build_scheduler(
        lambda **parts: parts,
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
    )


def build(
    options: dict[str, Any] | None,
    *,
    num_blocks: int = 33,
    block_size: int = BLOCK,
    seqs: int = 4,
    budget: int = 64,
    by: str = "fcfs",
    asynchronous: bool = False,
    chunked: bool = True,
    long_prefill: int = 0,
    watermark: float = 0.0,
    groups: Sequence[Any] = (),
    tokenizer: Any = None,
    remote: bool = False,
    factory: Any = FACTORY,
) -> Any:
    """A scheduler with the plug-in's ``options``; None is vLLM's own. ``by``: vLLM's scheduling policy. ``groups``:
    KV cache specs, for more than one group. ``remote``: with a connector, see ``RemoteStore``."""
    parts = dict(_parts(num_blocks, block_size, seqs, budget))
    config = parts["vllm_config"] = copy.copy(parts["vllm_config"])
    config.additional_config = {} if options is None else {"turnstile": options}
    config.scheduler_config = copy.copy(config.scheduler_config)
    config.scheduler_config.policy = by
    config.scheduler_config.async_scheduling = asynchronous
    config.scheduler_config.enable_chunked_prefill = chunked
    config.scheduler_config.long_prefill_token_threshold = long_prefill
    config.scheduler_config.watermark = watermark
    if groups:
        config.cache_config = copy.copy(config.cache_config)
        config.cache_config.mamba_cache_mode = "align"  # read where there is a Mamba group
        named = [KVCacheGroupSpec([f"layer{i}"], spec) for i, spec in enumerate(groups)]
        parts["kv_cache_config"] = KVCacheConfig(num_blocks, [], named)
    if remote:
        config.kv_transfer_config = KVTransferConfig(
            kv_connector="RemoteStore",
            kv_connector_module_path=__name__,
            kv_role="kv_consumer",
            kv_connector_extra_config={"blocks": 0},
        )
    if tokenizer is not None:
        parts["structured_output_manager"] = copy.copy(parts["structured_output_manager"])
        parts["structured_output_manager"].tokenizer = tokenizer
    if options is None:
        return (AsyncScheduler if asynchronous else Scheduler)(**parts)
    return factory(**parts)


def attention(**window: Any) -> Any:
    """The spec of a group with full attention, or with ``sliding_window=…`` tokens of it."""
    kind: Any = SlidingWindowSpec if window else FullAttentionSpec
    return kind(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32, **window)


class RemoteStore(OffloadTier):
    """The first ``extra_args["kv_transfer_params"]["remote"]`` tokens of a prompt lie elsewhere; they take their time
    to come, and while they do the request holds memory and waits."""

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        there = (request.kv_transfer_params or {}).get("remote", 0)
        return max(there - num_computed_tokens, 0), there > num_computed_tokens


def request(
    request_id: str,
    prompt: Sequence[int],
    outputs: int,
    *,
    session: str | None = None,
    block_size: int = BLOCK,
    arrival: float = 0.0,
    priority: int = 0,
    **sampling: Any,
) -> Request:
    """A request as the engine core makes it: real hashes, of real tokens. ``outputs``: its max_tokens."""
    parameters = SamplingParams(max_tokens=outputs, **sampling)
    parameters.update_from_generation_config({}, eos_token_id=EOS)
    return Request(
        request_id,
        list(prompt),
        parameters,
        None,
        arrival_time=arrival,
        priority=priority,
        block_hasher=get_request_block_hasher(block_size, sha256),
        session_id=session,
    )


class Driver:
    """Steps a scheduler; ``depth`` batches are in flight at once, as many as vLLM's async scheduling has.

    The token at each place of an answer is given, so what is sampled again after a preemption is the same.
    """

    def __init__(self, scheduler: Any, depth: int = 1) -> None:
        self.scheduler, self.depth, self.now = scheduler, depth, 0.0
        self.live: dict[str, Request] = {}
        self.answers: dict[str, list[int]] = {}
        self.finished: dict[str, RequestStatus] = {}
        self.came: set[str] = set()  # whose remote KV is there: told with the next batch
        self._flying: deque[tuple[Any, dict[str, int]]] = deque()
        if hasattr(scheduler, "clock"):
            scheduler.clock = lambda: self.now

    def add(self, request: Request, answer: Sequence[int]) -> Request:
        self.live[request.request_id], self.answers[request.request_id] = request, list(answer)
        self.scheduler.add_request(request)
        return request

    def abort(self, *request_ids: str) -> None:
        self.scheduler.finish_requests(request_ids, RequestStatus.FINISHED_ABORTED)
        self._collect()

    def step(self, seconds: float = 0.05) -> Any:
        """One ``schedule``, and the ``update_from_output`` of the oldest batch once ``depth`` of them fly."""
        output = self.scheduler.schedule()
        places = {}
        for name in output.num_scheduled_tokens:
            request = self.scheduler.requests[name]
            if not request.is_prefill_chunk:
                places[name] = request.num_computed_tokens - request.num_prompt_tokens
        self._flying.append((output, places))
        self.now += seconds
        if len(self._flying) >= self.depth:
            self.land()
        return output

    def land(self) -> Any:
        """The oldest batch comes back."""
        output, places = self._flying.popleft()
        names = list(output.num_scheduled_tokens)
        sampled = []
        for name in names:
            answer = self.answers[name]
            sampled.append([answer[min(places[name], len(answer) - 1)]] if name in places else [])
        index = {name: i for i, name in enumerate(names)}
        came = KVConnectorOutput(finished_recving=self.came) if self.came else None
        self.came = set()
        result = self.scheduler.update_from_output(
            output, ModelRunnerOutput(names, index, sampled, kv_connector_output=came)
        )
        self._collect()
        return result

    def drain(self) -> None:
        while self._flying:
            self.land()

    def run(self, limit: int = 10_000) -> None:
        """Until nothing is left."""
        while self.live:
            assert limit, f"no end in sight: {sorted(self.live)}"
            limit -= 1
            self.step()
        self.drain()

    def ask(
        self,
        name: str,
        prompt: Sequence[int],
        answer: Sequence[int] = (EOS,),
        *,
        outputs: int | None = None,
        **how: Any,
    ) -> list[int]:
        """One request from its arrival to its end, alone; gives its tokens."""
        made = request(name, prompt, outputs or len(answer), **how)
        self.add(made, answer)
        while name in self.live:
            self.step()
        self.drain()
        return list(made.all_token_ids)

    def _collect(self) -> None:
        for name in [name for name, made in self.live.items() if made.is_finished()]:
            self.finished[name] = self.live.pop(name).status


def free_ids(scheduler: Any) -> list[int]:
    """The free list from its head, and that its links and its count agree."""
    queue = scheduler.kv_cache_manager.block_pool.free_block_queue
    found, block = [], queue.fake_free_list_head
    while block.next_free_block is not queue.fake_free_list_tail:
        assert block.next_free_block.prev_free_block is block
        block = block.next_free_block
        found.append(block.block_id)
    assert queue.fake_free_list_tail.prev_free_block is block
    assert len(found) == queue.num_free_blocks == len(set(found))
    return found


def check(scheduler: Any) -> None:
    """Every account balances: references, the free list, pins, turns, counters."""
    manager = scheduler.kv_cache_manager
    pool = manager.block_pool
    held: Counter[int] = Counter()
    for single in manager.coordinator.single_type_managers:
        held.update(b.block_id for blocks in single.req_to_blocks.values() for b in blocks if not b.is_null)
    held.update(block.block_id for _, blocks in scheduler.deferred_frees for block in blocks if not block.is_null)
    pinned: Counter[int] = Counter()
    for pin in scheduler.pins:
        assert len({block.block_id for block in pin.blocks}) == len(pin.blocks)
        assert all(block.block_hash is not None and not block.is_null for block in pin.blocks)
        assert pin in pin.program.pins
        pinned.update(block.block_id for block in pin.blocks)
    for block in pool.blocks:
        if not block.is_null:
            assert block.ref_cnt == held[block.block_id] + pinned[block.block_id], block
    free = free_ids(scheduler)
    assert set(free) == {block.block_id for block in pool.blocks if block.ref_cnt == 0 and not block.is_null}
    hashed = [pool.blocks[i].block_hash is not None for i in free]
    assert hashed == sorted(hashed), "what can never hit is reused first"
    assert len(pinned) <= scheduler.options.max_pinned * (pool.num_gpu_blocks - 1)
    assert scheduler.pins.count(-1.0) == (len(scheduler.pins), len(pinned))
    requests = sum(block.ref_cnt > pinned[block.block_id] for block in pool.blocks if not block.is_null)
    assert math.isclose(pool.get_usage(), requests / (pool.num_gpu_blocks - 1), abs_tol=1e-9)

    programs = list(scheduler.programs)
    turns = scheduler.programs.turns
    assert sum(len(program.pins) for program in programs) == len(scheduler.pins)
    assert sum(program.waiting for program in programs) == sum(not turn.running for turn in turns.values())
    assert sum(program.running for program in programs) == sum(turn.running for turn in turns.values())
    assert all(program.waiting >= 0 and program.running >= 0 for program in programs)
    tools = sum(not (program.live or program.job_ended or program.away) for program in programs)
    states = sum(program.waiting > 0 for program in programs), sum(program.running > 0 for program in programs), tools
    assert scheduler.programs.states() == states
    if scheduler.active:
        assert turns.keys() == {name for name, made in scheduler.requests.items() if not made.is_finished()}
        assert {name for name, turn in turns.items() if turn.running} == {r.request_id for r in scheduler.running}
    count = scheduler.counters
    gone = count.claims + count.expiries + count.pressure_releases + count.drops.total()
    assert count.pins == gone + len(scheduler.pins)


@cache
def tokenizer() -> Any:
    """A real tokenizer of bytes in which each byte is a token, and so is a call's marker; ids from 8 on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*(f"<{i}>" for i in range(FIRST_TOKEN)), *alphabet]
    inner = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    return inner


def said(text: str) -> list[int]:
    return tokenizer().encode(text).ids
