"""Cutting a turn into reasoning and content: streamed pieces add up to the whole, wherever the stream is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.reasoning import Start, prompt_start, split

PIECES = st.lists(
    st.sampled_from(["<think>", "</think>", "\n", " ", "<", "</th", "12", "ok", "<tool_call>{}"]), max_size=12
)


@pytest.mark.parametrize(
    ("start", "text", "reasoning", "content"),
    [
        (Start.CHOOSES, "<think></think>144", "", "144"),
        (Start.CHOOSES, "<think>\n3*4=12\n</think>144", "3*4=12\n", "144"),
        (Start.CHOOSES, "144", "", "144"),
        (Start.CHOOSES, "<think>\n3*4", "3*4", ""),
        (Start.CHOOSES, "<think>\na\n</think>\n\n<tool_call>", "a\n", "<tool_call>"),
        (Start.CHOOSES, "<think>a<tool_call>x</tool_call></think>1", "a<tool_call>x</tool_call>", "1"),
        (Start.CHOOSES, "", "", ""),
        (Start.THINKING, "3*4=12</think>144", "3*4=12", "144"),
        (Start.THINKING, "3*4=1 <", "3*4=1 <", ""),
        (Start.ANSWER, "144", "", "144"),
        (Start.ANSWER, "1 </think> 2", "", "1 </think> 2"),
    ],
)
def test_whole_turns(start: Start, text: str, reasoning: str, content: str) -> None:
    assert split(text, start, whole=True)[:2] == (reasoning, content)


@given(PIECES, st.sampled_from(Start), st.randoms())
def test_parts_only_grow_and_an_answer_once_begun_goes_on(pieces: list[str], start: Start, random) -> None:
    text = "".join(pieces)
    cuts = sorted(random.randrange(len(text) + 1) for _ in range(4))
    last = split("", start)
    for cut in [*cuts, len(text)]:
        now = split(text[:cut], start)
        assert now.reasoning.startswith(last.reasoning)
        assert now.content.startswith(last.content)
        assert not last.ended or (now.ended and now.reasoning == last.reasoning)
        last = now
    whole = split(text, start, whole=True)
    assert whole.reasoning.startswith(last.reasoning)
    assert whole.content.startswith(last.content)


@pytest.mark.parametrize(
    ("prompt", "start"),
    [
        ("<|im_start|>assistant\n", Start.CHOOSES),
        ("<|im_start|>assistant\n<think>\n", Start.THINKING),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", Start.ANSWER),
        ("<think></think>12<|im_end|>\n<|im_start|>assistant\n", Start.CHOOSES),
    ],
)
def test_prompt_start(prompt: str, start: Start) -> None:
    assert prompt_start(prompt) is start
