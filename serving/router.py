"""One address for several servers: every turn of a program goes to the replica that holds its KV cache.

vLLM's data-parallel mode gives one address too, but no affinity, and it ends as a whole when one engine core dies
(0.32: /health says 503 five seconds later, then the server exits). Here a failed replica costs its own cache.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import time
import urllib.parse
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from rollout.scheduling.middleware import given_name
from serving.affinity import Homes
from serving.replica import Replica
from serving.replica_metrics import merged

TRIES = 2  # a request that kills an engine must not kill them all
HOP_BY_HOP = {
    *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer"),
    *("transfer-encoding", "upgrade", "host", "content-length", "expect"),
}
RELEASE = re.compile(r"/v1/programs/(.+)/release")
ONE_SERVERS_STATE = re.compile(  # routes that change, or ask for, what only one of the servers then has
    r"/(reset_\w+_cache|sleep|wake_up|pause|resume|collective_rpc|(start|stop)_profile|scale_elastic_ep|\w*weight\w*"
    r"|v1/(un)?load_lora_adapter|v1/responses/.+|inference/v1/abort_requests)"
)
SSE_ERROR = b'data: {"error"'
METRICS_TIMEOUT_S = 5.0


class Unanswered(Exception):
    """The replica failed before the client got anything: another may answer."""


class Turn(NamedTuple):
    """What a request says about its program."""

    program: str | None
    last: bool = False


class Router:
    """The web application. ``X-Replica`` in an answer tells which server gave it."""

    def __init__(self, replicas: Sequence[Replica], session: aiohttp.ClientSession) -> None:
        self._replicas = replicas
        self._session = session
        self._homes = Homes(len(replicas))
        self.app = web.Application(client_max_size=0)  # vLLM sets no limit either
        self.app.router.add_get("/health", self.health)
        self.app.router.add_get("/metrics", self.metrics)
        self.app.router.add_route("*", "/{path:.*}", self.forward)

    async def health(self, request: web.Request) -> web.Response:
        """200 while one replica can serve; the body tells of each."""
        ups = [replica.up for replica in self._replicas]
        replicas = [{"up": r.up, "restarts": r.restarts, "url": r.server.url} for r in self._replicas]
        status = "ok" if all(ups) else "degraded" if any(ups) else "down"
        answer = web.json_response({"status": status, "replicas": replicas}, status=200 if any(ups) else 503)
        if not any(ups):
            answer.headers["Retry-After"] = self._retry_after()
        return answer

    async def metrics(self, request: web.Request) -> web.Response:
        """All servers' metrics on one page, with the label ``replica``."""
        pages = await asyncio.gather(*(self._page(replica) for replica in self._replicas))
        return web.Response(body=merged(pages, self._replicas), headers={"Content-Type": "text/plain; version=0.0.4"})

    async def forward(self, request: web.Request) -> web.StreamResponse:
        """Answer as the program's replica does, as another if that one fails, or with 503."""
        if request.method == "POST" and ONE_SERVERS_STATE.fullmatch(request.path):
            urls = ", ".join(replica.server.url for replica in self._replicas)
            return _error(501, f"{request.path} concerns one server, and here are several: ask each of {urls}")
        body = await request.read()
        turn = read_turn(request.method, request.rel_url.raw_path, request.headers.get("X-Session-ID"), body)
        tried: set[int] = set()
        while len(tried) < TRIES:
            up = [r.index for r in self._replicas if r.up and r.index not in tried]
            if not up:
                break
            visit = self._homes.begin(turn.program, up, time.monotonic())
            replica = self._replicas[visit.replica]
            try:
                return await self._answer(request, body, replica)
            except Unanswered:
                tried.add(replica.index)
                replica.suspected.set()
            finally:
                self._homes.end(visit, time.monotonic())
                if turn.last and turn.program is not None:
                    self._homes.release(turn.program)
        failed = f"replicas {sorted(tried)} failed while they answered" if tried else "no replica is up"
        answer = _error(503, f"{failed}: ask again in a while")
        answer.headers["Retry-After"] = self._retry_after()
        return answer

    async def _answer(self, request: web.Request, body: bytes, replica: Replica) -> web.StreamResponse:
        url = URL(replica.server.url + request.rel_url.raw_path_qs, encoded=True)
        headers = _end_to_end(request.headers)
        try:
            upstream = await self._session.request(
                request.method, url, headers=headers, data=body or None, allow_redirects=False
            )
        except (TimeoutError, aiohttp.ClientError) as error:
            raise Unanswered from error
        async with upstream:
            streams = upstream.content_type == "text/event-stream"
            try:
                first = await upstream.content.readany() if streams else await upstream.read()
            except (TimeoutError, aiohttp.ClientError) as error:
                raise Unanswered from error
            if (upstream.status >= 500 or first.startswith(SSE_ERROR)) and not await replica.healthy(self._session):
                raise Unanswered
            headers = _end_to_end(upstream.headers)
            headers["X-Replica"] = str(replica.index)
            if not streams:
                return web.Response(status=upstream.status, reason=upstream.reason, headers=headers, body=first)
            answer = web.StreamResponse(status=upstream.status, reason=upstream.reason, headers=headers)
            with contextlib.suppress(ConnectionResetError):  # the client has left, and nobody is told
                await answer.prepare(request)
                await answer.write(first)
                async for chunk in _rest(upstream, replica):
                    await answer.write(chunk)
                await answer.write_eof()
            return answer

    async def _page(self, replica: Replica) -> str:
        """The server's metrics; none from a server that does not answer."""
        if not replica.up:
            return ""
        timeout = aiohttp.ClientTimeout(total=METRICS_TIMEOUT_S)
        try:
            async with self._session.get(f"{replica.server.url}/metrics", timeout=timeout) as answer:
                return await answer.text() if answer.status == 200 else ""
        except (TimeoutError, aiohttp.ClientError):
            return ""

    def _retry_after(self) -> str:
        """Seconds until the next replica should be back, by how long its last start took."""
        return str(max(1, math.ceil(min(replica.due for replica in self._replicas) - time.monotonic())))


