"""Typed schemas of a training run, and the checks that need more than one of them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from rollout import config as rollout_config
from rollout.config import EvaluationConfig, LimitsConfig, SamplingConfig, SchedulerConfig, require
from rollout.scheduling.options import KEY, Options


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
    """Low-rank adapters by peft; the checkpoint is merged, the adapter lies beside it."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str = "all-linear"

    def __post_init__(self) -> None:
        require(self.rank > 0, "lora.rank", f"{self.rank} must be at least 1")


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
class ValueModelConfig:
    """A token-classification model with one label, of its own weights and optimizer, beside the policy."""

    path: str | None = None  # None: from the policy's checkpoint
    dtype: str = "float32"
    warmup_rounds: int = 5  # rounds of rollouts that train it alone, before the policy's first step
    warmup_epochs: int = 4  # over each of these
    epochs: int = 1  # over every later round
    minibatches: int = 1  # optimizer steps an epoch
    clip: float | None = 0.2  # how far a value may move from what it was at the rollout; None: any way
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=2e-6))

    def __post_init__(self) -> None:
        require(self.dtype in ("float32", "bfloat16"), "critic.dtype", f"{self.dtype!r} is not float32 or bfloat16")
        require(self.warmup_rounds >= 0, "critic.warmup_rounds", f"{self.warmup_rounds} must not be negative")
        for name in ("warmup_epochs", "epochs", "minibatches"):
            require(getattr(self, name) > 0, f"critic.{name}", f"{getattr(self, name)} must be at least 1")
        require(self.clip is None or self.clip > 0, "critic.clip", f"{self.clip} must be above 0; null does not clip")
        schedule = self.optimizer.lr_scheduler_type
        require(
            schedule not in ("reduce_lr_on_plateau", "greedy"),
            "critic.optimizer.lr_scheduler_type",
            f"{schedule} waits for a metric that nobody gives; take constant, linear or cosine",
        )

    def steps(self, rounds: int) -> int:
        """Optimizer steps of a run with so many rounds after those of the warm-up."""
        return self.minibatches * (self.warmup_rounds * self.warmup_epochs + rounds * self.epochs)


@dataclass
class KlConfig:
    """Penalty towards the policy that the run started from (k3 estimator); 0 keeps no reference in memory."""

    coef: float = 0.0
    unbiased: bool = True  # k3 times the ratio to the anchor: only then is its gradient that of the KL


@dataclass
class UniformConfig:
    """The same number of rollouts for every prompt."""

    _target_: str = "training.budgets.Uniform"
    samples: int = 8

    def __post_init__(self) -> None:
        require(self.samples > 0, "budget.samples", f"{self.samples} must be at least 1")


@dataclass
class GroupConfig:
    """GRPO: rewards relative to the group's mean, over its standard deviation if ``normalize``."""

    _target_: str = "training.advantages.Group"
    normalize: bool = True
    clip: float | None = None


@dataclass
class RlooConfig:
    """Rewards relative to the mean of the other members."""

    _target_: str = "training.advantages.Rloo"


@dataclass
class GaeConfig:
    """PPO: a value model's expectation, over whole episodes; the value model's targets have a lambda of their own."""

    _target_: str = "training.advantages.Gae"
    gamma: float = 1.0
    lam: float = 0.95
    lam_value: float = 1.0
    whiten: bool = True


@dataclass
class EgaeConfig:
    """T-PPO's extended GAE: also of episodes that a window has cut."""

    _target_: str = "training.advantages.Egae"
    gamma: float = 1.0
    lam: float = 0.95
    whiten: bool = True


@dataclass
class ClipConfig:
    """PPO's clipped ratio; a higher upper bound is DAPO's clip-higher; ``dual_clip`` bounds negative advantages."""

    _target_: str = "training.losses.Clip"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = None


@dataclass
class CispoConfig:
    """CISPO: the clipped ratio is a detached weight, so that no token loses its gradient."""

    _target_: str = "training.losses.Cispo"
    clip_high: float = 4.0


@dataclass
class GspoConfig:
    """GSPO: one ratio a sequence."""

    _target_: str = "training.losses.Gspo"
    clip_low: float = 3e-4
    clip_high: float = 4e-4


@dataclass
class NoCorrectionConfig:
    _target_: str = "training.corrections.NoCorrection"


@dataclass
class TisConfig:
    """Truncated importance sampling from the engine's log-probs to the trainer's."""

    _target_: str = "training.corrections.Tis"
    cap: float = 2.0


@dataclass
class TokenMaskConfig:
    """Drop tokens whose trainer/engine ratio leaves [low, high]."""

    _target_: str = "training.corrections.TokenMask"
    low: float = 0.5
    high: float = 5.0


@dataclass
class SequenceMaskConfig:
    """Drop sequences whose trainer/engine ratio, the product over tokens, leaves [low, high]."""

    _target_: str = "training.corrections.SequenceMask"
    low: float = 0.0
    high: float = 3.0


