"""The numbers of a dense decoder that its memory and its arithmetic follow from, counted on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rollout.errors import UserError


@dataclass(frozen=True)
class Shape:
    """A dense decoder's numbers. ``parameters`` counts a tied head once; ``adapter`` is LoRA's own, 0 without it."""

    hidden: int
    layers: int
    query: int  # heads × head_dim
    key: int  # key-value heads × head_dim
    heads: int
    mlp: int
    vocabulary: int
    qk_norm: bool
    parameters: int
    layer_parameters: int
    adapter: int = 0
    rank: int = 0
    tied: bool = False

    @property
    def layer_matrices(self) -> int:
        """Parameters of a layer's linears: all but the gains of its norms."""
        return self.layer_parameters - 2 * self.hidden - (2 * self.query // self.heads if self.qk_norm else 0)


def build_shape(architecture: dict[str, Any], *, lora: dict[str, Any] | None = None) -> Shape:
    """Count a model of this ``config.json`` on the meta device; ``lora`` holds peft.LoraConfig's keywords.

    Raises UserError for an unknown ``model_type`` and for mixtures of experts, which these formulas do not cover.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.for_model(**architecture)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"model.architecture: {str(error).splitlines()[0]}; give the numbers of config.json") from error
    if getattr(config, "num_experts", 0) or getattr(config, "num_local_experts", 0):
        raise UserError("dry_run: plans dense models only, this one has experts; run without dry_run=true")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        total = sum(p.numel() for p in model.parameters())
        names = {name for name, _ in model.named_parameters()}
        layer = sum(p.numel() for name, p in model.named_parameters() if ".layers.0." in name)
        adapter = 0
        if lora is not None:
            from peft import LoraConfig, get_peft_model

            adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
            adapter = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        query=heads * head_dim,
        key=(getattr(config, "num_key_value_heads", None) or heads) * head_dim,
        heads=heads,
        mlp=config.intermediate_size,
        vocabulary=config.vocab_size,
        qk_norm=any(".q_norm." in name for name in names),
        parameters=total,
        layer_parameters=layer,
        adapter=adapter,
        rank=lora["r"] if lora else 0,
        tied=bool(config.tie_word_embeddings),
    )
