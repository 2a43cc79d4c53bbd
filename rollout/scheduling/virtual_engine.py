"""An engine core without a model: vLLM's own scheduler and KV cache manager, and a clock that the cost model moves."""

from __future__ import annotations

import inspect
import itertools
import json
import logging
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from vllm import SamplingParams
from vllm.config import CacheConfig, KVTransferConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from rollout.engines.vllm import environment_kept
from rollout.scheduling.costs import Cost, Work

MAX_MODEL_LEN = 1 << 22  # no session is refused for its length
EOS = 2
FIRST_TOKEN = 8  # ids below are special


@cache
def _model_config() -> ModelConfig:
    """A one-layer Llama that is never loaded: the scheduler reads lengths and kinds from its configuration."""
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "num_hidden_layers": 1,
        "vocab_size": 1 << 20,
        "max_position_embeddings": MAX_MODEL_LEN,
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        return ModelConfig(
            model=folder, skip_tokenizer_init=True, max_model_len=MAX_MODEL_LEN, dtype="float32", enforce_eager=True
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """vLLM's advice on block sizes and kernels concerns a model that is not there, as do the variables that it sets."""
    logger = logging.getLogger("vllm")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with environment_kept():
            yield
    finally:
        logger.setLevel(level)


def build_scheduler(
    scheduler: Callable[..., Any] | None,
    *,
    num_blocks: int,
    block_size: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    options: dict[str, Any] | None = None,
    offload_blocks: int = 0,
) -> Any:
    """The scheduler as vLLM's engine core builds it; None is vLLM's own. Sizes in simulated tokens and blocks.

    A factory with the parameter ``simulated`` gets True: ours then admits policies that know the future.
    """
    with _quiet():
        caches = CacheConfig(block_size=block_size, enable_prefix_caching=True)
        caches.num_gpu_blocks = num_blocks
        config = VllmConfig(
            model_config=_model_config(),
            cache_config=caches,
            scheduler_config=SchedulerConfig(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                max_model_len=MAX_MODEL_LEN,
                is_encoder_decoder=False,
                enable_chunked_prefill=True,
            ),
            kv_transfer_config=_tier(offload_blocks) if offload_blocks else None,
            additional_config=options or {},
        )
        layers = FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=1, dtype=torch.float32)
        build: Callable[..., Any] = scheduler or Scheduler
        told = {"simulated": True} if "simulated" in inspect.signature(build).parameters else {}
        return build(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], layers)]),
            structured_output_manager=StructuredOutputManager(config),
            include_finished_set=False,
            log_stats=False,
            block_size=block_size,
            hash_block_size=block_size,
            **told,
        )


def _tier(blocks: int) -> KVTransferConfig:
    return KVTransferConfig(
        kv_connector="OffloadTier",
        kv_connector_module_path="rollout.scheduling.offload_tier",
        kv_role="kv_consumer",
        kv_connector_extra_config={"blocks": blocks},
    )


