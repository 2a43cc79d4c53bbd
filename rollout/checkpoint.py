"""What a checkpoint folder says about itself, read from its files; broken folders are refused before vLLM starts."""

from __future__ import annotations

import json
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
    config = read_config(folder)
    if "model_type" not in config:
        raise UserError(f"{folder / 'config.json'} names no model_type; save the checkpoint again")
    check_weights(folder)
    tokenizer = _tokenizer_config(folder)
    return Checkpoint(
        folder.resolve(), config["model_type"], _template(folder, tokenizer), _added_tokens(folder, tokenizer)
    )


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json``, or one line that says what the folder lacks."""
    if not (folder / "config.json").is_file():
        inside = sorted(folder.glob("checkpoints/*/config.json"), key=lambda file: file.stat().st_mtime)
        remedy = f"did you mean {inside[-1].parent}?" if inside else "give a folder that save_pretrained wrote"
        raise UserError(f"{folder} has no config.json; {remedy}")
    return read_json(folder / "config.json")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object, or one line that names the file."""
    value = parse_json(file)
    if not isinstance(value, dict):
        raise UserError(f"{file} is damaged (not a JSON object); copy or save the checkpoint again")
    return value


def parse_json(file: Path) -> Any:
    """Whatever JSON the file holds, or one line that names it."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is damaged ({first_line(error)}); copy or save the checkpoint again") from None


def check_weights(folder: Path) -> None:
    """Every safetensors file that the folder needs must be there and as long as its header says."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise UserError(f"{folder} lacks {', '.join(missing)}, which {index.name} names; copy the checkpoint again")
    else:
        files = sorted(folder.glob("*.safetensors"))
        if not files and not any(folder.glob("*.bin")):
            raise UserError(f"{folder} has no weights (no *.safetensors); copy or save the checkpoint again")
    for file in files:
        try:
            with safe_open(file, framework="numpy"):  # reads the header, and checks it against the file's length
                pass
        except SafetensorError as error:
            raise UserError(f"{file} is damaged ({first_line(error)}); copy or save the checkpoint again") from None


def first_line(error: Exception) -> str:
    """What a library's error says, without the lines that explain it."""
    return str(error).strip().partition("\n")[0]


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    vocabularies = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
    if not any((folder / name).is_file() for name in vocabularies):
        raise UserError(f"{folder} has no tokenizer (tokenizer.json); save the tokenizer into the same folder")
    file = folder / "tokenizer_config.json"
    return read_json(file) if file.is_file() else {}


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
        entries += read_json(folder / "tokenizer.json").get("added_tokens", [])
    return frozenset(entry["content"] for entry in entries)
