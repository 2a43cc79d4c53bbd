"""What the plug-in relies on inside vLLM, by name: another version fails with the name of what it lacks."""

from __future__ import annotations

import functools
import inspect
import re
from pathlib import Path
from typing import Any

import vllm
from vllm import SamplingParams
from vllm.config import CacheConfig, ParallelConfig, SchedulerConfig, VllmConfig
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import RequestQueue, SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from rollout.errors import UserError

WRITTEN_FOR = "0.32"

# Class → methods it must have, with the parameters that the plug-in passes or intercepts.
METHODS: dict[type, dict[str, tuple[str, ...]]] = {
    Scheduler: {
        "add_request": ("request",),
        "finish_requests": ("request_ids", "finished_status"),
        "schedule": ("throttle_prefills",),
        "update_from_output": ("scheduler_output", "model_runner_output"),
        "reset_prefix_cache": ("reset_running_requests", "reset_connector"),
        "set_pause_state": ("pause_state",),
        "shutdown": (),
        "_free_request": ("request", "delay_free_blocks"),
        "_preempt_request": ("request", "timestamp", "drop_stale_output"),
        "_handle_stopped_request": ("request",),
    },
    KVCacheManager: {
        "allocate_slots": ("request", "num_new_tokens", "num_new_computed_tokens", "new_computed_blocks",
                           "num_external_computed_tokens", "num_encoder_tokens", "num_lookahead_tokens",
                           "reserved_blocks", "full_sequence_must_fit", "has_scheduled_reqs", "delay_cache_blocks"),
        "get_blocks": ("request_id",),
        "estimate_cached_tokens": ("request",),
    },
    KVCacheCoordinator: {
        "get_num_blocks_to_allocate": (
            "request_id", "num_tokens", "new_computed_blocks", "num_encoder_tokens", "total_computed_tokens",
            "num_local_computed_tokens", "num_tokens_main_model", "apply_admission_cap", "prefill_end"),
    },
    BlockPool: {"touch": ("blocks",), "free_blocks": ("ordered_blocks",), "get_num_free_blocks": (), "get_usage": ()},
    FreeKVCacheBlockQueue: {"prepend_n": ("blocks",)},
    RequestQueue: dict.fromkeys(
        ("add_request", "pop_request", "peek_request", "prepend_request", "prepend_requests", "remove_request",
         "remove_requests", "__bool__", "__len__", "__iter__"), ()),
}  # fmt: skip

# Class → attributes that it must have, or that its source must set.
ATTRIBUTES: dict[type, tuple[str, ...]] = {
    Scheduler: ("waiting", "kv_holding_waiting", "running", "requests", "policy", "kv_cache_manager", "block_size",
                "hash_block_size", "structured_output_manager", "parallel_config"),
    KVCacheManager: ("block_pool", "coordinator", "empty_kv_cache_blocks", "max_model_len", "watermark_blocks"),
    KVCacheBlocks: ("blocks",),
    BlockPool: ("free_block_queue", "num_gpu_blocks"),
    FreeKVCacheBlockQueue: ("fake_free_list_tail", "num_free_blocks"),
    KVCacheBlock: ("ref_cnt", "block_id", "block_hash", "is_null", "pool", "prev_free_block", "next_free_block"),
    Request: ("request_id", "session_id", "sampling_params", "priority", "arrival_time", "status", "block_hashes",
              "num_tokens", "num_prompt_tokens", "num_computed_tokens", "all_token_ids", "output_token_ids"),
    RequestStatus: ("WAITING", "RUNNING", "PREEMPTED", "WAITING_FOR_STREAMING_REQ", "FINISHED_ABORTED",
                    "FINISHED_ERROR"),
    PauseState: ("UNPAUSED",),
    SchedulingPolicy: ("PRIORITY",),
    SchedulerOutput: ("num_scheduled_tokens", "total_num_scheduled_tokens"),
    SamplingParams: ("stop", "extra_args"),
    VllmConfig: ("cache_config", "scheduler_config", "additional_config"),
    CacheConfig: ("enable_prefix_caching",),
    SchedulerConfig: ("async_scheduling", "policy"),
    StructuredOutputManager: ("tokenizer",),
    ParallelConfig: ("data_parallel_index",),
}  # fmt: skip

# Module → what its source says: a release, and the numbers on /metrics, pass through the front end. It is read and not
# imported, for an engine core has none.
WORDS: dict[str, tuple[str, ...]] = {
    "v1/engine/core.py": ("def abort_requests(self, request_ids",),
    "v1/engine/core_client.py": ("async def call_utility_async(self, method",),
    "v1/engine/async_llm.py": ("self.engine_core =",),
    "entrypoints/launchers/api_server/app_state.py": ("state.engine_client =", "state.vllm_config ="),
}

_source = functools.cache(inspect.getsource)  # half a second for all of them: it parses whole files


def missing() -> list[str]:
    """What this vLLM lacks: ``Class.method``, ``Class.method(parameter)``, ``Class.attribute``, words of a module."""
    lacking = []
    for owner, methods in METHODS.items():
        for name, parameters in methods.items():
            method = getattr(owner, name, None)
            inherited = name not in vars(owner) and getattr(method, "__isabstractmethod__", False)
            if method is None or inherited:
                lacking.append(f"{owner.__name__}.{name}")
                continue
            there = inspect.signature(method).parameters
            lacking += [f"{owner.__name__}.{name}({x})" for x in parameters if x not in there]
    for owner, names in ATTRIBUTES.items():
        lacking += [f"{owner.__name__}.{x}" for x in names if not hasattr(owner, x) and not _sets(_source(owner), x)]
    for module, words in WORDS.items():
        lacking += [f'"{x}" in {module}' for x in words if x not in _text(module)]
    return lacking


@functools.cache
def _text(module: str) -> str:
    path = Path(vllm.__file__).parent / module
    return path.read_text() if path.exists() else ""


@functools.cache
def _sets(source: str, name: str) -> bool:
    return re.search(rf"\bself\.{name}\b|^    {name}:", source, re.MULTILINE) is not None


def check(vllm_config: Any) -> None:
    """Refuse what the plug-in cannot work with.

    Raises:
        UserError: prefix caching is off, or this vLLM's internals have other names.
    """
    if not vllm_config.cache_config.enable_prefix_caching:
        raise UserError(
            "scheduler: prefix caching is off, so no KV can be kept; drop --no-enable-prefix-caching or use policy fcfs"
        )
    lacking = missing()
    if lacking:
        raise UserError(
            f"scheduler: vLLM {vllm.__version__} has no {', '.join(lacking)}; the plug-in was written for "
            f"{WRITTEN_FOR}: install vllm=={WRITTEN_FOR}.* or use policy fcfs"
        )
