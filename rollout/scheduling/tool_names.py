"""Which tool an output calls, read from its token ids: the key under which tool latencies are kept. Pure.

Two kinds of call are known. A *marked* call follows a start marker: Hermes ``<tool_call>{"name": …}``, Qwen XML
``<function=NAME>``, Mistral ``[TOOL_CALLS]``, Llama ``<|python_tag|>`` or a bare ``{"name": …, "parameters": …}``, and
their kin. A *fenced* call is a ```bash block, keyed by the command that matters: ``cd x && pytest -q`` is pytest.
Continuum (arXiv 2511.02230, appendix B) takes the first word, and finds most of its delay under ``cd``.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Protocol

from rollout.scheduling.latency import PERSON

MARKERS = (
    "<tool_call>",  # Hermes, Qwen, GLM
    "<function=",
    "[TOOL_CALLS]",
    "<|python_tag|>",
    "<|tool_call|>",  # Granite
    "<|tool_call_begin|>",  # Kimi
    "<｜tool▁call▁begin｜>",  # DeepSeek
    '<invoke name="',  # MiniMax
    " to=functions.",  # gpt-oss
)
UNKNOWN = "unknown"  # a call whose name cannot be read: still a call, the agent's loop will answer it
MOST_DECODED = 2048  # tokens of an output that has start tokens, in all its calls
OPENING, ENDING = 128, 384  # tokens of an output without one: a call stands at its end, or is most of it
HEAD = 48  # tokens decoded behind a start token: enough for a name
MOST_CALLS = 16  # parallel calls that are read
MOST_NAMES = 3  # of them that make the key
LONGEST = 64  # characters of a key
THOUGHTS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))

_TAG = re.compile("|".join(re.escape(tag) for pair in THOUGHTS for tag in pair))
_CLOSING = {closing for _, closing in THOUGHTS}
_FENCE = re.compile(r"^[ \t]*```(?:bash|sh|shell)[ \t]*\r?\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
_BETWEEN = re.compile(r"[\s;,]*")
_NAMED = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]+)"|\s*<function=([^>\s]+)')
_BARE = re.compile(r'\s*(?:function<｜tool▁sep｜>)?(?:functions\.)?([A-Za-z_][\w.\-/]*)(?=\s*(?:[\[{(<>:"]|\n|\Z))')

# What a shell script does before the command that takes its time; it names the script only if nothing follows.
_SETUP = re.compile(
    r"cd|pushd|popd|export|unset|source|\.|set|shopt|alias|ulimit|umask|trap|local|declare|readonly|eval"
    r"|echo|printf|pwd|true|:|test|\[\[?|conda activate"
)
_KEYWORDS = re.compile(r"then|do|else|elif|if|while|until|!|\{|time|nohup|exec|command|builtin")
_NO_COMMAND = re.compile(r"for|case|select|function|done|fi|esac|\}")
# Commands that run another, with their options that take a value.
_WRAPPERS = {
    "sudo": ("-u", "-g", "-C", "-D"),
    "timeout": ("-s", "-k"),
    "env": ("-u", "-C"),
    "nice": ("-n",),
    "stdbuf": ("-i", "-o", "-e"),
}
_RUNNERS = re.compile("uv|poetry|pipenv|pdm")  # uv run pytest
_SHELLS = re.compile("bash|sh|zsh")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*\+?=")
_REDIRECTION = re.compile(r"\d*[<>]&\d*-?|&>")
_COMMENT = re.compile(r"(?:^|(?<=\s))#.*$", re.MULTILINE)
_PYTHON = re.compile(r"(?:python|pypy)[\d.]*")
_SCRIPT_OPTION = re.compile("-[a-z]*c$")
MOST_SCRIPT = 1024  # characters of a script in which its command is looked for


class Tokenizer(Protocol):
    """What is asked of a tokenizer; those of Hugging Face and of vLLM have it."""

    def decode(self, ids: Any, /) -> Any: ...

    def get_vocab(self) -> dict[str, int]: ...


class Undecodable(Exception):
    """The tokenizer raised at what a model wrote."""


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of any ids; negative ones, vLLM's placeholders, are left out. Raises Undecodable."""
    try:
        return str(tokenizer.decode([token for token in ids if token >= 0]))
    except Exception as error:
        # A tokenizer is a stranger's code, often the checkpoint's own, that raises what it likes at ids which it has no
        # word for. This is called in the engine core's loop, where an exception ends every client's request; what it
        # said is told once, by ``Identity``.
        raise Undecodable(f"{type(error).__name__}: {error}") from error


