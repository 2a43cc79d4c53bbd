"""Typed schemas of everything that produces episodes. Imports neither torch nor vLLM: configuration must be instant.

A member of a Hydra group is a dataclass here: its fields are the settings, ``_target_`` names the class that reads
them, and ``__post_init__`` refuses impossible values in one line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from rollout.errors import UserError
from rollout.scheduling.latency import ToolLatencies
from rollout.scheduling.options import CLAIRVOYANT, Options
from rollout.scheduling.policies import STOCK

PROGRAM_SCHEDULER = "rollout.scheduling.vllm_plugin.program_scheduler"  # our plug-in, as vLLM's flag names it
MIDDLEWARE = "rollout.scheduling.middleware.ProgramMiddleware"  # its side in the OpenAI server


def require(condition: bool, key: str, problem: str) -> None:
    """Refuse a configuration in one line that names the key and the remedy."""
    if not condition:
        raise UserError(f"{key}: {problem}")


@dataclass
class VllmConfig:
    """vLLM behind the Engine protocol. ``mode``: in_process (CPU, tests), process (own process), http (a server)."""

    _target_: str = "rollout.engines.vllm.build"
    mode: str = "in_process"
    dtype: str = "float32"
    max_model_len: int = 512
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 8192
    block_size: int = 32
    kv_cache_gib: float = 1.0  # CPU only
    gpu_memory_utilization: float = 0.85
    tensor_parallel_size: int = 1
    replicas: int = 1  # engines that share the episodes
    devices: list[int] | None = None  # GPUs of all replicas, in order; None: those that this process sees
    restarts: int = 3  # how often each replica may die and be started anew within a run
    # How weights arrive. file: through shared memory. Not run on GPU: nccl, to engines with GPUs of their own; ipc, to
    # engines on the trainer's.
    transfer: str = "file"
    enforce_eager: bool = True
    deterministic: bool = False  # tokens repeat; in_process also every bit, elsewhere log-probs up to float order
    sleep_level: int = 0  # while a trainer on the same GPUs works; 1: weights wait in host memory, 2: they are dropped
    keep_cache: bool = False  # at weight updates: what a window cut goes on from KV of older weights
    scheduler_cls: str | None = None
    scheduler_options: dict[str, Any] = field(default_factory=dict)  # reaches the scheduler as additional_config
    extra: dict[str, Any] = field(default_factory=dict)  # any other vLLM engine argument, unchanged
    url: str | None = None  # mode=http: a server that runs already; None starts one
    timeout_s: float = 300.0  # longest wait for one request, for a start and for a sync

    def __post_init__(self) -> None:
        modes = ("in_process", "process", "http")
        require(self.mode in modes, "engine.mode", f"{self.mode!r} is not one of {', '.join(modes)}")
        require(
            not self.deterministic or self.mode != "http",
            "engine.deterministic",
            "needs engine.mode=in_process for the same bits, or process for the same tokens, not http",
        )
        require(self.url is None or self.mode == "http", "engine.url", f"needs engine.mode=http, not {self.mode}")
        require(self.replicas > 0, "engine.replicas", f"{self.replicas} must be at least 1")
        require(
            self.replicas == 1 or self.mode != "in_process",
            "engine.replicas",
            f"this process holds one engine, not {self.replicas}; take engine=vllm_process",
        )
        require(
            self.replicas == 1 or self.url is None,
            "engine.replicas",
            "the server at engine.url is one; leave the url out to start several",
        )
        require(0 <= self.sleep_level <= 2, "engine.sleep_level", f"{self.sleep_level} is not 0, 1 or 2")
        require(
            self.sleep_level == 0 or self.url is None,
            "engine.sleep_level",
            "the server at engine.url is its owner's to put to sleep; leave the url out to start one",
        )
        require(self.restarts >= 0, "engine.restarts", f"{self.restarts} must not be negative")
        transfers = ("file", "nccl", "ipc")
        require(
            self.transfer in transfers, "engine.transfer", f"{self.transfer!r} is not one of {', '.join(transfers)}"
        )
        require(
            self.transfer == "file" or self.mode != "in_process",
            "engine.transfer",
            f"{self.transfer} is for engines in processes of their own; take engine=vllm_process",
        )
        require(
            self.transfer == "file" or self.url is not None or self.restarts == 0,
            "engine.restarts",
            f"engine.transfer={self.transfer} keeps no copy of the weights to start an engine anew on; give 0",
        )
        require(
            self.devices is None or (self.mode != "in_process" and self.url is None),
            "engine.devices",
            "are for engines that are started as processes of their own; take engine=vllm_process",
        )
        require(
            self.devices is None or len(set(self.devices)) == len(self.devices),
            "engine.devices",
            f"{self.devices} names a device twice",
        )
        require(
            self.replicas == 1 or "port" not in self.extra,
            "engine.extra.port",
            "the replicas cannot share it; leave it out, and each takes a free one",
        )
        require(self.max_num_seqs > 0, "engine.max_num_seqs", f"{self.max_num_seqs} must be at least 1")
        require(self.timeout_s > 0, "engine.timeout_s", f"{self.timeout_s} must be above 0")


@dataclass
class TransformersConfig:
    """transformers' continuous batching behind the Engine protocol: no vLLM needed."""

    _target_: str = "rollout.engines.transformers.build"
    dtype: str = "float32"
    max_model_len: int = 512
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    block_size: int = 32
    num_blocks: int = 1024
    device: str = "auto"  # auto: cuda where there is one
    deterministic: bool = False
    transfer: str = "file"
    timeout_s: float = 300.0

    def __post_init__(self) -> None:
        require(
            self.transfer == "file",
            "engine.transfer",
            f"{self.transfer} is vLLM's; take engine=vllm_process, or leave it at file",
        )
        require(
            not self.deterministic,
            "engine.deterministic",
            "the transformers engine takes no seed per request; use engine=vllm",
        )


