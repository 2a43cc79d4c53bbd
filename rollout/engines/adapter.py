"""A trainer's low-rank adapter in vLLM, beside weights that stay as the engine was started with. Free of torch.

It travels as the folder that peft saves, and has one name in an engine: a later version takes the place of the last.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollout.engines.weight_files import roomy_folder

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

NAME = "turnstile"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of vLLM's max_lora_rank
FILES = ("adapter_config.json", "adapter_model.safetensors")


def adapter_arguments(rank: int, modules: list[str]) -> dict[str, Any]:
    """vLLM's engine arguments for one adapter of ``rank`` on the layers with these names.

    All others stay plain, the head above all: with an adapter there, even an absent one, vLLM 0.32 gives no prompt
    log-probs (vllm-project/vllm#51594), and the gate after each sync reads those.
    """
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": next(size for size in RANKS if size >= rank),
        "lora_target_modules": modules,
    }


def lora_request(folder: Path | None = None) -> LoRARequest:
    """What requests carry to be answered by the adapter; with a ``folder``, what loads that in its place.

    Requests name no folder: vLLM's prefix cache tells adapters apart by it, and ``keep_cache`` means that it must not.
    """
    from vllm.lora.request import LoRARequest

    return LoRARequest(NAME, 1, NAME if folder is None else str(folder), load_inplace=folder is not None)


class KeptAdapter:
    """One version of an adapter for engines that are started anew, after its folder has gone."""

    def __init__(self, folder: Path, version: int) -> None:
        self.version = version
        self._files = {name: (folder / name).read_bytes() for name in FILES}

    @contextlib.contextmanager
    def folder(self) -> Iterator[Path]:
        """The folder once more."""
        with tempfile.TemporaryDirectory(prefix="turnstile-", dir=roomy_folder()) as path:
            for name, content in self._files.items():
                (Path(path) / name).write_bytes(content)
            yield Path(path)
