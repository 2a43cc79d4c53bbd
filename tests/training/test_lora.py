"""Adapters as the rest of the world sees them: merged weights under plain names."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from training.checkpoint import save_policy
from training.lora import add_adapter, base_model, merged_weights
from training.models import build_tiny, load_policy
from training.policy_weights import PolicyWeights
from training.settings import LoraConfig


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"hidden": 32, "mlp": 48, "heads": 2, "head_dim": 16}
    return build_tiny(tmp_path_factory.mktemp("base"), ["1 + 2 = 3"] * 4, tied=request.param, **shape)


def adapted(folder: Path) -> tuple[Any, Any]:
    """A model whose adapter has been trained: both its factors are far from nothing."""
    model, tokenizer = load_policy(folder)
    model = add_adapter(model, LoraConfig(rank=4, alpha=8), None)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lora_" in name)
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.2, generator=generator)
    return model, tokenizer


def test_merged_weights_equal_pefts_own_merge_and_leave_the_model_alone(folder: Path) -> None:
    model, _ = adapted(folder)
    before = copy.deepcopy(model.state_dict())
    ours = dict(merged_weights(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    plain, _ = load_policy(folder)
    theirs = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    assert list(ours) == list(theirs) == [name for name, _ in plain.named_parameters()]
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value.detach(), rtol=0, atol=1e-6)
        moved = (ours[name] - plain.get_parameter(name)).abs().max() > 0.01
        assert moved == name.endswith("proj.weight"), name


@pytest.mark.parametrize("adapter", [True, False])
def test_what_weights_will_be_is_known_before_they_are_read(folder: Path, adapter: bool) -> None:
    model = adapted(folder)[0] if adapter else load_policy(folder, dtype="bfloat16")[0]
    weights = PolicyWeights(model)
    for _ in range(2):  # a stream that can be read again
        assert weights.metadata() == [(name, value.dtype, tuple(value.shape)) for name, value in weights]
    assert ("lm_head.weight" in dict(weights)) is not base_model(model).config.tie_word_embeddings


def test_without_an_adapter_the_weights_are_the_models_own(folder: Path) -> None:
    model, _ = load_policy(folder)
    assert base_model(model) is model
    for (name, value), (own_name, own) in zip(merged_weights(model), model.named_parameters(), strict=True):
        assert name == own_name and value.data_ptr() == own.data_ptr() and not value.requires_grad


def test_a_saved_policy_is_an_ordinary_folder_with_its_adapter_beside_it(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = adapted(folder)
    save_policy(model, tokenizer, tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
        base, _ = load_policy(folder)
        resumed = add_adapter(base, LoraConfig(rank=4, alpha=8), tmp_path / "adapter")
        assert any(parameter.requires_grad for parameter in resumed.parameters())
        torch.testing.assert_close(resumed.eval()(input_ids=ids).logits, expected, rtol=0, atol=1e-6)
