"""``dry_run=true``: show what a run needs of each GPU and how its steps are cut, and refuse what cannot fit."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollout.config import VllmConfig
from rollout.engines.router import device_shares
from rollout.errors import UserError
from training import layout, memory
from training.config import TrainingConfig
from training.memory import GIB, EnginePlan, PlanInput, Strategy
from training.memory_plan import Phase, Plan, plan
from training.model_shape import build_shape

if TYPE_CHECKING:
    from rich.console import Console

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def dry_run(cfg: TrainingConfig) -> None:
    """Print the plan of a run; raises UserError, after printing, if it does not fit. Loads no weights."""
    made = plan(plan_input(cfg))
    report(made)
    check(made)


def plan_input(cfg: TrainingConfig) -> PlanInput:
    """Read a run's settings. The model's numbers come from its folder, else from ``model.architecture``."""
    if not isinstance(cfg.engine, VllmConfig):
        raise UserError("dry_run: plans engine=vllm and its kin; choose one, or run without dry_run=true")
    lora = None
    if cfg.lora is not None:
        lora = {"r": cfg.lora.rank, "target_modules": cfg.lora.target_modules}
    strategy, deepspeed = _strategy(cfg.trainer)
    bf16 = bool(cfg.trainer.get("bf16")) or cfg.model.dtype == "bfloat16"
    weights = BYTES[cfg.model.dtype]
    adapter = weights if deepspeed else 4
    trained = weights if lora is None else adapter
    own_gpus, processes = _placement(cfg.engine, cfg.node.gpus, os.environ)
    return PlanInput(
        shape=build_shape(_architecture(cfg), lora=lora),
        critic=None if cfg.critic is None else build_shape(_critic_architecture(cfg)),
        strategy=strategy,
        gpus=cfg.node.gpus,
        memory=int(cfg.node.gpu_memory_gib * GIB),
        weight_bytes=weights,
        compute_bytes=2 if bf16 else 4,
        # DeepSpeed keeps float32 weights and moments beside bfloat16 ones; torch's AdamW follows the weights' dtype.
        master=deepspeed and trained == 2,
        moment_bytes=4 if deepspeed else trained,
        adapter_bytes=adapter,
        autocast=bool(cfg.trainer.get("bf16")) and not deepspeed and strategy != "fsdp",
        masked=_masked(cfg),
        checkpointing=bool(cfg.trainer.get("gradient_checkpointing", True)),  # on by itself where there are GPUs
        max_tokens=cfg.batch.max_tokens,
        reference=cfg.kl.coef > 0,
        engine=EnginePlan(
            element_bytes=BYTES[cfg.engine.dtype],
            utilization=cfg.engine.gpu_memory_utilization,
            max_model_len=cfg.engine.max_model_len,
            max_num_seqs=cfg.engine.max_num_seqs,
            tensor_parallel=cfg.engine.tensor_parallel_size,
            replicas=cfg.engine.replicas,
            own_gpus=own_gpus,
            sleeps=cfg.engine.sleep_level > 0,
        ),
        prompts=cfg.batch.prompts,
        samples=getattr(cfg.budget, "samples", 1),
        minibatches=cfg.batch.minibatches,
        epochs=cfg.batch.epochs,
        processes=processes,
    )


def _placement(engine: VllmConfig, gpus: int, launched: Mapping[str, str]) -> tuple[int, int]:
    """GPUs of a node that are the engine's alone, and processes that train, on all nodes together.

    torchrun and ``accelerate launch`` say in the environment how many there are, the first of a node on its first GPU.
    Without them: one on every GPU below those of an engine that has the last ones, else on every GPU.
    """
    visible = [str(i) for i in range(gpus)]
    used = device_shares(engine.replicas, engine.tensor_parallel_size, engine.devices, visible)
    devices = {int(device) for share in used for device in share}
    last = devices == set(range(min(devices), gpus)) and engine.devices is not None
    here = int(launched.get("LOCAL_WORLD_SIZE", 0)) or (min(devices) if last and min(devices) else gpus)
    if here > gpus:
        raise UserError(f"node.gpus: {here} processes train on {gpus} GPUs; start no more than there are GPUs")
    return sum(device >= here for device in devices), int(launched.get("WORLD_SIZE", here))


def _masked(cfg: TrainingConfig) -> int:
    """Tokens of a row in which SDPA must keep sequences apart; other attention takes their boundaries."""
    if cfg.model.attention != "sdpa" or cfg.batch.row_tokens == 1:
        return 0
    return min(cfg.batch.row_tokens or cfg.batch.max_tokens, cfg.batch.max_tokens)


def _architecture(cfg: TrainingConfig) -> dict[str, Any]:
    model = cfg.model
    if model.path is None:
        return {
            "model_type": "qwen3",
            "hidden_size": model.hidden,
            "intermediate_size": model.mlp,
            "num_hidden_layers": model.layers,
            "num_attention_heads": model.heads,
            "num_key_value_heads": model.heads,
            "head_dim": model.head_dim,
            "vocab_size": model.vocabulary,
            "tie_word_embeddings": model.tied,
        }
    file = Path(model.path) / "config.json"
    if file.is_file():
        return json.loads(file.read_text())
    if not model.architecture:
        raise UserError(f"model.path: {file} is not there; download the model, or give model.architecture its numbers")
    return dict(model.architecture)


def _critic_architecture(cfg: TrainingConfig) -> dict[str, Any]:
    """The value model's numbers: the policy's, unless it has a checkpoint of its own."""
    path = cfg.critic.path
    if path is None:
        return _architecture(cfg)
    file = Path(path) / "config.json"
    if not file.is_file():
        raise UserError(f"critic.path: {file} is not there; download the model, or take critic.path=null")
    return json.loads(file.read_text())


def _strategy(trainer: dict[str, Any]) -> tuple[Strategy, bool]:
    """How model states are sharded, and whether DeepSpeed does it."""
    stage = layout.zero_stage(trainer)
    if stage is not None:
        strategies: dict[int, Strategy] = {0: "replicated", 1: "zero1", 2: "zero2", 3: "zero3"}
        return strategies[stage], True
    return ("fsdp" if trainer.get("fsdp") else "replicated"), False


def report(made: Plan, console: Console | None = None) -> None:
    """Print the plan for people: GiB per GPU of each phase, the engine's cache, and the batch."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    p = made.inputs
    s = p.shape
    console.print(
        f"{s.parameters / 1e9:.2f} B parameters, {memory.trainable(s) / 1e9:.3f} B trained by {p.trainers} processes; "
        f"{p.gpus} GPUs of {p.memory / GIB:.0f} GiB, {p.engine.gpus} the engine's, {p.engine.own_gpus or 'none'} of "
        f"them its own; states {p.strategy}, gradient checkpointing {'on' if p.checkpointing else 'off'}"
    )
    table = Table("GiB per GPU", *(phase.name for phase in made.phases), box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    for name in dict.fromkeys(name for phase in made.phases for name in phase.parts):
        table.add_row(name, *(_gib(phase.parts.get(name)) for phase in made.phases))
    table.add_section()
    table.add_row("total", *(_gib(phase.total) for phase in made.phases))
    table.add_row("left", *(_gib(p.memory - phase.total) for phase in made.phases))
    console.print(table)
    batch = Table("batch plan", "", box=box.SIMPLE_HEAD)
    batch.columns[1].justify = "right"
    for name, number in made.batch.items():
        batch.add_row(name, f"{number:,}")
    batch.add_row("tokens in the cache of a replica", f"{made.kv_tokens:,}")
    full = max(made.kv_tokens, 0) // p.engine.max_model_len
    batch.add_row("sequences of full length in it", f"{min(full, p.engine.max_num_seqs):,}")
    console.print(batch)
    console.print("An estimate from formulas (training/memory.py); not run on GPU.")


def _gib(size: int | None) -> str:
    return "" if size is None else f"{size / GIB:.2f}"


def check(made: Plan) -> None:
    """Refuse, in one line, a plan that cannot fit: by how many GiB, and what to change. Raises UserError."""
    p = made.inputs
    needed = p.engine.max_model_len * memory.kv_bytes_per_token(p.shape, p.engine.element_bytes)
    missing = needed // p.engine.tensor_parallel - made.kv_cache
    if missing > 0:
        raise UserError(
            f"engine.gpu_memory_utilization: {p.engine.utilization} leaves no room for one sequence of "
            f"engine.max_model_len={p.engine.max_model_len}, {missing / GIB:.2f} GiB too little; raise it or "
            "engine.tensor_parallel_size, or lower engine.max_model_len"
        )
    problems = []
    for phase in made.phases:
        excess = phase.total - p.memory
        if excess > 0:
            name, size = max(phase.parts.items(), key=lambda part: part[1])
            problems.append(
                f"{phase.name}: needs {phase.total / GIB:.1f} GiB of a GPU's {p.memory / GIB:.0f} GiB, "
                f"{excess / GIB:.1f} GiB too much (most: {name}, {size / GIB:.1f} GiB); {_remedy(p, phase)}"
            )
    if problems:
        raise UserError("; and ".join(problems))


def _remedy(p: PlanInput, phase: Phase) -> str:
    """The least change that makes this phase fit."""
    for changed, text in _changes(p, phase.name):
        made = plan(changed)
        same = next(other for other in made.phases if other.name == phase.name)
        if same.total <= p.memory and made.kv_tokens >= p.engine.max_model_len:
            return text
    return "raise node.gpus" if p.shape.adapter else "raise node.gpus, or train adapters (lora=lora)"


def _changes(p: PlanInput, phase: str) -> Iterator[tuple[PlanInput, str]]:
    if phase == "rollouts":
        for percent in range(math.floor(p.engine.utilization * 100), 0, -1):
            yield (
                replace(p, engine=replace(p.engine, utilization=percent / 100)),
                f"lower engine.gpu_memory_utilization to {percent / 100} at most",
            )
        replicas = p.gpus // 2 // p.engine.tensor_parallel
        if p.engine.own_gpus == 0 and replicas:
            own = replace(p.engine, replicas=replicas, own_gpus=replicas * p.engine.tensor_parallel)
            left = p.gpus - own.own_gpus
            devices = ",".join(map(str, range(left, p.gpus)))
            text = f"give the engine GPUs of its own (engine.replicas={replicas} engine.devices=[{devices}])"
            yield replace(p, engine=own, processes=left), f"{text} and train with {left} processes"
    if phase == "training" and p.engine.shares and not p.engine.sleeps:
        yield replace(p, engine=replace(p.engine, sleeps=True)), "let the engine sleep meanwhile (engine.sleep_level=2)"
    if not p.checkpointing:
        yield replace(p, checkpointing=True), "add ++trainer.gradient_checkpointing=true"
    if phase == "training":
        base = replace(p, checkpointing=True)
        also = "" if p.checkpointing else "add ++trainer.gradient_checkpointing=true and "
        for tokens in range(p.max_tokens // 1024 * 1024, p.engine.max_model_len - 1, -1024):
            yield replace(base, max_tokens=tokens), f"{also}lower batch.max_tokens to {tokens} at most"
    if p.strategy not in ("zero3", "fsdp") and p.trainers > 1:
        text = "shard the weights (sharding=zero3 or fsdp2)"
        yield replace(p, strategy="zero3", checkpointing=True), text
