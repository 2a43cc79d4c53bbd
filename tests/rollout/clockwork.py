"""An engine and tools under one virtual clock: what a window does can then be said to the tick."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from hypothesis import strategies as st

from rollout.chat import Chat
from rollout.config import LimitsConfig
from rollout.engines import Generation, Sampling
from rollout.engines.lockstep import Lockstep
from rollout.engines.mailbox import Request
from rollout.environment import Row
from rollout.episode import Episode, program_id
from rollout.runner import Job, Runner
from rollout.speaker import Policy
from rollout.tasks import ToolEnvironment
from rollout.tools import Tool, tool
from rollout.window import Ended, Window
from training.models import train_tokenizer

SETTLE = 40  # turns of the event loop in which everything that follows from a tick happens
FILLER = 400  # a token without meaning
CALL_LENGTH = 8  # tokens of the shortest turn that calls a tool

Script = Callable[[str, int], list[int]]  # (program, turn) → the tokens of that turn
Turns = list[list[int]]


@functools.cache
def chat() -> Chat:
    call = '{"name": "look", "arguments": {"ticks": 1}}'
    tokenizer = train_tokenizer([call, call.replace("look", "glance"), "assistant\n"] * 4, 512)
    tokenizer.add_tokens([f"filler {i}" for i in range(len(tokenizer), 512)])
    return Chat(tokenizer)


def words(length: int) -> list[int]:
    """A turn of so many tokens that calls nothing."""
    return [*[FILLER] * (length - 1), chat().end_of_turn_id]


def calls(ticks: int, length: int = CALL_LENGTH) -> list[int]:
    """A turn of so many tokens that calls a tool which takes so many ticks (fewer than ten); 0: one that takes none."""
    name = "look" if ticks else "glance"
    text = f'<tool_call>{{"name": "{name}", "arguments": {{"ticks": {ticks}}}}}</tool_call>'
    call = [*chat().encode("</think>" + text), chat().end_of_turn_id]
    return [*chat().encode("<think>"), *[FILLER] * (length - 1 - len(call)), *call]


class Clockwork:
    """An ``Engine``: a tick writes one token of every running request, as the script has it.

    It refuses a prompt that is not what the program wrote before, and knows no more of a program than its prompt. The
    log-prob of a token is minus its number among all that were ever written, which no other token has. ``open`` says
    whether the clock runs while nobody writes; ``failures`` are raised to a program, one a request, after the tick
    ``healthy``.
    """

    def __init__(self, script: Script) -> None:
        self.script = script
        self.version = 0
        self.config = SimpleNamespace(timeout_s=5.0)
        self.ticks = self.written = 0
        self.asked: list[Request] = []
        self.aborted: list[str] = []
        self.failures: dict[str, list[BaseException]] = {}
        self.healthy = 0
        self.open: Callable[[], bool] = lambda: True
        self._running: dict[asyncio.Future[Generation], tuple[Request, list[int], Generation]] = {}
        self._sleepers: list[tuple[int, asyncio.Future[None]]] = []
        self._ticking: asyncio.Task[None] | None = None

    async def generate(self, ids: list[int], sampling: Sampling, **keywords: Any) -> Generation:
        (future,) = self.submit([Request(ids, sampling, **keywords)])
        return await self.result(future, sampling)

    def submit(self, requests: list[Request]) -> list[asyncio.Future[Generation]]:
        futures = []
        for request in requests:
            future = asyncio.get_running_loop().create_future()
            futures.append(future)
            self.asked.append(request)
            said, opening = request.ids, chat().encode("<|im_start|>assistant\n")
            starts = [i for i in range(len(said)) if said[i : i + len(opening)] == opening]
            said = said[starts[-1] + len(opening) :]
            turn = self.script(request.program_id, len(starts) - 1)
            assert turn[: len(said)] == said, "an episode goes on exactly where it stopped"
            self._running[future] = request, turn[len(said) :], Generation([], [], "length", [])
        self._wind()
        return futures

    async def result(self, future: asyncio.Future[Generation], sampling: Sampling) -> Generation:
        try:
            return await future
        finally:
            self._running.pop(future, None)

    async def abort(self, program_id: str) -> None:
        for future, (request, _, out) in list(self._running.items()):
            if request.program_id == program_id:
                self.aborted.append(program_id)
                self._end(future, out, "abort")

    async def release(self, program_id: str) -> None: ...

    async def wait(self, ticks: int) -> None:
        future = asyncio.get_running_loop().create_future()
        self._sleepers.append((self.ticks + ticks, future))
        self._wind()
        await future

    def _wind(self) -> None:
        if self._ticking is None:
            self._ticking = asyncio.ensure_future(self._tick_on())

    async def _tick_on(self) -> None:
        while True:
            while not self._goes():
                await asyncio.sleep(2e-4)
            for _ in range(SETTLE):
                await asyncio.sleep(0)
            if self._goes():  # no window has ended meanwhile
                self.tick()

    def _goes(self) -> bool:
        return bool(self._running or (self._sleepers and self.open()))

    def tick(self) -> None:
        self.ticks += 1
        for future, (request, rest, out) in list(self._running.items()):
            if self.ticks > self.healthy and (failures := self.failures.get(request.program_id)):
                del self._running[future]
                future.set_exception(failures.pop(0))
                continue
            out.ids.append(rest.pop(0))
            self.written += 1
            out.logprobs.append(-float(self.written))
            out.versions.append(self.version)
            if not rest:
                self._end(future, out, "stop")
            elif len(out.ids) == request.sampling.max_tokens:
                self._end(future, out, "length")
        for due, future in list(self._sleepers):
            if due <= self.ticks:
                self._sleepers.remove((due, future))
                if not future.done():
                    future.set_result(None)

    def _end(self, future: asyncio.Future[Generation], out: Generation, finish: Any) -> None:
        del self._running[future]
        out.finish = finish
        future.set_result(out)


@dataclass
class Rig:
    clock: Clockwork
    runner: Runner
    window: Window
    policy: Policy


@contextlib.contextmanager
def rig(
    script: Script,
    length: int,
    slots: int,
    *,
    jobs: Iterator[Job] | None = None,
    tools: list[Tool] | None = None,
    max_age: int = 1000,
    once: bool = True,
    lockstep: bool = False,
    max_model_len: int = 100_000,
    **limits: Any,
) -> Iterator[Rig]:
    """A window over a clockwork; its tools are ``look``, which takes ticks, and ``glance``, which takes none."""
    clock = Clockwork(script)

    @tool(timeout=10.0)
    async def look(ticks: int) -> str:
        """Wait.

        Args:
            ticks: how long
        """
        await clock.wait(ticks)
        return "seen"

    @tool(timeout=None)
    def glance(ticks: int) -> str:
        """At once.

        Args:
            ticks: none
        """
        return "seen"

    many = {"max_new_tokens": 10_000, "max_turns": 100, "max_tool_calls": 100, "episode_timeout_s": 20.0, **limits}
    engine: Any = Lockstep(clock) if lockstep else clock  # type: ignore[arg-type]
    environment = functools.partial(ToolEnvironment, tools or [look, glance], lambda answer, gold: True)
    runner = Runner(environment, LimitsConfig(**many), engine if lockstep else None)
    window = Window(runner, length, slots, max_age, once=once)
    policy = Policy(engine, chat(), Sampling(max_tokens=1), max_model_len, window=window)
    window.policy = policy
    if jobs is not None:
        window.supply = functools.partial(next, jobs)
    clock.open = lambda: window._open
    try:
        yield Rig(clock, runner, window, policy)
    finally:
        runner.close()


def jobs(prefix: str = "g") -> Iterator[Job]:
    """Endless: ``g0/0``, ``g1/0``, …"""
    number = 0
    while True:
        yield Job(Row(f"q{number}", [{"role": "user", "content": "?"}], ""), f"{prefix}{number}", 0)
        number += 1


@st.composite
def turns(draw: st.DrawFn) -> Turns:
    """Calls, of tools that take ticks or none, and an answer."""
    asked = st.builds(calls, st.integers(0, 5), st.integers(CALL_LENGTH, 14))
    return [*draw(st.lists(asked, max_size=2)), words(draw(st.integers(1, 14)))]


def scripted(episodes: list[Turns]) -> Script:
    return lambda program, turn: episodes[number(program) % len(episodes)][turn]


def number(program: str) -> int:
    return int(program.partition("/")[0][1:])


class Ledger:
    """The own tokens that each episode brings to training, window for window."""

    def __init__(self) -> None:
        self.told: dict[str, list[tuple[int, float | None, int]]] = defaultdict(list)

    def write(self, ended: Ended, version: int) -> None:
        for episode in (*ended.finished, *ended.unfinished):
            new = tokens_of(episode)[episode.sequences[0].trained :]
            assert all(v == version for *_, v in new), "in the window that wrote it, with its version"
            self.told[program_id(episode)] += new
        for episode in ended.finished:
            assert self.told[program_id(episode)] == tokens_of(episode), "once, with its log-prob"


def tokens_of(episode: Episode) -> list[tuple[int, float | None, int]]:
    """Token, log-prob and version of each own token."""
    (sequence,) = episode.sequences
    rows = zip(sequence.token_ids, sequence.behaviour_logprobs, sequence.versions, sequence.own_mask, strict=True)
    return [(token, logprob, version) for token, logprob, version, own in rows if own]
