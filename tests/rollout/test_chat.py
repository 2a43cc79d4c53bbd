from __future__ import annotations

import copy
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.chat import TAGS, Chat, assistant_message, parse_text, tool_call
from rollout.environment import Message
from rollout.episode import ToolCall
from rollout.errors import UserError
from rollout.tasks.arithmetic import Arithmetic
from rollout.tools.calculator import calculator
from training.models import train_tokenizer

QUESTION: Message = {"role": "user", "content": "What is 12 + 34?"}
CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "12+34"}}</tool_call>'
CALLED = ToolCall("calculator", {"expression": "12+34"})


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(Arithmetic().corpus(), 512)


@pytest.fixture(scope="module")
def chat(tokenizer: Any) -> Chat:
    return Chat(tokenizer)


def with_template(tokenizer: Any, name: str) -> Chat:
    """The tiny tokenizer under a real family's chat template, as TRL ships them."""
    import trl

    source = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    other = copy.deepcopy(tokenizer)
    special = sorted(set(re.findall(r"<[|｜][^<>]*?[|｜]>", source)))
    other.add_tokens(special, special_tokens=True)
    other.bos_token = special[0]
    other.chat_template = source
    return Chat(other)


def text_of(chat: Chat, ids: list[int]) -> str:
    return chat.tokenizer.decode(ids, skip_special_tokens=False)


def test_the_prompt_is_short_and_knows_three_modes(chat: Chat) -> None:
    tokens = {mode: chat.open([QUESTION], [calculator], mode) for mode in ("auto", "always", "never")}
    base = "<|im_start|>user\nWhat is 12 + 34?<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(chat, tokens["auto"]) == base and len(tokens["auto"]) == 15
    assert text_of(chat, tokens["always"]) == base + "<think>\n"
    assert text_of(chat, tokens["never"]) == base + "<think></think>"
    assert chat.opening == {"auto": "", "always": "<think>\n", "never": "<think></think>"}
    with pytest.raises(UserError, match="reasoning: 'sometimes' is not one of auto, always, never"):
        chat.open([QUESTION], [], "sometimes")


def test_tags_are_single_tokens(chat: Chat) -> None:
    assert all(len(chat.encode(tag)) == 1 for tag in TAGS)
    assert [chat.think_id, chat.think_end_id] == chat.encode("<think></think>")
    assert [text_of(chat, [stop]) for stop in chat.stop_token_ids] == ["<|im_end|>"]
    assert len(chat.encode("12345\n\n")) == 7


@pytest.mark.parametrize("name", ["tiny", "qwen3", "qwen2_5", "qwen3_instruct_2507", "qwen3_training"])
@pytest.mark.parametrize("contents", [["46"], ["46", 'error: "x"\n', ""], ["<b>", "{x}", " 7 "]])
def test_turn_by_turn_equals_the_template_rendered_at_once(tokenizer: Any, name: str, contents: list[str]) -> None:
    chat = Chat(tokenizer) if name == "tiny" else with_template(tokenizer, name)
    calls = [tool_call("calculator", {"expression": "12+34"})] * len(contents)
    turn = {"role": "assistant", "content": "So.", "tool_calls": calls}
    results = [{"role": "tool", "content": content} for content in contents]
    whole = chat.tokenizer.apply_chat_template([QUESTION, turn, *results], tokenize=False, add_generation_prompt=True)
    assert whole.endswith("<|im_end|>" + text_of(chat, chat.tool_results(contents)))
    assert chat.tool_results(contents) == chat.encode(text_of(chat, chat.tool_results(contents)))
    assert chat.keeps_thinking


def test_templates_that_change_results_are_followed(tokenizer: Any) -> None:
    trims = with_template(tokenizer, "qwen3_5_think")
    assert "<tool_response>\n46\n</tool_response>" in text_of(trims, trims.tool_results(["\n 46 "]))
    quotes = with_template(tokenizer, "llama3_1")
    assert '"a \\"b\\""<|eot_id|>' in text_of(quotes, quotes.tool_results(['a "b"']))


def test_modes_of_other_templates(tokenizer: Any) -> None:
    qwen3 = with_template(tokenizer, "qwen3").opening
    assert qwen3 == {"auto": "", "always": "<think>\n", "never": "<think>\n\n</think>\n\n"}
    opens = with_template(tokenizer, "qwen3_5_think")
    assert opens.opens_think and opens.opening["auto"] == opens.opening["always"] == "<think>\n"
    assert opens.opening["never"] == "<think>\n\n</think>\n\n"
    assert with_template(tokenizer, "qwen3_5_nothink").opening["always"] == "<think>\n"
    assert not with_template(tokenizer, "deepseek_r1_distill").keeps_thinking


