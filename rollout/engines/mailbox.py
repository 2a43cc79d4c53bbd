"""Hand-over between asyncio callers and an engine that lives on a thread of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass
from typing import Any

from rollout.engines import Sampling
from rollout.errors import WaitTimeout


@dataclass(frozen=True, slots=True)
class Request:
    """The arguments of one ``Engine.generate`` call."""

    ids: list[int]
    sampling: Sampling
    program_id: str
    tool: str | None = None
    last_turn: bool = False
    priority: int = 0


class Outbox:
    """Results of futures, collected on the engine's thread and delivered to each event loop in one call."""

    def __init__(self) -> None:
        self._results: list[tuple[asyncio.Future[Any], Any]] = []

    def put(self, future: asyncio.Future[Any], result: Any) -> None:
        """``result`` may be an exception, which the future then raises."""
        self._results.append((future, result))

    def deliver(self) -> None:
        if not self._results:
            return
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Any]]] = {}
        for item in self._results:
            by_loop.setdefault(item[0].get_loop(), []).append(item)
        self._results = []
        for loop, items in by_loop.items():
            if not loop.is_closed():  # else nobody waits any more
                loop.call_soon_threadsafe(_resolve, items)


def _resolve(items: Iterable[tuple[asyncio.Future[Any], Any]]) -> None:
    for future, result in items:
        if future.done():  # the caller was cancelled or ran out of time
            continue
        if isinstance(result, BaseException):
            future.set_exception(result)
        else:
            future.set_result(result)


async def within(awaitable: Awaitable[Any], seconds: float, what: str) -> Any:
    """Await, but not for ever: ``WaitTimeout`` names what was waited for."""
    try:
        async with asyncio.timeout(seconds) as limit:
            return await awaitable
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise WaitTimeout(f"waited {seconds:g} s for {what}; raise engine.timeout_s if that is too short") from error
