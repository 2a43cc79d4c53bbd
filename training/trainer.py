"""One algorithm-blind loop on transformers.Trainer: a step is one optimizer step over a list of packed micro-batches.

The trainer owns the loop over micro-batches and tells accelerate which is the last; it sees tokens, advantages,
weights and a policy mask, never the algorithm.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rollout.errors import UserError
from rollout.scheduling.files import LATENCIES
from training import checkpoint
from training.callbacks import UpdateCallback
from training.corrections import Correction, Stats
from training.critic import Critic
from training.flops import TrainingWork, peak_flops, rates
from training.head import token_logprobs
from training.losses import PolicyLoss
from training.objective import means, policy_objective, reduce
from training.packing import MicroBatch
from training.ranks import Ranks
from training.stream import RolloutStream, StepBatch
from training.timing import remaining


@dataclass
class Objective:
    """The loss of a token and what it is measured against. ``reference`` gives no-gradient log-probs for the KL."""

    loss: PolicyLoss
    correction: Correction
    recomputed: bool
    kl_coef: float = 0.0
    kl_unbiased: bool = True
    reference: Callable[[MicroBatch], torch.Tensor] | None = None


class RolloutTrainer(Trainer):
    """Trains the policy on a ``RolloutStream``; ``checkpoints`` is the folder that ``step-N`` folders go to."""

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        tokenizer: PreTrainedTokenizerBase,
        objective: Objective,
        checkpoints: Path,
        keep_last: int,
        callbacks: list[TrainerCallback],
        ranks: Ranks,
    ) -> None:
        super().__init__(model=model, args=args, processing_class=tokenizer, callbacks=callbacks)
        self.remove_callback(PrinterCallback)
        self.add_callback(UpdateCallback(self._updated))
        self.work = TrainingWork.of(model)
        self._scored: list[torch.Tensor] = []
        self.objective = objective
        self.critic: Critic | None = None  # set by the builder: it takes the trainer's devices and processes
        self.checkpoints, self.keep_last, self.ranks = checkpoints, keep_last, ranks
        self.stream: RolloutStream | None = None  # set by the builder, on rank 0: it in turn calls back for weights
        self.steps: Iterator[StepBatch] | None = None  # set by the builder: this rank's part of each of the stream's
        self._metrics: dict[str, float] = {}
        self._start = self._step_end = time.monotonic()

    def create_accelerator_and_postprocess(self) -> None:
        """Also FSDP2 on CPUs, which accelerate has but does not choose there."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp_plugin_args is not None and not self.is_fsdp_enabled:
            state = self.accelerator.state
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            state.distributed_type = PartialState().distributed_type = DistributedType.FSDP  # the one is read anew
            self.is_fsdp_enabled = True

    def get_train_dataloader(self) -> Iterator[StepBatch]:
        """The stream itself: no prefetching, so that a step's rollouts are made after the step before it."""
        if self.steps is None:
            raise ValueError("set trainer.steps before train()")
        return self.steps

    def training_step(
        self, model: torch.nn.Module, inputs: StepBatch, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Forward and backward of all micro-batches; the gradient is that of the sum of their losses over all ranks."""
        start = time.monotonic()
        critic = self._train_critic(inputs["critic"])
        trained = time.monotonic()
        model.train()
        micro_batches, anchors = inputs["micro_batches"], inputs["anchors"]
        total = torch.zeros((), device=self.args.device)
        stats = []
        self._scored = []
        for i, micro_batch in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            self.accelerator.gradient_state._set_sync_gradients(last)
            waits = not last and not self.is_deepspeed_enabled
            with self.accelerator.no_sync(model) if waits else contextlib.nullcontext():
                with self.compute_loss_context_manager():
                    anchor = None if anchors is None else anchors[i].to(self.args.device)
                    loss, part = self._loss(model, micro_batch.to(self.args.device), anchor)
                # Data-parallel wrappers average gradients over processes; our weights already divide by all tokens.
                scale = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
                self.accelerator.backward(loss * self.accelerator.num_processes, **scale)
            total += loss.detach()
            stats.append(part)
        self.accelerator.gradient_state._set_sync_gradients(True)
        total = self.accelerator.reduce(total, reduction="sum")
        if not math.isfinite(total.item()):
            raise UserError(
                f"the loss of step {self.state.global_step + 1} is {total.item()}; the last checkpoint is untouched: "
                "lower optimizer.learning_rate or look at mismatch_max in metrics.jsonl"
            )
        if inputs["metrics"]:  # the first step of a round: the policy is still the one that sampled
            self.stream.on_scored(micro_batches, self._scored)
        now = self._trained = time.monotonic()
        self._metrics = inputs["metrics"] | critic
        self._metrics |= {"time/train": now - trained, "time/step": now - self._step_end}
        if self.critic is not None:
            self._metrics["time/critic"] = trained - start
        self._tokens = sum(int((batch.sequence_ids >= 0).sum()) for batch in micro_batches)
        self._flops = None if self.work is None else self.work.flops(micro_batches)
        if stats:
            policy = means(reduce(self._of_all_ranks(reduce(stats))))
            del policy["loss"]  # Trainer logs it
            self._metrics |= {f"policy/{name}": value for name, value in policy.items()}
        return total

    def _of_all_ranks(self, stats: Stats) -> list[Stats]:
        """By rank: their sums in one message."""
        if self.ranks.size == 1:
            return [stats]
        mine = torch.stack([value.to(self.args.device) for value in stats.values()])
        every = self.accelerator.gather(mine).view(self.ranks.size, -1)
        return [dict(zip(stats, row, strict=True)) for row in every]

    def _train_critic(self, steps: list[list[MicroBatch]]) -> dict[str, float]:
        """The value model's steps, before the policy's: their gradients are gone when those of the policy come."""
        metrics: dict[str, float] = {}
        if self.critic is not None:
            for step in steps:
                metrics |= self.critic.step(step)
        return metrics

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Also the last look before the optimizer's step: a finite loss can have gradients that are not."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not math.isfinite(float(norm)):
            raise UserError(
                f"the gradient norm of step {self.state.global_step + 1} is {float(norm)}; the last checkpoint is "
                "untouched: lower optimizer.learning_rate or look at mismatch_max in metrics.jsonl"
            )
        return norm

    def _loss(
        self, model: torch.nn.Module, micro_batch: MicroBatch, anchor: torch.Tensor | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logprobs, entropy = token_logprobs(model, micro_batch)
        self._scored.append(logprobs.detach() if anchor is None else anchor)
        objective = self.objective
        if objective.recomputed and anchor is None:
            anchor = logprobs.detach()  # the only step of its round: the policy is still the one that sampled
        return policy_objective(
            logprobs,
            entropy,
            micro_batch,
            loss=objective.loss,
            correction=objective.correction,
            anchor_logprobs=anchor,
            reference_logprobs=objective.reference(micro_batch) if objective.reference else None,
            kl_coef=objective.kl_coef,
            kl_unbiased=objective.kl_unbiased,
        )

    @torch.no_grad()
    def logprobs(self, micro_batches: list[MicroBatch]) -> list[torch.Tensor]:
        """The trainer's own log-probs of the policy's tokens: what ``anchor=recomputed`` measures ratios against."""
        training = self.model_wrapped.training
        self.model_wrapped.eval()  # no dropout: it would be another policy
        try:
            with self.compute_loss_context_manager():
                return [token_logprobs(self.model_wrapped, m.to(self.args.device))[0].cpu() for m in micro_batches]
        finally:
            self.model_wrapped.train(training)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what the stream and the objective measured to each step's row."""
        if "loss" in logs:
            self._step_end = time.monotonic()
            logs = {**logs, **self._metrics, "time/elapsed": self._step_end - self._start}
            logs |= {"time/other": remaining(logs)} | self._rates(logs["time/train"])
        super().log(logs, start_time)
        del self.state.log_history[:-1]  # goes into every checkpoint; metrics.jsonl has it all

    def _updated(self) -> None:
        """The optimizer's own step belongs to training."""
        seconds = time.monotonic() - self._trained
        for name in ("time/train", "time/step"):
            self._metrics[name] += seconds

    def _rates(self, seconds: float) -> dict[str, float]:
        """How fast the last step trained, on this process's device."""
        device = self.args.device
        peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        return rates(self._tokens, self._flops, seconds, peak)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Everything that a run is, whole or not at all: written beside its place and renamed into it.

        Every rank writes its part of what is sharded, and its random numbers; rank 0 all the rest.
        """
        ranks = self.ranks
        step = self.state.global_step
        with contextlib.ExitStack() as stack:
            folder = ranks.agree(
                stack.enter_context(checkpoint.writing(self.checkpoints, step, self.keep_last)) if ranks.leads else None
            )
            try:
                with ranks.waiting("the others' parts of a checkpoint"):
                    self._write(folder)
                    ranks.gather(None)
            except UserError:  # rank 0 may have given the checkpoint up while this one still wrote
                shutil.rmtree(folder, ignore_errors=True)
                raise
            except checkpoint.UNWRITTEN as error:
                if ranks.size == 1:
                    raise
                # At once: the others may wait for this rank in the middle of their part, and end when it does.
                rank, cause = checkpoint.first_cause(error, ranks.rank)
                text = checkpoint.unwritten(self.checkpoints / f"step-{step}", cause)
                raise UserError(f"rank {rank}: {text}") from error

    def _write(self, folder: Path) -> None:
        policy = self.accelerator.unwrap_model(self.model)
        checkpoint.save_policy(policy, self.processing_class, folder if self.ranks.leads else None)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_rng_state(str(folder))
        if self.critic is not None:
            self.critic.save(folder)
        if not self.ranks.leads:
            return
        self._save_scaler(str(folder))
        self.state.save_to_json(str(folder / "trainer_state.json"))
        torch.save(self.stream.state_dict(), folder / "stream.pt")
        if (history := self.stream.axes.budget.history) is not None:  # for other runs; this one has it in stream.pt
            history.write(folder)
        latencies = self.checkpoints.with_name(LATENCIES)
        if latencies.exists():  # kept up to date by the engine's scheduler; serving starts from them
            shutil.copy(latencies, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """The model was built from the checkpoint's own folder; only a sharded one must read it again."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
