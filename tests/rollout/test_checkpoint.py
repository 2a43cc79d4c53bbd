"""What is read from a checkpoint folder, and one clear line for each way in which it can be broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rollout.checkpoint import read
from rollout.errors import UserError

TOKENS = [{"content": "<think>"}, {"content": "</think>"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": TOKENS}))
    (folder / "tokenizer_config.json").write_text('{"chat_template": "from the config"}')
    save_file(
        {"w": torch.zeros(3, 4), "empty": torch.zeros(0)}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    return folder


def shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = {"weight_map": {"w": "a.safetensors", "v": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_whole_checkpoint(folder: Path) -> None:
    checkpoint = read(str(folder))
    assert checkpoint.path == folder.resolve()
    assert (checkpoint.model_type, checkpoint.template) == ("qwen3", "from the config")
    assert checkpoint.added_tokens == {"<think>", "</think>"}


def test_template_file_comes_first(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("from the file")
    assert read(str(folder)).template == "from the file"


def test_named_templates(folder: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert read(str(folder)).template == "tools"


def test_slow_tokenizer_and_no_template(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"7": TOKENS[0]}}))
    checkpoint = read(str(folder))
    assert (checkpoint.template, checkpoint.added_tokens) == ("", {"<think>"})


def test_all_shards(folder: Path) -> None:
    shard(folder)
    save_file({"v": torch.zeros(2)}, folder / "b.safetensors")
    read(str(folder))


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json; give a folder"),
        (lambda f: (f / "config.json").write_text('{"model'), r"config.json is damaged \(Unterminated"),
        (lambda f: (f / "config.json").write_text("[]"), r"config.json is damaged \(not a JSON object\)"),
        (lambda f: (f / "config.json").write_text("{}"), "names no model_type"),
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer"),
        (lambda f: (f / "tokenizer.json").write_text("{"), r"tokenizer.json is damaged \(Expecting"),
        (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
        (lambda f: cut(f / "model.safetensors", -4), r"model.safetensors is damaged .*not fully covered"),
        (lambda f: cut(f / "model.safetensors", 20), r"model.safetensors is damaged .*invalid header"),
        (lambda f: cut(f / "model.safetensors", 0), r"model.safetensors is damaged .*header too small"),
        (shard, "lacks b.safetensors"),
    ],
)
def test_damage(folder: Path, damage, message: str) -> None:
    damage(folder)
    with pytest.raises(UserError, match=message) as raised:
        read(str(folder))
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith(str(folder))


def test_run_directory_points_to_its_newest_checkpoint(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    folder.rename(tmp_path / "checkpoints" / "step-3")
    with pytest.raises(UserError, match=r"did you mean .*checkpoints/step-3\?"):
        read(str(tmp_path))
