"""Typed schema of ``python -m serving``. Imports neither torch nor vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from rollout.config import SchedulerConfig, require

# Flags that a server among replicas cannot have from outside.
NOT_REPLICATED = {
    **dict.fromkeys(("host", "port", "uds", "root-path"), "each replica has its own; give host= and port="),
    **dict.fromkeys(("ssl-keyfile", "ssl-certfile"), "replicas answer by plain HTTP; put a TLS proxy before them"),
    "device-ids": "each replica has its own; set CUDA_VISIBLE_DEVICES",
}


def flag(key: str) -> str:
    """A key of ``extra`` as vLLM's flag, without the dashes before it."""
    return key.lstrip("-").replace("_", "-")


@dataclass
class ServingConfig:
    """A checkpoint behind vLLM's OpenAI-compatible server."""

    checkpoint: str = MISSING
    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free port
    name: str | None = None  # what clients pass as `model`; None: the name of the checkpoint's folder
    run_dir: str = MISSING  # engine.log lies here
    dtype: str = "auto"  # auto: the checkpoint's
    max_model_len: int | None = None  # None: the checkpoint's
    max_num_seqs: int | None = None
    kv_cache_gib: float = 1.0  # CPU only
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    replicas: int = 1  # servers behind the one address, each with devices of its own; a program stays with one
    enforce_eager: bool | None = None  # None: on CPU only, where compiling takes longer than it gives back
    tool_parser: str = "auto"  # auto: by the chat template; none; or a name that vLLM knows
    reasoning_parser: str = "auto"
    start_timeout_s: float = 900.0
    stop_timeout_s: float = 30.0  # for running requests, before the engine is killed
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    extra: dict[str, Any] = field(default_factory=dict)  # any other flag of `vllm serve`, without its dashes

    def check(self) -> None:
        """Refuse impossible values in one line that names the key."""
        require(0 <= self.port <= 65535, "port", f"{self.port} is not a port; use 1 to 65535, or 0 for any free one")
        for name in ("start_timeout_s", "stop_timeout_s", "kv_cache_gib"):
            require(getattr(self, name) > 0, name, f"{getattr(self, name)} must be above 0")
        require(
            0 < self.gpu_memory_utilization <= 1,
            "gpu_memory_utilization",
            f"{self.gpu_memory_utilization} must be in (0, 1]",
        )
        for name in ("max_model_len", "max_num_seqs", "tensor_parallel_size", "replicas"):
            value = getattr(self, name)
            require(value is None or value > 0, name, f"{value} must be at least 1")
        if self.replicas > 1:
            for key in self.extra:
                require(flag(key) not in NOT_REPLICATED, f"extra.{key}", NOT_REPLICATED.get(flag(key), ""))
        self.scheduler.check()


def register() -> None:
    """Tell Hydra the schema."""
    ConfigStore.instance().store(name="serving_schema", node=ServingConfig)
