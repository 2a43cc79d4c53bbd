"""vLLM's own scheduler and KV cache manager without a model: what an engine core holds, minus the weights."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from vllm import SamplingParams
from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

MAX_MODEL_LEN = 1 << 22  # no session is refused for its length
EOS = 2
FILLER = 3


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
        "vocab_size": 64,
        "max_position_embeddings": MAX_MODEL_LEN,
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        return ModelConfig(
            model=folder,
            skip_tokenizer_init=True,
            max_model_len=MAX_MODEL_LEN,
            dtype="float32",
            enforce_eager=True,
        )


def build_scheduler(
    scheduler: Callable[..., Any] | None,
    *,
    num_blocks: int,
    block_size: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    policy: str = "fcfs",
    additional_config: dict[str, Any] | None = None,
) -> Any:
    """The scheduler as vLLM's engine core would build it; None is vLLM's own. Sizes in simulated tokens and blocks."""
    logging.getLogger("vllm").setLevel(logging.WARNING)
    model = _model_config()
    cache_config = CacheConfig(block_size=block_size, enable_prefix_caching=True)
    cache_config.num_gpu_blocks = num_blocks
    config = VllmConfig(
        model_config=model,
        cache_config=cache_config,
        scheduler_config=SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=MAX_MODEL_LEN,
            is_encoder_decoder=False,
            enable_chunked_prefill=True,
            policy=policy,
        ),
        additional_config=additional_config or {},
    )
    spec = FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=1, dtype=torch.float32)
    kv = KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    return (scheduler or Scheduler)(
        vllm_config=config,
        kv_cache_config=kv,
        structured_output_manager=StructuredOutputManager(config),
        include_finished_set=False,
        log_stats=False,
        block_size=block_size,
        hash_block_size=block_size,
    )


def finish_step(scheduler: Any, output: SchedulerOutput, tokens: dict[str, list[int]]) -> None:
    """Hand the scheduler what the model would have sampled: request id → its new tokens, in the order scheduled."""
    ids = list(tokens)
    scheduler.update_from_output(
        output,
        ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={rid: i for i, rid in enumerate(ids)},
            sampled_token_ids=list(tokens.values()),
        ),
    )


def make_request(
    request_id: str,
    *,
    prompt_tokens: int,
    outputs: int,
    session_id: str | None,
    extra_args: dict[str, Any],
    arrival_time: float,
    hashes: list[bytes],
    block_size: int,
) -> Request:
    """A request as the engine core makes it of a client's. ``hashes``: of the context's blocks, output included."""
    sampling = SamplingParams(max_tokens=outputs, extra_args=extra_args or None)
    sampling.update_from_generation_config({}, eos_token_id=EOS)

    def hasher(request: Request) -> list[Any]:
        have, full = len(request.block_hashes), request.num_tokens // block_size
        return hashes[have:full] if full > have else []

    return Request(
        request_id,
        [FILLER] * prompt_tokens,
        sampling,
        None,
        arrival_time=arrival_time,
        block_hasher=hasher,
        session_id=session_id,
    )