class ToolNames:
    """Reads the called tool off an output.

    Where a marker is one token of the vocabulary, only a few tokens behind it are decoded.
    """

    def __init__(self, tokenizer: Tokenizer, markers: Sequence[str] = MARKERS) -> None:
        vocabulary = tokenizer.get_vocab()
        self._tokenizer = tokenizer
        self._starts = {vocabulary[marker] for marker in markers if marker in vocabulary}
        self._marker = re.compile("|".join(re.escape(marker) for marker in markers))
        tags = [(pair[closes], bool(closes)) for pair in THOUGHTS for closes in (0, 1)]
        self._tags = {vocabulary[tag]: closes for tag, closes in tags if tag in vocabulary}

    def call(self, token_ids: Sequence[int]) -> str | None:
        """The tool that the output calls; None if it calls none, which makes what follows a person's turn.

        Calls inside thoughts do not count. The first kind of marker in the output is the one that counts. Several calls
        make one key, for their gap lasts as long as the slowest: unique names, sorted, joined by ``+``, at most three.
        A call whose name cannot be read is ``unknown``. Any ids are taken; at most ``MOST_DECODED`` are decoded, or
        ``OPENING`` and ``ENDING`` where no token starts a call. Raises Undecodable.
        """
        ids = list(token_ids)
        tags = [(i, i + 1, self._tags[token]) for i, token in enumerate(ids) if token in self._tags]
        ids = [token for start, end in _spoken(len(ids), tags) for token in ids[start:end]]
        names = self._behind_tokens(ids)
        if not names:
            parts = [ids] if len(ids) <= OPENING + ENDING else [ids[:OPENING], ids[-ENDING:]]
            text = "\n".join(map(self._decode, parts))
            spans = _spoken(len(text), [(m.start(), m.end(), m[0] in _CLOSING) for m in _TAG.finditer(text)])
            names = self._in_text("".join(text[start:end] for start, end in spans))
        if not names:
            return None
        return label("+".join(sorted({label(name) for name in names})[:MOST_NAMES]))

    def _behind_tokens(self, ids: list[int]) -> list[str]:
        """Names behind start tokens; empty where there is no start token."""
        starts = [i for i, token in enumerate(ids) if token in self._starts]
        starts = [i for i in starts if ids[i] == ids[starts[0]]][:MOST_CALLS]
        share = MOST_DECODED // max(len(starts), 1)
        names = []
        for start, end in pairwise([*starts, len(ids)]):
            section = ids[start + 1 : min(end, start + 1 + share - HEAD)]
            names += _section_names(self._decode(section[:HEAD]), self._decode, section)
        return names

    def _in_text(self, text: str) -> list[str]:
        found = list(self._marker.finditer(text))
        starts = [match.start() for match in found if match[0] == found[0][0]][:MOST_CALLS]
        names = []
        for start, end in pairwise([*starts, len(text)]):
            section = text[start + len(found[0][0]) : end]
            names += _section_names(section, str, section)
        names = names or _json_names(text, needs_arguments=True)
        if names:
            return names
        blocks = list(_FENCE.finditer(text))
        # Several blocks amid prose explain something to a person; agents write one, or end on their last.
        if len(blocks) == 1 or (blocks and not text[blocks[-1].end() :].strip()):
            return [command_name(match[1]) or UNKNOWN for match in blocks]
        return []

    def _decode(self, ids: list[int]) -> str:
        return decode(self._tokenizer, ids)


def _spoken(length: int, tags: Iterable[tuple[int, int, bool]]) -> list[tuple[int, int]]:
    """Spans outside thoughts. ``tags`` are (start, end, closes); a thought may have been opened by the prompt."""
    spans: list[tuple[int, int]] = []
    start, thinking = 0, False
    for begin, end, closes in tags:
        if closes and not thinking:
            spans = []
        elif not closes and not thinking:
            spans.append((start, begin))
        start, thinking = end, not closes
    return spans if thinking else [*spans, (start, length)]


