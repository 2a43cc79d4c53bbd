"""What a checkpoint folder says about itself, read from its files; broken folders are refused before vLLM starts."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout.errors import UserError


@dataclass(frozen=True)
class Checkpoint:
    """``template``: source of the chat template, or empty. ``added_tokens``: strings that are one token."""

    path: Path
    model_type: str
    template: str
    added_tokens: frozenset[str]


def read(path: str) -> Checkpoint:
    """Read the Hugging Face folder ``path``. Raises UserError for what is missing or corrupt, with the file's name."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"checkpoint: {path} is not a folder; give a Hugging Face checkpoint folder (download hub models first)"
        )
    if not (folder / "config.json").is_file():
        inside = sorted(folder.glob("checkpoints/*/config.json"), key=lambda file: file.stat().st_mtime)
        remedy = f"did you mean {inside[-1].parent}?" if inside else "give a folder that save_pretrained wrote"
        raise UserError(f"checkpoint: {folder} has no config.json; {remedy}")
    config = _json(folder / "config.json")
    if "model_type" not in config:
        raise UserError(f"checkpoint: {folder / 'config.json'} names no model_type; save the checkpoint again")
    _check_weights(folder)
    tokenizer = _tokenizer_config(folder)
    return Checkpoint(
        folder.resolve(), config["model_type"], _template(folder, tokenizer), _added_tokens(folder, tokenizer)
    )


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"checkpoint: {file} is not JSON ({error}); copy or save the checkpoint again") from None
    if not isinstance(value, dict):
        raise UserError(f"checkpoint: {file} is not a JSON object; copy or save the checkpoint again")
    return value


def _check_weights(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = [folder / name for name in sorted(set(_json(index).get("weight_map", {}).values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise UserError(f"checkpoint: {folder} lacks {', '.join(missing)}, which {index.name} names; copy it again")
    else:
        files = sorted(folder.glob("*.safetensors"))
        if not files and not any(folder.glob("*.bin")):
            raise UserError(f"checkpoint: {folder} has no weights (*.safetensors); copy or save the checkpoint again")
    for file in files:
        _check_safetensors(file)


def _check_safetensors(file: Path) -> None:
    """The header must be whole, and the file as long as the header says: catches copies and saves that were cut."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        header = stream.read(length) if length <= size - 8 else b""
    try:
        tensors = json.loads(header)
        end = max((entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"checkpoint: {file} has no whole safetensors header; copy or save the checkpoint again"
        ) from None
    if size != 8 + length + end:
        raise UserError(
            f"checkpoint: {file} has {size} bytes, not {8 + length + end}; copy or save the checkpoint again"
        )


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    vocabularies = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
    if not any((folder / name).is_file() for name in vocabularies):
        raise UserError(
            f"checkpoint: {folder} has no tokenizer (tokenizer.json); save the tokenizer into the same folder"
        )
    file = folder / "tokenizer_config.json"
    return _json(file) if file.is_file() else {}


def _template(folder: Path, tokenizer: dict[str, Any]) -> str:
    """The template that transformers would use: its own file first, then the tokenizer's entry, by name where named."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    entry = tokenizer.get("chat_template") or ""
    if isinstance(entry, list):
        named = {item["name"]: item["template"] for item in entry}
        entry = named.get("tool_use") or named.get("default") or ""
    return entry


def _added_tokens(folder: Path, tokenizer: dict[str, Any]) -> frozenset[str]:
    entries = list(tokenizer.get("added_tokens_decoder", {}).values())
    if (folder / "tokenizer.json").is_file():
        entries += _json(folder / "tokenizer.json").get("added_tokens", [])
    return frozenset(entry["content"] for entry in entries)
