"""``python -m serving scheduler=turnstile`` under the official client: 200 concurrent sessions for two minutes.

Sessions of several turns name themselves by header, by ``prompt_cache_key`` or in the body; some call tools, some chat,
some stop at a string, some break a stream off, some say which turn is their last, some release. The model is tiny and
untrained: what is shown is that nothing fails, and that the scheduler counts what the client counts.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from benchmarks.report import Report

SESSIONS, SECONDS = 200, 120.0
QUICK_SESSIONS, QUICK_SECONDS = 16, 8.0
POOL_TOKENS = 60_000  # of 200 sessions: less than they hold together
TURNS = (2, 8)
TOOL = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Look something up.",
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
    },
}
TEXT = "the quick brown fox jumps over a lazy dog while seven wizards box with five liquor jugs 0123456789"
START_S, STOP_S, REQUEST_S = 300.0, 60.0, 120.0


def build(folder: Path) -> Path:
    from transformers.utils import logging

    from training.models import build_tiny

    logging.disable_progress_bar()
    return build_tiny(folder, [TEXT, json.dumps(TOOL)] * 4, hidden=64, mlp=128)


@contextmanager
def serving(checkpoint: Path, run_dir: Path) -> Iterator[str]:
    """The command as a person runs it; gives the server's address."""
    shape = json.loads((checkpoint / "config.json").read_text())
    token_bytes = 2 * 4 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
    settings = [
        f"checkpoint={checkpoint}",
        f"run_dir={run_dir}",
        "name=tiny",
        "port=0",
        "scheduler=turnstile",
        "max_model_len=2048",
        f"kv_cache_gib={POOL_TOKENS * token_bytes / 2**30}",
        "+extra.block-size=32",
        "+extra.enable-prompt-tokens-details=true",
        "+extra.disable-uvicorn-access-log=true",
    ]
    command = [sys.executable, "-m", "serving", *settings]
    printed = run_dir / "printed.txt"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with printed.open("w") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_S
        while not (found := re.search(r"serving +(http://\S+)/v1", printed.read_text())):
            if server.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"error: the server did not start: {printed.read_text()[-1000:]}")
            time.sleep(0.2)
        yield found[1]
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGINT)
        server.wait(STOP_S)


class Crowd:
    """All sessions and what they counted. ``counts``: turns, programs, releases, … ; ``errors``: by what they said."""

    def __init__(self, client: Any, seed: int) -> None:
        self.client, self.random = client, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self._ids = itertools.count()

    async def run(self, sessions: int, seconds: float) -> None:
        """As many at any time; each that is over makes way for a new one until the time is up."""
        deadline = time.monotonic() + seconds

        async def place() -> None:
            await asyncio.sleep(self.random.uniform(0, 2))
            while time.monotonic() < deadline:
                try:
                    await self.session(f"session {next(self._ids)}/ü")
                except Exception as error:  # whatever went wrong is what the benchmark counts
                    self.errors[f"{type(error).__name__}: {str(error)[:100]} ({error.__cause__!r})"] += 1

        await asyncio.gather(*(place() for _ in range(sessions)))

    async def session(self, name: str) -> None:
        """One program from its first turn to its end."""
        draw = self.random
        kind = draw.choice(["tools", "tools", "chat", "stop"])
        ending = draw.choice(["nothing", "last_turn", "release", "abort"])
        named = draw.choice(["header", "prompt_cache_key", "session_id"])
        turns = draw.randint(*TURNS)
        messages: list[dict[str, Any]] = [{"role": "system", "content": words(draw, 30)}]
        messages.append({"role": "user", "content": f"{name}: {words(draw, 20)}"})
        for turn in range(turns):
            last = turn == turns - 1
            extra: dict[str, Any] = {}
            if kind == "tools" and turn:
                extra["tool"] = "search"
            if last and ending == "last_turn":
                extra["last_turn"] = 1
            if last and ending == "abort":
                return await self.leave(messages, identity(name, named, extra))
            text = await self.turn(messages, identity(name, named, extra), kind)
            self.counts["programs"] += not turn
            messages.append({"role": "assistant", "content": text})
            if kind == "tools":
                call = {"name": "search", "arguments": json.dumps({"query": words(draw, 2)})}
                messages[-1]["tool_calls"] = [{"id": f"call{turn}", "type": "function", "function": call}]
                messages.append({"role": "tool", "tool_call_id": f"call{turn}", "content": words(draw, 20)})
            else:
                messages.append({"role": "user", "content": words(draw, 10)})
            await asyncio.sleep(min(draw.expovariate(1.0), 5.0))
        if ending == "release":
            await self.client.post(f"/programs/{quote(name, safe='')}/release", cast_to=object)
            self.counts["releases"] += 1

    async def turn(self, messages: list[dict[str, Any]], named: dict[str, Any], kind: str) -> str:
        reply = await self.client.chat.completions.create(
            messages=messages, max_tokens=self.random.randint(4, 24), **arguments(named, kind)
        )
        self.counts["turns"] += 1
        self.counts["prompt_tokens"] += reply.usage.prompt_tokens
        self.counts["cached_tokens"] += reply.usage.prompt_tokens_details.cached_tokens or 0
        return reply.choices[0].message.content or ""

    async def leave(self, messages: list[dict[str, Any]], named: dict[str, Any]) -> None:
        """Break a stream off at its first word."""
        stream = await self.client.chat.completions.create(
            messages=messages, max_tokens=1000, stream=True, **arguments(named, "chat")
        )
        async for _ in stream:
            self.counts["turns"] += 1
            break
        await stream.close()
        self.counts["aborts"] += 1


