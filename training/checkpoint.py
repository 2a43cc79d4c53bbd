"""Checkpoints on disk: ordinary Hugging Face folders, whole or absent, with the run's state beside the weights."""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from rollout.checkpoint import read_json
from rollout.errors import UserError, WaitTimeout

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STEP = re.compile(r"step-(\d+)")
PARTS = (
    "parts.json"  # every file of a checkpoint and its size: transformers resumes from what it finds, and skips the rest
)

UNWRITTEN = (OSError, RuntimeError, SafetensorError, CheckpointException)  # what a full disk is to those who write
# in what torch says of it, by how far it got; the last where another process has given the folder up
OF_WRITING = ("write", "iostream", "inline_container", "Parent directory")


def steps(checkpoints: Path) -> list[tuple[int, Path]]:
    """All whole checkpoints, oldest first."""
    found = [(int(m[1]), p) for p in checkpoints.glob("step-*") if (m := STEP.fullmatch(p.name))]
    return sorted(found)


def latest(checkpoints: Path) -> Path | None:
    """The newest whole checkpoint; a folder that lacks a part is refused by name."""
    found = steps(checkpoints)
    if not found:
        return None
    folder = found[-1][1]
    parts = read_json(folder / PARTS) if (folder / PARTS).exists() else {PARTS: 0}
    for name, size in parts.items():
        part = folder / name
        if part.exists() and part.stat().st_size != size:
            raise UserError(
                f"{folder}: {name} has {part.stat().st_size} bytes, not {size}; delete this folder to resume from the "
                "one before it"
            )
        if not part.exists():
            raise UserError(f"{folder}: {name} is missing; delete this folder to resume from the one before it")
    return folder


def step_of(folder: Path) -> int:
    """Optimizer steps behind a checkpoint."""
    return json.loads((folder / "trainer_state.json").read_text())["global_step"]


@contextlib.contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Write into a folder beside ``target`` and rename it into place; on any error nothing is left behind."""
    scratch = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        yield scratch
        _flush(scratch)
        if target.exists():  # a run that was resumed from an earlier step writes this one again
            shutil.rmtree(target)
        scratch.rename(target)
    except UNWRITTEN as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise UserError(unwritten(target, error)) from error
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def unwritten(target: Path, error: BaseException) -> str:
    """The one line for what kept ``target`` from being written; an error that is none of writing is raised again."""
    _, error = first_cause(error, 0)
    other = isinstance(error, RuntimeError) and not any(word in str(error) for word in OF_WRITING)
    if other or isinstance(error, WaitTimeout):
        raise error
    text = str(error).partition("\n")[0]
    return f"cannot write {target}: {text}; free disk space, then resume=true goes on"


def first_cause(error: BaseException, rank: int) -> tuple[int, BaseException]:
    """What went wrong where; ``rank`` is this process's. FSDP tells every process of what went wrong on others."""
    if not isinstance(error, CheckpointException):
        return rank, error
    at, (cause, _) = next(iter(error.failures.items()))
    return at, cause


@contextlib.contextmanager
def writing(checkpoints: Path, step: int, keep_last: int) -> Iterator[Path]:
    """A place for the checkpoint of ``step``; once it is whole, all but the last ``keep_last`` are deleted."""
    with written_whole(checkpoints / f"step-{step}") as scratch:
        yield scratch
        files = sorted(path for path in scratch.rglob("*") if path.is_file())
        parts = {str(path.relative_to(scratch)): path.stat().st_size for path in files}
        (scratch / PARTS).write_text(json.dumps(parts, indent=1))
    for _, folder in steps(checkpoints)[:-keep_last]:
        shutil.rmtree(folder)


def save_policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path | None) -> None:
    """The policy as ``from_pretrained`` and ``vllm serve`` load it. LoRA: merged, with the adapter in ``adapter/``.

    Every process must ask where the weights are sharded; those that give no ``folder`` only help to make them whole.
    """
    from training.lora import adapter_weights, base_model, merged_weights

    merged, adapter = merged_weights(model), adapter_weights(model)
    if folder is None:
        collections.deque(itertools.chain(merged, adapter), maxlen=0)
        return
    weights = {name: tensor.to("cpu").contiguous() for name, tensor in merged}
    base_model(model).save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    if base_model(model) is not model:
        model.save_pretrained(folder / "adapter", state_dict=dict(adapter))


def _flush(folder: Path) -> None:
    """A rename must not reach the disk before what it names."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