class Context:
    """What a session has said so far, in simulated tokens: token ids, and hashes of its blocks without any hashing.

    Equal hashes mean equal prefixes. ``prefix``: (id, tokens) of the parts that other sessions begin with too.
    """

    def __init__(self, prefix: Sequence[tuple[str, int]], block_size: int, unique: Iterator[int]) -> None:
        self._size, self._unique = block_size, unique
        self._filler = FIRST_TOKEN + next(unique)
        self.tokens: list[int] = []
        self.blocks: list[bytes] = []
        self.computed = 0  # tokens from the start that were computed at some time
        end = 0
        for name, length in prefix:
            self.tokens += [zlib.crc32(name.encode())] * length
            end += length
            names = range(len(self.blocks), end // block_size)
            self.blocks += [f"{name}/{i}".encode() for i in names]

    def ask(self, keep: int | None, prompt: int, outputs: int) -> int:
        """The next turn: what stays of the context, what the prompt adds, and the answer; gives the prompt's length."""
        length = len(self.tokens)
        if keep is not None and keep < length:
            del self.tokens[keep:]
            del self.blocks[keep // self._size :]
            self.computed = min(self.computed, keep)
            self._filler = FIRST_TOKEN + next(self._unique)
        self.tokens += [self._filler] * prompt
        asked = len(self.tokens)
        self.tokens += [self._filler] * (outputs - 1) + [EOS]
        missing = len(self.tokens) // self._size - len(self.blocks)
        self.blocks += [next(self._unique).to_bytes(8, "big") for _ in range(missing)]
        return asked


class InFlight:
    """A request in the engine. ``owner`` is the client's own; ``outputs`` counts the tokens of its answer."""

    __slots__ = ("answered", "context", "outputs", "owner", "request")

    def __init__(self, request: Request, context: Context, outputs: int, owner: Any) -> None:
        self.request, self.context, self.outputs, self.owner = request, context, outputs, owner
        self.answered = 0


class VirtualEngine:
    """Steps of a scheduler, each charged to the clock ``now`` by the cost model. One batch in flight, as without async
    scheduling. ``scale`` real tokens stand behind each simulated one.
    """

    def __init__(self, scheduler: Any, cost: Cost, *, scale: int, block_size: int) -> None:
        self.scheduler, self.cost, self.scale, self.block_size = scheduler, cost, scale, block_size
        self.now = 0.0
        self.live: dict[str, InFlight] = {}
        self._unique = itertools.count()
        self.steps = 0
        self.busy = self.running_seconds = 0.0  # seconds of steps; the same times the requests in them
        self.prefilled = self.recomputed = self.loaded = 0  # simulated tokens
        self.scheduled: dict[str, int] = {}  # by the last step
        if hasattr(scheduler, "clock"):
            scheduler.clock = lambda: self.now

    def context(self, prefix: Sequence[tuple[str, int]]) -> Context:
        """A new session's; ``prefix`` in simulated tokens."""
        return Context(prefix, self.block_size, self._unique)

    def submit(
        self,
        request_id: str,
        context: Context,
        prompt: int,
        outputs: int,
        *,
        owner: Any,
        arrival: float,
        session_id: str | None,
        extra_args: dict[str, Any] | None,
    ) -> None:
        """A request as the engine core makes it of a client's: the first ``prompt`` tokens of the context."""
        sampling = SamplingParams(max_tokens=outputs, extra_args=extra_args)
        sampling.update_from_generation_config({}, eos_token_id=EOS)
        size, blocks = self.block_size, context.blocks

        def hasher(request: Request) -> list[Any]:
            have, full = len(request.block_hashes), request.num_tokens // size
            return blocks[have:full] if full > have else []

        request = Request(
            request_id,
            context.tokens[:prompt],
            sampling,
            None,
            arrival_time=arrival,
            block_hasher=hasher,
            session_id=session_id,
        )
        self.live[request_id] = InFlight(request, context, outputs, owner)
        self.scheduler.add_request(request)

    def step(self) -> list[InFlight] | None:
        """One step: the requests that got their first token or their last. None if the scheduler scheduled nothing."""
        output = self.scheduler.schedule()
        scheduled = self.scheduled = output.num_scheduled_tokens
        if not scheduled:
            self.scheduler.update_from_output(output, ModelRunnerOutput([], {}))
            return None
        work, sampled, notable = self._compute(scheduled)
        seconds = self.cost.seconds(work)
        self.now += seconds
        self.busy += seconds
        self.running_seconds += seconds * work.running
        self.steps += 1
        ids = list(scheduled)
        self.scheduler.update_from_output(
            output, ModelRunnerOutput(ids, dict(zip(ids, range(len(ids)), strict=True)), sampled)
        )
        for entry in notable:
            if entry.answered == entry.outputs:
                del self.live[entry.request.request_id]
        return notable

    def _compute(self, scheduled: dict[str, int]) -> tuple[Work, list[list[int]], list[InFlight]]:
        """What the step costs, the tokens it samples, and who got a first or a last one."""
        live = self.live
        prefill = prefill_context = decode = decode_context = read = recomputed = 0
        sampled: list[list[int]] = []
        notable: list[InFlight] = []
        nothing: list[int] = []
        answers = False
        for request_id, n in scheduled.items():
            entry = live[request_id]
            request, context = entry.request, entry.context
            end = request.num_computed_tokens
            start = end - n
            read += end
            known = context.computed
            if start >= known:
                context.computed = end
            else:
                recomputed += min(end, known) - start
                context.computed = max(end, known)
            if n == 1 and entry.answered and start >= known:
                decode += 1
                decode_context += end
            else:
                prefill += n
                prefill_context += n * (start + end + 1)
            if end < request.num_tokens:
                sampled.append(nothing)
                continue
            answers = True
            entry.answered += 1
            if entry.answered == entry.outputs:
                sampled.append([EOS])
                notable.append(entry)
            else:
                sampled.append([context.tokens[-2]])
                if entry.answered == 1:
                    notable.append(entry)
        scale = self.scale
        loaded = self.scheduler.connector.take() if self.scheduler.connector is not None else 0
        self.prefilled += prefill
        self.recomputed += recomputed
        self.loaded += loaded
        work = Work(
            rounds=scale if answers else 1,
            prefill=prefill * scale,
            decode=decode * scale,
            prefill_context=prefill_context * scale * scale / 2,
            decode_context=decode_context * scale * scale,
            read=read * scale,
            running=len(scheduled),
            loaded=loaded * scale,
        )
        return work, sampled, notable
