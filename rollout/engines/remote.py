"""What engines outside this process share: an event loop on a thread of its own, the weight update, the time-outs."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rollout.config import VllmConfig
from rollout.engines import Generation, PauseMode, Sampling
from rollout.engines.device_transfer import DeviceTransfer
from rollout.engines.mailbox import Request, within
from rollout.engines.vllm import check_model, check_prompt, last_words
from rollout.engines.weight_files import weight_files
from rollout.errors import EngineDied, WaitTimeout
from rollout.weights import Weights

if TYPE_CHECKING:
    import torch

LAST_CALLS_S = 5.0  # for calls to end when the engine is closed
ALIVE_EVERY_S = 1.0  # between two looks at an engine that a control call waits for


class RemoteEngine(ABC):
    """An ``Engine`` whose coroutines run on the engine's own loop, so that callers may use any loop.

    A member fills in the underscored coroutines; they raise ``EngineDied`` when the other side is gone. ``version`` is
    that of the weights in ``model_dir``.
    """

    def __init__(self, config: VllmConfig, model_dir: str, log_path: Path | None, version: int = 0) -> None:
        self.config = config
        self.version = version
        self.log_path = log_path
        self._vocab_size = check_model(model_dir)
        self._programs: dict[str, str] = {}  # running request → its program
        self._ids = itertools.count()
        self._calls: set[asyncio.Task[Any]] = set()  # under way on the engine's loop
        self._paused = False
        self._closed = False
        self._transfer = None if config.transfer == "file" else DeviceTransfer(config, [self])
        self._retains = config.scheduler_cls is not None  # stock vLLM keeps nothing for a program
        self._counts = dict.fromkeys(("requests", "prompt_tokens", "cached_tokens", "generated_tokens"), 0)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine-loop", daemon=True)
        self._thread.start()

    # --- one request -------------------------------------------------------------------------------------------------

    @abstractmethod
    async def _generate(self, request: Request, request_id: str) -> Generation: ...

    @abstractmethod
    async def _score(self, ids: list[int], request_id: str) -> list[float]: ...

    @abstractmethod
    async def _abort(self, request_ids: list[str]) -> None: ...

    @abstractmethod
    async def _release(self, program_id: str) -> None:
        """Called only if ``_retains``."""

    # --- the engine --------------------------------------------------------------------------------------------------

    @abstractmethod
    async def _set_paused(self, mode: PauseMode | None) -> None: ...

    @abstractmethod
    async def _world_size(self) -> int: ...

    @abstractmethod
    async def _join_transfer(self, info: dict[str, Any]) -> None: ...

    @abstractmethod
    async def _start_update(self) -> None: ...

    @abstractmethod
    async def _send_update(self, info: dict[str, Any]) -> None: ...

    @abstractmethod
    async def _finish_update(self, version: int) -> None: ...

    @abstractmethod
    async def _drop_cache(self) -> None:
        """Unless ``config.keep_cache``."""

    @abstractmethod
    async def _load_adapter(self, folder: Path, version: int) -> None:
        """Load an adapter, for all requests from now on."""

    @abstractmethod
    async def _sleep(self, level: int) -> None: ...

    @abstractmethod
    async def _wake(self, tags: list[str] | None) -> None: ...

    @abstractmethod
    async def _health(self) -> None: ...

    @abstractmethod
    def _stop(self) -> None:
        """End the other side; blocks."""

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
        check_prompt(ids, 1, self.config.max_model_len, self._vocab_size)
        request_id = str(next(self._ids))
        self._programs[request_id] = program_id
        request = Request(ids, sampling, program_id, tool, last_turn, priority)
        try:
            result = await self._call(
                self._generate(request, request_id), f"vLLM to write up to {sampling.max_tokens} tokens"
            )
        finally:
            del self._programs[request_id]
        self._counts["requests"] += 1
        self._counts["prompt_tokens"] += len(ids)
        self._counts["cached_tokens"] += result.cached_tokens
        self._counts["generated_tokens"] += len(result.ids)
        return result

    async def score(self, ids: list[int]) -> list[float]:
        check_prompt(ids, 1, self.config.max_model_len, self._vocab_size)
        return await self._call(self._score(ids, str(next(self._ids))), f"vLLM to score {len(ids)} tokens")

    async def update_weights(self, stream: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Freeze what runs, load, and let it go on: its later tokens carry the new version.

        ``config.transfer`` other than file needs a stream that is ``Weights``.
        """
        if self._transfer is not None:
            await self._transfer.send(cast(Weights, stream), version)
            return
        with contextlib.closing(weight_files(stream)) as files:
            await self.load(files, version)

    async def load(self, files: Iterator[Path], version: int) -> None:
        """``update_weights`` from safetensors files, each of which lives until the next is asked for."""
        await self._call(self._watched(self._update(files, version)), f"weights of version {version} to load")

    async def load_adapter(self, folder: Path, version: int) -> None:
        """Freeze what runs, load, and let it go on: its later tokens carry the new version."""
        what = f"the adapter of version {version} to load"
        await self._call(self._watched(self._update_adapter(folder, version)), what)

    async def _update(self, files: Iterator[Path], version: int) -> None:
        await self._begin_update()
        while path := await asyncio.to_thread(next, files, None):
            await self._send_update({"path": str(path)})
        await self._end_update(version)

    async def _update_adapter(self, folder: Path, version: int) -> None:
        await self._freeze()
        await self._load_adapter(folder, version)
        await self._go_on(version)

    async def _begin_update(self) -> None:
        await self._freeze()
        await self._start_update()

    async def _end_update(self, version: int) -> None:
        await self._finish_update(version)
        await self._go_on(version)

    async def _freeze(self) -> None:
        if not self._paused:
            await self._set_paused("keep")

    async def _go_on(self, version: int) -> None:
        await self._drop_cache()
        if not self._paused:
            await self._set_paused(None)
        self.version = version

    async def world_size(self) -> int:
        """Workers that take part in a weight transfer."""
        return await self._call(self._watched(self._world_size()), "the number of the engine's workers")

    async def join_transfer(self, info: dict[str, Any]) -> None:
        """Meet the trainer: once, before the first of the updates that vLLM's weight transfer takes step by step."""
        await self._call(self._watched(self._join_transfer(info)), "the engine's workers to meet the trainer")

    async def begin_update(self) -> None:
        await self._call(self._watched(self._begin_update()), "the engine to freeze what runs")

    async def send_update(self, info: dict[str, Any]) -> None:
        await self._call(self._watched(self._send_update(info)), "weights to arrive")

    async def end_update(self, version: int) -> None:
        await self._call(self._watched(self._end_update(version)), "the engine to go on with new weights")

    async def pause(self, mode: PauseMode = "wait") -> None:
        """``abort`` ends what runs, ``wait`` lets it end, ``keep`` freezes it. New requests wait for ``resume``."""
        await self._call(self._watched(self._set_paused(mode)), "running requests to end before a pause")
        self._paused = True

    async def resume(self) -> None:
        await self._call(self._watched(self._set_paused(None)), "the engine to resume")
        self._paused = False

    async def sleep(self, level: int = 1) -> None:
        """Give memory back (a no-op on CPU). Running requests are aborted."""
        await self._call(self._watched(self._sleep(level)), "the engine to sleep")

    async def wake(self, tags: list[str] | None = None) -> None:
        await self._call(self._watched(self._wake(tags)), "the engine to wake")

    async def abort(self, program_id: str) -> None:
        running = [request_id for request_id, program in self._programs.items() if program == program_id]
        if running:
            await self._call(self._abort(running), "an abort")

    async def release(self, program_id: str) -> None:
        if self._retains:
            await self._call(self._watched(self._release(program_id)), "a release")

    async def stats(self) -> dict[str, float]:
        """Counts of this client since the start, and how many of its requests run now."""
        return {**self._counts, "running": len(self._programs)}

    @property
    def calls(self) -> int:
        """How many calls wait for an answer, of any kind."""
        return len(self._calls)

    async def health(self) -> None:
        await self._call(self._health(), "a sign of life")

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        await asyncio.to_thread(self._start, self._end_calls())
        if self._transfer is not None:
            self._transfer.close()
        await asyncio.to_thread(self._stop)
        self._loop.call_soon_threadsafe(self._loop.stop)
        await asyncio.to_thread(self._thread.join, self.config.timeout_s)
        self._loop.close()

    async def _watched(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Await on the engine's loop, but not on a dead engine: vLLM 0.32 never answers control calls that it lost."""
        task = asyncio.ensure_future(coroutine)
        try:
            while not (await asyncio.wait({task}, timeout=ALIVE_EVERY_S))[0]:
                await self._health()
            return task.result()
        finally:
            task.cancel()

    async def _call(self, coroutine: Coroutine[Any, Any, Any], what: str) -> Any:
        """Run on the engine's loop. A caller that is cancelled or runs out of time cancels it there, which aborts."""
        if self._closed:
            coroutine.close()
            raise EngineDied("the vLLM engine was closed")
        future = asyncio.run_coroutine_threadsafe(self._until_closed(coroutine), self._loop)
        return await within(asyncio.wrap_future(future), self.config.timeout_s, what)

    async def _until_closed(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        task = asyncio.current_task()
        assert task is not None
        self._calls.add(task)
        try:
            return await coroutine
        except asyncio.CancelledError:
            if self._closed:
                raise EngineDied("the vLLM engine was closed") from None
            raise
        finally:
            self._calls.discard(task)

    async def _end_calls(self) -> None:
        """Whoever still waits for an answer hears that there will be none."""
        for task in self._calls:
            task.cancel()
        if self._calls:
            await asyncio.wait(set(self._calls), timeout=LAST_CALLS_S)

    def _start(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run on the engine's loop and block, while this object is being built or closed."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(self.config.timeout_s)
        except TimeoutError as error:
            if future.done():
                raise
            future.cancel()
            raise WaitTimeout(f"waited {self.config.timeout_s:g} s for vLLM to start or stop") from error

    def _died(self, error: BaseException | str) -> EngineDied:
        return EngineDied(f"the vLLM engine died: {error or 'no reason given'}; last said: {last_words(self.log_path)}")
