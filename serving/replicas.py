"""Several servers behind one address, to be used as one ``Server`` is."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Sequence

import aiohttp
from aiohttp import web
from rich.console import Console

from rollout.errors import EngineDied
from serving.replica import HERE, Launch, Replica
from serving.router import Router
from serving.server import bound, listening, stop_all

KEEP_ALIVE_S = 75.0  # as for one server: clients keep connections for as long as a tool may take
CONNECT_TIMEOUT_S = 5.0


class Replicas:
    """Starts all servers at once; ``listener`` is bound to the address and listens when all of them are ready."""

    def __init__(
        self, launches: Sequence[Launch], listener: socket.socket, start_timeout: float, console: Console
    ) -> None:
        self._listener = listener
        self._start_timeout = start_timeout
        self._console = console
        self._replicas: list[Replica] = []
        holders = [bound(HERE, 0) for _ in launches]  # at the same time, so that no two get the same port
        ports = [holder.getsockname()[1] for holder in holders]
        for holder in holders:
            holder.close()
        try:
            for index, (launch, port) in enumerate(zip(launches, ports, strict=True)):
                self._replicas.append(Replica(index, launch, port))
        except BaseException:
            self.stop(0.0)
            raise

    def wait_ready(self, timeout: float, waiting: Callable[[float], None]) -> None:
        """``Server.wait_ready`` for all; the first that fails is told of."""
        start = time.monotonic()
        while not all(replica.up for replica in self._replicas):
            seconds = time.monotonic() - start
            for replica in self._replicas:
                if not replica.up and replica.server.healthy():
                    replica.ready(seconds)
                else:
                    replica.server.check_starting(0.0 if replica.up else seconds, timeout)
            waiting(seconds)
            time.sleep(0.25)
        listening(self._listener)

    def wait(self) -> None:
        """Serve until interrupted, or until no replica can be started any more: EngineDied."""
        asyncio.run(self._serve())
        logs = ", ".join(str(replica.server.log) for replica in self._replicas)
        raise EngineDied(f"no replica is left (logs: {logs})")

    async def _serve(self) -> None:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(
            timeout=timeout,
            connector=connector,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        ) as session:
            runner = web.AppRunner(
                Router(self._replicas, session).app,
                access_log=None,
                auto_decompress=False,
                handler_cancellation=True,  # a client that leaves ends its request at the server too
                keepalive_timeout=KEEP_ALIVE_S,
                shutdown_timeout=1.0,
            )
            await runner.setup()
            try:
                await web.SockSite(runner, self._listener).start()
                watches = (r.watch(session, self._console, self._start_timeout) for r in self._replicas)
                await asyncio.gather(*watches)
            finally:
                await runner.cleanup()

    def stop(self, timeout: float) -> None:
        """``Server.stop`` for all at the same time; those that still start have no request to finish."""
        self._listener.close()
        for replica in self._replicas:
            if not replica.up:
                replica.server.kill()
        stop_all([replica.server for replica in self._replicas], timeout)