def test_a_turn_that_the_prompt_opened_is_parsed_whole(tokenizer: Any) -> None:
    opens = with_template(tokenizer, "qwen3_5_think")
    turn = opens.parse(opens.encode("hm\n</think>\n\n46<|im_end|>"))
    assert (turn.reasoning, turn.content, turn.well_formed) == ("hm", "46", True)
    chat = Chat(tokenizer)
    assert chat.parse(chat.encode("46<|im_end|>"), "never").well_formed
    assert not chat.parse(chat.encode("46<|im_end|>"), "auto").well_formed
    assert chat.parse(chat.encode("hm</think>46"), "always").reasoning == "hm"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("qwen3_5_think", "does not write tool calls as"),
        ("llama3_1", "does not write tool calls as"),
        ("phi3", "does not write tool calls as"),
    ],
)
def test_templates_with_other_tool_calls_are_refused_with_tools_only(tokenizer: Any, name: str, words: str) -> None:
    chat = with_template(tokenizer, name)
    assert chat.open([QUESTION], [])
    with pytest.raises(UserError, match=words):
        chat.open([QUESTION], [calculator])


def test_templates_that_cannot_be_followed_are_refused(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="no special token"):
        with_template(tokenizer, "glm4moe")
    with pytest.raises(UserError, match="does not show tool results"):
        with_template(tokenizer, "phi3").tool_results(["1"])
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        Chat(bare)


@pytest.mark.parametrize(
    ("text", "reasoning", "content", "calls"),
    [
        ("<think></think>46", "", "46", []),
        ("<think>\n2+4=6\n</think>\n\n46", "2+4=6", "46", []),
        (f"<think></think>{CALL}", "", "", [CALLED]),
        (f"<think>hm</think>Let me see.\n{CALL}\n{CALL}\n", "hm", "Let me see.", [CALLED, CALLED]),
        ('<think></think><tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', "", "", [ToolCall("f", {})]),
        ("\n<think>a < b</think><b>c</b>", "a < b", "<b>c</b>", []),
    ],
)
def test_well_formed_turns(text: str, reasoning: str, content: str, calls: list[ToolCall]) -> None:
    turn = parse_text(text)
    assert (turn.reasoning, turn.content, turn.calls, turn.well_formed) == (reasoning, content, calls, True)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("46", "46", []),
        ("", "", []),
        (CALL, "", [CALLED]),
        ("<think>46", "", []),
        ("</think>46", "46", []),
        ("x<think></think>46", "x46", []),
        ("<think><think></think>46", "46", []),
        ("<think></think></think>46", "46", []),
        ("<think></think>4<think></think>6", "46", []),
        (f"<think>{CALL}</think>46", "46", []),
        (f"<think>{CALL}", "", []),
        ("<think></think><tool_call>{", "", []),
        (f"<think></think><tool_call>{CALL}", "", [CALLED]),
        ("<think></think></tool_call>46", "46", []),
        ("<think></think><tool_response>46</tool_response>46", "4646", []),
        (f"<think></think>{CALL}<think></think>", "", [CALLED]),
    ],
)
def test_ill_formed_turns(text: str, content: str, calls: list[ToolCall]) -> None:
    turn = parse_text(text)
    assert (turn.content, turn.calls, turn.well_formed) == (content, calls, False)


@pytest.mark.parametrize(
    ("json", "name", "problem"),
    [
        ("", "", "not valid JSON"),
        ("{'name': 1}", "", "not valid JSON"),
        ("[" * 100_000, "", "not valid JSON"),
        ("9" * 10_000, "", "not valid JSON"),
        ("[]", "", "not {"),
        ('{"arguments": {}}', "", "not {"),
        ('{"name": 3, "arguments": {}}', "", "not {"),
        ('{"name": "f"}', "f", "not a JSON object"),
        ('{"name": "f", "arguments": "1+1"}', "f", "not a JSON object"),
    ],
)
def test_bad_calls_say_what_is_wrong(json: str, name: str, problem: str) -> None:
    turn = parse_text(f"<think></think><tool_call>{json}</tool_call>")
    assert turn.well_formed and len(turn.calls) == 1
    assert (turn.calls[0].name, turn.calls[0].arguments) == (name, None)
    assert problem in (turn.calls[0].problem or "") and len(turn.calls[0].problem or "") < 200