@dataclass
class LimitsConfig:
    """What ends an episode, and how long infrastructure may take."""

    max_turns: int = 4  # assistant turns
    max_tool_calls: int = 3
    max_new_tokens: int = 128  # own tokens of a whole episode
    max_turn_tokens: int | None = None  # own tokens of one turn; None: what is left of the episode
    tool_result_chars: int = 2000  # longer tool results are cut, and say so
    retries: int = 2  # after an infrastructure failure, before the episode is dropped
    max_failures_in_a_row: int = 8
    episode_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        for name in ("max_turns", "max_new_tokens", "tool_result_chars", "max_failures_in_a_row"):
            require(getattr(self, name) > 0, f"limits.{name}", f"{getattr(self, name)} must be at least 1")
        for name in ("max_tool_calls", "retries"):
            require(getattr(self, name) >= 0, f"limits.{name}", f"{getattr(self, name)} must not be negative")
        turn = self.max_turn_tokens
        require(turn is None or turn > 0, "limits.max_turn_tokens", f"{turn} must be at least 1, or null for no limit")


@dataclass
class SamplingConfig:
    """Training samples the full distribution; evaluation may do as it likes."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        require(self.temperature >= 0, "sampling.temperature", f"{self.temperature} must not be negative")
        require(0 < self.top_p <= 1, "sampling.top_p", f"{self.top_p} must be in (0, 1]")


@dataclass
class ArithmeticConfig:
    """Finite, seeded questions of graded difficulty; the test split never meets the training split."""

    _target_: str = "rollout.tasks.arithmetic.Arithmetic"
    name: str = "arithmetic"
    size: int = 4096  # training questions
    test_size: int = 2000
    seed: int = 0
    operators: str = "+-*"
    mix: dict[str, float] = field(default_factory=lambda: {"1": 0.2, "2": 0.4, "3": 0.4})  # share of each difficulty
    use_tool: bool = True
    demonstration_mix: dict[str, float] | None = None  # share of each difficulty, of those in mix; None: the study's
    thinking: float | None = None  # share of demonstrations that think, of those without a tool; None: the study's
    told: float = 0.0  # share of them whose system prompt asks to think, or not to

    def __post_init__(self) -> None:
        require(self.size > 0, "task.size", f"{self.size} must be at least 1")
        for name in ("thinking", "told"):
            share = getattr(self, name) or 0.0
            require(0 <= share <= 1, f"task.{name}", f"{share} must be a share, from 0 to 1")
        require(
            set(self.operators) <= set("+-*") and self.operators != "",
            "task.operators",
            f"{self.operators!r} may hold only + - *",
        )
        require(
            set(self.mix) <= {"1", "2", "3"} and sum(self.mix.values()) > 0,
            "task.mix",
            f"{dict(self.mix)} must give shares for difficulties 1, 2, 3",
        )
        shown = self.demonstration_mix
        require(
            shown is None or sum(shown.get(d, 0.0) for d, share in self.mix.items() if share > 0) > 0,
            "task.demonstration_mix",
            f"{shown} must give a share to a difficulty of task.mix={dict(self.mix)}",
        )


@dataclass
class LongChainConfig:
    """Chains of digits whose solution lengths follow a pinned heavy-tailed law, in own tokens."""

    _target_: str = "rollout.tasks.long_chain.LongChain"
    name: str = "long_chain"
    size: int = 1024  # training questions
    test_size: int = 2048
    seed: int = 0
    slip: float = 0.08  # share of wrong digits among the sums of demonstrations: what RL has to remove
    median_tokens: int = 64
    longest_tokens: int = 512  # the 99th percentile, and the maximum

    def __post_init__(self) -> None:
        for name in ("size", "test_size"):
            require(getattr(self, name) > 0, f"task.{name}", f"{getattr(self, name)} must be at least 1")
        require(0 <= self.slip <= 1, "task.slip", f"{self.slip} must be in [0, 1]")
        shortest = 14  # two lines with two digits of count
        require(
            self.median_tokens >= shortest, "task.median_tokens", f"{self.median_tokens} must be at least {shortest}"
        )
        require(
            self.longest_tokens > self.median_tokens,
            "task.longest_tokens",
            f"{self.longest_tokens} must be above task.median_tokens={self.median_tokens}",
        )


@dataclass
class Gsm8kConfig:
    """GSM8K's own JSONL files, read from ``path`` (a folder with train.jsonl and test.jsonl)."""

    _target_: str = "rollout.tasks.gsm8k.Gsm8k"
    name: str = "gsm8k"
    path: str = MISSING
    size: int | None = None  # None: all
    test_size: int | None = None
    seed: int = 0


