"""Typed settings of the members of every axis, a dataclass each. Imports no torch.

Its fields are the settings, ``_target_`` names the class that reads them, ``__post_init__`` refuses impossible values.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from rollout.config import require
from training.settings import OptimizerConfig


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
class AdaptiveConfig(UniformConfig):
    """Between ``low`` and ``high`` rollouts for a prompt, ``samples`` in the mean, by the prompts' success rates."""

    _target_: str = MISSING
    low: int = 2
    high: int = 128
    history: str | None = None  # a checkpoint of another run: begin with what it had seen of the prompts

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.low >= 0 and self.low != 1, "budget.low", f"{self.low} must be 0, or 2 or more")
        require(
            self.low <= self.samples <= self.high,
            "budget.samples",
            f"{self.samples} must be from budget.low={self.low} to budget.high={self.high}",
        )
        require(self.high >= 2, "budget.high", f"{self.high} must be at least 2")


@dataclass
class KnapsackConfig(AdaptiveConfig):
    """As published: success rates of the last visits, fall-backs for prompts that always or never succeeded."""

    _target_: str = "training.budgets.Knapsack"
    least_seen: int = 8  # rollouts before a prompt is judged by them

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.low >= 2, "budget.low", f"{self.low} must be at least 2: a prompt that gets none is never judged")
        require(self.least_seen >= 1, "budget.least_seen", f"{self.least_seen} must be at least 1")


@dataclass
class BayesKnapsackConfig(AdaptiveConfig):
    """The value's expectation over a Beta posterior of each prompt's success rate."""

    _target_: str = "training.budgets.BayesKnapsack"
    low: int = 0
    prior: list[float] | None = None  # successes, failures; None: fitted to all prompts seen so far
    half_life: float | None = None  # rounds; None: what was seen counts for ever
    cost: str = "rollouts"  # or tokens: the budget is the tokens that ``samples`` of each prompt would take

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prior is not None:
            right = len(self.prior) == 2 and min(self.prior) > 0
            require(right, "budget.prior", f"{list(self.prior)} must be two positive numbers, or null to fit them")
        if self.half_life is not None:
            require(self.half_life > 0, "budget.half_life", f"{self.half_life} must be above 0, or null")
        require(self.cost in ("rollouts", "tokens"), "budget.cost", f"{self.cost} must be rollouts or tokens")


@dataclass
class GroupConfig:
    """GRPO: rewards relative to the group's mean, over its standard deviation if ``normalize``."""

    _target_: str = "training.estimates.Group"
    normalize: bool = True
    clip: float | None = None


@dataclass
class DecoupledConfig:
    """GDPO: each named part of the reward over its own standard deviation in the group, times its scale, then summed.

    A penalty then keeps its size whatever else varies; ``group`` erases it where nothing else does.
    """

    _target_: str = "training.estimates.Decoupled"
    clip: float | None = None


@dataclass
class RlooConfig:
    """Rewards relative to the mean of the other members."""

    _target_: str = "training.estimates.Rloo"


@dataclass
class GaeConfig:
    """PPO: a value model's expectation, over whole episodes; the value model's targets have a lambda of their own."""

    _target_: str = "training.estimates.Gae"
    gamma: float = 1.0
    lam: float = 0.95
    lam_value: float = 1.0
    whiten: bool = True


@dataclass
class EgaeConfig:
    """T-PPO's extended GAE: also of episodes that a window has cut."""

    _target_: str = "training.estimates.Egae"
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
class OtcConfig:
    """OTC: a right answer is worth more, the fewer tool calls it took."""

    _target_: str = "training.rewards.otc.Otc"
    form: str = "grpo"  # or ppo: no optimum, every call costs
    alpha: float = 1.0
    max_calls: float = 4.0  # c: smaller is stricter; conf/reward/otc.yaml takes limits.max_tool_calls
    optimum: str = "history"  # fewest calls that ever sufficed; group: in this group alone
    least_successes: int = 1  # that a number of calls needs before it is the optimum: above 1 a lucky guess is none
    format_weight: float = 0.0  # 1: the paper's r_correct + r_format, with which wrong answers earn too
    prices: dict[str, float] = field(default_factory=dict)  # of a call, by tool: seconds, money; others 1

    def __post_init__(self) -> None:
        require(self.form in ("grpo", "ppo"), "reward.form", f"{self.form!r} is not grpo or ppo")
        require(self.optimum in ("history", "group"), "reward.optimum", f"{self.optimum!r} is not history or group")
        require(self.alpha > 0, "reward.alpha", f"{self.alpha} must be above 0")
        require(self.least_successes >= 1, "reward.least_successes", f"{self.least_successes} must be at least 1")
        for name in ("max_calls", "format_weight"):
            require(getattr(self, name) >= 0, f"reward.{name}", f"{getattr(self, name)} must not be negative")
        least = min(self.prices.values(), default=0.0)
        require(least >= 0, "reward.prices", f"{dict(self.prices)} must not be negative")


@dataclass
class AdaCotConfig:
    """AdaCoT: prices of a missed thought, a needless one, and ill form."""

    _target_: str = "training.rewards.adacot.AdaCot"
    alpha_miss: float = 0.2
    alpha_over: float = 0.3
    gamma_format: float = 1.0
    alpha_told: float = 1.5  # of not doing what the system prompt asks for (reasoning.told_*)
    labels: str = "task"  # or self: the policy's own success without thought
    threshold: float = 0.5  # self: below it a prompt needs thought
    least_seen: int = 4  # self: rollouts without thought before a prompt is judged
    longest_answer: int | None = None  # characters; a longer answer counts as thought
    mask_decision: bool = False  # no policy loss on the decision: for stages that would push it one way

    def __post_init__(self) -> None:
        for name in ("alpha_miss", "alpha_over", "gamma_format", "alpha_told"):
            require(getattr(self, name) >= 0, f"reward.{name}", f"{getattr(self, name)} must not be negative")
        require(self.labels in ("task", "self"), "reward.labels", f"{self.labels!r} is not task or self")
        require(0 < self.threshold < 1, "reward.threshold", f"{self.threshold} must be between 0 and 1")
        require(self.least_seen >= 1, "reward.least_seen", f"{self.least_seen} must be at least 1")
        shortest = self.longest_answer is None or self.longest_answer > 0
        require(shortest, "reward.longest_answer", f"{self.longest_answer} must be at least 1, or null")


@dataclass
class OtcAdaCotConfig:
    """Both at once, each with its own settings."""

    _target_: str = "training.rewards.otc_adacot.OtcAdaCot"
    otc: OtcConfig = field(default_factory=OtcConfig)
    adacot: AdaCotConfig = field(default_factory=AdaCotConfig)
