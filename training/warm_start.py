"""Supervised warm start on a task's demonstrations, by trl.SFTTrainer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rollout.chat import Chat
from rollout.errors import UserError
from rollout.tasks import Demonstration
from training.head import attach_head, token_logprobs
from training.packing import MicroBatch, TrainSequence, pack
from training.settings import SftConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def tokenised(chat: Chat, demonstrations: Iterable[Demonstration], max_length: int) -> list[dict[str, Any]]:
    """Rows for SFTTrainer: the ids that the agent loop would have built, and a weight for each own token."""
    rows = []
    for demonstration in demonstrations:
        ids, own = chat.demonstration(demonstration.messages, demonstration.tools)
        if len(ids) <= max_length:
            rows.append({"input_ids": ids, "loss_weights": [demonstration.weight * mine for mine in own]})
    if not rows:
        raise UserError(f"warm_start.max_length: no demonstration is as short as {max_length} tokens; raise it")
    return rows


def collate(rows: list[dict[str, Any]], pad_id: int, row_tokens: int) -> dict[str, torch.Tensor]:
    """One packed batch, as the fields of a ``MicroBatch``: short rows hold several demonstrations each."""
    sequences = []
    for index, row in enumerate(rows):
        weights = np.array(row["loss_weights"])
        zeros = np.zeros(len(weights))
        ids, own = np.array(row["input_ids"]), weights > 0
        sequences.append(TrainSequence(ids, own, zeros, zeros, weights, index, np.where(own, 0, -1)))
    longest = max(row_tokens, *map(len, sequences))
    (batch,) = pack(sequences, max_tokens=longest * len(sequences), row_tokens=longest, pad_id=pad_id)
    return {field.name: getattr(batch, field.name) for field in fields(batch)}


def weighted_loss(
    model: torch.nn.Module,
    inputs: dict[str, torch.Tensor],
    mean: Callable[[torch.Tensor], torch.Tensor] = lambda normaliser: normaliser,
) -> torch.Tensor:
    """Cross-entropy of own tokens under one joint normaliser: sum of weight x loss over the sum of weights.

    ``mean`` of the normaliser over processes: the mean of their losses is then that of the whole batch.
    """
    batch = MicroBatch(**inputs)
    weights = batch.own(batch.weights)
    return -(weights * token_logprobs(model, batch)[0]).sum() / mean(weights.sum())


def warm_start(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    demonstrations: Iterable[Demonstration],
    config: SftConfig,
    work_dir: Path,
    seed: int,
    progress: Callable[[int, dict[str, float]], None],
) -> None:
    """Train ``model`` in place. ``progress(step, logs)`` is called as it goes."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import SFTConfig as Arguments
    from trl import SFTTrainer

    class Progress(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            progress(state.global_step, logs or {})

    class WeightedSftTrainer(SFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss = weighted_loss(model, inputs, lambda n: self.accelerator.reduce(n, reduction="mean"))
            if not torch.isfinite(loss):
                step = self.state.global_step + 1
                raise UserError(f"the loss of warm-start step {step} is {loss.item()}; lower warm_start.learning_rate")
            return loss

        def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
            if config.optimizer == "muon" and self.optimizer is None:
                from training.muon import Muon

                self.optimizer = Muon(self.model, lr=config.learning_rate, adam_lr=config.learning_rate)
            return super().create_optimizer(model)

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if config.batch_size % processes:
        raise UserError(
            f"warm_start.batch_size: {config.batch_size} is no multiple of {processes} processes; make it so"
        )
    attach_head(model)
    rows = tokenised(Chat(tokenizer), demonstrations, config.max_length)
    arguments = Arguments(
        output_dir=str(work_dir),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,  # of all processes, which split it
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        lr_scheduler_type="cosine",
        weight_decay=0.0,
        max_length=None,
        seed=seed,
        data_seed=seed,
        use_cpu=not torch.cuda.is_available(),
        accelerator_config={"split_batches": processes > 1},
        ddp_find_unused_parameters=False,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        logging_steps=10,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = WeightedSftTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        data_collator=lambda batch: collate(batch, tokenizer.pad_token_id, config.row_tokens),
        callbacks=[Progress()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