@dataclass
class DatasetConfig:
    """Anything that ``datasets.load_dataset`` loads, by a map of columns."""

    _target_: str = "rollout.tasks.dataset.DatasetTask"
    name: str = "dataset"
    path: str = MISSING  # a hub name, or a builder such as json with data_files
    data_files: Any = None
    config: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    prompt_column: str = "prompt"  # text, or a list of messages
    answer_column: str = "answer"
    difficulty_column: str | None = None
    thought_column: str | None = None  # true where a question needs thought, or a list of it turn by turn
    tools: list[str] = field(default_factory=list)  # dotted names of Tool objects
    verifier: str = "math"  # math (math-verify) · exact · a dotted name of (answer, gold) -> bool
    size: int | None = None
    test_size: int | None = None
    seed: int = 0


@dataclass
class SchedulerConfig:
    """The scheduler class inside vLLM, by dotted name; None is stock. ``options`` reach it as additional_config."""

    cls: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def policy(self) -> str | None:
        """The policy of ours that runs; None for vLLM's own order and for other people's classes."""
        policy = Options.read(self.options).policy if self.cls == PROGRAM_SCHEDULER else None
        return None if policy in STOCK else policy

    def check(self, engine: Any = None) -> None:
        """Refuse a policy or option that is wrong, and an ``engine`` that cannot run it, before anything starts."""
        if self.cls is None:
            return
        require(
            engine is None or hasattr(engine, "scheduler_cls"), "scheduler", "only vLLM has a choice; take engine=vllm"
        )
        url = getattr(engine, "url", None)
        require(url is None, "scheduler", "the server at engine.url chose its own; leave it out")
        policy = self.policy
        if policy is None:
            return
        require(policy != CLAIRVOYANT, "scheduler", f"{policy} knows the future: it is for the simulator alone")
        exact = getattr(engine, "deterministic", False)
        require(not exact, "engine.deterministic", f"{policy} decides by the clock; take scheduler=fcfs or priority")
        options = Options.read(self.options)
        options.build()
        if options.latencies is not None:
            ToolLatencies().load(options.latencies)


