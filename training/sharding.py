"""Weights that ZeRO-3 or FSDP2 has spread over processes, made whole one after the other; every process must ask."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def gathered(parameters: Iterable[torch.Tensor], *, changed: bool = False) -> AbstractContextManager[Any]:
    """Inside it, parameters that ZeRO-3 has sharded are whole; ``changed``: afterwards all have rank 0's."""
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if changed else None)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Without gradient; a copy of its own where it was sharded. ZeRO-3's inside ``gathered`` only."""
    value = tensor.detach()
    if isinstance(value, torch.distributed.tensor.DTensor):
        return value.full_tensor()
    return value.clone() if hasattr(tensor, "ds_id") else value


def whole_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape that ``whole`` gives; nobody has to ask together."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def whole_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every entry of the model's state, shared ones under each of their names."""
    for name, value in model.state_dict(keep_vars=True).items():
        with gathered([value]):
            yield name, whole(value)


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether other processes hold a part of it."""
    dtensor = torch.distributed.tensor.DTensor
    return any(hasattr(p, "ds_id") or isinstance(p, dtensor) for p in model.parameters())
