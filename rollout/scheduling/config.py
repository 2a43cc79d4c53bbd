"""Typed schemas of ``python -m rollout.scheduling.simulator``. Imports neither torch nor vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from rollout.config import SchedulerConfig, require
from rollout.scheduling.costs import Linear, Roofline


@dataclass
class WorkloadConfig:
    """What clients ask: a generator by name, or a recorded trace (``trace=FILE``), and the load."""

    name: str = MISSING  # rollout.scheduling.workloads.generate lists them; trace: recorded sessions alone
    programs: int = 100
    rate: float | None = None  # programs a second (open loop); or
    concurrency: int | None = None  # programs at a time (closed loop)
    seed: int = 0
    tokens: float = 1.0  # factor on all lengths
    system_tokens: int = 0  # the same first tokens in every generated session
    group_size: int = 8  # rl_batch: rollouts of one prompt
    chat_rate: float = 1.0  # swe_chat: chats a second
    longest_gap: float = 600.0  # of a recorded trace, seconds

    def __post_init__(self) -> None:
        for name in ("programs", "group_size"):
            require(getattr(self, name) > 0, f"workload.{name}", f"{getattr(self, name)} must be at least 1")
        for name in ("tokens", "chat_rate", "longest_gap"):
            require(
                0 < getattr(self, name) < float("inf"), f"workload.{name}", f"{getattr(self, name)} must be above 0"
            )
        require(self.system_tokens >= 0, "workload.system_tokens", f"{self.system_tokens} must not be negative")


@dataclass
class SimulatorConfig:
    """One run of a workload through a scheduler under the virtual clock."""

    run_dir: str = MISSING
    trace: str | None = None  # recorded sessions or requests, in place of the generator: JSON lines, gzipped or not
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    hardware: Any = MISSING
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    pool_tokens: int | None = 400_000  # KV cache of the engine; None: all sessions at once
    scale: int = 8  # real tokens behind one simulated token
    block_size: int = 16  # simulated tokens
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    hints: bool = True  # clients send tool names and last-turn flags
    names: bool = True  # clients send session ids
    offload_tokens: int = 0  # capacity of the tier in host memory
    timeline: bool = False  # draw timeline.png: programs × time

    def check(self) -> None:
        """Refuse impossible values in one line that names the key."""
        for name in ("scale", "block_size", "max_num_seqs"):
            require(getattr(self, name) > 0, name, f"{getattr(self, name)} must be at least 1")
        require(self.pool_tokens is None or self.pool_tokens > 0, "pool_tokens", f"{self.pool_tokens} must be above 0")
        require(
            not self.timeline or find_spec("matplotlib") is not None,
            "timeline",
            "needs matplotlib, which is not installed; pip install matplotlib",
        )
        require(self.offload_tokens >= 0, "offload_tokens", f"{self.offload_tokens} must not be negative")


GROUPS: dict[str, dict[str, type]] = {
    "workload": {"workload": WorkloadConfig},
    "hardware": {"roofline": Roofline, "linear": Linear},
}


def register() -> None:
    """Tell Hydra the schemas: ``schema/GROUP/MEMBER`` beside the YAML files of ``conf/``."""
    store = ConfigStore.instance()
    store.store(name="simulator_schema", node=SimulatorConfig)
    for group, members in GROUPS.items():
        for member, schema in members.items():
            store.store(group=f"schema/{group}", name=member, node=schema)
