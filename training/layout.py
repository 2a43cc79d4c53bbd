"""How the states of a run are cut over its processes, read off its settings and off a checkpoint's files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout.errors import UserError

# The value of `sharding` that gives each. ZeRO-1 and ZeRO-2 differ in gradients, which are in no file.
SHARDING = {
    "replicated": "none",
    "deepspeed": "DeepSpeed without ZeRO",
    "zero1": "zero1 or zero2",
    "zero3": "zero3 or zero3_offload",
    "fsdp": "fsdp2",
}


@dataclass(frozen=True)
class Layout:
    """``kind``: a key of ``SHARDING``. ``offloads``: the optimizer is DeepSpeed's own, in the CPU's memory."""

    kind: str
    processes: int
    offloads: bool = False

    @property
    def of_deepspeed(self) -> bool:
        return self.kind in ("zero1", "zero3")


def zero_settings(trainer: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """DeepSpeed's ``zero_optimization`` in the settings of ``trainer``; None without DeepSpeed."""
    given = trainer.get("deepspeed")
    if not given:
        return None
    settings = json.loads(Path(given).read_text()) if isinstance(given, str) else given
    return settings.get("zero_optimization", {})


def zero_stage(trainer: Mapping[str, Any]) -> int | None:
    """The ZeRO stage in the settings of ``trainer``; None without DeepSpeed."""
    settings = zero_settings(trainer)
    return None if settings is None else int(settings.get("stage", 0))


def offloads(zero: Mapping[str, Any]) -> bool:
    """Whether these settings of ``zero_optimization`` move the optimizer off the GPU."""
    return (zero.get("offload_optimizer") or {}).get("device", "none") != "none"


def wanted(trainer: Mapping[str, Any], processes: int) -> Layout:
    """That of a run with these settings of ``trainer``."""
    zero = zero_settings(trainer)
    if zero is not None:
        kind = {0: "deepspeed", 1: "zero1", 2: "zero1", 3: "zero3"}[int(zero.get("stage", 0))]
        return Layout(kind, processes, offloads(zero))
    return Layout("fsdp" if trainer.get("fsdp") else "replicated", processes)


def saved(checkpoint: Path) -> Layout:
    """That of the run that saved ``checkpoint``: each process leaves its random-number state there."""
    processes = max(1, len(list(checkpoint.glob("rng_state_*.pth"))))
    kind = "replicated"
    if any(checkpoint.glob("pytorch_model_fsdp*")):
        kind = "fsdp"
    elif any(checkpoint.glob("global_step*/*zero_pp_rank_*_model_states.pt")):
        kind = "zero3"
    elif any(checkpoint.glob("global_step*/*zero_pp_rank_*_optim_states.pt")):
        kind = "zero1"
    elif any(checkpoint.glob("global_step*")):
        kind = "deepspeed"
    return Layout(kind, processes)


def saved_offloaded(checkpoint: Path) -> bool:
    """Whether an optimizer of DeepSpeed's own saved ``checkpoint``; reads no tensor."""
    import torch

    part = next(checkpoint.glob("global_step*/*zero_pp_rank_0_*_optim_states.pt"))
    settings = torch.load(part, map_location="cpu", mmap=True, weights_only=False)["ds_config"]
    return offloads(settings["zero_optimization"])


def check_resumable(checkpoint: Path, run: Layout) -> None:
    """Refuse, in one line, a checkpoint whose optimizer states nobody can cut anew. Raises UserError."""
    found = saved(checkpoint)
    weights = f"or start another run_dir from its weights alone (model=hf model.path={checkpoint})"
    if found.kind != run.kind:
        raise UserError(
            f"sharding: {checkpoint} holds optimizer states of sharding={SHARDING[found.kind]}, this run has "
            f"{SHARDING[run.kind]}; resume with the former, {weights}"
        )
    if found.of_deepspeed and found.processes != run.processes:
        raise UserError(
            f"resume: {checkpoint} was saved by {found.processes} processes and this run has {run.processes}, but "
            f"DeepSpeed cannot cut optimizer states anew; resume with --nproc-per-node {found.processes}, {weights}"
        )
    if found.of_deepspeed and run.offloads and not saved_offloaded(checkpoint):
        raise UserError(
            f"sharding: {checkpoint} was saved without offload_optimizer, and DeepSpeed's CPU optimizer cannot read "
            f"that; resume without it (sharding={SHARDING[found.kind].split()[0]}), {weights}"
        )