def words(draw: random.Random, count: int) -> str:
    return " ".join(draw.choices(TEXT.split(), k=count))


def identity(name: str, named: str, extra: dict[str, Any]) -> dict[str, Any]:
    """The arguments by which a request names its program, and what it says about the turn."""
    body = {"vllm_xargs": extra} if extra else {}
    if named == "header":  # holds ASCII only
        return {"extra_headers": {"X-Session-ID": quote(name)}, "extra_body": body}
    if named == "prompt_cache_key":
        return {"prompt_cache_key": name, "extra_body": body}
    return {"extra_body": body | {"session_id": name}}


def arguments(named: dict[str, Any], kind: str) -> dict[str, Any]:
    body = {"ignore_eos": True, "chat_template_kwargs": {"reasoning": "never"}, **named["extra_body"]}
    return {
        "model": "tiny",
        **named,
        "extra_body": body,
        **({"tools": [TOOL], "tool_choice": "none"} if kind == "tools" else {}),
        **({"stop": ["e"]} if kind == "stop" else {}),
    }


def numbers(url: str) -> dict[str, float]:
    """The scheduler's counters on the server's own page of metrics, with causes summed."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as page:
        lines = page.read().decode().splitlines()
    found: Counter[str] = Counter()
    for line in lines:
        if match := re.fullmatch(r"turnstile_(\w+?)(?:_total)?\{.*\} (\S+)", line):
            found[match[1]] += float(match[2])
    return dict(found)


def settled(url: str, crowd: Crowd) -> dict[str, float]:
    """The counters once they agree, or after ten seconds: they are published once a second."""
    for _ in range(20):
        found = numbers(url)
        if all(found[name] == crowd.counts[name] for name in ("turns", "programs")):
            break
        time.sleep(0.5)
    return found


async def load(url: str, sessions: int, seconds: float) -> Crowd:
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0, timeout=REQUEST_S) as client:
        crowd = Crowd(client, seed=0)
        await crowd.run(sessions, seconds)
        return crowd


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SESSIONS} sessions, {QUICK_SECONDS:g} s, no bars")
    options = parser.parse_args()
    sessions, seconds = (QUICK_SESSIONS, QUICK_SECONDS) if options.quick else (SESSIONS, SECONDS)
    report = Report("server_sessions")
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        run_dir.mkdir()
        with serving(build(Path(folder) / "model"), run_dir) as url:
            report.console.print(f"{sessions} sessions for {seconds:g} s …", style="dim")
            start = time.monotonic()
            crowd = asyncio.run(load(url, sessions, seconds))
            wall = time.monotonic() - start
            found = settled(url, crowd)
    counts = crowd.counts
    for text, count in crowd.errors.most_common(5):
        report.console.print(f"{count} x {text}", style="red", markup=False)
    rows = [(name, counts[name], int(found[name])) for name in ("programs", "turns")]
    report.table("by the client's count, and on /metrics", ["", "client", "metrics"], rows)
    report.figure("requests", counts["turns"])
    report.figure("requests_per_second", counts["turns"] / wall)
    report.figure("errors", sum(crowd.errors.values()))
    report.figure("turns_difference", abs(found["turns"] - counts["turns"]))
    report.figure("programs_difference", abs(found["programs"] - counts["programs"]))
    report.figure("reused_share", counts["cached_tokens"] / max(counts["prompt_tokens"], 1))
    report.figure("client_aborts", counts["aborts"])
    report.figure("client_releases", counts["releases"])
    # Fewer than the client's: a stream that is broken off when all of it is written ends like any other.
    for name in ("aborts", "pins", "claims", "pressure_releases", "preemptions", "string_stops"):
        report.figure(name, found[name])
    for figure in ("errors", "turns_difference", "programs_difference"):
        report.bar(figure, "==", 0)
    report.finish(options.quick)


if __name__ == "__main__":
    main()
