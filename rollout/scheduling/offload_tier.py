"""A second-chance store for KV blocks in host memory, as a KV connector of vLLM's: the simulator charges it by PCIe.

Simplifications: a turn's blocks are copied out when it ends, for free (the copy overlaps with computing, as in vLLM's
own offloading); the least recently used go first; what the GPU no longer has is loaded at once when the turn is
admitted, and the seconds of loading are added to that step. So losing a pin demotes its blocks, and falling out of the
tier drops them.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1 import SupportsHMA
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request


class OffloadTier(KVConnectorBase_V1, SupportsHMA):
    """The scheduler's half of a connector; there is no worker. ``extra_config["blocks"]`` is its capacity."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.capacity: int = vllm_config.kv_transfer_config.kv_connector_extra_config["blocks"]
        self.block_size: int = vllm_config.cache_config.block_size
        self.loaded = 0  # tokens brought back since the last ``take``
        self._blocks: dict[bytes, None] = {}  # least recently used first

    def take(self) -> int:
        """Tokens loaded since the last call."""
        loaded, self.loaded = self.loaded, 0
        return loaded

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        first = num_computed_tokens // self.block_size
        last = (request.num_tokens - 1) // self.block_size  # one token is always computed
        found = first
        while found < last and request.block_hashes[found] in self._blocks:
            found += 1
        return (found - first) * self.block_size, False

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        self.loaded += num_external_tokens

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return KVConnectorMetadata()

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        # Tails first, so that a prefix outlives what needs it.
        for block in reversed(request.block_hashes[: request.num_computed_tokens // self.block_size]):
            self._blocks.pop(block, None)
            self._blocks[block] = None
        while len(self._blocks) > self.capacity:
            del self._blocks[next(iter(self._blocks))]
        return False, None

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Worker's half: nothing is ever loaded without a model."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Worker's half."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Worker's half."""

    def wait_for_save(self) -> None:
        """Worker's half."""
