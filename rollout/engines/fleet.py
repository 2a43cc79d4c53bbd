"""Several engines as one, each of which is started anew when it dies. A fleet of one is the engine with restarts.

On GPUs each replica gets ``engine.tensor_parallel_size`` devices of its own (not run on GPU).
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rollout.config import VllmConfig
from rollout.engines import Generation, PauseMode, Sampling
from rollout.engines.adapter import KeptAdapter
from rollout.engines.device_transfer import DeviceTransfer
from rollout.engines.member import (
    Member,
    in_thread,
    member_class,
    member_devices,
    member_variables,
    numbered,
    replacement_variables,
)
from rollout.engines.remote import RemoteEngine
from rollout.engines.router import Router
from rollout.engines.weight_files import KeptWeights, rest_of
from rollout.errors import EngineDied
from rollout.scheduling.files import with_own_port
from rollout.weights import BOUNDS, SyncMismatch, Weights, furthest

if TYPE_CHECKING:
    import torch

DRAIN_S = 5.0  # for the calls of a dead engine to hear of its death


class Fleet:
    """An ``Engine`` over ``config.replicas`` vLLM engines, each in processes of its own.

    A program's calls go to one member, which holds its cache (``Router``). When a member dies its running requests are
    written anew, from the token ids that came with them, by whichever member has room, or waits for its replacement:
    an episode keeps no token of an answer that a death cut, and notices nothing but the time, which counts towards its
    own time-out. The member starts again on the last weights; these are kept once, in shared memory where there is
    room. The replacement must give the log-probs that its fellows gave at the last sync. More than ``config.restarts``
    deaths of one member, or a failure to start that is no death, end the fleet: all calls raise.
    """

    def __init__(self, config: VllmConfig, model_dir: str, log_path: Path | None) -> None:
        self.config = config
        self.version = 0
        self.log_path = log_path
        self.router = Router(config.replicas)
        self._single = replace(config, replicas=1, devices=None)
        self._model_dir = model_dir
        # Of a checkpoint, whose folder may be deleted before an engine is started anew.
        self._rest = rest_of(Path(model_dir)) if config.restarts else {}
        self._state = threading.Lock()  # of members and router
        self._weights_lock = threading.Lock()  # held while weights are written, and by whoever starts on them
        self._weights: KeptWeights | None = None
        self._adapter: KeptAdapter | None = None
        self._reference: dict[tuple[int, ...], list[float]] = {}  # scores at the last sync
        self._running: Counter[str] = Counter()  # calls of each program
        self._aborted: set[str] = set()
        self._paused: PauseMode | None = None
        self._failure: BaseException | None = None
        self._closed = False
        shares = member_devices(config)
        self._members = [
            Member(
                i,
                log_path if log_path is None or config.replicas == 1 else numbered(log_path, i),
                member_variables(i, None if shares is None else shares[i]),
            )
            for i in range(config.replicas)
        ]
        self._transfer: DeviceTransfer | None = None
        self._start_all()
        if config.transfer != "file":
            engines = [member.engine for member in self._members if member.engine is not None]
            self._transfer = DeviceTransfer(self._single, engines)

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
        self._running[program_id] += 1
        try:
            while True:
                member, engine = await self._place(program_id)
                if program_id in self._aborted:  # its engine died before it could
                    return Generation([], [], "abort", [])
                try:
                    return await engine.generate(
                        ids, sampling, program_id=program_id, tool=tool, last_turn=last_turn, priority=priority
                    )
                except EngineDied as error:
                    self._lost(member, engine, error)
        finally:
            self._running[program_id] -= 1
            if not self._running[program_id]:
                del self._running[program_id]
                self._aborted.discard(program_id)
            if last_turn:
                with self._state:
                    self.router.release(program_id)

    async def abort(self, program_id: str) -> None:
        if program_id in self._running:
            self._aborted.add(program_id)
            await self._at(program_id, lambda engine: engine.abort(program_id))

    async def release(self, program_id: str) -> None:
        await self._at(program_id, lambda engine: engine.release(program_id))
        with self._state:
            self.router.release(program_id)

    async def _place(self, program_id: str) -> tuple[Member, RemoteEngine]:
        while True:
            self._check()
            with self._state:
                index = self.router.place(program_id)
                if index is not None:
                    member = self._members[index]
                    assert member.engine is not None
                    return member, member.engine
                down = [member.replacing for member in self._members if member.replacing is not None]
            if down:
                await asyncio.wait(map(asyncio.wrap_future, down), return_when=asyncio.FIRST_COMPLETED)

    async def _at(self, program_id: str, call: Callable[[RemoteEngine], Awaitable[None]]) -> None:
        """Ask the program's member, if it has one; what a dead one held for it is gone anyway."""
        with self._state:
            index = self.router.where(program_id)
            member = None if index is None else self._members[index]
            engine = None if member is None else member.engine
        if member is None or engine is None:
            return
        try:
            await call(engine)
        except EngineDied as error:
            self._lost(member, engine, error)

    async def score(self, ids: list[int]) -> list[float]:
        return await self._on(self._members[0], lambda engine: engine.score(ids))

    async def score_each(self, ids: list[int]) -> list[list[float]]:
        """``score`` by every member, which a weight sync's gate compares one by one."""
        replies = await self._each(lambda engine: engine.score(ids))
        self._reference[tuple(ids)] = replies[0]
        return replies

    async def update_weights(self, stream: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """The stream is written down once, and every member reads that; ``config.transfer`` may know a shorter way."""
        self._check()
        if self._transfer is not None:
            await self._transfer.send(cast(Weights, stream), version)
            self.version = version
            return
        weights = await asyncio.to_thread(self._keep, stream, version)
        await self._each(lambda engine: engine.load(iter(weights.paths), version))
        self.version = version

    async def load_adapter(self, folder: Path, version: int) -> None:
        """The adapter is kept for members that are started anew: they are so without it."""
        self._check()
        await asyncio.to_thread(self._keep_adapter, folder, version)
        await self._each(lambda engine: engine.load_adapter(folder, version))
        self.version = version

    async def pause(self, mode: PauseMode = "wait") -> None:
        self._paused = mode
        await self._each(lambda engine: engine.pause(mode))

    async def resume(self) -> None:
        self._paused = None
        await self._each(lambda engine: engine.resume())

    async def sleep(self, level: int = 1) -> None:
        await self._each(lambda engine: engine.sleep(level))

    async def wake(self, tags: list[str] | None = None) -> None:
        await self._each(lambda engine: engine.wake(tags))

    async def stats(self) -> dict[str, float]:
        """Sums over the members, those that died included, and how many deaths there were (``restarts``)."""
        total: Counter[str] = Counter()
        for member in self._members:
            total.update(member.past)
            if member.engine is not None:
                total.update(await member.engine.stats())
        return {**total, "restarts": sum(member.deaths for member in self._members)}

    async def health(self) -> None:
        """One that died is replaced first."""
        await self._each(lambda engine: engine.health())

    async def close(self) -> None:
        with self._state:
            if self._closed:
                return
            self._closed = True
            down = [member.replacing for member in self._members if member.replacing is not None]
        if down:
            await asyncio.wait([asyncio.wrap_future(future) for future in down])
        if self._transfer is not None:
            self._transfer.close()
        await asyncio.gather(*(member.engine.close() for member in self._members if member.engine is not None))
        if self._weights is not None:
            self._weights.close()

    async def _each(self, call: Callable[[RemoteEngine], Awaitable[Any]]) -> list[Any]:
        return await asyncio.gather(*(self._on(member, call) for member in self._members))

    async def _on(self, member: Member, call: Callable[[RemoteEngine], Awaitable[Any]]) -> Any:
        """Ask a member; one that dies meanwhile is asked again once it is replaced."""
        while True:
            self._check()
            with self._state:
                engine, replacing = member.engine, member.replacing
            if replacing is not None:
                await asyncio.wait([asyncio.wrap_future(replacing)])
                continue
            if engine is None:  # it could not be replaced
                continue
            try:
                return await call(engine)
            except EngineDied as error:
                self._lost(member, engine, error)

    def _check(self) -> None:
        if self._closed:
            raise EngineDied("the vLLM engine was closed")
        if self._failure is not None:
            raise self._failure

    def _start_all(self) -> None:
        """All at once; where one fails the others are closed again, and the first failure is raised."""
        starts = [in_thread(self._start, member) for member in self._members]
        errors = [error for start in starts if (error := start.exception()) is not None]
        if errors:
            in_thread(asyncio.run, self.close()).result()
            raise errors[0]

    def _start(self, member: Member) -> None:
        """Start an engine for the member, on the last weights; blocks."""
        weights = self._weights
        with nullcontext(self._model_dir) if weights is None else weights.folder(self._rest) as folder:
            version = 0 if weights is None else weights.version
            options = with_own_port(self._single.scheduler_options, member.index)
            config = replace(self._single, scheduler_options=options)
            own = member.own if member.deaths == 0 else replacement_variables(member.own)
            member.engine = member_class(config)(config, str(folder), member.log_path, version, own)

    def _keep(self, stream: Iterable[tuple[str, torch.Tensor]], version: int) -> KeptWeights:
        """Write new weights down in the place of the last, before or after a member starts on these; blocks."""
        with self._weights_lock:
            self._check()
            if self._weights is not None:
                self._weights.close()
            self._weights = KeptWeights(stream, version)
            self._reference = {}
            return self._weights

    def _keep_adapter(self, folder: Path, version: int) -> None:
        with self._weights_lock:
            self._check()
            self._adapter = KeptAdapter(folder, version)
            self._reference = {}

    def _lost(self, member: Member, engine: RemoteEngine, error: EngineDied) -> None:
        """The member's engine died: have it replaced, unless somebody else has said so already."""
        with self._state:
            if member.engine is not engine or member.replacing is not None or self._closed:
                return
            self.router.down(member.index)
            if self._dies(member, error):
                member.replacing = in_thread(self._replace, member, engine)

    def _dies(self, member: Member, error: EngineDied) -> bool:
        """Count a death; whether the member may be started again."""
        member.deaths += 1
        if member.deaths > self.config.restarts and self._failure is None:
            self._failure = EngineDied(
                f"engine {member.index} of {self.config.replicas} died {member.deaths} times, "
                f"engine.restarts={self.config.restarts}: {error}"
            )
        return self._failure is None

    def _replace(self, member: Member, dead: RemoteEngine) -> None:
        """Close the dead engine and start another; on a thread of its own."""
        try:
            asyncio.run(self._bury(member, dead))
            with self._weights_lock:
                while not self._closed:
                    try:
                        self._start(member)
                        asyncio.run(self._admit(member))
                        break
                    except EngineDied as error:
                        if not self._dies(member, error):
                            return
            with self._state:
                self.router.up(member.index)
        except BaseException as error:  # not a death: another start would end alike
            self._failure = self._failure or error
        finally:
            with self._state:
                member.replacing = None

    async def _bury(self, member: Member, dead: RemoteEngine) -> None:
        deadline = time.monotonic() + DRAIN_S
        while dead.calls and time.monotonic() < deadline:
            await asyncio.sleep(0.05)  # the callers hear the cause
        await dead.close()
        counts = await dead.stats()
        del counts["running"]
        with self._state:
            member.past.update(counts)
            member.engine = None

    async def _admit(self, member: Member) -> None:
        """Nobody generates on a replacement that has other weights than its fellows."""
        engine = member.engine
        assert engine is not None
        try:
            if self._adapter is not None:
                with self._adapter.folder() as folder:
                    await engine.load_adapter(folder, self._adapter.version)
            for ids, expected in list(self._reference.items()):  # which grows meanwhile
                difference = furthest(expected, await engine.score(list(ids)))
                if difference > BOUNDS.get(self.config.dtype, math.inf):
                    raise SyncMismatch(
                        f"engine {member.index}, started anew on version {engine.version}, differs by {difference:.3g} "
                        "nats from what the last weight sync gave; some weights did not arrive"
                    )
            if self._paused is not None:
                await engine.pause(self._paused)
        except BaseException:
            await engine.close()
            raise
