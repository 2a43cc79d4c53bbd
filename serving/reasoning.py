"""Where thinking ends and the answer begins. Pure text, no vLLM."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from rollout.chat import THINK, THINK_END


class Start(StrEnum):
    """What the prompt left for the model to write."""

    CHOOSES = "chooses"  # the model may open <think> itself
    THINKING = "thinking"  # the prompt ends inside <think>
    ANSWER = "answer"  # the prompt ends after </think>


class Split(NamedTuple):
    """``ended``: nothing that follows can be thinking any more, and an answer has begun."""

    reasoning: str
    content: str
    ended: bool


def prompt_start(prompt: str) -> Start:
    """How a rendered prompt that asks for the assistant's turn ends."""
    tail = prompt.rstrip()
    if tail.endswith(THINK):
        return Start.THINKING
    if tail.endswith(THINK_END):
        return Start.ANSWER
    return Start.CHOOSES


def split(text: str, start: Start, *, whole: bool = False) -> Split:
    """Cut an assistant turn, ``whole`` or as far as it is written, into reasoning and content.

    As ``text`` grows, both parts only grow, so a stream is the difference of two calls. The newline after ``<think>``
    and those after ``</think>`` are framing. A turn that neither opens ``<think>`` nor was given it is content.
    """
    if start is Start.ANSWER:
        return Split("", text, True)
    if start is Start.CHOOSES:
        opened = text.lstrip()
        if not opened.startswith(THINK):
            undecided = THINK.startswith(opened) and not whole
            return Split("", "" if undecided else text, not undecided)
        text = opened.removeprefix(THINK)
    reasoning, closed, content = text.partition(THINK_END)
    if not closed and not whole:
        reasoning = reasoning[: len(reasoning) - _partial_tag(reasoning)]
    content = content.lstrip("\n")
    return Split(reasoning.removeprefix("\n"), content, content != "")


def _partial_tag(text: str) -> int:
    """Length of the longest end of ``text`` that may still become ``</think>``."""
    return next((n for n in range(len(THINK_END) - 1, 0, -1) if text.endswith(THINK_END[:n])), 0)
