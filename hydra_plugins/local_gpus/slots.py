"""Device slots: which GPUs a job may see."""

from __future__ import annotations

import os
import shutil
import subprocess

from hydra.errors import CompactHydraException


def visible_gpus() -> list[str]:
    """This machine's GPUs, as CUDA_VISIBLE_DEVICES names them; asks neither torch nor CUDA, which would open them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [device.strip() for device in chosen.split(",") if device.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False).stdout
    return [str(i) for i, _ in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))]


def device_slots(slots: int | None, gpus_per_job: int) -> list[dict[str, str]]:
    """One entry per job that may run at once: the environment variables of the slot.

    Without GPUs a slot is only a place in the queue. Refuses more slots than the visible GPUs can hold.
    """
    if gpus_per_job < 1:
        raise CompactHydraException(f"hydra.launcher.gpus_per_job: {gpus_per_job} must be at least 1")
    if slots is not None and slots < 1:
        raise CompactHydraException(f"hydra.launcher.slots: {slots} must be at least 1")
    gpus = visible_gpus()
    if not gpus:
        return [{} for _ in range(slots or 1)]
    room = len(gpus) // gpus_per_job
    if room < (slots or 1):
        raise CompactHydraException(
            f"hydra.launcher.slots: {slots or 1} jobs of {gpus_per_job} GPUs need {(slots or 1) * gpus_per_job}, "
            f"{len(gpus)} are visible; lower slots or gpus_per_job"
        )
    groups = [gpus[i * gpus_per_job : (i + 1) * gpus_per_job] for i in range(slots or room)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups]
