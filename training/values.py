"""Value models on disk: token classification with one label, out of a policy's checkpoint or out of their own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from rollout.checkpoint import first_line
from rollout.errors import UserError
from training.models import check_checkpoint
from training.sharding import gathered

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def load_value_model(path: str | Path, *, dtype: str = "float32", attention: str = "sdpa") -> PreTrainedModel:
    """The trunk of any checkpoint, policies included, with a head that gives V of the state after each token.

    A head that the checkpoint has is kept; what it lacks of one begins at zero, so that every value is 0. Dropout is
    off. A missing or corrupt file, or a model that has no token-classification class, is a UserError.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForTokenClassification

    check_checkpoint(path, ("config.json",))
    try:
        config = AutoConfig.from_pretrained(path, num_labels=1)
        _without_dropout(config)
        model, loading = AutoModelForTokenClassification.from_pretrained(
            path, config=config, dtype=dtype, attn_implementation=attention, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path}: cannot make a value model of it: {first_line(error)}") from error
    missing = set(loading["missing_keys"])
    if trunk := sorted(name for name in missing if name.startswith(f"{model.base_model_prefix}.")):
        raise UserError(f"{path} lacks {trunk[0]}: not a whole checkpoint; copy it again or give another folder")
    head = [parameter for name, parameter in model.named_parameters() if name in missing]
    with torch.no_grad(), gathered(head, changed=True):
        for parameter in head:
            parameter.zero_()
    return model


def check_tokenizer(path: str | Path, policy: PreTrainedTokenizerFast) -> None:
    """Refuse a value model that reads other token ids than the policy writes."""
    from transformers import AutoTokenizer

    check_checkpoint(path, ("config.json", "tokenizer_config.json"))
    try:
        theirs, ours = AutoTokenizer.from_pretrained(path).get_vocab(), policy.get_vocab()
    except (OSError, ValueError) as error:
        raise UserError(f"critic.path: {path} has no usable tokenizer ({first_line(error)}); save one there") from error
    if theirs != ours:
        differing = len({token for token, _ in theirs.items() ^ ours.items()})
        raise UserError(
            f"critic.path: the tokenizer of {path} is not the policy's ({differing} tokens differ); give a model with "
            "the policy's tokenizer, or null for the policy's own weights"
        )


def _without_dropout(config: Any) -> None:
    """Values are regressed and compared token by token: two passes of one model must agree."""
    config.classifier_dropout = 0.0  # transformers takes 0.1 where a configuration says nothing
    for name, value in config.to_dict().items():
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)


class HeadlessProbe(torch.nn.Module):
    """A value model as ``head.respects_boundaries`` asks a policy: its head may be zero and say nothing, so that a
    feature of the trunk stands for a log-prob."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, **unused: Any) -> SimpleNamespace:
        # By way of the whole model: FSDP must see its root first.
        inputs = {"input_ids": input_ids, "position_ids": position_ids}
        feature = self.model(**inputs, use_cache=False, output_hidden_states=True).hidden_states[-1][..., 0].float()
        return SimpleNamespace(log_probs=feature, entropy=feature)
