"""A served checkpoint through the official client: two-turn tool conversation, three reasoning modes, Ctrl-C."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from openai import BadRequestError

from rollout.chat import Chat
from rollout.tools.calculator import calculator
from tests.serving.lessons import CALL, EASY, HARD, question
from tests.serving.process import Serving, alive

pytestmark = pytest.mark.timeout(400)
THOUGHTS = {"auto": "12*34 is hard\n", "always": "12*34 is hard\n", "never": ""}
MODES = pytest.mark.parametrize("mode", ["auto", "always", "never"])
STREAM = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


@dataclass
class Answer:
    """One assistant turn, whichever way it came."""

    reasoning: str = ""
    content: str = ""
    calls: list[dict[str, str]] = field(default_factory=list)
    finish: str | None = None
    prompt_ids: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)

    def message(self) -> dict[str, Any]:
        """What a client appends to its conversation."""
        calls = [
            {"type": "function", "id": c["id"], "function": {"name": c["name"], "arguments": c["arguments"]}}
            for c in self.calls
        ]
        return {"role": "assistant", "content": self.content, "reasoning": self.reasoning} | (
            {"tool_calls": calls} if calls else {}
        )


def ask(client: Any, messages: list[dict[str, Any]], *, stream: bool, mode: str | None = None, **kwargs: Any) -> Answer:
    extra: dict[str, Any] = {"return_token_ids": True}
    if mode is not None:
        extra["chat_template_kwargs"] = {"reasoning": mode}
    settings = {"model": "parrot", "messages": messages, "temperature": 0, "max_tokens": 64, "extra_body": extra}
    answer = Answer()
    if not stream:
        reply = client.chat.completions.create(**settings, **kwargs)
        message, answer.finish = reply.choices[0].message, reply.choices[0].finish_reason
        answer.reasoning, answer.content = message.model_extra.get("reasoning") or "", message.content or ""
        answer.calls = [
            {"id": c.id, "name": c.function.name, "arguments": c.function.arguments} for c in message.tool_calls or []
        ]
        answer.prompt_ids, answer.ids = reply.model_extra["prompt_token_ids"], reply.choices[0].model_extra["token_ids"]
        return answer
    for chunk in client.chat.completions.create(**settings, stream=True, **kwargs):
        answer.prompt_ids = chunk.model_extra.get("prompt_token_ids") or answer.prompt_ids
        for choice in chunk.choices:
            answer.finish = choice.finish_reason or answer.finish
            answer.ids += choice.model_extra.get("token_ids") or []
            answer.reasoning += choice.delta.model_extra.get("reasoning") or ""
            answer.content += choice.delta.content or ""
            for call in choice.delta.tool_calls or []:
                if call.id:
                    answer.calls.append({"id": call.id, "name": call.function.name, "arguments": ""})
                answer.calls[call.index]["arguments"] += call.function.arguments or ""
    return answer


@STREAM
@MODES
def test_two_turn_tool_conversation(client: Any, checkpoint: Path, mode: str, stream: bool) -> None:
    from transformers import AutoTokenizer

    messages = question(HARD)
    first = ask(client, messages, stream=stream, mode=mode, tools=[calculator.schema])
    assert (first.finish, first.reasoning, first.content) == ("tool_calls", THOUGHTS[mode], "")
    assert [(c["name"], c["arguments"]) for c in first.calls] == [("calculator", '{"expression": "12*34"}')]

    result = calculator.function("12*34")
    messages = [*messages, first.message(), {"role": "tool", "tool_call_id": first.calls[0]["id"], "content": result}]
    second = ask(client, messages, stream=stream, mode=mode, tools=[calculator.schema])
    thoughts = "the tool says 408\n" if mode == "always" else ""
    assert (second.finish, second.reasoning, second.content) == ("stop", thoughts, "It is 408.")
    assert not second.calls

    # The server's prompts are those of training rollouts, and the second one continues the first.
    chat = Chat(AutoTokenizer.from_pretrained(checkpoint))
    assert first.prompt_ids == chat.open(question(HARD), [calculator], mode)
    assert second.prompt_ids == first.prompt_ids + first.ids + chat.tool_results([result], mode)


@STREAM
@MODES
def test_answer_without_tools(client: Any, mode: str, stream: bool) -> None:
    answer = ask(client, question(EASY), stream=stream, mode=mode)
    assert answer.reasoning == ("2 and 2\n" if mode == "always" else "")
    assert (answer.finish, answer.content, answer.calls) == ("stop", "It is 4.", [])


@STREAM
def test_no_mode_is_auto(client: Any, stream: bool) -> None:
    answer = ask(client, question(HARD), stream=stream, tools=[calculator.schema])
    assert (answer.reasoning, answer.calls[0]["name"]) == (THOUGHTS["auto"], "calculator")


@STREAM
def test_stop_strings_hold_text_back_but_lose_none(client: Any, stream: bool) -> None:
    answer = ask(client, question(EASY), stream=stream, mode="always", stop=["never written"])
    assert (answer.reasoning, answer.content) == ("2 and 2\n", "It is 4.")


@MODES
def test_required_tool_after_reasoning(client: Any, mode: str) -> None:
    """The grammar that forces a call starts where reasoning ends, in each mode."""
    answer = ask(client, question(HARD), stream=False, mode=mode, tools=[calculator.schema], tool_choice="required")
    assert (answer.reasoning, len(answer.calls)) == (THOUGHTS[mode], 1)


def test_no_tools_wanted(client: Any) -> None:
    tools = {"tools": [calculator.schema], "tool_choice": "none"}
    answer = ask(client, question(HARD), stream=False, mode="never", **tools)
    assert (answer.content, answer.calls) == (CALL, [])


def test_unknown_mode_is_the_clients_error(client: Any) -> None:
    with pytest.raises(BadRequestError, match="auto, always or never"):
        ask(client, question(EASY), stream=False, mode="sometimes")


def test_what_a_person_sees(serving: Serving, client: Any) -> None:
    for text in (
        "parsers     tool calls: hermes, reasoning: turnstile",
        "curl http://",
        "OpenAI(base_url=",
        "engine.log",
    ):
        assert text in serving.printed
    assert "INFO" not in serving.printed


def test_ctrl_c_stops_everything(serving: Serving, client: Any) -> None:
    """Last in this file: it ends the server that the others share."""
    processes = [psutil.Process(serving.process.pid), *psutil.Process(serving.process.pid).children(recursive=True)]
    assert len(processes) >= 3  # ours, vLLM's server, its engine
    serving.process.send_signal(signal.SIGINT)
    assert serving.process.wait(60) == 0
    assert serving.finished().endswith("stopped\n")
    assert "Traceback" not in serving.printed
    assert not alive(processes)
