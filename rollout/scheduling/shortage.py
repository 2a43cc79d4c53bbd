"""How many blocks an allocation of vLLM's lacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.request import Request


def missing_blocks(manager: KVCacheManager, request: Request, tokens: int, how: Mapping[str, Any]) -> int:
    """Blocks that must come free before ``allocate_slots(request, tokens, **how)``, which has failed, can succeed.

    For a waiting request. vLLM asks twice: for the whole sequence (``full_sequence_must_fit``), and for this step with
    its lookahead, beside what is reserved for KV that loads. To both the watermark is added, while others run. Blocks
    that the request hits and nobody holds count: they lie among the free ones, and it takes them from there.
    """
    most, coordinator = manager.max_model_len, manager.coordinator
    local = request.num_computed_tokens + how.get("num_new_computed_tokens", 0)
    computed = min(local + how.get("num_external_computed_tokens", 0), most)
    hits = how.get("new_computed_blocks") or manager.empty_kv_cache_blocks
    common = {
        "request_id": request.request_id,
        "new_computed_blocks": hits.blocks,
        "num_encoder_tokens": how.get("num_encoder_tokens", 0),
        "total_computed_tokens": computed,
        "num_local_computed_tokens": local,
        "prefill_end": max(request.num_prompt_tokens, request.num_tokens - 1),
    }
    end = computed + tokens
    slots = min(end + how.get("num_lookahead_tokens", 0), most)
    lacking = coordinator.get_num_blocks_to_allocate(num_tokens=slots, num_tokens_main_model=end, **common)
    lacking += how.get("reserved_blocks", 0)
    if how.get("full_sequence_must_fit"):
        length = min(request.num_tokens, most)
        whole = coordinator.get_num_blocks_to_allocate(
            num_tokens=length, num_tokens_main_model=length, apply_admission_cap=True, **common
        )
        lacking = max(lacking, whole)
    if how.get("has_scheduled_reqs"):
        lacking += manager.watermark_blocks
    return lacking - manager.block_pool.get_num_free_blocks()
