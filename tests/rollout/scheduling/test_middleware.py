"""The middleware inside an application put together by vLLM's own functions, read by vLLM's own request models."""

from __future__ import annotations

import asyncio
import json
from argparse import Namespace
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY, generate_latest
from starlette.responses import Response
from vllm.entrypoints.generate.base.serving import GenerateBaseServing
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware

from rollout.scheduling import metrics, middleware
from rollout.scheduling.counters import Counters
from rollout.scheduling.latency import ToolLatencies
from rollout.scheduling.metrics import Publisher
from rollout.scheduling.middleware import ProgramMiddleware, tell, tool_before
from rollout.scheduling.programs import Programs

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "größer 你好 🐢"}]}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": "m", "prompt": "größer"},
    "/v1/responses": {"model": "m", "input": "größer"},
}
MODELS = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
}
KEY = {"Authorization": "Bearer secret"}


class Engines:
    """Stands where the client of the engine cores does; what it hears is what they would."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, list[str]]] = []
        self.engine_core = self
        self.silent = False

    async def call_utility_async(self, method: str, ids: list[str]) -> None:
        if self.silent:
            await asyncio.Event().wait()
        self.heard.append((method, ids))


def make_app(api_key: list[str] | None = None, additional_config: dict[str, Any] | None = None) -> FastAPI:
    """Routes that answer with what vLLM makes of the request, behind vLLM's handlers and middlewares."""
    app = FastAPI()
    app.state.args = Namespace(log_error_stack=False)
    app.state.engine_client = Engines()
    if additional_config is not None:
        app.state.vllm_config = Namespace(additional_config=additional_config)

    def add_turn(path: str, model: Any) -> None:
        async def turn(request: Any, raw_request: Request) -> dict[str, Any]:
            body = (await raw_request.body()).decode()
            session = GenerateBaseServing._get_session_id(request, raw_request)
            return {"session": session, "extra": request.vllm_xargs, "body": body}

        turn.__annotations__["request"] = model  # what FastAPI parses the body into
        app.post(path)(turn)

    for path, model in MODELS.items():
        add_turn(path, model)

    @app.post("/v1/echo")
    async def echo(request: Request) -> Response:
        return Response(await request.body(), headers={"content-type": request.headers["content-type"]})

    init_exception_handler(app)
    arguments = Namespace(
        allowed_origins=["*"],
        allow_credentials=False,
        allowed_methods=["*"],
        allowed_headers=["*"],
        api_key=api_key,
        enable_request_id_headers=False,
        middleware=["rollout.scheduling.middleware.ProgramMiddleware"],
    )
    init_entrypoints_middleware(arguments, app, ("generate",))
    assert app.user_middleware[0].cls is ProgramMiddleware  # outermost: outside authentication
    return app


def post(app: FastAPI, path: str, body: Any, headers: dict[str, str] | None = None) -> httpx.Response:
    """``body`` as bytes, as an iterator of chunks, or as an object that becomes JSON."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        content = body if isinstance(body, bytes) or hasattr(body, "__aiter__") else json.dumps(body).encode()
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.post(
                path, content=content, headers={"content-type": "application/json"} | (headers or {})
            )

    return asyncio.run(send())


async def chunks(body: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(body), size):
        yield body[start : start + size]


@pytest.fixture(scope="module")
def app() -> FastAPI:
    return make_app()


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("name", ["conversation-7", "größer 你好 🐢", 'a "quoted\\" {name}', "x" * 256])
def test_the_cache_key_becomes_the_session(app: FastAPI, path: str, name: str) -> None:
    body = json.dumps(BODIES[path] | {"prompt_cache_key": name}, ensure_ascii=False, indent=1).encode() + b" \n"
    answer = post(app, path, body).json()
    assert answer["session"] == name
    sent, came = body.decode(), answer["body"]
    assert came.startswith(sent.rstrip()[:-1]) and came.endswith("} \n")  # all else to the byte
    assert json.loads(came) == json.loads(sent) | {"session_id": name}


@pytest.mark.parametrize(
    ("given", "headers", "session"),
    [
        ({"session_id": "own"}, {}, "own"),
        ({}, {"X-Session-ID": "own"}, "own"),
        ({"vllm_xargs": {"session_id": "own"}}, {}, "own"),
        ({"session_id": "body"}, {"X-Session-ID": "header"}, "body"),
        ({"vllm_xargs": {"session_id": "extra"}}, {"X-Session-ID": "header"}, "header"),
        ({"session_id": None}, {}, "key"),
        ({"session_id": None}, {"X-Session-ID": "header"}, "header"),
        ({"vllm_xargs": None}, {}, "key"),
        ({"vllm_xargs": {"tool": "search"}}, {}, "key"),
    ],
)
@pytest.mark.parametrize("path", BODIES)
def test_a_name_given_to_vllm_comes_first(
    app: FastAPI, path: str, given: dict[str, Any], headers: dict[str, str], session: str
) -> None:
    body = BODIES[path] | {"prompt_cache_key": "key"} | given
    answer = post(app, path, body, headers).json()
    assert answer["session"] == session
    if session != "key":
        assert answer["body"] == json.dumps(body)


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_bodies_in_chunks(app: FastAPI, size: int) -> None:
    body = json.dumps(CHAT | {"prompt_cache_key": "a"}, ensure_ascii=False).encode()
    assert post(app, "/v1/chat/completions", chunks(body, size)).json()["session"] == "a"
    body = json.dumps(CHAT, ensure_ascii=False).encode()
    answer = post(app, "/v1/chat/completions", chunks(body, size)).json()
    assert answer == {"session": None, "extra": None, "body": body.decode()}


@pytest.mark.parametrize("name", ["", "x" * 257, "a\nb", "a\x00", "\x7f", "\ud800", 5, True, 1.5, [], {"a": "b"}])
@pytest.mark.parametrize("where", ["prompt_cache_key", "session_id", "vllm_xargs"])
def test_malformed_names_are_refused_as_openai_does(app: FastAPI, where: str, name: Any) -> None:
    given = {"vllm_xargs": {"session_id": name}} if where == "vllm_xargs" else {where: name}
    answer = post(app, "/v1/chat/completions", CHAT | given)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == 400
    assert where in error["message"] and "1 to 256 printable" in error["message"]


def test_a_malformed_header_is_refused(app: FastAPI) -> None:
    for header in ("", "x" * 257):
        assert post(app, "/v1/chat/completions", CHAT, {"X-Session-ID": header}).status_code == 400


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"prompt_cache_key": "a"',
        b'["prompt_cache_key"]',
        b'"prompt_cache_key"',
        b"\xff\xfe{",
        b"\xef\xbb\xbf" + json.dumps({"prompt_cache_key": "a"}).encode(),
        json.dumps({"prompt_cache_key": "a"}).encode("utf-16"),
        b'{"prompt_cache_key": ' + b"[" * 100_000,
        b'{"prompt_cache_key": null}',
        b'{"messages": "prompt_cache_key"}',
        b'{"messages": "\\"prompt_cache_key\\""}',
    ],
)
def test_what_names_no_program_is_left_alone(body: bytes) -> None:
    assert tell(body) is body


def called(*calls: tuple[str, str]) -> dict[str, Any]:
    """An assistant's message with calls of these ids and names."""
    functions = [{"id": i, "type": "function", "function": {"name": name, "arguments": "{}"}} for i, name in calls]
    return {"role": "assistant", "content": None, "tool_calls": functions}


def result(call: str, **more: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call, "content": "größer 🐢"} | more


USER = CHAT["messages"]
ITEMS = [{"role": "user", "content": "größer"}]
CALL = {"type": "function_call", "call_id": "a", "name": "search", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "a", "output": "42"}
RESULTS: list[tuple[dict[str, Any], str | None]] = [
    ({"messages": [*USER, called(("a", "search")), result("a")]}, "search"),
    ({"messages": [*USER, called(("a", "search"), ("b", "fetch")), result("b"), result("a")]}, "fetch+search"),
    ({"messages": [*USER, called(("a", "search"), ("b", "search")), result("a"), result("b")]}, "search"),
    ({"messages": [*USER, called(("a", "old")), result("a"), called(("b", "new")), result("b")]}, "new"),
    ({"messages": [*USER, called(("a", "search")), result("a", name="web")]}, "web"),
    ({"messages": [*USER, result("nobody's")]}, "tool"),
    ({"messages": [*USER, called(("a", "person")), result("a")]}, "person()"),
    ({"messages": [*USER, called(("a", "search")), result("a"), *USER]}, None),
    ({"messages": USER}, None),
    ({"input": [*ITEMS, CALL, OUTPUT]}, "search"),
    ({"input": [OUTPUT]}, "tool"),
    ({"input": [CALL, OUTPUT, *ITEMS]}, None),
    ({"input": "function_call_output"}, None),
]


@pytest.mark.parametrize(("turn", "tool"), RESULTS, ids=[str(tool) for _, tool in RESULTS])
@pytest.mark.parametrize("given", [{}, {"prompt_cache_key": "key"}, {"session_id": "key"}], ids=["", "cache", "own"])
def test_a_tools_result_says_which_tool_it_is_of(
    app: FastAPI, turn: dict[str, Any], tool: str | None, given: dict[str, Any]
) -> None:
    body = json.dumps({"model": "m"} | turn | given)
    path = "/v1/chat/completions" if "messages" in turn else "/v1/responses"
    answer = post(app, path, body.encode()).json()
    assert answer["extra"] == (None if tool is None else {"tool": tool})
    assert answer["session"] == ("key" if given else None)
    assert answer["body"].startswith(body[:-1])  # all else to the byte
    if tool is None and "prompt_cache_key" not in given:
        assert answer["body"] == body


@pytest.mark.parametrize(
    ("extra", "becomes"),
    [
        ({"tool": "mine"}, {"tool": "mine"}),
        ({"tool": ""}, {"tool": ""}),
        ({"last_turn": 1, "session_id": "s"}, {"last_turn": 1, "session_id": "s", "tool": "search"}),
        ({}, {"tool": "search"}),
        (None, {"tool": "search"}),
    ],
)
def test_what_the_client_says_itself_stands(
    app: FastAPI, extra: dict[str, Any] | None, becomes: dict[str, Any]
) -> None:
    body = {"model": "m", **RESULTS[0][0], "vllm_xargs": extra}
    assert post(app, "/v1/chat/completions", body).json()["extra"] == becomes


@pytest.mark.parametrize("extra", [["tool"], "tool", {"tool": None}])
def test_arguments_that_vllm_refuses_are_refused(app: FastAPI, extra: Any) -> None:
    body = {"model": "m", **RESULTS[0][0], "vllm_xargs": extra}
    assert post(app, "/v1/chat/completions", body).status_code == 400


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.sampled_from(["tool", "a", "assistant"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "type", "name", "id", "call_id", "tool_call_id", "tool_calls", "function"]), inner
        )
    ),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(st.fixed_dictionaries({}, optional={"messages": anything, "input": anything, "vllm_xargs": anything}))
def test_any_json_is_read(content: dict[str, Any]) -> None:
    """What is malformed is for vLLM to refuse, and nothing that was sent is lost."""
    body = json.dumps(content).encode()
    told = json.loads(tell(body))
    name = tool_before(content)
    assert name is None or (name and name.isprintable() and len(name) <= 64)
    assert {key: told.get(key) for key in content if key != "vllm_xargs"} == {
        key: value for key, value in content.items() if key != "vllm_xargs"
    }
    extra = content.get("vllm_xargs")
    hinted = isinstance(extra, dict | None) and name is not None and "tool" not in (extra or {})
    assert told.get("vllm_xargs") == ((extra or {}) | {"tool": name} if hinted else extra)


def test_a_job_goes_on_after_an_output_whose_call_nobody_can_read() -> None:
    """A format without a known marker reads as a final answer; the body of the next turn says what it was."""
    programs = Programs(ToolLatencies())
    turn = programs.arrive("r1", "s", 10, 0.0)
    programs.admit(turn, 0.0)
    programs.finish(turn, 1.0, tool=None, aborted=False)
    told = json.loads(tell(json.dumps(RESULTS[0][0]).encode()))
    again = programs.arrive("r2", "s", 20, 3.0, told["vllm_xargs"]["tool"])
    assert again.job is turn.job and (again.job.turns, again.job.gaps) == (2, 2.0)
    assert programs.latencies.durations("search") == [2.0]


def test_bad_json_is_answered_by_vllm(app: FastAPI) -> None:
    answer = post(app, "/v1/chat/completions", b'{"prompt_cache_key": "a"')
    assert answer.status_code == 400
    assert "JSON" in answer.json()["error"]["message"]


def test_other_paths_are_untouched(app: FastAPI) -> None:
    body = json.dumps({"prompt_cache_key": "\n"}).encode()
    answer = post(app, "/v1/echo", chunks(body, 3), {"content-type": "text/plain", "X-Session-ID": ""})
    assert (answer.status_code, answer.content) == (200, body)


def test_a_client_that_leaves_is_a_client_that_left() -> None:
    """The application hears of it as it would without the middleware, in the body and after it."""
    messages = [
        {"type": "http.request", "body": b'{"prompt_cache_key": "a', "more_body": True},
        {"type": "http.disconnect"},
    ]
    assert asyncio.run(heard(messages)) == messages
    whole = {"type": "http.request", "body": b'{"prompt_cache_key": "a"}', "more_body": False}
    first, second = asyncio.run(heard([whole, {"type": "http.disconnect"}]))
    assert json.loads(first["body"]) == {"prompt_cache_key": "a", "session_id": "a"}
    assert second == {"type": "http.disconnect"}


