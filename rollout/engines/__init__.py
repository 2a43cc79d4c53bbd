"""The protocol that every engine member keeps, and its values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch

PauseMode = Literal["abort", "wait", "keep"]


@dataclass(frozen=True)
class Sampling:
    """How to sample. ``temperature=0`` is greedy. ``seed`` makes a request's tokens independent of its batch."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()


@dataclass
class Generation:
    """What one ``generate`` call wrote.

    ``ids`` (length n, the stop token included), ``logprobs`` (n, of the sampled tokens, after temperature),
    ``versions`` (n, policy version per token), ``finish``, ``cached_tokens`` (prompt tokens served from the cache).
    """

    ids: list[int]
    logprobs: list[float]
    finish: Literal["stop", "length", "abort"]
    versions: list[int]
    cached_tokens: int = 0
    extras: dict[str, Any] = field(default_factory=dict)


class Engine(Protocol):
    """Token ids in, token ids out. Coroutines may be awaited from any one event loop; the engine keeps its own threads.

    Every member raises ``EngineDied`` from pending and later calls when it can go on no more, and ``WaitTimeout``
    where a wait has run out.
    """

    version: int

    async def generate(
        self,
        ids: list[int],
        sampling: Sampling,
        *,
        program_id: str,
        tool: str | None = None,
        last_turn: bool = False,
        priority: int = 0,
    ) -> Generation: ...

    async def score(self, ids: list[int]) -> list[float]:
        """Log-probs at temperature 1 of ``ids[1:]``, each given what stands before it: length ``len(ids) - 1``."""

    async def update_weights(self, stream: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Load named tensors (transformers' names) and stamp later tokens with ``version``.

        Drops the prefix cache, unless the member's ``keep_cache`` says otherwise.
        """

    async def load_adapter(self, folder: Path, version: int) -> None:
        """``update_weights`` by a low-rank adapter alone, over the weights that the engine was started with.

        ``folder`` is one that peft saves, read before this returns; from then on the adapter answers every request.
        vLLM members can, if they were started with ``adapter_arguments``.
        """

    async def pause(self, mode: PauseMode = "wait") -> None: ...

    async def resume(self) -> None: ...

    async def sleep(self, level: int = 1) -> None: ...

    async def wake(self, tags: list[str] | None = None) -> None: ...

    async def abort(self, program_id: str) -> None:
        """End the program's running request; its ``generate`` returns with ``finish="abort"``."""

    async def release(self, program_id: str) -> None:
        """The program will not come back: whatever is retained for it may go."""

    async def stats(self) -> dict[str, float]: ...

    async def health(self) -> None:
        """Raises ``EngineDied`` unless the engine answers."""

    async def close(self) -> None:
        """Stop threads and processes; safe to call twice."""
