"""Low-rank adapters by peft, and weights as everything outside training knows them: merged, with plain names.

Engines take these too, or the adapter alone, in the folder that peft saves.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rollout.engines.weight_files import roomy_folder
from rollout.errors import UserError
from training.settings import LoraConfig
from training.sharding import gathered, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def add_adapter(model: PreTrainedModel, config: LoraConfig, adapter: Path | None) -> Any:
    """Freeze the model and give it an adapter: a new one, or the one saved in ``adapter``."""
    from peft import LoraConfig as PeftConfig
    from peft import PeftModel, get_peft_model

    if adapter is not None:
        return PeftModel.from_pretrained(model, adapter, is_trainable=True)
    settings = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.target_modules,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, settings)


def base_model(model: Any) -> PreTrainedModel:
    """The transformers model, without an adapter around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def merged_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight once, under transformers' names, adapters added in. The model itself is left alone.

    Merging in place and back would leave a rounding error in the frozen weights at every sync. What other processes
    hold a part of is made whole, one weight after the other: they must all ask.
    """
    for name, parameter, module in plain_parameters(model):
        with gathered([parameter, *(() if module is None else module.parameters())]):
            value = whole(parameter)
            if module is not None:
                for adapter in module.active_adapters:
                    value = value + whole(module.get_delta_weight(adapter)).to(value.dtype)
            yield name, value


def plain_parameters(model: Any) -> Iterator[tuple[str, torch.nn.Parameter, Any]]:
    """Every weight once, as this process holds it: transformers' name, the parameter, the adapted layer it is of."""
    base = base_model(model)
    adapted = {}
    if base is not model:
        from peft.tuners.lora import LoraLayer

        adapted = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    for name, parameter in base.named_parameters():  # yields shared tensors once: a tied head is left out
        if ".lora_" in name or "lora_embedding" in name:
            continue
        merges = ".base_layer." in name and name.endswith(".weight")
        module = adapted.get(name.rsplit(".base_layer.", 1)[0]) if merges else None
        yield name.replace(".base_layer.", "."), parameter, module


@torch.no_grad()
def adapter_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The adapter's own weights, whole; none without one."""
    if base_model(model) is model:
        return
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with gathered([parameter]):
                yield name, whole(parameter)


@contextlib.contextmanager
def adapter_folder(model: Any) -> Iterator[Path]:
    """The adapter as peft saves it, in shared memory where there is room; gone afterwards.

    The other processes that hold a part of it must exhaust ``adapter_weights`` meanwhile.
    """
    weights = dict(adapter_weights(model))
    with tempfile.TemporaryDirectory(prefix="turnstile-", dir=roomy_folder()) as folder:
        model.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
        yield Path(folder)


def served_modules(model: Any) -> list[str]:
    """The names of the layers with adapters, each once and without its path; refuses what vLLM cannot compute.

    Embeddings and the head are left out although vLLM knows them: its prompt log-probs, which the gate reads, do not.
    """
    from peft.tuners.lora import LoraLayer

    base = base_model(model)
    layers = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    head = base.get_output_embeddings()
    names: dict[bool, set[str]] = {True: set(), False: set()}
    for name, layer in layers.items():
        served = isinstance(layer.get_base_layer(), torch.nn.Linear) and layer is not head
        names[served].add(name.rpartition(".")[2])
    if names[False]:
        raise UserError(
            f"lora.target_modules: {', '.join(sorted(names[False]))} cannot have an adapter in the engine; "
            "name linear layers inside the decoder, or take lora.sync=merged"
        )
    return sorted(names[True])