@dataclass
class AnchorConfig:
    """What the ratio is taken against: the engine's log-probs, or the trainer's own before the first update."""

    kind: str = "behaviour"

    def __post_init__(self) -> None:
        require(
            self.kind in ("behaviour", "recomputed"), "anchor.kind", f"{self.kind!r} is not behaviour or recomputed"
        )


@dataclass
class CompleteConfig:
    """Every episode to its end: a step waits for the longest.

    ``spare`` is the share of prompts started beyond ``batch.prompts``: the first groups to end are kept, the others
    thrown away. It favours short answers.
    """

    spare: float = 0.0

    def __post_init__(self) -> None:
        require(self.spare >= 0, "window.spare", f"{self.spare} must not be negative")


@dataclass
class TruncatedConfig:
    """T-PPO: every slot writes ``length`` own tokens a step; what is not over goes on in the next (arXiv 2506.15050).

    ``length`` null is a third of ``limits.max_new_tokens``, as in the paper (8K of 24K).
    """

    length: int | None = None
    max_windows: int | None = None  # older episodes are dropped and counted; None: four times what the longest needs

    def __post_init__(self) -> None:
        require(self.length is None or self.length > 0, "window.length", f"{self.length} must be at least 1")

    def tokens(self, max_new_tokens: int) -> int:
        """Own tokens of a window, for episodes of at most so many."""
        return self.length or -(-max_new_tokens // 3)

    def needed(self, max_new_tokens: int) -> int:
        """Windows that the longest episode needs: it may start inside of one."""
        return -(-max_new_tokens // self.tokens(max_new_tokens)) + 1

    def oldest(self, max_new_tokens: int) -> int:
        """Windows after which an episode is dropped."""
        return self.max_windows or 4 * self.needed(max_new_tokens)


@dataclass
class AllConfig:
    _target_: str = "training.selection.All"


@dataclass
class DynamicSamplingConfig:
    """DAPO: resample until enough groups vary, at most ``max_rounds`` times."""

    _target_: str = "training.selection.DynamicSampling"
    max_rounds: int = 4


@dataclass
class DropOverlongConfig:
    """Truncated episodes count in their group's statistics but are not trained on."""

    _target_: str = "training.selection.DropOverlong"


@dataclass
class TaskRewardConfig:
    _target_: str = "training.rewards.TaskReward"


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
    """The hardware that ``dry_run`` plans for."""

    gpus: int = 1
    gpu_memory_gib: float = 80.0
    engine_gpus: int = 0  # GPUs of the engine's own; 0: shared with the trainer (sleep and wake)


@dataclass
class TrainingConfig:
    """Everything that decides a run."""

    name: str = "training"
    run_dir: str = MISSING
    seed: int = 0
    steps: int = 100
    resume: bool = False
    overwrite: bool = False
    dry_run: bool = False
    threads: int | None = None  # torch threads; None: torch's own choice
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: Any = None
    task: Any = MISSING
    engine: Any = MISSING
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    budget: Any = MISSING
    advantage: Any = MISSING
    loss: Any = MISSING
    critic: Any = None
    correction: Any = MISSING
    anchor: AnchorConfig = field(default_factory=AnchorConfig)
    window: Any = MISSING
    selection: Any = MISSING
    reward: Any = MISSING
    max_staleness: int = 0
    kl: KlConfig = field(default_factory=KlConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: dict[str, Any] = field(default_factory=dict)  # any other transformers.TrainingArguments
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    warm_start: Any = None
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    episodes_logged: int = 8  # episodes a step written to episodes.jsonl
    node: NodeConfig = field(default_factory=NodeConfig)

    def check(self) -> None:
        """Refuse combinations that cannot work, each in one line with its remedy."""
        s = self.sampling
        require(self.steps > 0, "steps", f"{self.steps} must be at least 1")
        full = s.top_p == 1 and s.top_k == 0 and s.min_p == 0
        key, value = next(
            ((n, getattr(s, n)) for n, off in (("top_p", 1), ("top_k", 0), ("min_p", 0)) if getattr(s, n) != off),
            ("", 0),
        )
        require(
            full,
            f"sampling.{key}",
            f"training samples the full distribution, so {value} is refused; leave it at its default",
        )
        require(s.temperature > 0, "sampling.temperature", "training cannot sample greedily; give a value above 0")
        recomputed = self.anchor.kind == "recomputed"
        require(
            recomputed or isinstance(self.correction, NoCorrectionConfig),
            "correction",
            "corrects from the engine's log-probs to recomputed ones; add anchor=recomputed or take correction=none",
        )
        samples = getattr(self.budget, "samples", None)
        relative = isinstance(self.advantage, GroupConfig | RlooConfig)
        require(not (relative and samples == 1), "budget.samples", "a group of one teaches nothing; give at least 2")
        length = self.engine.max_model_len if hasattr(self.engine, "max_model_len") else None
        require(
            length is None or length <= self.batch.max_tokens,
            "batch.max_tokens",
            f"{self.batch.max_tokens} is shorter than engine.max_model_len={length}: a whole sequence must fit",
        )
        require(
            length is None or self.limits.max_new_tokens < length,
            "limits.max_new_tokens",
            f"{self.limits.max_new_tokens} leaves no room for a prompt in engine.max_model_len={length}",
        )
        master = self.lora is not None or "deepspeed" in self.trainer
        require(
            self.model.dtype == "float32" or master,
            "model.dtype",
            "bfloat16 under AdamW loses small updates; take float32 with ++trainer.bf16=true, deepspeed, or lora=lora",
        )
        self._check_critic()
        self._check_window()
        self.scheduler.check(self.engine)
        elsewhere = self.scheduler.policy is not None and Options.read(self.scheduler.options).save_latencies
        require(
            not elsewhere,
            f"scheduler.options.{KEY}.save_latencies",
            "training keeps them in its run directory and in every checkpoint; leave it out",
        )
        require(self.kl.coef >= 0, "kl.coef", f"{self.kl.coef} must not be negative")
        self._check_staleness()
        allowed = {
            "deepspeed",
            "fsdp",
            "fsdp_config",
            "bf16",
            "gradient_checkpointing",
            "gradient_checkpointing_kwargs",
            "report_to",
            "use_liger_kernel",
            "torch_compile",
            "optim",
            "optim_args",
        }
        for key in self.trainer:
            require(key in allowed, f"trainer.{key}", f"is not for users; allowed are {', '.join(sorted(allowed))}")

    def _check_staleness(self) -> None:
        if self.max_staleness == 0:
            return
        require(
            self.max_staleness == 1 and isinstance(self.window, CompleteConfig),
            "max_staleness",
            f"{self.max_staleness}: 1, one step off the policy, is built for window=complete; others are synchronous",
        )
        exact = getattr(self.engine, "deterministic", False)
        require(not exact, "max_staleness", "1 plays while it trains, which engine.deterministic cannot repeat; take 0")
        again = isinstance(self.selection, DynamicSamplingConfig)
        require(not again, "max_staleness", "1 asks for a round before the last is judged; take selection=all")
        require(
            not isinstance(self.correction, NoCorrectionConfig),
            "correction",
            "max_staleness=1 trains on an older policy's episodes; add correction=tis anchor=recomputed",
        )

    def _check_critic(self) -> None:
        reads = isinstance(self.advantage, GaeConfig | EgaeConfig)
        if self.critic is None:
            require(not reads, "critic", "gae and egae read a value model; add critic=value_model")
            return
        require(reads, "critic", "nobody reads its values; take critic=none, or advantage=gae or egae")
        master = "deepspeed" in self.trainer
        require(
            self.critic.dtype == "float32" or master,
            "critic.dtype",
            "bfloat16 under AdamW loses small updates; take float32, with ++trainer.bf16=true, or deepspeed",
        )
        require("fsdp" not in self.trainer, "trainer.fsdp", "a critic under FSDP is not built; take trainer.deepspeed")

    def _check_window(self) -> None:
        keeps = getattr(self.engine, "keep_cache", False)
        if not isinstance(self.window, TruncatedConfig):
            require(not keeps, "engine.keep_cache", "no episode outlives a weight update; add window=truncated")
            return
        longest = self.limits.max_new_tokens
        tokens, needed = self.window.tokens(longest), self.window.needed(longest)
        require(
            tokens <= longest,
            "window.length",
            f"{tokens} is larger than limits.max_new_tokens={longest}; lower it, or take window=complete",
        )
        oldest = self.window.oldest(longest)
        require(
            oldest >= needed,
            "window.max_windows",
            f"{oldest} drops every episode of limits.max_new_tokens={longest}: they need {needed}; raise it",
        )
        if isinstance(self.advantage, EgaeConfig):
            once = isinstance(self.selection, DynamicSamplingConfig)
            require(not once, "selection", "dynamic_sampling judges whole groups, and egae trains parts; take another")
            return
        require(
            not isinstance(self.correction, NoCorrectionConfig),
            "correction",
            "whole episodes of truncated windows are partly of older policies; add correction=tis anchor=recomputed, "
            "or take advantage=egae, which trains each token in its window",
        )


GROUPS: dict[str, dict[str, type]] = {
    "budget": {"uniform": UniformConfig},
    "advantage": {"group": GroupConfig, "rloo": RlooConfig, "gae": GaeConfig, "egae": EgaeConfig},
    "loss": {"clip": ClipConfig, "cispo": CispoConfig, "gspo": GspoConfig},
    "correction": {
        "none": NoCorrectionConfig,
        "tis": TisConfig,
        "token_mask": TokenMaskConfig,
        "sequence_mask": SequenceMaskConfig,
    },
    "window": {"complete": CompleteConfig, "truncated": TruncatedConfig},
    "selection": {"all": AllConfig, "dynamic_sampling": DynamicSamplingConfig, "drop_overlong": DropOverlongConfig},
    "reward": {"task": TaskRewardConfig},
    "critic": {"value_model": ValueModelConfig},
    "lora": {"lora": LoraConfig},
    "warm_start": {"sft": SftConfig},
}


def register() -> None:
    """Tell Hydra the schemas of rollouts and training."""
    ConfigStore.instance().store(name="training_schema", node=TrainingConfig)
    rollout_config.register({**rollout_config.GROUPS, **GROUPS})
