"""Settings of a run beside its axes: model, optimizer, batches, warm start, checkpoints. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rollout.config import require


@dataclass
class ModelConfig:
    """A Hugging Face path, or (``path`` null) a tiny Qwen3 built from these numbers with a tokenizer for the task."""

    path: str | None = None
    dtype: str = "float32"
    attention: str = "sdpa"
    hidden: int = 128
    layers: int = 2
    heads: int = 4
    head_dim: int = 32
    mlp: int = 384
    vocabulary: int = 512
    tied: bool = True
    architecture: dict[str, Any] = field(default_factory=dict)  # config.json's numbers, for dry_run without the files

    def __post_init__(self) -> None:
        require(self.dtype in ("float32", "bfloat16"), "model.dtype", f"{self.dtype!r} is not float32 or bfloat16")


@dataclass
class LoraConfig:
    """Low-rank adapters by peft; the checkpoint is merged, the adapter lies beside it.

    ``sync`` is what travels to the engine: every weight with the adapter merged in, which any engine takes and answers
    from at full speed, or the ``adapter`` alone, which vLLM then computes beside each layer.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str = "all-linear"
    sync: str = "merged"

    def __post_init__(self) -> None:
        require(self.rank > 0, "lora.rank", f"{self.rank} must be at least 1")
        require(self.sync in ("merged", "adapter"), "lora.sync", f"{self.sync!r} is not merged or adapter")


@dataclass
class BatchConfig:
    """How a step is cut. ``max_tokens`` of a packed micro-batch, ``row_tokens`` of a packed row (on CPU: short)."""

    prompts: int = 32
    minibatches: int = 1
    epochs: int = 1
    max_tokens: int = 8192
    row_tokens: int | None = None
    aggregation: str = "token"  # token (DAPO) · sequence (GRPO) · constant (Dr. GRPO)

    def __post_init__(self) -> None:
        for name in ("prompts", "minibatches", "epochs", "max_tokens"):
            require(getattr(self, name) > 0, f"batch.{name}", f"{getattr(self, name)} must be at least 1")
        modes = ("token", "sequence", "constant")
        require(
            self.aggregation in modes, "batch.aggregation", f"{self.aggregation!r} is not one of {', '.join(modes)}"
        )
        require(self.minibatches <= self.prompts, "batch.minibatches", f"{self.minibatches} exceeds batch.prompts")


@dataclass
class OptimizerConfig:
    """AdamW and its schedule, by their names in transformers.TrainingArguments."""

    learning_rate: float = 1e-6
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lr_scheduler_type: str = "constant"
    lr_scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    warmup_steps: int = 0


@dataclass
class SftConfig:
    """Supervised warm start on the task's demonstrations, by trl.SFTTrainer."""

    steps: int = 300
    batch_size: int = 64
    learning_rate: float = 3e-3
    warmup_steps: int = 20
    optimizer: str = "adamw_torch"  # or muon: Muon on matrices, AdamW on the rest
    demonstrations: int = 20_000
    max_length: int = 512
    row_tokens: int = 128  # packed rows hold this many tokens, or the longest demonstration

    def __post_init__(self) -> None:
        require(
            self.optimizer in ("adamw_torch", "muon"),
            "warm_start.optimizer",
            f"{self.optimizer!r} is not adamw_torch or muon",
        )
        require(self.steps > 0, "warm_start.steps", f"{self.steps} must be at least 1; warm_start=none skips it")


@dataclass
class ReasoningConfig:
    """Rollouts whose thinking is not the policy's free choice. Shares; the rest decides for itself.

    ``forced``: of each group, by the template. ``told``: of the visits to prompts, by a system prompt, which rewards of
    thinking (``reward=adacot``) then take for the need.
    """

    forced_always: float = 0.0
    forced_never: float = 0.0
    told_always: float = 0.0
    told_never: float = 0.0

    def __post_init__(self) -> None:
        for kind in ("forced", "told"):
            shares = {f"{kind}_{mode}": getattr(self, f"{kind}_{mode}") for mode in ("always", "never")}
            right = min(shares.values()) >= 0 and sum(shares.values()) <= 1
            require(right, f"reasoning.{kind}_always", f"{shares} must be shares of at least 0, at most 1 together")


@dataclass
class CheckpointConfig:
    every: int = 50  # steps; the last step is always kept
    keep_last: int = 2

    def __post_init__(self) -> None:
        require(self.every > 0, "checkpoint.every", f"{self.every} must be at least 1")
        require(self.keep_last > 0, "checkpoint.keep_last", f"{self.keep_last} must be at least 1")


@dataclass
class ProbeConfig:
    """The gate after each weight sync: log-probs of ``sequences`` fixed texts must agree within ``bound``."""

    sequences: int = 4
    bound: float | None = None  # None: 1e-4 in float32, measured value in bfloat16

    def __post_init__(self) -> None:
        require(self.sequences > 0, "probe.sequences", f"{self.sequences} must be at least 1: the gate is never off")


@dataclass
class NodeConfig:
    """The hardware that ``dry_run`` plans for; which of its GPUs are the engine's alone says ``engine.devices``."""

    gpus: int = 1
    gpu_memory_gib: float = 80.0
