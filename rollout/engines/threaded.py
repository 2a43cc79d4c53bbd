"""An engine that is stepped on a thread of its own in this process: what vLLM in process and transformers share."""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rollout.config import TransformersConfig, VllmConfig
from rollout.engines import Generation, PauseMode, Sampling
from rollout.engines.mailbox import Outbox, Request, within
from rollout.engines.vllm import check_model, check_prompt
from rollout.errors import EngineDied, UserError, WaitTimeout

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class Running:
    """A request that the engine thread has accepted. ``request`` is None for a scoring request."""

    future: asyncio.Future[Any]
    ids: list[int]
    request: Request | None
    internal_id: str = ""
    spans: list[tuple[int, int]] = field(default_factory=list)  # (version, tokens written by its end)


class ThreadedEngine(ABC):
    """An ``Engine``. Callers post commands; the engine thread runs them between two steps, and owns everything else.

    A member fills in the methods under "member"; all of them run on the engine thread.
    """

    name = "engine"

    def __init__(self, config: VllmConfig | TransformersConfig, model_dir: str) -> None:
        self.config = config
        self.version = 0
        self._vocab_size = check_model(model_dir)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._outbox = Outbox()
        self._running: dict[str, Running] = {}
        self._held: list[Running] = []  # came while the engine was paused
        self._paused: PauseMode | None = None
        self._drained: list[asyncio.Future[Any]] = []
        self._ids = itertools.count()
        self._dead: EngineDied | None = None
        self._closed = False
        self._counts = dict.fromkeys(("requests", "prompt_tokens", "cached_tokens", "generated_tokens", "steps"), 0)
        self._step_seconds = 0.0
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._serve, args=(started,), name=f"{self.name}-engine", daemon=True)
        self._thread.start()
        try:
            started.result(config.timeout_s)
        except TimeoutError as error:
            if started.done():
                raise
            raise WaitTimeout(f"waited {config.timeout_s:g} s for {self.name} to start") from error

    # --- member ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def _open(self) -> None:
        """Build the engine."""

    @abstractmethod
    def _add(self, key: str, running: Running) -> None:
        """Start a request; its result is given to ``_done`` under this key, now or in a later step."""

    @abstractmethod
    def _step(self) -> None: ...

    @abstractmethod
    def _cut(self, key: str, running: Running) -> Generation:
        """End a request early and give what it wrote so far."""

    @abstractmethod
    def _load(self, stream: Iterable[tuple[str, torch.Tensor]], version: int) -> None: ...

    @abstractmethod
    def _sleep(self, level: int) -> None: ...

    @abstractmethod
    def _wake(self, tags: list[str] | None) -> None: ...

    @abstractmethod
    def _usage(self) -> float:
        """Share of the key-value cache that is in use."""

    @abstractmethod
    def _shut(self) -> None: ...

    # --- callers -----------------------------------------------------------------------------------------------------

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
        (future,) = self.submit([Request(ids, sampling, program_id, tool, last_turn, priority)])
        return await self.result(future, sampling)

    def submit(self, requests: list[Request]) -> list[asyncio.Future[Generation]]:
        """Hand several requests over at once: the engine gets all of them, in this order, between two steps."""
        self._check_alive()
        for request in requests:
            check_prompt(request.ids, 1, self.config.max_model_len, self._vocab_size)
        loop = asyncio.get_running_loop()
        items = [Running(loop.create_future(), request.ids, request) for request in requests]
        self._commands.put(lambda: self._accept(items))
        return [running.future for running in items]

    async def result(self, future: asyncio.Future[Generation], sampling: Sampling) -> Generation:
        """Wait for a submitted request; a caller that stops waiting takes the request out of the engine."""
        return await self._finish(future, f"{self.name} to write up to {sampling.max_tokens} tokens")

    async def score(self, ids: list[int]) -> list[float]:
        self._check_alive()
        check_prompt(ids, 1, self.config.max_model_len, self._vocab_size)
        running = Running(asyncio.get_running_loop().create_future(), ids, None)
        self._commands.put(lambda: self._accept([running]))
        return await self._finish(running.future, f"{self.name} to score {len(ids)} tokens")

    async def update_weights(self, stream: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Load between two steps; later tokens of running requests carry the new version. ``stream`` is read there."""

        def load() -> None:
            self._load(stream, version)
            self.version = version

        await self._ask(load, f"weights of version {version} to load")

    async def pause(self, mode: PauseMode = "wait") -> None:
        """``abort`` ends what runs, ``wait`` lets it end, ``keep`` freezes it. New requests wait for ``resume``."""
        self._check_alive()
        future = asyncio.get_running_loop().create_future()
        self._commands.put(lambda: self._pause(mode, future))
        await within(future, self.config.timeout_s, "running requests to end before a pause")

    async def resume(self) -> None:
        await self._ask(self._resume, "the engine to resume")

    async def sleep(self, level: int = 1) -> None:
        """Give memory back; running requests are aborted."""

        def sleep() -> None:
            self._abort(lambda running: True)
            self._sleep(level)

        await self._ask(sleep, "the engine to sleep")

    async def wake(self, tags: list[str] | None = None) -> None:
        await self._ask(lambda: self._wake(tags), "the engine to wake")

    async def abort(self, program_id: str) -> None:
        await self._ask(lambda: self._abort(lambda running: running.request.program_id == program_id), "an abort")

    async def release(self, program_id: str) -> None:  # noqa: B027 - a member whose scheduler may keep KV overrides it
        """Nothing is kept for a program here."""

    async def stats(self) -> dict[str, float]:
        """Counts since the start, and what runs now."""

        def read() -> dict[str, float]:
            now = {"running": len(self._running), "held": len(self._held), "kv_usage": self._usage()}
            return {**self._counts, **now, "step_seconds": self._step_seconds}

        return await self._ask(read, "statistics")

    async def health(self) -> None:
        await self._ask(lambda: None, "a sign of life")

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._commands.put(lambda: None)
            await asyncio.to_thread(self._thread.join, self.config.timeout_s)
            if self._thread.is_alive():
                raise WaitTimeout(f"waited {self.config.timeout_s:g} s for the engine's last step to end")

    async def _ask(self, action: Callable[[], Any], what: str) -> Any:
        """Run ``action`` on the engine thread between two steps."""
        self._check_alive()
        future = asyncio.get_running_loop().create_future()

        def command() -> None:
            try:
                self._outbox.put(future, action())
            except Exception as error:
                self._outbox.put(future, error)

        self._commands.put(command)
        return await within(future, self.config.timeout_s, what)

    async def _finish(self, future: asyncio.Future[Any], what: str) -> Any:
        try:
            return await within(future, self.config.timeout_s, what)
        except BaseException:  # time-out or cancellation: nobody will read the rest
            self._commands.put(lambda: self._abort(lambda running: running.future is future))
            raise

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineDied(str(self._dead))
        if self._closed:
            raise EngineDied(f"the {self.name} engine was closed")

    # --- engine thread -----------------------------------------------------------------------------------------------

    def _serve(self, started: Future[None]) -> None:
        try:
            self._open()
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(None)
        error = EngineDied(f"the {self.name} engine was closed")
        try:
            while not self._closed:
                self._turn()
        except Exception as cause:
            error = EngineDied(f"the {self.name} engine died in a step: {type(cause).__name__}: {cause}")
        self._die(error)
        self._shut()

    def _turn(self) -> None:
        """Run the commands that wait, then one step; with nothing to do, sleep until a command comes."""
        if not self._running or self._paused == "keep":
            self._commands.get()()
        while not self._commands.empty():
            self._commands.get()()
        if self._running and self._paused != "keep":
            start = time.perf_counter()
            self._step()
            self._counts["steps"] += 1
            self._step_seconds += time.perf_counter() - start
        if not self._running:
            for future in self._drained:
                self._outbox.put(future, None)
            self._drained = []
        self._outbox.deliver()

    def _accept(self, items: list[Running]) -> None:
        for running in items:
            if self._paused is not None:
                self._held.append(running)
                continue
            key = str(next(self._ids))
            self._running[key] = running
            try:
                self._add(key, running)
            except ValueError as error:  # sampling parameters that the engine refuses: the caller's fault alone
                self._done(key, UserError(f"engine: {self.name} refuses a request: {error}"))

    def _done(self, key: str, result: Generation | list[float] | BaseException) -> None:
        running = self._running.pop(key)
        if isinstance(result, Generation):
            self._counts["requests"] += 1
            self._counts["prompt_tokens"] += len(running.ids)
            self._counts["cached_tokens"] += result.cached_tokens
            self._counts["generated_tokens"] += len(result.ids)
        self._outbox.put(running.future, result)

    def _abort(self, chosen: Callable[[Running], bool]) -> None:
        """End generations early; a caller that still waits gets what was written so far."""
        for key, running in list(self._running.items()):
            if running.request is not None and chosen(running):
                self._done(key, self._cut(key, running))
        for running in list(self._held):
            if running.request is not None and chosen(running):
                self._held.remove(running)
                self._outbox.put(running.future, Generation([], [], "abort", []))

    def _pause(self, mode: PauseMode, future: asyncio.Future[Any]) -> None:
        self._paused = mode
        if mode == "abort":
            self._abort(lambda running: True)
        if mode == "keep" or not self._running:
            self._outbox.put(future, None)
        else:
            self._drained.append(future)

    def _resume(self) -> None:
        self._paused = None
        held, self._held = self._held, []
        self._accept(held)

    def _die(self, error: EngineDied) -> None:
        self._dead = error
        for running in [*self._running.values(), *self._held]:
            self._outbox.put(running.future, error)
        for future in self._drained:
            self._outbox.put(future, error)
        self._running, self._held, self._drained = {}, [], []
        self._paused = "keep"  # what came too late is only held, and fails with the rest
        while not self._commands.empty():
            self._commands.get()()
        for running in self._held:
            self._outbox.put(running.future, error)
        self._outbox.deliver()
