"""Engine batches that are a function of the episodes alone: what ``engine.deterministic`` stands on.

A request's log-probs differ in the last bits with the requests that share its batch, and which ones do depends on how
long tools take. Here a ``generate`` call waits until every live program waits in one; then all go to the engine at
once, in the order in which the programs entered.
"""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from rollout.engines import Generation, Sampling
from rollout.engines.mailbox import Request, within
from rollout.engines.threaded import ThreadedEngine


class Lockstep:
    """An ``Engine`` around one in this process. All but ``generate`` goes to that engine unchanged.

    ``enter`` every program of a batch before the first of them generates; ``leave`` when it is over, also after an
    error, else the others wait for it until ``engine.timeout_s``. ``enter`` may be called from any thread.
    """

    def __init__(self, engine: ThreadedEngine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._live: dict[str, int] = {}  # program → its place in the order
        self._waiting: dict[str, tuple[Request, asyncio.Future[asyncio.Future[Generation]]]] = {}
        self._entered = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def enter(self, program_id: str) -> None:
        """The program will call ``generate``, any number of times, one after the other."""
        with self._lock:
            if program_id in self._live:
                raise ValueError(f"program {program_id} has entered already; ids of live programs must differ")
            self._live[program_id] = self._entered
            self._entered += 1

    def leave(self, program_id: str) -> None:
        """The program will not call again; called on the event loop of the programs."""
        with self._lock:
            self._live.pop(program_id, None)
        self._go_if_all_wait()

    async def generate(
        self,
        ids: list[int],
        sampling: Sampling,
        *,
        program_id: str,
        tool: str | None = None,
        last_turn: bool = False,
        priority: int = 0,
    ) -> Generation:
        if program_id not in self._live:
            raise ValueError(f"program {program_id} has not entered the lockstep")
        gate: asyncio.Future[asyncio.Future[Generation]] = asyncio.get_running_loop().create_future()
        self._waiting[program_id] = (Request(ids, sampling, program_id, tool, last_turn, priority), gate)
        try:
            self._go_if_all_wait()
            future = await within(gate, self._engine.config.timeout_s, "the other programs to reach their next turn")
        finally:
            if self._waiting.get(program_id, (None, None))[1] is gate:  # cancelled or out of time
                del self._waiting[program_id]
        return await self._engine.result(future, sampling)

    def _go_if_all_wait(self) -> None:
        with self._lock:
            order = sorted(self._live, key=self._live.__getitem__)
        if not order or any(program not in self._waiting for program in order):
            return
        batch = [self._waiting.pop(program) for program in order]
        try:
            futures = self._engine.submit([request for request, _ in batch])
        except Exception as error:  # a dead engine, or one bad prompt: the whole batch must hear of it
            for _, gate in batch:
                if not gate.done():
                    gate.set_exception(error)
            return
        for (_, gate), future in zip(batch, futures, strict=True):
            if not gate.done():
                gate.set_result(future)
