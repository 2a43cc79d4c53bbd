"""Trainer to engine: one weight update, then a gate that compares both on the same tokens.

A sync can report success and leave layers stale; a checksum of tensors does not see it. Log-probs do.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rollout.engines import Engine
from rollout.errors import UserError

if TYPE_CHECKING:
    import torch

# Largest difference of a token's log-prob, in nats, that arithmetic alone explains, by the engine's dtype, against a
# trainer in fp32. Measured on 0.5M-parameter models, CPU (tests/rollout/test_weights.py, benchmarks/sync_parity.py):
# noise 2e-6 in fp32, 0.03 to 0.06 in bf16, 0.012 in fp16; one stale linear layer 0.47 to 1.5 in all three. A stale norm
# layer (0.05 to 0.07) shows in fp32 only.
BOUNDS = {"float32": 1e-4, "bfloat16": 0.25, "float16": 0.05}


class SyncMismatch(RuntimeError):
    """Engine and trainer give different log-probs after a weight sync: the rollouts would come from another policy."""


def bound_for(dtype: str) -> float:
    """The default bound of the gate for an engine that computes in ``dtype``."""
    if dtype not in BOUNDS:
        raise UserError(f"engine.dtype: no probe bound for {dtype!r}; use one of {', '.join(BOUNDS)}")
    return BOUNDS[dtype]


class Weights(Protocol):
    """A model's weights by transformers' names: a stream that may be read again, and is announced before it is read.

    Where processes hold parts of them, all must read, in step; what ``metadata`` says they need not exchange.
    """

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]: ...

    def metadata(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of all that reading gives, in its order."""


@dataclass
class Probe:
    """The gate. ``ids``: fixed sequences of two tokens or more; ``bound``: largest accepted difference, in nats."""

    ids: list[list[int]]
    bound: float

    def __post_init__(self) -> None:
        if not self.ids or min(len(ids) for ids in self.ids) < 2:
            raise ValueError("a probe needs sequences of at least two tokens each")

    async def check(self, engine: Engine, trainer_logprobs: list[list[float]]) -> float:
        """Compare; gives the largest difference. Raises ``SyncMismatch`` above the bound, also for NaN.

        ``trainer_logprobs[i]`` has ``len(ids[i]) - 1`` entries at temperature 1, in the order of ``Engine.score``.
        """
        engine_logprobs = await asyncio.gather(*(_scores(engine, ids) for ids in self.ids))
        worst = 0.0
        for ours, replies in zip(trainer_logprobs, engine_logprobs, strict=True):
            for theirs in replies:
                worst = max(worst, furthest(ours, theirs))
        if worst > self.bound:
            raise SyncMismatch(
                f"weight sync to version {engine.version}: engine and trainer differ by {worst:.3g} nats, above the "
                f"bound of {self.bound:.3g}; some weights did not arrive, or the two compute in different dtypes"
            )
        return worst


def furthest(ours: list[float], theirs: list[float]) -> float:
    """The largest difference between log-probs of the same tokens; infinite where one is not a number."""
    differences = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    return math.inf if any(map(math.isnan, differences)) else max(differences)


async def _scores(engine: Engine, ids: list[int]) -> list[list[float]]:
    """The engine's log-probs, from each engine of a fleet: every one of them must pass."""
    each = getattr(engine, "score_each", None)
    return [await engine.score(ids)] if each is None else await each(ids)


async def sync(
    engine: Engine,
    weights: Iterable[tuple[str, torch.Tensor]] | Path,
    version: int,
    *,
    probe: Probe | None = None,
    trainer_logprobs: Callable[[list[list[int]]], list[list[float]]] | None = None,
    asleep: bool = False,
) -> float | None:
    """Send the policy's weights as ``version`` and pass the gate; gives the probe's largest difference.

    ``weights``: named tensors, or the folder of an adapter over the weights that the engine was started with.
    An engine that is ``asleep`` is woken in two parts, so that its cache never lies beside weights on their way.
    ``trainer_logprobs`` maps the probe's sequences to the trainer's own log-probs; it runs on a thread, so that
    rollouts on this event loop go on.
    """
    if asleep:
        await engine.wake(["weights"])
    if isinstance(weights, Path):
        await engine.load_adapter(weights, version)
    else:
        await engine.update_weights(weights, version)
    if asleep:
        await engine.wake(["kv_cache"])
    if probe is None:
        return None
    if trainer_logprobs is None:
        raise ValueError("a probe needs trainer_logprobs to compare the engine with")
    return await probe.check(engine, await asyncio.to_thread(trainer_logprobs, probe.ids))


def named_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """A model's weights under transformers' names, each tensor once: a tied ``lm_head`` is left to the embedding."""
    for name, parameter in model.named_parameters():  # yields shared tensors once, under their first name
        yield name, parameter.detach()


def model_logprobs(model: torch.nn.Module, sequences: list[list[int]]) -> list[list[float]]:
    """Log-probs at temperature 1 of each sequence's tokens after the first, by a plain forward pass of the model.

    One sequence at a time: the reference must not depend on padding or packing.
    """
    import torch

    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        result = []
        with torch.no_grad():
            for ids in sequences:
                tokens = torch.tensor([ids], device=device)
                logits = model(input_ids=tokens).logits[0, :-1].float()
                result.append(logits.log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0].tolist())
    finally:
        model.train(training)
    return result
