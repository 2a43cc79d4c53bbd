"""vLLM in this process: ``LLMEngine.step()`` on a thread of its own. For CPU and tests."""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollout.config import VllmConfig
from rollout.engines import Generation, PauseMode, Sampling, vllm_plugin
from rollout.engines.mailbox import Outbox, Request, within
from rollout.engines.vllm import (
    SCORING_FIELDS,
    check_model,
    check_prompt,
    engine_arguments,
    environment,
    generation,
    refusals,
    sampling_fields,
    sampling_params,
)
from rollout.errors import EngineDied, UserError

if TYPE_CHECKING:
    import torch
    from vllm import RequestOutput
    from vllm.v1.engine.llm_engine import LLMEngine

_live = threading.Lock()  # vLLM keeps one set of process groups per process


@dataclass(slots=True)
class Running:
    """A request that the engine thread has accepted. ``request`` is None for a scoring request."""

    future: asyncio.Future[Any]
    request: Request | None
    internal_id: str = ""


class InProcessEngine:
    """An ``Engine``. Callers post commands; the engine thread runs them between two steps."""

    def __init__(self, config: VllmConfig, model_dir: str, log_path: Path | None) -> None:
        if not _live.acquire(blocking=False):
            raise UserError("engine.mode: one in_process engine lives here already; close it, or use mode=process")
        self.config = config
        self.version = 0
        self._vocab_size = check_model(model_dir)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._outbox = Outbox()
        self._running: dict[str, Running] = {}  # by external request id
        self._held: list[tuple[Running, list[int]]] = []  # came while the engine was paused
        self._paused: PauseMode | None = None
        self._drained: list[asyncio.Future[Any]] = []
        self._ids = itertools.count()
        self._dead: EngineDied | None = None
        self._closed = False
        self._counts = dict.fromkeys(("requests", "prompt_tokens", "cached_tokens", "generated_tokens", "steps"), 0)
        self._step_seconds = 0.0
        started: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._serve, args=(model_dir, log_path, started), name="vllm-engine", daemon=True
        )
        self._thread.start()
        started.result()

    # --- callers ---------------------------------------------------------------------------------------------------

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
        items = [(Running(loop.create_future(), request), request.ids) for request in requests]
        self._post(lambda: self._accept_all(items))
        return [running.future for running, _ in items]

    async def result(self, future: asyncio.Future[Generation], sampling: Sampling) -> Generation:
        """Wait for a submitted request; a caller that stops waiting takes the request out of the engine."""
        what = f"vLLM to write up to {sampling.max_tokens} tokens"
        return await self._finish(future, what)

    async def score(self, ids: list[int]) -> list[float]:
        self._check_alive()
        check_prompt(ids, 1, self.config.max_model_len, self._vocab_size)
        running = Running(asyncio.get_running_loop().create_future(), None)
        self._post(lambda: self._accept_all([(running, ids)]))
        return await self._finish(running.future, f"vLLM to score {len(ids)} tokens")

    async def update_weights(self, stream: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        await self._ask(lambda: self._load(stream, version), f"weights of version {version} to load")

    async def pause(self, mode: PauseMode = "wait") -> None:
        """``abort`` ends what runs, ``wait`` lets it end, ``keep`` freezes it. New requests wait for ``resume``."""
        future = asyncio.get_running_loop().create_future()
        self._check_alive()
        self._post(lambda: self._pause(mode, future))
        await within(future, self.config.timeout_s, "running requests to end before a pause")

    async def resume(self) -> None:
        await self._ask(self._resume, "the engine to resume")

    async def sleep(self, level: int = 1) -> None:
        """Give memory back (a no-op on CPU). Requests must have ended: pause first."""
        await self._ask(lambda: self._engine.sleep(level), "the engine to sleep")

    async def wake(self, tags: list[str] | None = None) -> None:
        await self._ask(lambda: self._engine.wake_up(tags), "the engine to wake")

    async def abort(self, program_id: str) -> None:
        await self._ask(lambda: self._abort(lambda running: running.request.program_id == program_id), "an abort")

    async def release(self, program_id: str) -> None:
        """Nothing is kept per program unless the scheduler does, and that learns of the end by ``last_turn``."""

    async def stats(self) -> dict[str, float]:
        """Counts since the start, and what runs now."""
        return await self._ask(self._stats, "statistics")

    async def health(self) -> None:
        await self._ask(lambda: None, "a sign of life")

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._post(lambda: None)
            await asyncio.to_thread(self._thread.join)

    async def _ask(self, action: Callable[[], Any], what: str) -> Any:
        """Run ``action`` on the engine thread between two steps."""
        self._check_alive()
        future = asyncio.get_running_loop().create_future()

        def command() -> None:
            try:
                self._outbox.put(future, action())
            except Exception as error:
                self._outbox.put(future, error)

        self._post(command)
        return await within(future, self.config.timeout_s, what)

    async def _finish(self, future: asyncio.Future[Any], what: str) -> Any:
        try:
            return await within(future, self.config.timeout_s, what)
        except BaseException:
            if self._dead is None and not self._closed:  # time-out or cancellation: nobody will read the rest
                self._post(lambda: self._abort(lambda running: running.future is future))
            raise

    def _post(self, command: Callable[[], None]) -> None:
        self._commands.put(command)

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineDied(str(self._dead))
        if self._closed:
            raise EngineDied("the vLLM engine was closed")

    # --- engine thread ---------------------------------------------------------------------------------------------

    def _serve(self, model_dir: str, log_path: Path | None, started: Future[None]) -> None:
        try:
            try:
                self._engine = start(self.config, model_dir, log_path)
            except BaseException as error:
                started.set_exception(error)
                return
            started.set_result(None)
            try:
                while not self._closed:
                    self._turn()
                self._die(EngineDied("the vLLM engine was closed"))
            except Exception as error:
                self._die(EngineDied(f"the vLLM engine died in a step: {type(error).__name__}: {error}"))
            self._engine.engine_core.shutdown()
            del self._engine
        finally:
            _live.release()

    def _turn(self) -> None:
        """Run the commands that wait, then one step; with nothing to do, sleep until a command comes."""
        if not self._running or self._paused == "keep":
            self._commands.get()()
        while not self._commands.empty():
            self._commands.get()()
        if self._running and self._paused != "keep":
            start = time.perf_counter()
            for output in self._engine.step():
                self._hand_out(output)
            self._counts["steps"] += 1
            self._step_seconds += time.perf_counter() - start
        if not self._running:
            for future in self._drained:
                self._outbox.put(future, None)
            self._drained = []
        self._outbox.deliver()

    def _accept_all(self, items: list[tuple[Running, list[int]]]) -> None:
        for running, ids in items:
            if self._paused is not None:
                self._held.append((running, ids))
                continue
            request = running.request
            external_id = str(next(self._ids))
            running.internal_id = self._engine.add_request(
                external_id,
                {"type": "token", "prompt_token_ids": ids},
                sampling_params(SCORING_FIELDS if request is None else sampling_fields(request)),
                priority=0 if request is None else request.priority,
                session_id=None if request is None else request.program_id,
            )
            self._running[external_id] = running

    def _hand_out(self, output: RequestOutput) -> None:
        running = self._running.pop(output.request_id)
        cached = output.num_cached_tokens or 0
        if running.request is None:
            self._outbox.put(running.future, list(output.prompt_logprobs.logprobs))
            return
        result = generation(output.outputs[0], cached)
        counts = self._counts
        counts["requests"] += 1
        counts["prompt_tokens"] += len(output.prompt_token_ids)
        counts["cached_tokens"] += cached
        counts["generated_tokens"] += len(result.ids)
        self._outbox.put(running.future, result)

    def _abort(self, chosen: Callable[[Running], bool]) -> None:
        """End requests early; a caller that still waits gets what was written so far."""
        from vllm.v1.engine import FinishReason

        for key, running in [(k, r) for k, r in self._running.items() if r.request is not None and chosen(r)]:
            state = self._engine.output_processor.request_states[running.internal_id]
            output = state.make_request_output([], None, FinishReason.ABORT, None)
            self._engine.abort_request([running.internal_id], internal=True)
            self._hand_out(output)
            self._running.pop(key, None)
        for item in [x for x in self._held if x[0].request is not None and chosen(x[0])]:
            self._held.remove(item)
            self._outbox.put(item[0].future, Generation([], [], "abort", []))

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
        self._accept_all(held)

    def _load(self, stream: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(stream)})
        self._engine.reset_prefix_cache(reset_running_requests=True)
        self._engine.set_weight_version(str(version))
        self.version = version

    def _stats(self) -> dict[str, float]:
        return {
            **self._counts,
            "running": len(self._running),
            "held": len(self._held),
            "step_seconds": self._step_seconds,
            "kv_usage": self._engine.engine_core.engine_core.scheduler.kv_cache_manager.usage,
        }

    def _die(self, error: EngineDied) -> None:
        self._dead = error
        while not self._commands.empty():  # requests and questions that came too late
            self._commands.get()()
        for running in [*self._running.values(), *(running for running, _ in self._held)]:
            self._outbox.put(running.future, error)
        for future in self._drained:
            self._outbox.put(future, error)
        self._outbox.deliver()


def start(config: VllmConfig, model_dir: str, log_path: Path | None) -> LLMEngine:
    """vLLM's engine with its core in this process."""
    with environment(log_path), refusals():
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine
        from vllm.v1.executor import Executor

        vllm_plugin.register()  # vLLM calls it once per process, perhaps before this engine
        vllm_config = EngineArgs(**engine_arguments(config, model_dir)).create_engine_config()
        engine = LLMEngine(vllm_config, Executor.get_class(vllm_config), log_stats=False, multiprocess_mode=False)
    engine.set_weight_version("0")
    return engine
