"""Bytes that each part of a run takes of a GPU: arithmetic over a model's ``Shape`` and a run's settings.

T is tokens of a micro-batch, b bytes of a compute element.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from training.model_shape import Shape

GIB = 2**30
FLOAT32 = 4
ENGINE_ASLEEP = 2 * GIB  # what vLLM keeps of a GPU in sleep: its CUDA context, NCCL and captured graphs
# trl.kernels.chunked_logprob: the head's tile of logits, in tokens and vocabulary entries
HEAD_TILE = (4096, 32768)
# DeepSpeed's default stage3_max_live_parameters: what ZeRO-3 may hold gathered at a time, in elements
ZERO3_LIVE = 10**9

Strategy = Literal["replicated", "zero1", "zero2", "zero3", "fsdp"]


@dataclass(frozen=True)
class EnginePlan:
    """``replicas`` of vLLM. ``own_gpus``: so many of its GPUs train nothing; on others it may sleep meanwhile."""

    element_bytes: int
    utilization: float
    max_model_len: int
    max_num_seqs: int
    tensor_parallel: int = 1
    replicas: int = 1
    own_gpus: int = 0
    sleeps: bool = True

    @property
    def gpus(self) -> int:
        return self.replicas * self.tensor_parallel

    @property
    def shares(self) -> bool:
        """Whether a GPU of the engine's trains too."""
        return self.gpus > self.own_gpus


@dataclass(frozen=True)
class PlanInput:
    """What a plan is made of; independent of Hydra.

    ``weight_bytes`` is what the trainer stores, ``compute_bytes`` what it multiplies in. ``master``: the optimizer
    keeps float32 weights beside bfloat16 ones (DeepSpeed). ``moment_bytes`` of each of AdamW's two moments. ``critic``:
    the shape of a value model, whole and trained as the policy is; it steps first, and its gradients are gone by then.
    ``adapter_bytes`` of an adapter's weight: peft makes them float32, DeepSpeed's bfloat16 turns them back.
    ``autocast``: torch casts to the compute type, operation by operation (``trainer.bf16`` without DeepSpeed and FSDP);
    else weights and activations have it. ``masked``: length of rows in which SDPA keeps packed sequences apart by a
    mask; 0 where attention is of variable length, or a row holds one sequence. ``processes`` that train, over which
    states are cut, on all nodes together; None: one on each GPU of this node that is not the engine's own.
    """

    shape: Shape
    strategy: Strategy
    gpus: int  # of a node, the engine's own included
    memory: int  # bytes of one GPU
    weight_bytes: int
    compute_bytes: int
    master: bool
    moment_bytes: int
    checkpointing: bool
    max_tokens: int
    reference: bool
    engine: EnginePlan
    prompts: int
    samples: int
    minibatches: int = 1
    epochs: int = 1
    adapter_bytes: int = FLOAT32
    critic: Shape | None = None
    autocast: bool = False
    masked: int = 0
    processes: int | None = None

    @property
    def trainers(self) -> int:
        return self.gpus - self.engine.own_gpus if self.processes is None else self.processes

    @property
    def residual_bytes(self) -> int:
        """Of an element of the residual stream: the embedding's, which autocast leaves alone."""
        return self.weight_bytes if self.autocast else self.compute_bytes


def trainable(shape: Shape) -> int:
    return shape.adapter or shape.parameters


def shards(strategy: Strategy, what: Literal["weights", "gradients", "optimizer"], gpus: int) -> int:
    """Over how many GPUs a model state is cut (ZeRO, arXiv 1910.02054 §5; FSDP shards all three)."""
    sharded = {
        "replicated": (),
        "zero1": ("optimizer",),
        "zero2": ("optimizer", "gradients"),
        "zero3": ("optimizer", "gradients", "weights"),
        "fsdp": ("optimizer", "gradients", "weights"),
    }
    return gpus if what in sharded[strategy] else 1


def model_states(p: PlanInput) -> dict[str, int]:
    """Weights, gradients and optimizer, bytes per GPU.

    weights: parameters × weight_bytes and adapter × adapter_bytes; gradients: as the weights that train; optimizer:
    what trains × (2 moments + 4 for a master copy). Each over ``shards``, rounded up.
    """
    train = trainable(p.shape)
    sizes = {
        "weights": p.shape.parameters * p.weight_bytes + p.shape.adapter * p.adapter_bytes,
        "gradients": train * (p.adapter_bytes if p.shape.adapter else p.weight_bytes),
        "optimizer": train * (2 * p.moment_bytes + (FLOAT32 if p.master else 0)),
    }
    return {name: math.ceil(size / shards(p.strategy, name, p.trainers)) for name, size in sizes.items()}  # type: ignore[arg-type]


def gathered(p: PlanInput) -> int:
    """Whole weights that sharding holds for a moment, in the compute type.

    ZeRO-3: at most ``stage3_max_live_parameters``. FSDP: a layer and the next, and what lies outside the layers
    (embedding and head), which stays gathered from forward to backward.
    """
    s = p.shape
    if p.strategy == "zero3":
        return min(s.parameters, ZERO3_LIVE) * p.compute_bytes
    if p.strategy == "fsdp":
        outside = s.parameters - s.layers * s.layer_parameters
        return (2 * s.layer_parameters + outside) * p.compute_bytes
    return 0


