"""Everything between messages and token ids, for templates that write tool calls as Hermes and Qwen do.

Conversations are append-only: ``open`` gives the first prompt, ``tool_results`` what follows a turn that the policy
wrote; nothing that stands is tokenised again.
"""

from __future__ import annotations

import json
import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollout.environment import Message
from rollout.episode import ToolCall, Turn
from rollout.errors import UserError
from rollout.tools import Tool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEMPLATE = Path(__file__).with_name("chat_template.jinja")
THINK, THINK_END = "<think>", "</think>"
TAGS = (THINK, THINK_END, "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
ANY_TAG = re.compile("|".join(TAGS))
REASONING = ("auto", "always", "never")
# Stand-ins that no template knows; a template is read by rendering them and looking for where they land.
MARKS = ("\u27e6one\u27e7", "\u27e6two\u27e7", "\u27e6three\u27e7")
ODD = ' a "b"\n{c} '


def parse_text(text: str) -> Turn:
    """One assistant turn from its whole text: ``<think>reasoning</think>content<tool_call>{json}</tool_call>...``.

    A tag out of place makes the turn ill-formed and is skipped; a call inside the reasoning, or one left open, is
    no call.
    """
    reasoning, content = "", ""
    calls: list[ToolCall] = []
    inside, thought, well_formed, position = "", False, True, 0
    for match in ANY_TAG.finditer(text):
        piece, tag, position = text[position : match.start()], match.group(), match.end()
        if inside == THINK:
            reasoning += piece
        elif not inside:
            content += piece
        if tag == THINK and not inside and not (thought or calls or content.strip()):
            inside, thought = THINK, True
        elif tag == THINK_END and inside == THINK:
            inside = ""
        elif tag == "<tool_call>" and not inside:
            inside = tag
        elif tag == "</tool_call>" and inside == "<tool_call>":
            inside = ""
            calls.append(parse_call(piece))
        else:
            well_formed = False
    if inside == THINK:
        reasoning += text[position:]
    elif not inside:
        content += text[position:]
    return Turn(reasoning.strip(), content.strip(), calls, well_formed=well_formed and thought and not inside)


def parse_call(text: str) -> ToolCall:
    """A tool call from its JSON; what is wrong with it becomes ``problem``, which the policy reads."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError) as error:
        return ToolCall("", None, f"the tool call is not valid JSON: {error}")
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return ToolCall("", None, 'the tool call is not {"name": ..., "arguments": {...}}')
    if not isinstance(call.get("arguments"), dict):
        return ToolCall(call["name"], None, "the arguments are not a JSON object")
    return ToolCall(call["name"], call["arguments"])


def assistant_message(turn: Turn) -> Message:
    """The turn as a message in OpenAI's format, for templates that must render the conversation anew."""
    message: Message = {"role": "assistant", "content": turn.content}
    if turn.reasoning:
        message["reasoning_content"] = turn.reasoning
    if turn.calls:
        message["tool_calls"] = [tool_call(call.name, call.arguments or {}) for call in turn.calls]
    return message


def tool_call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A tool call in OpenAI's format, with the arguments as an object, as chat templates expect it."""
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


class Chat:
    """The chat format of one tokenizer.

    ``reasoning`` is auto (the policy chooses to think), always or never; ``opening[reasoning]`` is the part of the
    turn that the prompt then already holds, such as ``<think>``. ``keeps_thinking`` is False for templates that drop
    earlier thinking once tool results follow: the next turn then needs a new sequence.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._name = tokenizer.name_or_path or "this tokenizer"
        if tokenizer.chat_template is None:
            raise UserError(f"{self._name}: the tokenizer has no chat template; add one or use another")
        from jinja2 import Environment, meta

        self.tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        templates = tokenizer.chat_template
        self._source = source = templates if isinstance(templates, str) else "".join(templates.values())
        # transformers adds loop controls and a generation block, which plain jinja2 cannot parse.
        environment = Environment(extensions=["jinja2.ext.loopcontrols"])
        self._variables = meta.find_undeclared_variables(
            environment.parse(re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", source))
        )
        self.think_id, self.think_end_id = self._single(THINK), self._single(THINK_END)
        added = [
            i for i, token in tokenizer.added_tokens_decoder.items() if token.special and token.content not in TAGS
        ]
        self._special_ids = frozenset(added) | {i for i in tokenizer.all_special_ids if i not in self._tag_ids()}
        self.end_of_turn_id = self._end_of_turn()
        stops = (self.end_of_turn_id, tokenizer.eos_token_id)
        self.stop_token_ids = tuple(dict.fromkeys(stop for stop in stops if stop is not None))
        self._end_of_turn_text = str(tokenizer.convert_ids_to_tokens(self.end_of_turn_id))
        self.opening = {reasoning: self._opening(reasoning) for reasoning in REASONING}
        self.opens_think = THINK in self.opening["auto"]
        self._pieces: dict[str, tuple[str, str, str] | None] = {}

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def open(self, messages: list[Message], tools: list[Tool], reasoning: str = "auto") -> list[int]:
        """The prompt of a first turn."""
        if tools and not self._reads_own_calls:
            raise UserError(
                f"{self._name}: its chat template does not write tool calls as <tool_call>{{json}}</tool_call>, so "
                "they could not be read back; use a checkpoint in Hermes' or Qwen3's format, or a task without tools"
            )
        return self.encode(self._prompt(messages, tools, reasoning))

    def tool_results(self, contents: list[str], reasoning: str = "auto") -> list[int]:
        """What follows a turn that ended with its stop token: the tool results, and the next turn's opening."""
        if reasoning not in self._pieces:
            self._pieces[reasoning] = self._find_pieces(reasoning)
        pieces = self._pieces[reasoning]
        if pieces is None:  # the template changes the contents (quotes or trims them): only it knows how
            return self.encode(self._tool_text(contents, reasoning))
        before, between, after = pieces
        return self.encode(before + between.join(contents) + after)

    def parse(self, ids: list[int], reasoning: str = "auto") -> Turn:
        """The turn that the policy wrote, with or without its stop token, after a prompt for ``reasoning``."""
        if ids and ids[-1] in self.stop_token_ids:
            ids = ids[:-1]
        turn = parse_text(self.opening[reasoning] + self._backend.decode(ids, skip_special_tokens=False))
        if not self._special_ids.isdisjoint(ids):
            turn.well_formed = False
        return turn

    def demonstration(self, messages: list[Message], tools: list[Tool]) -> tuple[list[int], list[bool]]:
        """A whole conversation as the agent loop would have built it: token ids, and True where the policy writes.

        ``messages`` alternate between assistant turns and their tool results after the first assistant turn, and end
        with an assistant turn.
        """
        first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
        ids = self.open(messages[:first], tools)
        own = [False] * len(ids)
        position = first
        while position < len(messages):
            written = self.encode(self._assistant_text(messages[: position + 1], tools))
            ids += written
            own += [True] * len(written)
            position += 1
            results = []
            while position < len(messages) and messages[position]["role"] == "tool":
                results.append(messages[position]["content"])
                position += 1
            if results:
                injected = self.tool_results(results)
                ids += injected
                own += [False] * len(injected)
        return ids, own

    @cached_property
    def _reads_own_calls(self) -> bool:
        text = self._render(self._call(), [], False)
        return ToolCall("tool", {"x": 1}) in parse_text(text.rpartition(MARKS[0])[2]).calls

    @cached_property
    def keeps_thinking(self) -> bool:
        """Whether thinking stays in the prompt when tool results follow it."""
        if "reasoning_content" in self._source:
            conversation = self._call()
            conversation[-1]["reasoning_content"] = MARKS[1]
        else:
            conversation = self._call(f"{THINK}\n{MARKS[1]}\n{THINK_END}\n\n")
        return MARKS[1] in self._render([*conversation, {"role": "tool", "content": "1"}], [], True)

    def _render(self, messages: list[Message], tools: list[Tool], prompt: bool, **kwargs: Any) -> str:
        from jinja2 import TemplateError

        schemas: list[Any] | None = [tool.schema for tool in tools] or None
        settings = {"add_generation_prompt": prompt, "tokenize": False, **kwargs}
        try:
            return str(self.tokenizer.apply_chat_template(messages, tools=schemas, **settings))
        except (TemplateError, TypeError) as error:
            raise UserError(f"{self._name}: its chat template refuses the conversation: {error}") from error

    def _prompt(self, messages: list[Message], tools: list[Tool], reasoning: str) -> str:
        """The rendered prompt, made to think or not by the template where it knows how, else by its opening tags."""
        if reasoning not in REASONING:
            raise UserError(f"reasoning: {reasoning!r} is not one of {', '.join(REASONING)}")
        if "reasoning" in self._variables:
            return self._render(messages, tools, True, reasoning=reasoning)
        switch = {} if reasoning == "auto" else {"enable_thinking": reasoning == "always"}  # Qwen's name
        text = self._render(messages, tools, True, **switch)
        opened, closed = (text.rstrip().endswith(tag) for tag in (THINK, THINK_END))
        if reasoning == "always" and not opened:
            return f"{text}{THINK}\n"
        if reasoning == "never" and not closed:
            return f"{text}{THINK_END}\n\n" if opened else f"{text}{THINK}\n\n{THINK_END}\n\n"
        return text

    def _opening(self, reasoning: str) -> str:
        text = self._prompt([{"role": "user", "content": MARKS[0]}], [], reasoning)
        return "".join(text.rpartition(MARKS[0])[2].partition(THINK)[1:])

    def _assistant_text(self, messages: list[Message], tools: list[Tool]) -> str:
        """What the policy would have written for the last message, its stop token included."""
        prompt = self._prompt(messages[:-1], tools, "auto")
        text = self._render(messages, tools, False)
        if not text.startswith(prompt):
            raise UserError(
                f"{self._name}: its chat template does not continue its own prompt when it renders an "
                "assistant turn, so demonstrations cannot be built; use a template that does"
            )
        written = text[len(prompt) :]
        written = written[: written.rindex(self._end_of_turn_text)] + self._end_of_turn_text
        if self.opens_think or written.startswith(THINK):
            return written
        thoughts = messages[-1].get("reasoning_content", "")
        return f"{THINK}{thoughts and chr(10) + thoughts}{THINK_END}{written}"

    def _call(self, content: str = "") -> list[Message]:
        calls = [tool_call("tool", {"x": 1})]
        return [{"role": "user", "content": MARKS[0]}, {"role": "assistant", "content": content, "tool_calls": calls}]

    def _tool_text(self, contents: list[str], reasoning: str) -> str:
        """Rendered by the template after a stand-in turn, and cut after that turn's stop token."""
        conversation = self._call()
        marked = self._render([*conversation, {"role": "tool", "content": MARKS[2]}], [], False)
        head, mark, _ = marked.partition(MARKS[2])
        start = head.rfind(self._end_of_turn_text)
        if not mark or start < 0:
            raise UserError(
                f"{self._name}: its chat template does not show tool results after an assistant turn; "
                "use a template that knows role=tool"
            )
        results = [{"role": "tool", "content": content} for content in contents]
        return self._prompt([*conversation, *results], [], reasoning)[start + len(self._end_of_turn_text) :]

    def _find_pieces(self, reasoning: str) -> tuple[str, str, str] | None:
        """Text before, between and after tool results; None if the template does more than put the contents there."""
        before, _, rest = self._tool_text(list(MARKS[:2]), reasoning).partition(MARKS[0])
        between, _, after = rest.partition(MARKS[1])
        for contents in ([ODD], [ODD, MARKS[0], "1"]):
            if self._tool_text(contents, reasoning) != before + between.join(contents) + after:
                return None
        return before, between, after

    def _tag_ids(self) -> set[int | None]:
        return {self._single(tag) for tag in TAGS}

    def _single(self, tag: str) -> int | None:
        ids = self.encode(tag)
        return ids[0] if len(ids) == 1 else None

    def _end_of_turn(self) -> int:
        """The special token that the template puts after an assistant turn."""
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARKS[0]}]
        after = self._render(messages, [], False).rpartition(MARKS[0])[2]
        for token_id in self.encode(after):
            if token_id in self._special_ids:
                return token_id
        raise UserError(
            f"{self._name}: its chat template ends assistant turns with no special token, so the end "
            "of a turn cannot be told; use another template"
        )
