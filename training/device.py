"""This process's own GPU, if there is one, shared with engines in other processes. Not run on GPU."""

from __future__ import annotations

import gc
import os

import torch


def own_device() -> torch.device:
    """The GPU that the launcher gave this process, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def give_memory_back() -> None:
    """What torch keeps for its next allocations goes back to the device, where an engine may want it."""
    if torch.cuda.is_available():
        gc.collect()  # a trainer that is done refers to itself
        torch.cuda.empty_cache()
