"""Log-probs and entropy of packed tokens, without a (tokens x vocabulary) tensor, and the gate that packing is safe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rollout.errors import UserError
from training.packing import IGNORED, MicroBatch, TrainSequence, pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attach_head(model: PreTrainedModel, *, temperature: float = 1.0) -> None:
    """Give ``model`` TRL's fused head, once and before PEFT wraps it. Without its keyword the forward stays as it was.

    ``temperature`` is the one that the rollouts sample at: the head divides logits by it in every later call.
    """
    from trl.trainer.utils import add_fused_lm_head

    if not temperature > 0:
        raise UserError(f"sampling.temperature: {temperature} must be above 0 in training; 1 is usual")
    add_fused_lm_head(model, temperature=temperature, outputs=("log_probs", "entropy"))


def token_logprobs(
    model: torch.nn.Module, batch: MicroBatch, *, every_target: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the policy's own tokens and entropies where they were drawn, both flat (n,) float32, in nats.

    In the order of ``batch.own``, at the temperature of ``attach_head``. ``every_target`` takes injected tokens too,
    in the order of ``batch.targets != -100``. The model sees each sequence by itself through ``position_ids``.
    """
    mask = batch.targets != IGNORED if every_target else batch.policy_mask
    output: Any = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        shift_labels=batch.targets.masked_fill(~mask, IGNORED),
        fused_lm_head=True,
    )
    return output.log_probs[mask], output.entropy[mask]


@torch.no_grad()
def respects_boundaries(model: torch.nn.Module, vocab_size: int, *, rows: int = 1) -> bool:
    """Whether sequences packed two a row have the log-probs that they have alone: a probe of random tokens.

    False for models that ignore ``position_ids`` (run those with ``row_tokens=1``), and for variable-length attention
    with ``rows`` above 1 (run that with one row a micro-batch). The yardstick is what the second sequence's log-probs
    become when it does see the first: packing may move them by a quarter of that, which bfloat16 stays below and any
    leak across the boundary does not.
    """
    generator, length = np.random.default_rng(0), 23
    tokens = generator.integers(0, vocab_size, (rows, 2 * length))
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()

    def logprobs(sequences: list[TrainSequence]) -> torch.Tensor:
        (batch,) = pack(sequences, max_tokens=rows * 2 * length, row_tokens=2 * length, pad_id=0)
        return token_logprobs(model, batch.to(device))[0].reshape(-1, length - 1)

    halves = tokens.reshape(2 * rows, length)
    together = logprobs([_probe(ids, 0, index) for index, ids in enumerate(halves)])[1::2]
    alone = torch.cat([logprobs([_probe(ids, 0, 0)]) for ids in halves[1::2]])
    leaked = torch.cat([logprobs([_probe(ids, length, 0)]) for ids in tokens])
    model.train(was_training)
    return bool((together - alone).abs().mean() <= 0.25 * (leaked - alone).abs().mean())


def _probe(ids: np.ndarray, prompt: int, index: int) -> TrainSequence:
    """A sequence whose tokens after position ``prompt`` are the policy's own."""
    zeros = np.zeros(len(ids))
    return TrainSequence(ids, np.arange(len(ids)) > prompt, zeros, zeros, zeros, index, zeros)
