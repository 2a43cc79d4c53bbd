"""What the plug-in relies on inside vLLM, by name: another version fails with the name of what it lacks."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import vllm
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

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
    },
    AsyncScheduler: {"_update_after_schedule": ("scheduler_output",)},
    KVCacheManager: {
        "allocate_slots": ("request", "num_new_tokens", "num_new_computed_tokens", "new_computed_blocks"),
        "get_blocks": ("request_id",),
        "estimate_cached_tokens": ("request",),
    },
    BlockPool: {"touch": ("blocks",), "free_blocks": ("ordered_blocks",), "get_num_free_blocks": ()},
    FreeKVCacheBlockQueue: {"prepend_n": ("blocks",)},
    RequestQueue: dict.fromkeys(
        ("add_request", "pop_request", "peek_request", "prepend_request", "prepend_requests", "remove_request",
         "remove_requests", "__bool__", "__len__", "__iter__"), ()),
}  # fmt: skip

# Class → attributes that its constructor or its source must set.
ATTRIBUTES: dict[type, tuple[str, ...]] = {
    Scheduler: ("waiting", "running", "requests", "policy", "kv_cache_manager", "block_size", "hash_block_size",
                "structured_output_manager", "scheduler_config"),
    KVCacheManager: ("block_pool", "watermark_blocks", "num_kv_cache_groups"),
    BlockPool: ("free_block_queue", "num_gpu_blocks"),
    FreeKVCacheBlockQueue: ("fake_free_list_head", "fake_free_list_tail", "num_free_blocks"),
    KVCacheBlock: ("ref_cnt", "block_id", "block_hash", "is_null", "pool", "prev_free_block", "next_free_block"),
    Request: ("session_id", "sampling_params", "priority", "arrival_time", "block_hashes", "num_computed_tokens",
              "num_tokens", "status", "output_token_ids", "prompt_token_ids"),
}  # fmt: skip


_source = functools.cache(inspect.getsource)  # half a second for all of them: it parses whole files


def missing() -> list[str]:
    """Names that this vLLM lacks: ``Class.method``, ``Class.method(parameter)`` or ``Class.attribute``."""
    lacking = []
    for owner, methods in METHODS.items():
        for name, parameters in methods.items():
            method = getattr(owner, name, None)
            if method is None:
                lacking.append(f"{owner.__name__}.{name}")
                continue
            there = inspect.signature(method).parameters
            lacking += [f"{owner.__name__}.{name}({x})" for x in parameters if x not in there]
    for owner, names in ATTRIBUTES.items():
        source = _source(owner)
        lacking += [f"{owner.__name__}.{x}" for x in names if not hasattr(owner, x) and f"self.{x}" not in source
                    and f"\n    {x}:" not in source]  # fmt: skip
    return lacking


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
