"""From a checked configuration to the objects of a run: every part is made here and nowhere else."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hydra.utils import get_method, instantiate

from rollout.chat import THINK, Chat
from rollout.checkpoint import first_line
from rollout.engines import Engine, Sampling
from rollout.engines.adapter import adapter_arguments
from rollout.errors import UserError
from rollout.runner import Runner, concurrency
from rollout.scheduling.files import with_files
from rollout.speaker import Policy
from rollout.tasks import Task
from rollout.window import Window
from training import checkpoint, journal
from training.config import TrainingConfig
from training.critic import Critic, make_critic
from training.device import own_device
from training.engine_sync import EngineSync
from training.head import attach_head, respects_boundaries, token_logprobs
from training.lora import add_adapter, base_model, served_modules
from training.members import AdaptiveConfig, DecoupledConfig, EgaeConfig, TruncatedConfig
from training.models import build_tiny, check_checkpoint, load_policy
from training.packing import MicroBatch
from training.prompts import PromptOrder
from training.ranks import Ranks
from training.rollouts import Axes, CompleteRollouts, Rollouts, Source, TruncatedRollouts
from training.settings import BatchConfig
from training.stream import RolloutStream
from training.together import Together
from training.trainer import Objective, RolloutTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback


def make_task(config: Any) -> Task:
    """The task that a ``task`` member describes."""
    return instantiate(config)


def initial_model(cfg: TrainingConfig, task: Task, directory: Path) -> Path | str:
    """The folder or hub name that the run starts from; ``model=tiny`` is built into ``directory`` first."""
    if cfg.model.path is not None:
        return cfg.model.path if Path(cfg.model.path).exists() else downloaded(cfg.model.path)
    if not hasattr(task, "corpus"):
        raise UserError(f"model=tiny: task {task.name} has no corpus for its tokenizer; give model=hf model.path=DIR")
    if not directory.exists():
        m = cfg.model
        shape = {"hidden": m.hidden, "layers": m.layers, "heads": m.heads, "head_dim": m.head_dim, "mlp": m.mlp}
        with checkpoint.written_whole(directory) as scratch:
            build_tiny(scratch, task.corpus(), **shape, vocab=m.vocabulary, tied=m.tied, seed=cfg.seed)
    return directory


def downloaded(name: str) -> Path:
    """The local folder of a hub model: engines read folders."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    check_checkpoint(name, ())
    try:
        return Path(snapshot_download(name))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(f"model.path: {name} is no folder and the hub did not give it ({first_line(error)})") from error


