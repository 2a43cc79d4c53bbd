"""Programs over HTTP: ``vllm serve … --middleware rollout.scheduling.middleware.ProgramMiddleware``.

OpenAI's ``prompt_cache_key``, which no scheduler of vLLM's sees, becomes ``session_id``. A turn that brings a tool's
result says so to the scheduler (``tool`` in ``vllm_xargs``): its job goes on, in whatever format the call was written.
``POST /v1/programs/{id}/release`` says that a program will not come back. If the scheduler has a ``metrics_path``,
vLLM's ``/metrics`` shows what it writes there.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import deque
from collections.abc import Iterator
from typing import Any

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rollout.scheduling.metrics import expose
from rollout.scheduling.options import Options
from rollout.scheduling.programs import LONGEST_NAME, RELEASE
from rollout.scheduling.tool_names import MOST_NAMES, label

TURNS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
NAMELESS = "tool"  # the hint where a result does not tell of which tool it is
TELLING = (b'"session_id"', b'"prompt_cache_key"', b'"tool"', b'"function_call_output"')  # a body without is left alone
RELEASE_TIMEOUT = 30.0  # seconds in which the engine must come round to a release: far more than a step takes


class ProgramMiddleware:
    """Pure ASGI, streams through; adds to the body of a turn what the scheduler must know, and changes nothing else.

    A name that the client gives vLLM itself comes first, in vLLM's order: ``session_id`` in the body, the header
    ``X-Session-ID``, ``session_id`` in ``vllm_xargs``. A name is a string of 1 to 256 printable characters: any other
    is answered with 400. What is no JSON object in UTF-8 is left to vLLM.

    vLLM puts this middleware outside the one that checks the API key. So nothing is done here before the application
    asks for the body, and the release is a route of the application: both stand behind the key.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._settled = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._settled:
            self._settled = True
            scope["app"].add_route("/v1/programs/{program:path}/release", release, methods=["POST"])
            show_numbers(scope["app"])
        if scope["type"] == "http" and scope["method"] == "POST" and _path(scope) in TURNS:
            receive = _Body(receive, Headers(scope=scope).get("X-Session-ID"))
        await self.app(scope, receive, send)


class _Body:
    """The ``receive`` of a turn: the body, once it is asked for, with what the scheduler must know in it."""

    def __init__(self, receive: Receive, header: str | None) -> None:
        self._receive = receive
        self._header = header
        self._pending: deque[Message] | None = None

    async def __call__(self) -> Message:
        if self._pending is None:
            self._pending = deque(await self._read())
        return self._pending.popleft() if self._pending else await self._receive()

    async def _read(self) -> list[Message]:
        messages = [await self._receive()]
        while messages[-1].get("more_body", False):
            messages.append(await self._receive())
        if messages[-1]["type"] != "http.request":  # the client left
            return messages
        body = b"".join(message.get("body", b"") for message in messages)
        told = tell(body, self._header)
        return messages if told is body else [{"type": "http.request", "body": told, "more_body": False}]


def tell(body: bytes, header: str | None = None) -> bytes:
    """``body`` with more members at its end, of which a JSON parser takes the last; ``body`` itself if none is needed.

    ``session_id``, if ``prompt_cache_key`` alone names the program; ``vllm_xargs`` with the ``tool`` whose result the
    turn brings, if the client does not name it there.

    Raises:
        HTTPException: 400, the name is malformed. FastAPI passes it on, and vLLM renders it as OpenAI does.
    """
    if header is None and not any(word in body for word in TELLING):
        return body  # spares most bodies a second parse
    try:
        content = json.loads(body.decode())
    except (ValueError, RecursionError):
        return body
    if not isinstance(content, dict):
        return body
    more: dict[str, Any] = {}
    if (name := cache_key(content, header)) is not None:
        more["session_id"] = name
    extra = content.get("vllm_xargs")
    extra = {} if extra is None else extra
    if isinstance(extra, dict) and "tool" not in extra and (tool := tool_before(content)) is not None:
        more["vllm_xargs"] = {**extra, "tool": tool}
    if not more:
        return body
    end = body.rindex(b"}")
    return body[:end] + b", " + json.dumps(more).encode()[1:] + body[end + 1 :]