def test_special_tokens_inside_a_turn_make_it_ill_formed(chat: Chat) -> None:
    assert not chat.parse(chat.encode("<think></think>4<|im_end|>6<|im_end|>")).well_formed
    assert not chat.parse(chat.encode("<think></think>46<|im_end|>\n<|im_start|>user\n<|im_end|>")).well_formed
    assert chat.parse([]).content == ""


pieces = st.lists(st.sampled_from([*TAGS, CALL, "46", "\n", " x ", "{", '"']) | st.text(max_size=5), max_size=12)


@given(pieces)
def test_no_text_upsets_the_parser_and_no_thought_acts(parts: list[str]) -> None:
    text = "".join(parts)
    turn = parse_text(text)
    if turn.well_formed:
        assert re.fullmatch(r"\s*<think>.*</think>.*", text, re.DOTALL)
        assert text.count("<think>") == text.count("</think>") == 1 and "<tool_response>" not in text
        assert len(turn.calls) == text.count("<tool_call>")
    assert all(tag not in turn.content and tag not in turn.reasoning for tag in TAGS)
    assert not parse_text(f"<think>{CALL}").calls


words = st.text(alphabet="abc 12+=\n.{}\"'é漢", max_size=12).map(str.strip)
arguments = st.dictionaries(st.text("ab", min_size=1, max_size=3), words | st.integers(-99, 99), max_size=2)
turns = st.tuples(words, words, st.lists(arguments, min_size=1, max_size=2), st.lists(words, min_size=1, max_size=2))


@given(st.lists(turns, max_size=2), words, words)
def test_demonstrations_survive_tokens(chat: Chat, shown: list[Any], reasoning: str, answer: str) -> None:
    messages = [QUESTION]
    for thoughts, content, calls, results in shown:
        message = {"role": "assistant", "content": content, "tool_calls": [tool_call("f", call) for call in calls]}
        messages.append(message | ({"reasoning_content": thoughts} if thoughts else {}))
        messages += [{"role": "tool", "content": result} for result in results]
    last = {"role": "assistant", "content": answer}
    messages.append(last | ({"reasoning_content": reasoning} if reasoning else {}))
    ids, own = chat.demonstration(messages, [])
    rendered = chat.tokenizer.apply_chat_template(messages, tokenize=False)
    assert text_of(chat, ids) + "\n" == rendered
    written, run = [], []
    for token, mine in zip(ids, own, strict=True):
        if mine:
            run.append(token)
        elif run:
            written.append(run)
            run = []
    parsed = [chat.parse(run) for run in [*written, run]]
    assert [assistant_message(turn) for turn in parsed] == [m for m in messages if m["role"] == "assistant"]
    assert all(turn.well_formed for turn in parsed)


@pytest.mark.parametrize("name", ["qwen3", "qwen2_5", "qwen3_instruct_2507"])
def test_demonstrations_for_other_families_open_with_think(tokenizer: Any, name: str) -> None:
    chat = with_template(tokenizer, name)
    for demonstration in Arithmetic().demonstrations(30):
        ids, own = chat.demonstration(demonstration.messages, demonstration.tools)
        prompt = chat.open(demonstration.messages[:1], demonstration.tools)
        assert ids[: len(prompt)] == prompt and not any(own[: len(prompt)]) and own[len(prompt)]
        assert ids[len(prompt)] == chat.think_id and ids[-1] == chat.end_of_turn_id


def test_own_tokens_of_a_tool_demonstration(chat: Chat) -> None:
    shown = next(d for d in Arithmetic().demonstrations(100) if d.style == "tool")
    ids, own = chat.demonstration(shown.messages, shown.tools)
    text = text_of(chat, [token for token, mine in zip(ids, own, strict=True) if mine])
    expression = shown.messages[1]["tool_calls"][0]["function"]["arguments"]["expression"]
    call = f'<tool_call>{{"name": "calculator", "arguments": {{"expression": "{expression}"}}}}</tool_call>'
    assert text == f"<think></think>{call}<|im_end|><think></think>{shown.messages[-1]['content']}<|im_end|>"


def test_a_turn_costs_microseconds(chat: Chat) -> None:
    ids = chat.encode(f"<think></think>{CALL}<|im_end|>")
    chat.tool_results(["46"])
    best = {"parse": 1.0, "tool_results": 1.0}
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(50):
            chat.parse(ids)
        middle = time.perf_counter()
        for _ in range(50):
            chat.tool_results(["46"])
        best["parse"] = min(best["parse"], (middle - start) / 50)
        best["tool_results"] = min(best["tool_results"], (time.perf_counter() - middle) / 50)
    assert best["parse"] < 100e-6 and best["tool_results"] < 200e-6