def make_policy_model(
    cfg: TrainingConfig, path: Path | str, adapter: Path | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model to train, with its fused head and, for LoRA, its adapter."""
    torch.manual_seed(cfg.seed)  # an adapter begins at random: the same in a run and in its resumption
    model, tokenizer = load_policy(path, dtype=cfg.model.dtype, attention=cfg.model.attention)
    model.to(own_device())  # before the trainer has it, it is asked for log-probs; its attention may be for GPUs only
    attach_head(model, temperature=cfg.sampling.temperature)
    if cfg.lora is not None:
        model = add_adapter(model, cfg.lora, adapter)
    if cfg.sends_adapter:
        served_modules(model)  # refuses, on every rank
    return model, tokenizer


def engine_settings(cfg: TrainingConfig, model_dir: Path | str, run_dir: Path) -> Any:
    """The engine's settings, with the run's files among those of a scheduler of ours, which finds them by variables."""
    if cfg.scheduler.policy is None:
        return cfg.engine
    options, variables = with_files(
        cfg.scheduler.options, checkpoint=Path(model_dir), run_dir=run_dir, save=True, resumed=cfg.resume
    )
    os.environ.update(variables)
    return replace(cfg.engine, scheduler_options=options)


def with_adapter(cfg: TrainingConfig, settings: Any, model: Any) -> Any:
    """The engine's settings, ready for the model's adapter; what ``engine.extra`` says of adapters stands."""
    return replace(settings, extra=adapter_arguments(cfg.lora.rank, served_modules(model)) | dict(settings.extra))


def make_engine(config: Any, model_dir: Path | str, log_path: Path) -> Engine:
    """Start the engine member on a Hugging Face folder."""
    return get_method(config._target_)(config, str(model_dir), log_path=log_path)


def make_runner(cfg: Any, task: Task, engine: Engine) -> tuple[Runner, Engine]:
    """The rollout thread, and the engine as its episodes see it: in lockstep where a run must be repeatable."""
    if not cfg.engine.deterministic or cfg.engine.mode != "in_process":  # elsewhere seeds alone make tokens repeat
        return Runner(task.environment, cfg.limits, concurrency=concurrency(cfg.engine)), engine
    from rollout.engines.lockstep import Lockstep

    lockstep = Lockstep(engine)
    return Runner(task.environment, cfg.limits, lockstep), lockstep


def make_policy(cfg: TrainingConfig, engine: Engine, tokenizer: PreTrainedTokenizerFast) -> Policy:
    """How episodes speak in training."""
    s = cfg.sampling
    sampling = Sampling(max_tokens=1, temperature=s.temperature, top_p=s.top_p, top_k=s.top_k, min_p=s.min_p)
    seed = cfg.seed if cfg.engine.deterministic else None
    return Policy(engine, Chat(tokenizer), sampling, cfg.engine.max_model_len, seed=seed)


def make_rollouts(cfg: TrainingConfig, task: Task, axes: Axes, runner: Runner, policy: Policy) -> Rollouts:
    """The member of the ``window`` axis with all that it plays."""
    timeout_s = cfg.limits.episode_timeout_s * (cfg.limits.retries + 2)
    prompts = PromptOrder(task.rows("train"), cfg.seed)
    source = Source(prompts, axes, runner, policy, cfg.batch.prompts, timeout_s, cfg.reasoning)
    if not isinstance(cfg.window, TruncatedConfig):
        spare = math.ceil(cfg.window.spare * cfg.batch.prompts)
        return CompleteRollouts(source, spare=spare, ahead=cfg.max_staleness)
    longest, unfinished = cfg.limits.max_new_tokens, isinstance(cfg.advantage, EgaeConfig)
    slots = cfg.batch.prompts * cfg.budget.samples
    window = Window(runner, cfg.window.tokens(longest), slots, max_age=cfg.window.oldest(longest), once=unfinished)
    window.policy = source.policy = replace(policy, window=window)
    return TruncatedRollouts(source, window, unfinished=unfinished)


def make_axes(cfg: TrainingConfig, task: Task) -> Axes:
    """The members of the run's axes; a reward that reads tool calls is refused for a task without tools."""
    reward = instantiate(cfg.reward)
    if getattr(reward, "needs_tools", False) and not task.tools():
        raise UserError(f"reward: {type(reward).__name__} rewards tool calls, but task {task.name} has no tools")
    if getattr(reward, "teaches_solved", False) and isinstance(cfg.budget, AdaptiveConfig) and cfg.budget.low < 4:
        raise UserError(
            f"budget.low: {type(reward).__name__} teaches something on prompts that always succeed, and "
            f"{cfg.budget.low} rollouts of those cannot show it; give at least 4, or take budget=uniform"
        )
    parts = {name: getattr(reward, name, {}) for name in ("scales", "joined")}
    advantage = instantiate(cfg.advantage, **(parts if isinstance(cfg.advantage, DecoupledConfig) else {}))
    return Axes(instantiate(cfg.budget), reward, advantage, instantiate(cfg.selection))


def probe_sequences(task: Task, chat: Chat, n: int) -> list[list[int]]:
    """Fixed texts for the gate: the first prompts of the task, with the end of a turn after them."""
    rows = itertools.islice(itertools.cycle(task.rows("train")), n)
    return [chat.open(row.messages, task.tools()) + list(chat.stop_token_ids[:1]) for row in rows]


def make_reference(cfg: TrainingConfig, model: Any, path: Path | str) -> Callable[[MicroBatch], torch.Tensor] | None:
    """No-gradient log-probs of the policy that the run started from; None without a KL penalty."""
    if cfg.kl.coef == 0:
        return None
    if cfg.lora is not None:  # the frozen base model is the reference: nothing more to hold in memory

        def frozen(batch: MicroBatch) -> torch.Tensor:
            with torch.no_grad(), model.disable_adapter():
                return token_logprobs(model, batch)[0]

        return frozen
    reference, _ = load_policy(path, dtype=cfg.model.dtype, attention=cfg.model.attention)
    attach_head(reference, temperature=cfg.sampling.temperature)
    reference.requires_grad_(False).eval()

    def scored(batch: MicroBatch) -> torch.Tensor:
        device = batch.input_ids.device
        reference.to(device)
        mixed = torch.autocast(device.type, torch.bfloat16, enabled=bool(cfg.trainer.get("bf16")))  # as the policy's
        with torch.no_grad(), mixed:
            return token_logprobs(reference, batch)[0]

    return scored


def training_arguments(cfg: TrainingConfig, run_dir: Path) -> Any:
    """transformers.TrainingArguments of a run: what the loop needs is fixed, the rest comes from ``trainer``."""
    from transformers import TrainingArguments

    fixed = {
        "output_dir": str(run_dir),
        "max_steps": cfg.steps,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "save_strategy": "steps",
        "save_steps": cfg.checkpoint.every,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "ignore_data_skip": True,
        "seed": cfg.seed,
        "data_seed": cfg.seed,
        # accelerate knows no DeepSpeed on what it calls CPUs
        "use_cpu": not torch.cuda.is_available() and "deepspeed" not in cfg.trainer,
        "dataloader_pin_memory": False,
        "ddp_find_unused_parameters": False,
        "ddp_timeout": int(cfg.process_timeout_s),
        "bf16": False,
        "gradient_checkpointing": torch.cuda.is_available(),
        "report_to": ["tensorboard"],
    }
    if "deepspeed" in cfg.trainer and not torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        join_deepspeed_on_cpu()
        fixed["accelerator_config"] = {"use_configured_state": True}
    arguments = TrainingArguments(**{**fixed, **asdict(cfg.optimizer), **cfg.trainer})
    if "LOCAL_RANK" not in os.environ and torch.cuda.is_available():
        arguments._n_gpu = 1  # other GPUs are engines': transformers would spread the policy over all with DataParallel
    return arguments


def join_deepspeed_on_cpu() -> None:
    """accelerate counts one process where DeepSpeed runs on CPUs, unless it is told the backend."""
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(cpu=False, backend="gloo")


def make_trainer(
    cfg: TrainingConfig,
    run_dir: Path,
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    reference: Callable[[MicroBatch], torch.Tensor] | None,
    callbacks: list[TrainerCallback],
    ranks: Ranks,
) -> RolloutTrainer:
    """The trainer, its stream still to be set."""
    objective = Objective(
        instantiate(cfg.loss),
        instantiate(cfg.correction),
        cfg.anchor.kind == "recomputed",
        cfg.kl.coef,
        cfg.kl.unbiased,
        reference,
    )
    arguments = training_arguments(cfg, run_dir)
    return RolloutTrainer(
        model, arguments, tokenizer, objective, run_dir / "checkpoints", cfg.checkpoint.keep_last, callbacks, ranks
    )


def make_value_model(
    cfg: TrainingConfig, policy: Path | str, resume: Path | None, trainer: RolloutTrainer
) -> Critic | None:
    """The run's critic, if it has one."""
    if cfg.critic is None:
        return None
    return make_critic(
        cfg.critic,
        policy,
        trainer.processing_class,
        trainer.args,
        trainer.accelerator,
        total_steps=cfg.critic.steps(math.ceil(cfg.steps / (cfg.batch.epochs * cfg.batch.minibatches))),
        attention=cfg.model.attention,
        resume=resume,
    )


def make_stream(
    cfg: TrainingConfig,
    rollouts: Rollouts,
    trainer: RolloutTrainer,
    engine_sync: EngineSync,
    log: journal.Journal,
    on_warm_up: Callable[[int, dict[str, float]], None],
    together: Together,
    batch: BatchConfig,
) -> RolloutStream:
    """Rank 0's stream, whose steps are then dealt out."""
    return RolloutStream(
        rollouts,
        batch,
        seed=cfg.seed,
        pad_id=trainer.processing_class.pad_token_id,
        max_new_tokens=cfg.limits.max_new_tokens,
        sync=lambda: together.sync(trainer.state.global_step),
        rest=engine_sync.rest,
        anchor=together.logprobs if cfg.anchor.kind == "recomputed" else None,
        critic=None if trainer.critic is None else together,
        on_round=lambda groups, estimates: log.write_episodes(
            trainer.state.global_step + 1, groups, estimates, cfg.episodes_logged
        ),
        on_warm_up=on_warm_up,
        on_scored=log.score,
        engine_steps=engine_steps(engine_sync),
        keep_zero=cfg.kl.coef != 0,
        think_id=decision_after(rollouts.source),
        processes=trainer.ranks.size,
    )


def make_batch(cfg: TrainingConfig, policy_packs: bool, critic: Critic | None) -> BatchConfig:
    """Who does not keep packed sequences apart is trained on one sequence a row; every rank must ask."""
    packs = policy_packs and (critic is None or critic.respects_boundaries(_probe_rows(cfg)))
    return cfg.batch if packs else replace(cfg.batch, row_tokens=1)


def packs(cfg: TrainingConfig, model: Any) -> bool:
    """Whether the policy keeps packed sequences apart; asked before a trainer wraps it."""
    return respects_boundaries(model, base_model(model).config.get_text_config().vocab_size, rows=_probe_rows(cfg))


def _probe_rows(cfg: TrainingConfig) -> int:
    return 2 if cfg.batch.row_tokens is not None else 1


def decision_after(source: Source) -> int | None:
    """The token after which the decision to think gets no policy loss; None where it gets one."""
    if not getattr(source.axes.reward, "mask_decision", False):
        return None
    if source.policy.chat.think_id is None:
        raise UserError(f"reward.mask_decision: {THINK} is no single token of this tokenizer; take one where it is")
    return source.policy.chat.think_id


def engine_steps(engine_sync: EngineSync) -> Callable[[], int] | None:
    """Counts the engine's steps where it does: in this process."""

    def stats() -> dict[str, float]:
        return engine_sync.runner.call(engine_sync.engine.stats(), engine_sync.timeout_s, "the engine's statistics")

    return (lambda: int(stats()["steps"])) if "steps" in stats() else None