def layer_activations(p: PlanInput) -> int:
    """Bytes per token that one decoder layer saves for its backward; attention keeps no matrix of its own.

    A norm over n numbers keeps its float32 input (4n), 1/rms (4) and, where its gain trains, its value in the type
    that came in: r, the residual stream's, or b, the compute type, in q and k. Linears keep their inputs: b(2h) for
    attention and MLP, b(mlp) for the last. SwiGLU keeps gate, its SiLU and up: 3b(mlp). Attention keeps q, k, v, its
    output (the last projection's input) and a float32 log-sum-exp a head; a mask has it repeat k and v for every head,
    and keep the mask as numbers, b for each token of the row. LoRA on every linear keeps rank numbers more for each of
    seven, and frozen gains keep no value. Where it casts, each of the seven keeps an input of its own, and the frozen
    linears none; where autocast casts a float32 stream, each of five linears keeps an input of its own.
    """
    s, b = p.shape, p.compute_bytes
    frozen = s.adapter > 0
    adapter = b if p.autocast else p.adapter_bytes
    norms = 2 * (FLOAT32 + (0 if frozen else p.residual_bytes)) * s.hidden + 2 * FLOAT32
    if s.qk_norm:  # one norm for every head of q and k
        norms += (FLOAT32 + (0 if frozen else b)) * (s.query + s.key)
        norms += FLOAT32 * s.heads * (s.query + s.key) // s.query
    if frozen and p.adapter_bytes != b:
        linears = adapter * (5 * s.hidden + s.query + s.mlp)
    else:
        linears = b * ((5 if p.residual_bytes != b else 2) * s.hidden + s.mlp)
    attention = b * 2 * (s.query + s.key) + FLOAT32 * s.heads
    if p.masked:
        attention += b * (2 * (s.query - s.key) + p.masked)
    return norms + linears + 7 * adapter * s.rank + attention + 3 * b * s.mlp


def cast_weights(p: PlanInput) -> int:
    """Bytes of a layer's weights in the compute type, where autocast copies them."""
    if not p.autocast:
        return 0
    own = p.shape.layer_matrices if p.weight_bytes != p.compute_bytes else 0
    return p.compute_bytes * (own + p.shape.adapter // p.shape.layers)


def kept_activations(p: PlanInput) -> int:
    """What all layers keep until the backward reaches them: T × layers × (r·hidden with checkpointing, else all)."""
    if p.checkpointing:
        return p.max_tokens * p.shape.layers * p.residual_bytes * p.shape.hidden
    return p.shape.layers * (p.max_tokens * layer_activations(p) + cast_weights(p))


def mask(p: PlanInput) -> int:
    """The mask of a micro-batch, a byte for each pair of a row's tokens; all layers share it."""
    return p.max_tokens * p.masked


def layer_work(p: PlanInput) -> int:
    """The backward of one layer: its recomputed activations and casts (checkpointing), two gradients of the MLP's and
    two of the residual stream's width, one more of the MLP's from its adapter in that one's type, and the gradient of a
    tied head, which waits for the embedding's."""
    s = p.shape
    recomputed = p.max_tokens * layer_activations(p) + cast_weights(p) if p.checkpointing else 0
    adapter = p.adapter_bytes * s.mlp if s.adapter else 0
    gradients = p.max_tokens * (2 * p.compute_bytes * (s.mlp + s.hidden) + adapter)
    waits = p.weight_bytes * s.vocabulary * s.hidden if s.tied and not s.adapter else 0
    return recomputed + gradients + waits


def head_work(p: PlanInput) -> int:
    """The fused head's backward: a tile of logits and the weights behind it, hidden states with a float32 gradient and
    its cast, what the last norm keeps, and, where the head trains, a float32 gradient of its weight and its cast.
    Counts every token as the policy's own."""
    s, r = p.shape, p.residual_bytes
    hidden = p.max_tokens * s.hidden * (r + FLOAT32 + (r if r != FLOAT32 else 0))
    norm = p.max_tokens * s.hidden * (FLOAT32 + (0 if s.adapter else r))
    weight = 0 if s.adapter else s.vocabulary * s.hidden * (FLOAT32 + (p.weight_bytes if p.weight_bytes != 4 else 0))
    return head_tile(p) + hidden + norm + weight


def head_tile(p: PlanInput) -> int:
    """Bytes of one tile of logits; its buffer has full width for small vocabularies too."""
    cast = p.compute_bytes * HEAD_TILE[1] * p.shape.hidden if p.weight_bytes != p.compute_bytes else 0
    return p.compute_bytes * min(p.max_tokens, HEAD_TILE[0]) * HEAD_TILE[1] + cast


def forward_work(p: PlanInput) -> int:
    """The end of a forward under autocast, which holds the copies of all weights until then: those, the head's first
    tile, hidden states twice and what the last norm keeps."""
    if not p.autocast:
        return 0
    kept = 0 if not p.checkpointing else p.shape.layers * cast_weights(p)
    norm = FLOAT32 + (0 if p.shape.adapter else p.residual_bytes)
    return kept + head_tile(p) + p.max_tokens * p.shape.hidden * (2 * p.residual_bytes + norm)


def kv_bytes_per_token(s: Shape, element_bytes: int) -> int:
    """Keys and values of every layer, over all tensor-parallel ranks together."""
    return 2 * s.layers * s.key * element_bytes


def engine_weights(p: PlanInput) -> int:
    return math.ceil(p.shape.parameters * p.engine.element_bytes / p.engine.tensor_parallel)


def engine_work(p: PlanInput) -> int:
    """vLLM's own working memory: float32 logits of a full batch with a sorted copy, and ``ENGINE_ASLEEP``."""
    return 2 * FLOAT32 * p.engine.max_num_seqs * p.shape.vocabulary + ENGINE_ASLEEP
