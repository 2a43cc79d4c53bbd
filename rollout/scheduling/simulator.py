"""The very same scheduler class under a virtual clock: ``python -m rollout.scheduling.simulator scheduler=turnstile``.

vLLM's real scheduler and KV cache manager, no model and no waiting: clients, tools and people are events, and a step
takes what the cost model says.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from rollout.errors import UserError
from rollout.hydra import conf_dir, guarded, run_command, run_dir, to_object
from rollout.scheduling import config
from rollout.scheduling.costs import Cost
from rollout.scheduling.results import Result
from rollout.scheduling.workloads import Workload, generate

config.register()


def simulate(
    workload: Workload,
    *,
    hardware: Cost,
    pool_tokens: int | None,
    scheduler: Callable[..., Any] | None = None,
    options: dict[str, Any] | None = None,
    scale: int = 1,
    block_size: int = 16,
    max_num_seqs: int = 256,
    max_num_batched_tokens: int = 8192,
    hints: bool = True,
    names: bool = True,
    offload_tokens: int = 0,
    record: bool = False,
) -> Result:
    """Play a workload through a scheduler and give what happened. The same arguments give the same result.

    Args:
        hardware: what a step costs.
        pool_tokens: KV cache of the engine, real tokens, without vLLM's null block; None holds all sessions at once.
        scheduler: any scheduler class or factory of vLLM's; None is vLLM's own. A ``clock`` that it has is replaced by
            the virtual one; ``tool_of`` (request → tool that the answer calls, or None) and ``true_gap`` (request →
            seconds to the next turn, inf if there is none) are set where it has them: synthetic tokens say nothing.
        options: the ``additional_config`` that it reads.
        scale: real tokens behind one simulated token. A step in which a request decodes then stands for ``scale``
            forward passes, so prefill and decode mix as under a chunk budget that is ``scale`` times smaller.
        block_size: simulated tokens. max_num_seqs, max_num_batched_tokens: as in vLLM, in real tokens.
        hints: clients send tool names and last-turn flags. names: they send session ids.
        offload_tokens: capacity of the tier in host memory, real tokens; 0 for none.
        record: keep the intervals of a timeline.

    Raises:
        UserError: sizes that cannot be. rollout.scheduling.clients.Deadlock: the scheduler stopped for ever.
    """
    from rollout.scheduling.clients import Simulation
    from rollout.scheduling.virtual_engine import VirtualEngine, build_scheduler

    if max_num_batched_tokens < scale * max_num_seqs:
        raise UserError(
            f"max_num_batched_tokens: {max_num_batched_tokens} at scale {scale} cannot decode max_num_seqs="
            f"{max_num_seqs} requests at once; lower scale or max_num_seqs"
        )
    block = scale * block_size
    longest = max(session.tokens for session in workload.sessions)
    if pool_tokens is None:
        pool_tokens = sum(session.tokens + block for session in workload.sessions)
    elif pool_tokens < longest + 2 * block:
        raise UserError(
            f"pool_tokens: {pool_tokens} cannot hold the longest session, {longest} tokens; enlarge the pool"
        )
    built = build_scheduler(
        scheduler,
        num_blocks=-(-pool_tokens // block) + 1,  # one is vLLM's null block
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens // scale,
        options=options,
        offload_blocks=offload_tokens // block,
    )
    engine = VirtualEngine(built, hardware, scale=scale, block_size=block_size)
    return Simulation(workload, engine, hints=hints, names=names, record=record).run()


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="simulator")
@guarded
def run(composed: DictConfig) -> float:
    """Simulate, write ``result.json`` (and ``timeline.png``), print a table and one JSON line; gives mean job time."""
    cfg: config.SimulatorConfig = to_object(composed)
    cfg.check()
    if find_spec("vllm") is None:
        raise UserError("the simulator runs vLLM's own scheduler, and vllm is not installed; pip install vllm")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # advice on kernels of a model that is not there
    started = time.monotonic()
    workload = read_workload(cfg)
    result = simulate(
        workload,
        hardware=cfg.hardware,
        pool_tokens=cfg.pool_tokens,
        scheduler=load(cfg.scheduler.cls) if cfg.scheduler.cls else None,
        options=dict(cfg.scheduler.options),
        scale=cfg.scale,
        block_size=cfg.block_size,
        max_num_seqs=cfg.max_num_seqs,
        max_num_batched_tokens=cfg.max_num_batched_tokens,
        hints=cfg.hints,
        names=cfg.names,
        offload_tokens=cfg.offload_tokens,
        record=cfg.timeline,
    )
    directory, name = run_dir(), HydraConfig.get().runtime.choices["scheduler"]
    if cfg.timeline:
        from rollout.scheduling.plots import timeline

        timeline(directory / "timeline.png", {name: result.intervals}, workload.name)
    OmegaConf.save(composed, directory / "config.yaml", resolve=True)
    figures = result.figures()
    record = {
        "benchmark": "simulator",
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores; the clock is virtual",
        "seconds": round(time.monotonic() - started, 1),
        "figures": {key: float(f"{value:.6g}") for key, value in figures.items()},
        "bars": [],
    }
    (directory / "result.json").write_text(json.dumps(record, indent=1))
    show(f"{workload.name}, scheduler={name}", figures)
    print(json.dumps(record), flush=True)
    return figures["mean_job_time"]


def read_workload(cfg: config.SimulatorConfig) -> Workload:
    """The recorded trace if there is one, else what the generator makes."""
    w = cfg.workload
    common = {"programs": w.programs, "rate": w.rate, "concurrency": w.concurrency, "seed": w.seed, "tokens": w.tokens}
    if cfg.trace is not None:
        from rollout.scheduling.traces import read_trace

        return read_trace(Path(cfg.trace), longest_gap=w.longest_gap, **common)  # type: ignore[arg-type]
    if w.name == "trace":
        raise UserError("trace: workload=sessions needs recorded sessions; add trace=FILE")
    return generate(
        w.name,
        system_tokens=w.system_tokens,
        group_size=w.group_size,
        chat_rate=w.chat_rate,
        **common,  # type: ignore[arg-type]
    )


def load(name: str) -> Callable[..., Any]:
    """A scheduler class or factory by its dotted name."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"scheduler.cls: {name}: {error}; give the dotted name of a class or factory") from None


def show(title: str, figures: dict[str, float]) -> None:
    """The table for people."""
    from rich.table import Table

    from rollout.display import console

    table = Table(title=title)
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.3f}")
    console.print(table)


def main() -> None:
    run_command(run)


if __name__ == "__main__":
    main()
