"""The value model of PPO: its own weights, optimizer, schedule, save and load; the loop says when it steps."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from rollout.errors import UserError
from training.head import respects_boundaries
from training.losses import value_loss
from training.members import ValueModelConfig
from training.packing import MicroBatch, TrainSequence, pack
from training.settings import OptimizerConfig
from training.sharding import whole, whole_weights
from training.values import HeadlessProbe, check_tokenizer, load_value_model

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainingArguments

FOLDER = "critic"  # inside a checkpoint
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # whatever part of it each process holds


class Critic:
    """Learns V of the state before each own token of the policy.

    ``model`` gives one number a token; ``accelerator`` is the trainer's, and decides device, autocast and processes.
    ``total_steps`` is what the schedule is spread over. ``deepspeed``: the trainer's settings of that name; the critic
    gets an engine of its own with the same ZeRO stage.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        config: ValueModelConfig,
        accelerator: Accelerator,
        *,
        total_steps: int,
        deepspeed: dict[str, Any] | str | None = None,
    ) -> None:
        from transformers import get_scheduler

        self.model, self.tokenizer, self.config, self.accelerator = model, tokenizer, config, accelerator
        self.steps = 0
        o = config.optimizer
        self.optimizer: Any = adamw(model, o)
        self.schedule = get_scheduler(
            o.lr_scheduler_type,
            self.optimizer,
            num_warmup_steps=o.warmup_steps,
            num_training_steps=total_steps,
            scheduler_specific_kwargs=dict(o.lr_scheduler_kwargs),
        )
        self.is_deepspeed = deepspeed is not None
        self.wrapped: Any
        if deepspeed is None and accelerator.is_fsdp2:
            self.wrapped, prepared = accelerator.prepare(model, self.optimizer)
            self.optimizer = prepared.optimizer
        elif deepspeed is None:
            self.wrapped = accelerator.prepare_model(model)
        else:
            from deepspeed import initialize

            settings = deepspeed_settings(deepspeed, o, bf16=accelerator.mixed_precision == "bf16")
            self.wrapped, self.optimizer, _, _ = initialize(
                model=model, optimizer=self.optimizer, lr_scheduler=self.schedule, config=settings
            )

    def respects_boundaries(self, rows: int) -> bool:
        """Whether sequences packed two a row, ``rows`` a micro-batch, keep the values that they have alone."""
        vocabulary = self.model.config.get_text_config().vocab_size
        return respects_boundaries(HeadlessProbe(self.model), vocabulary, rows=rows)

    @torch.no_grad()
    def values(self, micro_batches: list[MicroBatch]) -> list[torch.Tensor]:
        """V of the state before each token that ``batch.own`` gives, in its order: flat float32 on the CPU."""
        self.wrapped.eval()
        _, most = self._count(micro_batches)
        found = [self._values(self.model, batch).cpu() for batch in self._padded(micro_batches, most)]
        return found[: len(micro_batches)]

    def step(self, micro_batches: list[MicroBatch]) -> dict[str, float]:
        """One optimizer step on the sum of weight x value loss over the own tokens of all micro-batches and processes.

        Their ``returns``, ``values`` (at the rollout) and ``weights`` are filled. Without a token anywhere nothing
        steps, schedule included, and there are no metrics. ``critic/explained_variance`` is 1 - Var(returns - V) /
        Var(returns) of V before the step, 0 where all returns are equal; ``critic/clipped`` the share of tokens whose
        gradient clipping took away.
        """
        tokens, most = self._count(micro_batches)
        if tokens == 0:
            return {}
        self.wrapped.train()
        sums = torch.zeros(6, dtype=torch.float64, device=self.accelerator.device)
        batches = self._padded(micro_batches, most)
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            waits = not last and not self.is_deepspeed
            with self.accelerator.no_sync(self.wrapped) if waits else contextlib.nullcontext():
                batch = batch.to(self.accelerator.device)
                returns, weights = batch.own(batch.returns), batch.own(batch.weights)
                values = self._values(self.wrapped, batch)
                per_token, clipped = value_loss(values, returns, batch.own(batch.values), self.config.clip)
                loss = (weights * per_token).sum()
                self._backward(loss * self.accelerator.num_processes, last)
            error, target = (returns - values.detach()).double(), returns.double()
            parts = (loss.detach().double(), clipped.double(), error, error**2, target, target**2)
            sums += torch.stack([part.sum() for part in parts])
        sums = self.accelerator.reduce(sums, reduction="sum")
        self._check("loss", float(sums[0]))
        rate = self.schedule.get_last_lr()[0]
        norm = self._update()
        self.steps += 1
        loss_sum, clipped_sum, *moments = sums.tolist()
        return {
            "critic/loss": loss_sum,
            "critic/explained_variance": _explained(tokens, *moments),
            "critic/grad_norm": norm,
            "critic/clipped": clipped_sum / tokens,
            "critic/learning_rate": rate,
        }

    def save(self, folder: Path) -> None:
        """``folder/critic``: what ``AutoModelForTokenClassification`` loads, with optimizer and schedule beside it."""
        target = folder / FOLDER
        leads = self.accelerator.is_main_process  # the others help to make weights whole, and keep none
        weights = {name: value.to("cpu", copy=True) for name, value in whole_weights(self.model) if leads}
        if self.is_deepspeed:
            self.wrapped.save_checkpoint(str(target / "deepspeed"), tag="state", client_state={"steps": self.steps})
        moments = None if self.is_deepspeed else get_optimizer_state_dict(self.model, self.optimizer, options=WHOLE)
        if not leads:
            return
        self.model.save_pretrained(target, state_dict=weights)
        self.tokenizer.save_pretrained(target)
        if not self.is_deepspeed:
            state = {"steps": self.steps, "optimizer": moments, "schedule": self.schedule.state_dict()}
            torch.save(state, target / "optimizer.pt")

    def load(self, folder: Path) -> None:
        """Go on as the critic that was saved would have; its weights are the model's already (``make_critic``)."""
        target = folder / FOLDER
        if self.is_deepspeed:
            _, state = self.wrapped.load_checkpoint(str(target / "deepspeed"), tag="state")
        else:
            state = torch.load(target / "optimizer.pt", map_location="cpu", weights_only=True)
            set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=WHOLE)
            self.schedule.load_state_dict(state["schedule"])
        self.steps = state["steps"]

    def _values(self, model: Any, batch: MicroBatch) -> torch.Tensor:
        batch = batch.to(self.accelerator.device)
        # Without a cache, as attention looks for boundaries in position_ids only then.
        output = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
        return batch.own(output.logits[..., 0].float())

    def _count(self, micro_batches: list[MicroBatch]) -> tuple[int, int]:
        """Own tokens over all processes, and the most micro-batches that any of them has."""
        mine = [sum(int(batch.policy_mask.sum()) for batch in micro_batches), len(micro_batches)]
        every = self.accelerator.gather(torch.tensor([mine], device=self.accelerator.device))
        return int(every[:, 0].sum()), int(every[:, 1].max())

    def _padded(self, micro_batches: list[MicroBatch], n: int) -> list[MicroBatch]:
        """As many as every other process runs: a collective operation waits for all of them."""
        none = np.zeros(2)
        (blank,) = pack([TrainSequence(none, none > 0, none, none, none, 0, none - 1)], max_tokens=2, pad_id=0)
        return [*micro_batches, *[blank] * (n - len(micro_batches))]

    def _backward(self, loss: torch.Tensor, last: bool) -> None:
        if self.is_deepspeed:
            self.wrapped.set_gradient_accumulation_boundary(last)
            self.wrapped.backward(loss, scale_wrt_gas=False)
        else:
            loss.backward()

    def _update(self) -> float:
        """Clip, step and schedule; the gradient's norm before clipping."""
        if self.is_deepspeed:
            self.wrapped.step()
            norm = float(self.wrapped.get_global_grad_norm())
            self._check("gradient norm", norm)
            return norm
        bound = self.config.optimizer.max_grad_norm or math.inf
        norm = float(whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), bound)))
        self._check("gradient norm", norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return norm

    def _check(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise UserError(
                f"the {what} of the critic's step {self.steps + 1} is {value}; the last checkpoint is untouched: lower "
                "critic.optimizer.learning_rate"
            )


def make_critic(
    config: ValueModelConfig,
    policy: Path | str,
    tokenizer: PreTrainedTokenizerFast,
    arguments: TrainingArguments,
    accelerator: Accelerator,
    *,
    total_steps: int,
    attention: str = "sdpa",
    resume: Path | None = None,
) -> Critic:
    """The critic of a run: out of the checkpoint ``resume``, else of ``critic.path``, else of the policy's checkpoint.

    ``tokenizer`` is the policy's; ``arguments`` and ``accelerator`` are the trainer's, which must exist by now.
    """
    path: Path | str = policy if config.path is None else config.path
    if resume is not None:
        path = resume / FOLDER
        if not path.exists():
            raise UserError(f"{resume} has no critic: it was trained without one; take critic=none, or another run_dir")
    elif config.path is not None:
        check_tokenizer(path, tokenizer)
    model = load_value_model(path, dtype=config.dtype, attention=attention)
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable(arguments.gradient_checkpointing_kwargs)
    critic = Critic(
        model, tokenizer, config, accelerator, total_steps=total_steps, deepspeed=arguments.deepspeed or None
    )
    if resume is not None:
        critic.load(resume)
    return critic


def adamw(model: torch.nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW as transformers.Trainer sets it up: no weight decay on vectors."""
    matrices: list[torch.nn.Parameter] = []
    vectors: list[torch.nn.Parameter] = []
    for parameter in model.parameters():
        whole = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 has flattened and sharded it
        (matrices if len(whole) > 1 else vectors).append(parameter)
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon)


def deepspeed_settings(given: dict[str, Any] | str, config: OptimizerConfig, *, bf16: bool) -> dict[str, Any]:
    """The policy's DeepSpeed settings as they are for the critic, which brings optimizer and schedule itself."""
    settings = json.loads(Path(given).read_text()) if isinstance(given, str) else given
    own = ("optimizer", "scheduler", "train_batch_size")
    kept = _without_auto({name: value for name, value in settings.items() if name not in own})
    if settings.get("bf16", {}).get("enabled") == "auto":
        kept["bf16"] = {**kept.get("bf16", {}), "enabled": bf16}
    return {
        **kept,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _without_auto(settings: Any) -> Any:
    """``auto`` is transformers' word; what it stood for is DeepSpeed's default."""
    if not isinstance(settings, dict):
        return settings
    return {name: _without_auto(value) for name, value in settings.items() if value != "auto"}


def _explained(n: int, error: float, error_squares: float, target: float, target_squares: float) -> float:
    variance = target_squares / n - (target / n) ** 2
    rest = error_squares / n - (error / n) ** 2
    # A variance below the rounding of its own terms is none.
    return 1 - rest / variance if variance > 1e-12 * target_squares / n else 0.0
