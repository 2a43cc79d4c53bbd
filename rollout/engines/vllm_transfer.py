"""Weights from the trainer to vLLM's workers through a file in shared memory, on vLLM's own weight transfer API.

vLLM's built-in back ends need GPUs. This one works wherever trainer and engine share a machine: the trainer writes a
safetensors file, and every worker loads from it. Loaded by vLLM only, by the name that ``vllm_plugin`` registers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload


@dataclass
class FileInit(WeightTransferInitInfo):
    """Nothing to agree on before the first update."""


@dataclass
class FileUpdate(WeightTransferUpdateInfo):
    """``path``: a safetensors file with transformers' names."""

    path: str


class FileTransfer(WeightTransferEngine[FileInit, FileUpdate]):
    init_info_cls = FileInit
    update_info_cls = FileUpdate

    def init_transfer_engine(self, init_info: FileInit) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))  # the base class waits for an accelerator

    def receive_weights(self, update_info: FileUpdate) -> None:
        with safe_open(update_info.path, framework="pt") as file:
            self.model.load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass
