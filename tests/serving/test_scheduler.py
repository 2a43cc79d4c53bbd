"""``python -m serving scheduler=turnstile`` under the official client: programs by every name, numbers on /metrics."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import signal
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rollout.scheduling.files import LATENCIES, NUMBERS
from rollout.scheduling.latency import ToolLatencies
from rollout.tools.calculator import calculator
from tests.serving.lessons import EASY, HARD, question
from tests.serving.process import Serving

PAUSE = 0.4  # seconds that a tool takes here


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scheduled")


@pytest.fixture(scope="module")
def scheduled(checkpoint: Path, run_dir: Path) -> Iterator[Serving]:
    """A server with our scheduler, on a checkpoint that a training run left tool latencies beside."""
    folder = run_dir / "step-7"
    shutil.copytree(checkpoint, folder)
    latencies = ToolLatencies()
    for _ in range(5):
        latencies.observe("calculator", 2.0)
    latencies.save(folder / LATENCIES)
    serving = Serving(
        f"checkpoint={folder}",
        "port=0",
        f"run_dir={run_dir}",
        "max_model_len=2048",
        "kv_cache_gib=0.01",
        "+extra.block-size=32",
        "+extra.enable-prompt-tokens-details=true",
        "scheduler=turnstile",
        "scheduler.options.turnstile.k=2",
        f"scheduler.options.turnstile.save_latencies={run_dir / 'kept.json'}",
    )
    yield serving
    if serving.process.poll() is None:
        serving.process.send_signal(signal.SIGINT)
        serving.process.wait(60)


@pytest.fixture(scope="module")
def url(scheduled: Serving) -> str:
    return scheduled.wait_for(r"serving +(http://\S+)/v1", timeout=240)[1]


@pytest.fixture(scope="module")
def client(url: str) -> Any:
    from openai import OpenAI

    return OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0, timeout=120)


def numbers(url: str) -> dict[str, float]:
    """The scheduler's numbers as /metrics shows them: published once a second, and when nothing is left to do."""
    time.sleep(1.1)
    with urllib.request.urlopen(f"{url}/metrics") as page:
        lines = page.read().decode().splitlines()
    found = [
        re.fullmatch(r'turnstile_(\w+?)(?:_total)?\{(?:cause="(\w+)",)?engine="0"\} (\S+)', line) for line in lines
    ]
    return {f"{m[1]}.{m[2]}" if m[2] else m[1]: float(m[3]) for m in found if m}


def grown(url: str, before: dict[str, float], *names: str) -> list[float]:
    now = numbers(url)
    return [now[name] - before[name] for name in names]


def ask(client: Any, messages: list[dict[str, Any]], **arguments: Any) -> Any:
    model = client.models.list().data[0].id
    return client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=64, **arguments)


def test_what_runs_is_said(scheduled: Serving, url: str, run_dir: Path) -> None:
    assert f"scheduler   turnstile, with the tool latencies of {run_dir / 'step-7' / LATENCIES}\n" in scheduled.printed
    assert numbers(url)["pool_blocks"] > 0


def test_a_connection_outlives_a_tool(url: str) -> None:
    """The official client reuses connections for up to 5 s, and vLLM by default closes them after as many."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    connection.auto_open = 0
    connection.connect()
    for pause in (0.0, 5.5):
        time.sleep(pause)
        connection.request("GET", "/health")
        assert connection.getresponse().read() == b""


def test_a_tool_call_is_a_pause_within_a_job(client: Any, url: str) -> None:
    """The output names the tool, so the job goes on; its KV is kept, and the next turn gets it back."""
    before = numbers(url)
    tools = [calculator.schema]
    session = {"X-Session-ID": "sum"}
    asked = ask(client, question(HARD), tools=tools, extra_headers=session).choices[0].message
    assert asked.tool_calls[0].function.name == "calculator"
    assert grown(url, before, "programs", "turns", "pins", "claims", "jobs", "programs_in_tool") == [1, 1, 1, 0, 0, 1]
    time.sleep(PAUSE)
    result = {"role": "tool", "tool_call_id": asked.tool_calls[0].id, "content": "408"}
    history = [*question(HARD), asked.model_dump(exclude_none=True), result]
    answered = ask(client, history, tools=tools, extra_headers=session)
    assert answered.choices[0].message.content == "It is 408."
    cached = answered.usage.prompt_tokens_details.cached_tokens
    assert cached > 0
    assert grown(url, before, "programs", "turns", "claims", "jobs", "tokens_reused") == [1, 2, 1, 1, cached]


def test_a_tools_result_goes_on_with_the_job_however_its_call_was_written(client: Any, url: str) -> None:
    """The output held no call that the scheduler can read; the message that answers it says what it was."""
    before = numbers(url)
    session = {"X-Session-ID": "unreadable"}
    ask(client, question(EASY), extra_headers=session)
    time.sleep(PAUSE)
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    asked = {"role": "assistant", "content": "weather?", "tool_calls": [call]}
    ask(client, [*question(EASY), asked, {"role": "tool", "tool_call_id": "c1", "content": "4"}], extra_headers=session)
    assert grown(url, before, "programs", "turns") == [1, 2]


@pytest.mark.parametrize(
    "name",
    [
        {"extra_headers": {"X-Session-ID": "chat"}},
        {"extra_body": {"prompt_cache_key": "chät 2/2"}},
        {"prompt_cache_key": "chat-3"},
        {"extra_body": {"session_id": "chat-4"}},
        {"extra_body": {"vllm_xargs": {"session_id": "chat-5"}}},
    ],
)
def test_every_name_makes_a_program(client: Any, url: str, name: dict[str, Any]) -> None:
    before = numbers(url)
    for _ in range(2):
        assert ask(client, question(EASY), **name).choices[0].message.content == "It is 4."
    assert grown(url, before, "programs", "turns", "jobs") == [1, 2, 2]


def test_requests_without_a_name_are_no_programs(client: Any, url: str) -> None:
    before = numbers(url)
    ask(client, question(EASY))
    assert grown(url, before, "programs", "turns", "pins") == [0, 0, 0]


def test_release_and_the_last_turn_let_go(client: Any, url: str) -> None:
    before = numbers(url)
    name = "to be/released ü"
    ask(client, question(HARD), tools=[calculator.schema], extra_body={"prompt_cache_key": name})
    assert grown(url, before, "pins_now") == [1]
    request = urllib.request.Request(f"{url}/v1/programs/{urllib.parse.quote(name, safe='')}/release", method="POST")
    with urllib.request.urlopen(request) as answer:
        assert (answer.status, json.load(answer)) == (202, {"released": name})
    once = {"vllm_xargs": {"session_id": "once", "last_turn": 1}}
    ask(client, question(HARD), tools=[calculator.schema], extra_body=once)
    assert grown(url, before, "pins_now", "drops.release", "programs") == [0, 1, 2]


def test_a_client_that_leaves_is_an_abort(client: Any, url: str) -> None:
    before = numbers(url)
    arguments = {"stream": True, "extra_headers": {"X-Session-ID": "left"}, "extra_body": {"ignore_eos": True}}
    model = client.models.list().data[0].id
    stream = client.chat.completions.create(model=model, messages=question(EASY), max_tokens=1900, **arguments)
    next(iter(stream))
    stream.close()
    time.sleep(1.0)  # until the server has noticed; the request would go on for longer
    ask(client, question(EASY))
    assert grown(url, before, "programs", "turns", "aborts", "pins_now") == [1, 1, 1, 0]


def test_a_malformed_name_is_refused_with_400(client: Any) -> None:
    from openai import BadRequestError

    with pytest.raises(BadRequestError, match="prompt_cache_key: must be a string of 1 to 256 printable characters"):
        ask(client, question(EASY), prompt_cache_key="line\nbreak")


def test_the_end_leaves_numbers_jobs_and_latencies(scheduled: Serving, url: str, run_dir: Path) -> None:
    """Last of all: Ctrl-C."""
    turns = numbers(url)["turns"]
    scheduled.process.send_signal(signal.SIGINT)
    assert scheduled.finished(60).endswith("stopped\n")
    left = json.loads((run_dir / NUMBERS).read_text())
    assert left["counters"]["turns"] == turns
    jobs = [json.loads(line) for line in (run_dir / f"{NUMBERS}.programs.jsonl").read_text().splitlines()]
    (job,) = (job for job in jobs if job["program"] == "sum")
    assert job["turns"] == 2
    assert PAUSE < job["gaps"] < job["finished"] - job["arrived"]
    *_, job = (job for job in jobs if job["program"] == "unreadable")
    assert job["turns"] == 2 and job["gaps"] > PAUSE
    kept = ToolLatencies()
    kept.load(run_dir / "kept.json")
    assert kept.durations("calculator")[:5] == [2.0] * 5
    assert len(kept.durations("weather")) == 1