def cache_key(content: dict[str, Any], header: str | None) -> str | None:
    """``prompt_cache_key``, if no name that vLLM knows itself stands before it. HTTPException 400: a malformed one."""
    where, name = given_name(content, header)
    if name is None:
        return None
    check_name(name, where)
    return name if where == "prompt_cache_key" else None


def given_name(content: dict[str, Any], header: str | None) -> tuple[str, Any]:
    """Where a turn names its program, and the name as it was given, unchecked; None if nowhere."""
    extra = content.get("vllm_xargs")
    names = {
        "session_id": content.get("session_id"),
        "X-Session-ID": header,
        "vllm_xargs.session_id": extra.get("session_id") if isinstance(extra, dict) else None,
        "prompt_cache_key": content.get("prompt_cache_key"),
    }
    return next(((where, name) for where, name in names.items() if name is not None), ("", None))


def tool_before(content: dict[str, Any]) -> str | None:
    """The tool whose result ends the prompt, as the scheduler calls it; None if something else does.

    Results are messages of the role ``tool`` (chat), or items ``function_call_output`` (Responses). The name is the
    message's own, or that in the call which the result answers. Several calls make one key, as in an output.
    """
    turns = content.get("messages", content.get("input"))
    turns = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    results = list(itertools.takewhile(_is_result, reversed(turns)))
    if not results:
        return None
    called = dict(pair for turn in turns for pair in _calls(turn))
    names = [turn.get("name") or called.get(str(turn.get("tool_call_id", turn.get("call_id")))) for turn in results]
    known = {label(name) for name in names if isinstance(name, str)}
    return label("+".join(sorted(known)[:MOST_NAMES])) if known else NAMELESS


def _is_result(turn: dict[str, Any]) -> bool:
    return turn.get("role") == "tool" or turn.get("type") == "function_call_output"


def _calls(turn: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Id and tool of the calls in an assistant's message, or of an item that is a call."""
    if turn.get("type") == "function_call":
        yield str(turn.get("call_id")), turn.get("name")
    calls = turn.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            yield str(call.get("id")), function.get("name")


async def release(request: Request) -> JSONResponse:
    """Answer 202 once every engine core knows; releasing what is unknown, or without our scheduler, does nothing.

    An abort would do, but with several engines the client drops aborts of requests that it does not know, while a
    utility call reaches all of them.
    """
    program = check_name(request.path_params["program"], "the program in the path")
    engine = getattr(request.app.state, "engine_client", None)
    if engine is None:
        raise HTTPException(501, "this server has no engine: send the release to the server that generates")
    try:
        async with asyncio.timeout(RELEASE_TIMEOUT):
            await engine.engine_core.call_utility_async("abort_requests", [RELEASE + program])
    except TimeoutError:
        raise HTTPException(504, f"the engine did not answer within {RELEASE_TIMEOUT:g} s; release again") from None
    return JSONResponse({"released": program}, status_code=202)


def show_numbers(app: Any) -> None:
    """Let the page of metrics read the scheduler's file, which its options name."""
    config = getattr(app.state, "vllm_config", None)
    path = Options.read(config.additional_config, writes=False).metrics_path if config is not None else None
    if path is not None:
        expose(path)


def check_name(name: Any, where: str) -> str:
    """The name of a program, or HTTPException 400."""
    if not isinstance(name, str):
        problem = f"a JSON {type(name).__name__}"
    elif not 0 < len(name) <= LONGEST_NAME:
        problem = f"{len(name)} characters"
    elif not name.isprintable():
        problem = "a character that is not printable"
    else:
        return name
    raise HTTPException(400, f"{where}: must be a string of 1 to {LONGEST_NAME} printable characters, got {problem}")


def _path(scope: Scope) -> str:
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))
