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
def respects_boundaries(model: torch.nn.Module, vocab_size: int, *, rows: int = 1, tolerance: float = 1e-3) -> bool:
    """Whether packed sequences have the log-probs that they have alone: a probe of 46 random tokens a row.

    False for models that ignore ``position_ids`` (run those with ``row_tokens=1``), and for variable-length attention
    with ``rows`` above 1 (run that with one row a micro-batch). ``tolerance`` in nats: rounding of the model's dtype
    stays below it, attention across a boundary does not.
    """
    generator = np.random.default_rng(0)
    sequences = [_probe_sequence(generator, index, vocab_size) for index in range(2 * rows)]
    device = next(model.parameters()).device
    row_tokens = 2 * len(sequences[0])
    (packed,) = pack(sequences, max_tokens=rows * row_tokens, row_tokens=row_tokens, pad_id=0)
    was_training = model.training
    model.eval()
    together = token_logprobs(model, packed.to(device))[0]
    alone = {}
    for sequence in sequences:
        (batch,) = pack([sequence], max_tokens=row_tokens, pad_id=0)
        alone[sequence.index] = token_logprobs(model, batch.to(device))[0]
    model.train(was_training)
    order = dict.fromkeys(packed.own(packed.sequence_ids).tolist())
    return bool((together - torch.cat([alone[index] for index in order])).abs().max() <= tolerance)


def _probe_sequence(generator: np.random.Generator, index: int, vocab_size: int, length: int = 23) -> TrainSequence:
    zeros = np.zeros(length)
    own = np.arange(length) > 0
    ids = generator.integers(0, vocab_size, length)
    return TrainSequence(ids, own, zeros, zeros, zeros, index, np.where(own, 0, -1))
