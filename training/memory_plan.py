"""What a run needs of each GPU, phase by phase, before anything is downloaded or started.

Kernels, allocator and NCCL are covered by a flat ``RESERVE``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from training.memory import (
    ENGINE_ASLEEP,
    GIB,
    PlanInput,
    engine_weights,
    engine_work,
    forward_work,
    gathered,
    head_work,
    kept_activations,
    kv_bytes_per_token,
    layer_work,
    mask,
    model_states,
)

RESERVE = 4 * GIB  # CUDA context, NCCL buffers, workspaces of matrix products, fragmentation


@dataclass
class Phase:
    """What stands side by side in one GPU's memory, by name, in bytes."""

    name: str
    parts: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass
class Plan:
    inputs: PlanInput
    phases: list[Phase]
    kv_cache: int  # bytes per engine GPU
    kv_tokens: int  # tokens that one engine replica holds
    batch: dict[str, int]


def plan(p: PlanInput) -> Plan:
    """Bytes per GPU of every phase, and how a step is cut. Refuses nothing: see ``dry_run.check``."""
    states = model_states(p)
    whole = p.shape.parameters * p.weight_bytes  # on every GPU
    reference = {"reference": whole} if p.reference and not p.shape.adapter else {}
    critic = None if p.critic is None else replace(p, shape=p.critic, critic=None)
    value_states = {} if critic is None else model_states(critic)
    value_model = {"critic": value_states["weights"] + value_states["optimizer"]} if value_states else {}
    resting = {"weights": states["weights"], "optimizer": states["optimizer"], **reference, **value_model}
    steps = [p] if critic is None else [p, critic]  # of an update, one after the other
    shared = p.engine.shares
    engine_total = int(p.engine.utilization * p.memory)
    meanwhile = {"engine asleep": ENGINE_ASLEEP} if p.engine.sleeps else {"engine awake": engine_total}
    training = Phase(
        "training",
        {
            **resting,
            "gradients": max(states["gradients"], value_states.get("gradients", 0)),
            "gathered weights": max(map(gathered, steps)),
            "kept activations": max(map(kept_activations, steps)),
            **({"attention mask": mask(p)} if p.masked else {}),
            "layer or head at work": max(head_work(p), *map(layer_work, steps), *map(forward_work, steps)),
            **(meanwhile if shared else {}),
            "reserve": RESERVE,
        },
    )
    cache = engine_total - engine_weights(p) - engine_work(p)
    engine = {
        "engine weights": engine_weights(p),
        "engine at work": engine_work(p),
        "KV cache": max(cache, 0),
    }
    rollouts = Phase("rollouts", {**resting, **engine, "reserve": RESERVE} if shared else engine)
    each = kv_bytes_per_token(p.shape, p.engine.element_bytes)
    return Plan(p, [rollouts, training], cache, cache * p.engine.tensor_parallel // each, batch_plan(p))


def batch_plan(p: PlanInput) -> dict[str, int]:
    """How a step is cut, if every episode is as long as the engine allows: fewer tokens give fewer micro-batches."""
    episodes = p.prompts * p.samples
    tokens = episodes * p.engine.max_model_len
    per_row = max(1, p.max_tokens // p.engine.max_model_len)
    episodes_per_update = math.ceil(math.ceil(p.prompts / p.minibatches) * p.samples / p.trainers)
    return {
        "prompts a step": p.prompts,
        "episodes a step": episodes,
        "tokens a step, at most": tokens,
        "optimizer steps a step": p.minibatches * p.epochs,
        "micro-batches an optimizer step and process, at most": math.ceil(episodes_per_update / per_row),
        "engine replicas": p.engine.replicas,
        "episodes at once, at most": min(episodes, p.engine.replicas * p.engine.max_num_seqs),
    }