@dataclass
class EvaluationConfig:
    """Accuracy on the test split: one seeded sample a question at ``temperature``, and greedily."""

    questions: int | None = 500  # None: the whole test split
    temperature: float = 1.0
    greedy: bool = True
    samples: int = 1  # above 1: also pass@k for k up to this number
    every: int | None = None  # training only: steps between evaluations of ``every_questions``
    every_questions: int = 200
    before: bool = True  # training only
    after: bool = True  # training only
    seed: int = 1

    def __post_init__(self) -> None:
        require(
            self.questions is None or self.questions > 0, "evaluation.questions", f"{self.questions} must be at least 1"
        )
        require(self.samples > 0, "evaluation.samples", f"{self.samples} must be at least 1")
        require(self.every is None or self.every > 0, "evaluation.every", f"{self.every} must be at least 1, or null")


@dataclass
class EvaluateConfig:
    """``python -m rollout.evaluate``: a checkpoint, or a running OpenAI-compatible server by ``url``."""

    checkpoint: str | None = None
    url: str | None = None
    model: str | None = None  # the server's name of the model; None: the only one it serves
    run_dir: str = MISSING
    reasoning: str = "auto"
    told: str | None = None  # always or never: a system prompt asks for it, and ``trigger`` says who obeys
    concurrency: int = 32  # requests at once; url only
    threads: int | None = None
    task: Any = MISSING
    engine: Any = MISSING
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def check(self) -> None:
        """Refuse what cannot be evaluated."""
        require(
            (self.checkpoint is None) != (self.url is None),
            "checkpoint",
            "give checkpoint=DIR or url=http://..., one of them",
        )
        exact = getattr(self.engine, "deterministic", False)
        require(not exact, "engine.deterministic", "is for training; evaluation is seeded by question and sample")
        self.scheduler.check(self.engine)
        require(self.concurrency > 0, "concurrency", f"{self.concurrency} must be at least 1")
        modes = ("auto", "always", "never")
        require(self.reasoning in modes, "reasoning", f"{self.reasoning!r} is not one of {', '.join(modes)}")
        require(self.told in (None, *modes[1:]), "told", f"{self.told!r} is not always, never or null")


GROUPS: dict[str, dict[str, type]] = {
    "task": {
        "arithmetic": ArithmeticConfig,
        "long_chain": LongChainConfig,
        "gsm8k": Gsm8kConfig,
        "dataset": DatasetConfig,
    },
    "engine": {"vllm": VllmConfig, "transformers": TransformersConfig},
}


def register(groups: dict[str, dict[str, type]] = GROUPS) -> None:
    """Tell Hydra the schemas: ``schema/GROUP/MEMBER`` beside the YAML files of ``conf/``."""
    store = ConfigStore.instance()
    store.store(name="evaluate_schema", node=EvaluateConfig)
    for group, members in groups.items():
        for member, schema in members.items():
            store.store(group=f"schema/{group}", name=member, node=schema)