def read_turn(method: str, path: str, header: str | None, body: bytes) -> Turn:
    """The program of a request, and whether this is its last. A malformed name is left to the server to refuse."""
    if method != "POST":
        return Turn(None)
    if released := RELEASE.fullmatch(path):
        return Turn(urllib.parse.unquote(released[1]), last=True)
    if not any(word in body for word in (b'"session_id"', b'"prompt_cache_key"', b'"last_turn"')):
        return Turn(header)  # spares most bodies a parse
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return Turn(header)
    if not isinstance(content, dict):
        return Turn(header)
    _, name = given_name(content, header)
    extra = content.get("vllm_xargs")
    return Turn(name if isinstance(name, str) else None, isinstance(extra, dict) and bool(extra.get("last_turn")))


async def _rest(upstream: aiohttp.ClientResponse, replica: Replica) -> AsyncIterator[bytes]:
    """What is left of a stream; if the server dies, an error event as vLLM's own, which clients raise."""
    try:
        while chunk := await upstream.content.readany():
            yield chunk
    except (TimeoutError, aiohttp.ClientError):
        replica.suspected.set()
        problem = _problem(503, f"replica {replica.index} failed within its answer: ask again")
        yield b"\n\ndata: " + problem + b"\n\ndata: [DONE]\n\n"


def _end_to_end(headers: Any) -> CIMultiDict[str]:
    dropped = HOP_BY_HOP | {name.strip().lower() for name in headers.get("Connection", "").split(",")}
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in dropped)


def _problem(status: int, message: str) -> bytes:
    kind = "ServiceUnavailableError" if status == 503 else "NotImplementedError"
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": status}}).encode()


def _error(status: int, message: str) -> web.Response:
    return web.Response(status=status, body=_problem(status, message), content_type="application/json")
