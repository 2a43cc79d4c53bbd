"""The policy behind somebody's OpenAI-compatible server: the same agent loop, by messages instead of token ids."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote

import openai

from rollout.chat import assistant_message, parse_text
from rollout.environment import Message
from rollout.episode import Episode, Sequence, ToolCall, ToolResult, Turn, program_id
from rollout.errors import UserError
from rollout.speaker import stable_seed
from rollout.tools import Tool


@dataclass
class Server:
    """A server's address and how to sample there. ``connect`` finds the model's name and refuses a dead address."""

    url: str
    model: str | None
    temperature: float
    seed: int | None
    reasoning: str
    timeout_s: float
    client: openai.AsyncOpenAI = field(init=False)

    def __post_init__(self) -> None:
        base = self.url.rstrip("/")
        base = base if base.endswith("/v1") else f"{base}/v1"
        self.client = openai.AsyncOpenAI(
            base_url=base, api_key=os.environ.get("OPENAI_API_KEY", "none"), timeout=self.timeout_s
        )

    async def connect(self) -> str:
        """The name of the model: the one asked for, or the only one that is served."""
        try:
            served = [model.id async for model in self.client.models.list()]
        except openai.OpenAIError as error:
            raise UserError(f"url: nothing answers at {self.url} ({error}); start it with python -m serving") from error
        if self.model is None and len(served) != 1:
            raise UserError(f"model: {self.url} serves {', '.join(served)}; add model=NAME")
        self.model = self.model or served[0]
        if self.model not in served:
            raise UserError(f"model: {self.url} does not serve {self.model!r}, only {', '.join(served)}")
        return self.model

    def at(self, temperature: float, seed: int | None) -> Server:
        """The same server for another pass of an evaluation."""
        return replace(self, temperature=temperature, seed=seed)

    def speaker(self) -> ChatSpeaker:
        return ChatSpeaker(self)


class ChatSpeaker:
    """One episode's side of the conversation. The server counts the tokens; their ids stay there."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.messages: list[Message] = []
        self.tools: list[Tool] = []
        self._call_ids: list[str] = []

    async def open(self, episode: Episode, messages: list[Message], tools: list[Tool]) -> None:
        self.messages, self.tools = list(messages), tools
        episode.sequences.append(Sequence())

    async def speak(self, episode: Episode, max_tokens: int) -> tuple[Turn, int, bool]:
        server = self.server
        reply = await server.client.chat.completions.create(
            model=server.model or "",
            messages=self.messages,  # type: ignore[arg-type]
            tools=[tool.schema for tool in self.tools] or openai.omit,  # type: ignore[arg-type]
            temperature=server.temperature,
            max_completion_tokens=max_tokens,
            seed=None if server.seed is None else self._seed(server.seed, episode),
            extra_body={"chat_template_kwargs": {"reasoning": server.reasoning}},
            extra_headers={"X-Session-ID": quote(program_id(episode), safe="")},  # a header holds Latin-1 alone
        )
        choice = reply.choices[0]
        turn, self._call_ids = _turn(choice.message)
        written = reply.usage.completion_tokens if reply.usage else 0
        episode.extras["own_tokens"] = episode.extras.get("own_tokens", 0) + written
        return turn, written, choice.finish_reason == "length"

    @staticmethod
    def _seed(seed: int, episode: Episode) -> int:
        return stable_seed(seed, episode.prompt_id, episode.sample, len(episode.turns))

    async def read(self, episode: Episode, results: list[ToolResult]) -> None:
        message = assistant_message(episode.turns[-1])
        for call, call_id in zip(message["tool_calls"], self._call_ids, strict=True):
            call["id"] = call_id
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        self.messages.append(message)
        pairs = zip(results, self._call_ids, strict=True)
        self.messages += [{"role": "tool", "tool_call_id": call_id, "content": r.content} for r, call_id in pairs]

    async def close(self, episode: Episode) -> None:
        """Nothing is held for an episode here."""


def _turn(message: Any) -> tuple[Turn, list[str]]:
    """The parsed message as a turn; a server without a reasoning parser leaves the tags in the content."""
    reasoning = getattr(message, "reasoning", None) or getattr(message, "reasoning_content", None) or ""
    content = message.content or ""
    if "</think>" in content:
        parsed = parse_text(content)
        reasoning, content = parsed.reasoning, parsed.content
    calls, ids = [], []
    for call in message.tool_calls or []:
        ids.append(call.id)
        try:
            arguments = json.loads(call.function.arguments)
            problem = None if isinstance(arguments, dict) else "the arguments are not a JSON object"
        except ValueError as error:
            arguments, problem = None, f"the arguments are not valid JSON: {error}"
        calls.append(ToolCall(call.function.name, arguments if problem is None else None, problem))
    return Turn(reasoning, content.strip(), calls), ids
