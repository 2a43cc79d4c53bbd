"""Typed schemas of a training run, and the checks that need more than one of them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from rollout import config as rollout_config
from rollout.config import EvaluationConfig, LimitsConfig, SamplingConfig, SchedulerConfig, VllmConfig, require
from rollout.engines.adapter import RANKS
from rollout.scheduling.options import KEY, Options
from training.members import (
    AdaCotConfig,
    AdaptiveConfig,
    AllConfig,
    AnchorConfig,
    BayesKnapsackConfig,
    CispoConfig,
    ClipConfig,
    CompleteConfig,
    DecoupledConfig,
    DropOverlongConfig,
    DynamicSamplingConfig,
    EgaeConfig,
    GaeConfig,
    GroupConfig,
    GspoConfig,
    KlConfig,
    KnapsackConfig,
    NoCorrectionConfig,
    OtcAdaCotConfig,
    OtcConfig,
    RlooConfig,
    SequenceMaskConfig,
    TaskRewardConfig,
    TisConfig,
    TokenMaskConfig,
    TruncatedConfig,
    UniformConfig,
    ValueModelConfig,
)
from training.settings import (
    BatchConfig,
    CheckpointConfig,
    LoraConfig,
    ModelConfig,
    NodeConfig,
    OptimizerConfig,
    ProbeConfig,
    ReasoningConfig,
    SftConfig,
)


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
    process_timeout_s: float = 7200.0  # how long one training process waits for another, rollouts and evaluations too
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: Any = None
    task: Any = MISSING
    engine: Any = MISSING
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    reasoning: ReasoningConfig = field(default_factory=ReasoningConfig)
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
    max_staleness: int = 0  # rounds that are played while the trainer works on an earlier one; 0: exactly on the policy
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

    @property
    def sends_adapter(self) -> bool:
        """Whether the engine gets adapters over the weights that it was started with, not all weights."""
        return self.lora is not None and self.lora.sync == "adapter"

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
        relative = isinstance(self.advantage, GroupConfig | DecoupledConfig | RlooConfig)
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
        require(self.process_timeout_s > 0, "process_timeout_s", f"{self.process_timeout_s} must be above 0")
        self._check_adapter()
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

    def notes(self) -> list[str]:
        """What works, but perhaps not as meant."""
        found = []
        if isinstance(self.budget, AdaptiveConfig) and isinstance(self.advantage, GaeConfig | EgaeConfig):
            found.append(
                "budget: values groups by the chance that their rewards vary, which means nothing where a value model "
                "judges each episode by itself; advantage=group is what it is made for"
            )
        priced = isinstance(self.reward, AdaCotConfig | OtcAdaCotConfig)
        if priced and isinstance(self.advantage, GroupConfig) and self.advantage.normalize:
            found.append(
                "reward: where all of a group are right, the group's standard deviation cancels the size of alpha_miss "
                "and alpha_over; advantage=decoupled or advantage.normalize=false keeps it"
            )
        return found

    def _check_adapter(self) -> None:
        if not self.sends_adapter:
            return
        vllm = isinstance(self.engine, VllmConfig)
        require(vllm, "lora.sync", "adapter: only vLLM computes adapters; take lora.sync=merged, or engine=vllm")
        way = self.engine.transfer
        require(way == "file", "engine.transfer", f"{way}: lora.sync=adapter sends a file; leave it at file")
        rank, most = self.lora.rank, RANKS[-1]
        require(rank <= most, "lora.rank", f"{rank}: vLLM takes at most {most}; lower it, or take lora.sync=merged")
        require(
            self.engine.sleep_level < 2,
            "engine.sleep_level",
            "2 drops the weights, which lora.sync=adapter never sends; take 1, or lora.sync=merged",
        )

    def _check_staleness(self) -> None:
        ahead, sleeps = self.max_staleness, getattr(self.engine, "sleep_level", 0) > 0
        require(ahead >= 0, "max_staleness", f"{ahead} must not be negative")
        require(
            not sleeps or not getattr(self.engine, "keep_cache", False),
            "engine.keep_cache",
            "an engine that sleeps while the trainer works gives up its cache; leave it out, or engine.sleep_level",
        )
        if ahead == 0:
            return
        require(
            isinstance(self.window, CompleteConfig),
            "max_staleness",
            f"{ahead} plays rounds ahead, which is built for window=complete; others are synchronous",
        )
        require(not sleeps, "max_staleness", f"{ahead} plays while it trains, so the engine cannot sleep; take 0")
        exact = getattr(self.engine, "deterministic", False)
        require(not exact, "max_staleness", f"{ahead} plays while it trains: never engine.deterministic; take 0")
        again = isinstance(self.selection, DynamicSamplingConfig)
        require(not again, "max_staleness", f"{ahead} asks for a round before the last is judged; take selection=all")
        require(
            not isinstance(self.correction, NoCorrectionConfig),
            "correction",
            f"max_staleness={ahead} trains on an older policy's episodes; add correction=tis anchor=recomputed",
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

    def _check_window(self) -> None:
        elsewhere = getattr(self.engine, "deterministic", False) and self.engine.mode != "in_process"
        require(
            not elsewhere or isinstance(self.window, CompleteConfig),
            "engine.deterministic",
            "what a window holds is a matter of time outside of this process; take engine=vllm, or window=complete",
        )
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
    "budget": {"uniform": UniformConfig, "knapsack": KnapsackConfig, "bayes_knapsack": BayesKnapsackConfig},
    "advantage": {
        "group": GroupConfig,
        "decoupled": DecoupledConfig,
        "rloo": RlooConfig,
        "gae": GaeConfig,
        "egae": EgaeConfig,
    },
    "loss": {"clip": ClipConfig, "cispo": CispoConfig, "gspo": GspoConfig},
    "correction": {
        "none": NoCorrectionConfig,
        "tis": TisConfig,
        "token_mask": TokenMaskConfig,
        "sequence_mask": SequenceMaskConfig,
    },
    "window": {"complete": CompleteConfig, "truncated": TruncatedConfig},
    "selection": {"all": AllConfig, "dynamic_sampling": DynamicSamplingConfig, "drop_overlong": DropOverlongConfig},
    "reward": {
        "task": TaskRewardConfig,
        "otc": OtcConfig,
        "adacot": AdaCotConfig,
        "otc_adacot": OtcAdaCotConfig,
    },
    "critic": {"value_model": ValueModelConfig},
    "lora": {"lora": LoraConfig},
    "warm_start": {"sft": SftConfig},
}


def register() -> None:
    """Tell Hydra the schemas of rollouts and training."""
    ConfigStore.instance().store(name="training_schema", node=TrainingConfig)
    rollout_config.register({**rollout_config.GROUPS, **GROUPS})
