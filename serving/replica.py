"""One of several servers: watched, taken out when it fails, and started again."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable

import aiohttp
from rich.console import Console

from rollout.errors import EngineDied, WaitTimeout
from serving.server import Server, free_port

Launch = Callable[[str, int], Server]  # by host and port
HERE = "127.0.0.1"  # only the router's address is reached from outside
INTERVAL_S = 2.0  # between two looks at a server; a failed request brings one at once
HEALTH_TIMEOUT_S = 10.0
SILENT_LOOKS = 3  # in a row without an answer before a server whose process lives is given up: it may be busy
STARTS = 3  # in a row that may fail before a replica stays out
PAUSE_S = 5.0  # before the second start, twice as long before the third


class Replica:
    """``up``: requests may go there. ``restarts``: how often it was started anew. ``due``: when it should be back."""

    def __init__(self, index: int, launch: Launch, port: int) -> None:
        self.index = index
        self.server = launch(HERE, port)
        self.up = False
        self.restarts = 0
        self.start_s = 0.0
        self.due = 0.0
        self.suspected = asyncio.Event()
        self._launch = launch

    def ready(self, seconds: float) -> None:
        """Its server answers, ``seconds`` after its start."""
        self.up = True
        self.start_s = seconds

    async def healthy(self, session: aiohttp.ClientSession) -> bool | None:
        """Whether its server can serve; None if it does not say."""
        if self.server.process.poll() is not None:
            return False
        timeout = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S)
        try:
            headers = {"Connection": "close"}  # one that was kept may just be closing
            async with session.get(f"{self.server.url}/health", timeout=timeout, headers=headers) as answer:
                return answer.status == 200
        except (TimeoutError, aiohttp.ClientError):
            return None

    async def watch(self, session: aiohttp.ClientSession, console: Console, start_timeout: float) -> None:
        """Replace the server whenever it fails; return when it cannot be started any more."""
        silent = 0
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.suspected.wait(), INTERVAL_S)
            self.suspected.clear()
            healthy = await self.healthy(session)
            silent = silent + 1 if healthy is None else 0
            if healthy or 0 < silent < SILENT_LOOKS:
                continue
            silent = 0
            if not await self._replace(session, console, start_timeout):
                return

    async def _replace(self, session: aiohttp.ClientSession, console: Console, start_timeout: float) -> bool:
        self.up = False
        code = self.server.process.poll()
        await asyncio.to_thread(self.server.kill)
        if code is not None and code < 0:
            cause = f"was killed by {signal.Signals(-code).name}"
        else:
            ended = "failed or hangs" if code is None else f"ended with code {code}"
            cause = f"{ended}: {self.server.last_words()}"
        console.print(f"replica {self.index}   {cause}; starting it again (log: {self.server.log})", markup=False)
        for failed in range(STARTS):
            await asyncio.sleep(PAUSE_S * failed)
            start = time.monotonic()
            self.due = start + self.start_s
            self.restarts += 1
            try:
                self.server = self._launch(HERE, free_port(HERE, 0))
                await self._started(session, start, start_timeout)
            except (EngineDied, WaitTimeout, OSError) as error:  # OSError: no memory, no room for the log
                await asyncio.to_thread(self.server.kill)
                console.print(f"replica {self.index}   {error}", markup=False)
            else:
                self.ready(time.monotonic() - start)
                console.print(f"replica {self.index}   serves again after {self.start_s:.0f} s")
                return True
        console.print(f"replica {self.index}   failed to start {STARTS} times and stays out")
        return False

    async def _started(self, session: aiohttp.ClientSession, start: float, timeout: float) -> None:
        while not await self.healthy(session):
            self.server.check_starting(time.monotonic() - start, timeout)
            await asyncio.sleep(0.25)