def _section_names(head: str, read: Callable[[Any], str], section: Any) -> list[str]:
    """Names in what follows a marker, read only if its ``head`` does not tell."""
    name = _head_name(head)
    if name is None:
        text = read(section)
        return _json_names(text) or [_head_name(text.lstrip().removeprefix("[")) or UNKNOWN]
    return [name]


def _head_name(text: str) -> str | None:
    match = _NAMED.match(text) or _BARE.match(text)
    return match[match.lastindex or 1] if match else None


def _json_names(text: str, needs_arguments: bool = False) -> list[str]:
    """Names in a row of JSON calls, or in a list of them, up to where it stops being JSON."""
    names, position, decoder = [], 0, json.JSONDecoder()
    while (position := _BETWEEN.match(text, position).end()) < len(text):  # type: ignore[union-attr]
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):  # no more calls, or too deeply nested to be one
            break
        for call in value if isinstance(value, list) else [value]:
            name = call.get("name", call.get("function")) if isinstance(call, dict) else None
            name = name.get("name") if isinstance(name, dict) else name
            if isinstance(name, str) and (not needs_arguments or "arguments" in call or "parameters" in call):
                names.append(name)
    return names


def label(name: str) -> str:
    """``name`` as a key and metric label: at most 64 printable characters, never empty, never a person's."""
    clipped = "".join(c for c in name if c.isprintable()).strip()[:LONGEST].strip()
    return f"{PERSON}()" if clipped == PERSON else clipped or UNKNOWN


def command_name(script: str, depth: int = 2) -> str | None:
    """The command that a shell script is about: its first that is more than set-up, else its first; None without one.

    Assignments, ``sudo``, ``timeout 9``, ``uv run`` and their like are taken off; ``python -m pytest`` is pytest and
    ``bash -lc "…"`` is what it runs. Never raises: what does not parse is read up to there.
    """
    first = None
    for words in _commands(script[:MOST_SCRIPT]):
        name = _command_name(_unwrapped(words), depth)
        if name is not None and not _SETUP.fullmatch(name):
            return name
        first = first or name
    return first


def _commands(script: str) -> Iterator[list[str]]:
    """The words of each simple command, split at ``&& || ; | &``, parentheses and line ends."""
    script = _REDIRECTION.sub(" ", _COMMENT.sub("", script.replace("\\\n", " ")))
    lexer = shlex.shlex(script, posix=True, punctuation_chars=";&|()\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, ""
    words: list[str] = []
    try:
        for word in lexer:
            if word.strip(";&|()\n"):
                words.append(word)
            else:
                yield words
                words = []
    except ValueError:  # a quote that nothing closes: often the cut at the end of an output
        pass
    yield words


def _unwrapped(words: list[str]) -> list[str]:
    """The command without assignments, keywords and commands that only run it."""
    words = list(words)
    while words:
        name = _base(words[0])
        if _ASSIGNMENT.match(words[0]) or _KEYWORDS.fullmatch(name):
            del words[0]
        elif name in _WRAPPERS:
            del words[0]
            while words and words[0].startswith("-"):
                del words[: 2 if words[0] in _WRAPPERS[name] else 1]
            if name == "timeout":
                del words[:1]
        elif _RUNNERS.fullmatch(name) and words[1:2] == ["run"]:
            del words[:2]
        else:
            break
    return words


def _command_name(words: list[str], depth: int) -> str | None:
    if not words or _NO_COMMAND.fullmatch(words[0]):
        return None
    name, arguments = _base(words[0]), words[1:]
    if _PYTHON.fullmatch(name):
        return _python_module(arguments) or "python"
    if _SHELLS.fullmatch(name) and depth:
        for option, script in pairwise(arguments):
            if _SCRIPT_OPTION.match(option):
                return command_name(script, depth - 1) or name
    return "conda activate" if words[:2] == ["conda", "activate"] else name


def _python_module(arguments: list[str]) -> str | None:
    """What ``-m`` runs; None for a file, ``-c`` or the standard input."""
    rest = iter(arguments)
    for argument in rest:
        if argument == "-m":
            return next(rest, None)
        if argument in ("-W", "-X"):
            next(rest, None)
        elif argument == "-c" or not argument.startswith("-"):
            return None
    return None


def _base(path: str) -> str:
    return path.rsplit("/", 1)[-1] or path