async def heard(messages: list[dict[str, Any]]) -> list[Any]:
    incoming, got = iter(messages), []

    async def inner(scope: Any, receive: Any, inner_send: Any) -> None:
        assert inner_send is send  # answers stream through
        got.extend([await receive() for _ in messages])

    async def receive() -> dict[str, Any]:
        return next(incoming)

    async def send(message: Any) -> None:
        raise AssertionError(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "app": FastAPI()}
    await ProgramMiddleware(inner)(scope, receive, send)
    return got


def test_a_prefix_in_front_of_all_paths() -> None:
    app = make_app()
    app.root_path = "/api"
    assert post(app, "/api/v1/chat/completions", CHAT | {"prompt_cache_key": "a"}).json()["session"] == "a"


@pytest.mark.parametrize("program", ["conversation-7", "größer 你好", "a/b?c", "release", "x" * 256])
def test_release(program: str) -> None:
    app = make_app()
    answer = post(
        app, f"/v1/programs/{httpx.URL('', params={'': program}).query.decode()[1:]}/release".replace("+", "%20"), b""
    )
    assert (answer.status_code, answer.json()) == (202, {"released": program})
    assert app.state.engine_client.heard == [("abort_requests", [middleware.RELEASE + program])]


def test_release_is_refused_for_a_malformed_name() -> None:
    app = make_app()
    for program in ("%01", "x" * 257):
        answer = post(app, f"/v1/programs/{program}/release", b"")
        assert answer.status_code == 400
        assert "path" in answer.json()["error"]["message"]
    assert app.state.engine_client.heard == []


def test_a_release_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "RELEASE_TIMEOUT", 0.01)
    app = make_app()
    app.state.engine_client.silent = True
    assert post(app, "/v1/programs/a/release", b"").status_code == 504


def test_a_server_without_an_engine() -> None:
    app = make_app()
    app.state.engine_client = None
    assert post(app, "/v1/programs/a/release", b"").status_code == 501


@pytest.mark.parametrize("path", ["/v1/programs/a/release", *BODIES])
def test_everything_stands_behind_the_key(path: str) -> None:
    app = make_app(api_key=["secret"])

    async def endless() -> AsyncIterator[bytes]:
        raise AssertionError("the body of a stranger was read")
        yield b""

    assert post(app, path, endless()).status_code == 401
    assert app.state.engine_client.heard == []
    assert post(app, path, BODIES.get(path, {}), KEY).status_code in (200, 202)


def test_the_scheduler_knows_a_release_by_the_same_words() -> None:
    from rollout.scheduling.program_scheduler import RELEASE

    assert RELEASE == middleware.RELEASE


def test_what_vllm_must_have() -> None:
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.core_client import AsyncMPClient, DPLBAsyncMPClient

    assert callable(EngineCore.abort_requests)
    assert DPLBAsyncMPClient.call_utility_async is not AsyncMPClient.call_utility_async  # one engine, all engines


def test_the_page_of_metrics_shows_the_schedulers_file(tmp_path: Path) -> None:
    path = tmp_path / "numbers.json"
    app = make_app(additional_config={"turnstile": {"metrics_path": str(path)}})
    Publisher(Counters(turns=3), dict, path=path)
    post(app, "/v1/chat/completions", CHAT)
    try:
        assert b'turnstile_turns_total{engine="0"} 3.0' in generate_latest(REGISTRY)
    finally:
        REGISTRY.unregister(metrics.expose(path))
        metrics._registered.cache_clear()


def test_a_front_end_that_cannot_write_the_schedulers_file_serves(tmp_path: Path) -> None:
    """The engine core may run elsewhere."""
    path = tmp_path / "elsewhere" / "numbers.json"
    app = make_app(additional_config={"turnstile": {"metrics_path": str(path)}})
    try:
        assert post(app, "/v1/chat/completions", CHAT).status_code == 200
    finally:
        REGISTRY.unregister(metrics.expose(path))
        metrics._registered.cache_clear()


@pytest.mark.parametrize("additional_config", [{}, {"turnstile": {"policy": "plas"}}])
def test_without_a_file_the_page_stays_as_it_is(additional_config: dict[str, Any]) -> None:
    before = list(REGISTRY._collector_to_names)
    assert post(make_app(additional_config=additional_config), "/v1/chat/completions", CHAT).status_code == 200
    assert list(REGISTRY._collector_to_names) == before
