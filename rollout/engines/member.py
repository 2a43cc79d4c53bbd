"""One replica of a ``Fleet``: the engine that it is at the moment, and its own devices, files and log."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rollout.config import VllmConfig
from rollout.engines.remote import RemoteEngine
from rollout.engines.router import device_shares
from rollout.scheduling.files import VARIABLES


@dataclass
class Member:
    """One replica. ``own``: its environment variables. ``replacing``: set while it is down, done when it is up."""

    index: int
    log_path: Path | None
    own: dict[str, str]
    engine: RemoteEngine | None = None
    replacing: Future[None] | None = None
    deaths: int = 0
    past: Counter[str] = field(default_factory=Counter)  # counts of its engines that died


def member_class(config: VllmConfig) -> Callable[..., RemoteEngine]:
    """The engine in a process of its own that ``config.mode`` names."""
    if config.mode == "process":
        from rollout.engines.vllm_process import ProcessEngine

        return ProcessEngine
    from rollout.engines.vllm_http import HttpEngine

    return HttpEngine


def member_devices(config: VllmConfig) -> list[tuple[str, ...]] | None:
    """The devices of each replica; None leaves the choice to vLLM. Not run on GPU."""
    import torch

    if config.devices is None and (config.replicas == 1 or not torch.cuda.is_available()):
        return None
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    return device_shares(config.replicas, config.tensor_parallel_size, config.devices, visible)


def member_variables(index: int, devices: tuple[str, ...] | None) -> dict[str, str]:
    """What a member's process finds in its environment and the others do not: devices, and files of its scheduler."""
    own = {} if devices is None else {"CUDA_VISIBLE_DEVICES": ",".join(devices)}
    metrics = os.environ.get(VARIABLES["metrics_path"])
    if index > 0 and metrics:
        own[VARIABLES["metrics_path"]] = str(numbered(Path(metrics), index))
    if index > 0:  # the first one's tool latencies, of its share of the episodes, stand for all
        own[VARIABLES["save_latencies"]] = ""
    return own


def replacement_variables(own: dict[str, str]) -> dict[str, str]:
    """Those of an engine that takes the place of one: its scheduler starts from the tool latencies that were saved
    last, for those of the run's start may lie in a checkpoint that has gone."""
    known = (os.environ.get(VARIABLES[name], "") for name in ("save_latencies", "latencies"))
    return {**own, VARIABLES["latencies"]: next((path for path in known if path and Path(path).is_file()), "")}


def numbered(path: Path, index: int) -> Path:
    """``engine.log`` → ``engine-1.log``."""
    return path.with_name(f"{path.stem}-{index}{path.suffix}")


def in_thread(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Run on a thread that nobody waits for at the interpreter's end."""
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name=function.__name__, daemon=True).start()
    return future
