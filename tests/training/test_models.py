from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rollout.errors import UserError
from rollout.tasks.arithmetic import Arithmetic
from training.models import build_tiny, load_policy, load_tokenizer

CORPUS = ["What is 12 + 34?", '{"name": "calculator", "arguments": {"expression": "12+34"}}'] * 50


def tiny(folder: Path, **settings: object) -> Path:
    return build_tiny(folder, CORPUS, **{"hidden": 32, "layers": 1, "heads": 2, "head_dim": 16, "mlp": 64, **settings})  # type: ignore[arg-type]


def test_the_default_shape_is_that_of_the_study(tmp_path: Path) -> None:
    model, tokenizer = load_policy(build_tiny(tmp_path, Arithmetic().corpus()))
    assert 0.35e6 < model.num_parameters() < 0.5e6 and model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer) <= 512
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) == "<|im_end|>"
    assert tokenizer.convert_ids_to_tokens(tokenizer.pad_token_id) == "<|endoftext|>"
    assert "reasoning" in tokenizer.chat_template


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_is_a_function_of_its_arguments(tmp_path: Path, tied: bool) -> None:
    state = torch.random.get_rng_state()
    one, same, other = (tiny(tmp_path / name, tied=tied, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert torch.equal(torch.random.get_rng_state(), state)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (one / name).read_bytes() == (same / name).read_bytes()
    assert (one / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()
    model, _ = load_policy(one)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


def test_digits_and_line_ends_stand_alone_and_boilerplate_is_whole(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny(tmp_path))
    ids = tokenizer('What is 12 + 3?\n<think>\n{"name": "calculator", "arguments": {"expression": "')["input_ids"]
    pieces = [tokenizer.decode([i]) for i in ids]
    assert pieces == ["What is ", "1", "2", " + ", "3", "?", "\n", "<think>", "\n", pieces[-1]]
    text = "naïve 漢字 <|im_start|> \t x"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_vocabulary_without_room_for_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.vocabulary: 100 is too small.*at least 265"):
        tiny(tmp_path, vocab=100)


def test_missing_checkpoints_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such checkpoint"):
        load_policy(tmp_path / "nowhere")
    with pytest.raises(UserError, match="outputs/run/step-3: no such checkpoint"):
        load_policy("outputs/run/step-3")
    for name, words in (
        ("config.json", r"has no config\.json"),
        ("tokenizer_config.json", r"has no tokenizer_config\.json"),
        ("model.safetensors", r"has no weights \(no \*\.safetensors\)"),
        ("tokenizer.json", r"tokenizer"),
    ):
        folder = tiny(tmp_path / name)
        (folder / name).unlink()
        with pytest.raises(UserError, match=words) as error:
            load_policy(folder)
        assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "weights")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        load_policy(folder)
    weights.write_bytes(b"")
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        load_policy(folder)
    for name in ("config.json", "tokenizer.json"):
        folder = tiny(tmp_path / name)
        (folder / name).write_text((folder / name).read_text()[:-20])
        with pytest.raises(UserError, match=rf"{name} is damaged"):
            load_policy(folder)


def test_unknown_models_and_missing_templates_are_one_line(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "type")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "qwen99"}))
    with pytest.raises(UserError, match="qwen99") as error:
        load_policy(folder)
    assert "\n" not in str(error.value)
    folder = tiny(tmp_path / "template")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        load_policy(folder)
