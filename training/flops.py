"""Floating-point operations that training needs, and what a device could do in the time."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from training.lora import base_model
from training.packing import MicroBatch

# Dense bf16 FLOP/s by NVIDIA's data sheets, without sparsity; the first name that matches as a word of the device's.
PEAKS = {
    "B200": 2250e12,
    "GH200": 989.4e12,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "L40S": 362.05e12,
    "RTX 4090": 165.2e12,
}


def peak_flops(device: str) -> float | None:
    """Dense bf16 FLOP/s of a device by ``torch.cuda.get_device_name``; None for one that the table has not."""
    return next((peak for name, peak in PEAKS.items() if re.search(rf"\b{name}\b", device)), None)


@dataclass(frozen=True)
class TrainingWork:
    """What a token costs in a dense decoder.

    ``trained`` and ``frozen`` count the parameters in matrix products outside the head, ``head`` and ``trained_head``
    those of the head; the table of embeddings is only looked up. ``attention``: layers × heads × head_dim.
    """

    trained: int
    frozen: int
    head: int
    trained_head: bool
    attention: int

    @classmethod
    def of(cls, model: Any) -> TrainingWork | None:
        """Count a model that is about to be trained; None for mixtures of experts and for other attention than full."""
        base = base_model(model)
        config = base.config.get_text_config()
        experts = any(getattr(config, name, 0) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        heads = getattr(config, "num_attention_heads", None)
        if experts or kinds != {"full_attention"} or heads is None:
            return None
        tables = {id(table.weight) for table in (base.get_input_embeddings(), base.get_output_embeddings())}
        head = base.get_output_embeddings().weight
        sizes = {True: 0, False: 0}
        for parameter in base.parameters():
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 has flattened and sharded it
            if len(shape) > 1 and id(parameter) not in tables:
                sizes[parameter.requires_grad] += shape.numel()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(
            trained=sizes[True],
            frozen=sizes[False],
            head=getattr(head, "ds_shape", head.shape).numel(),
            trained_head=head.requires_grad,
            attention=config.num_hidden_layers * heads * head_dim,
        )

    def matrix_flops(self, tokens: int, targets: int) -> float:
        """Forward and backward of the matrix products: 6 a trained parameter and token, 4 a frozen one.

        A frozen matrix passes a gradient on but gets none. The head works on ``targets`` alone, the tokens with a loss.
        """
        head = (6.0 if self.trained_head else 4.0) * self.head * targets
        return (6.0 * self.trained + 4.0 * self.frozen) * tokens + head

    def attention_flops(self, lengths: Iterable[int]) -> float:
        """Forward and backward of causal attention over sequences of these lengths: 6 · layers · width · length².

        Half of what every position on every other would cost (PaLM, arXiv 2204.02311, appendix B: 12 · L · H · Q · T a
        token), as the mask leaves half.
        """
        return 6.0 * self.attention * sum(length**2 for length in lengths)

    def flops(self, micro_batches: Iterable[MicroBatch]) -> float:
        """Of one pass of training over micro-batches. What checkpointing computes again is not counted, nor padding."""
        total = 0.0
        for batch in micro_batches:
            _, lengths = batch.sequence_ids[batch.sequence_ids >= 0].unique(return_counts=True)
            total += self.matrix_flops(int(lengths.sum()), int(batch.policy_mask.sum()))
            total += self.attention_flops(lengths.tolist())
        return total


def rates(tokens: float, flops: float | None, seconds: float, peak: float | None) -> dict[str, float]:
    """Of an optimizer step of so many seconds: tokens and FLOPs per second, and the share of the device's peak, MFU."""
    found = {"train/tokens_per_second": tokens / seconds}
    if flops is not None:
        found["train/flops"] = flops / seconds
        if peak is not None:
            found["train/mfu"] = flops / seconds / peak
    return found
