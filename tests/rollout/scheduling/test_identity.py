"""Whose request it is, what it called and how it ended, read from real requests."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.v1.request import Request

from rollout.scheduling.identity import INFERRED, UNKNOWN, Identity
from rollout.scheduling.prefixes import PrefixIndex
from rollout.scheduling.programs import LONGEST_NAME
from tests.rollout.scheduling.driver import BLOCK, EOS, build, request, said, tokenizer


def identity(*, infer: bool = False, tokens: Any = None) -> Identity:
    manager = build({"policy": "turnstile"}, tokenizer=tokens).structured_output_manager
    return Identity(manager, BLOCK, infer=infer)


def answered(text: str, **how: Any) -> Request:
    made = request("r", [10] * 9, 500, **how)
    made.append_output_token_ids(said(text))
    return made


def test_names() -> None:
    program = identity().program
    assert program(request("r", [1], 1, session="s")) == "s"
    assert program(request("r", [1], 1, extra_args={"session_id": "x"})) == "x"
    assert program(request("r", [1], 1, session="s", extra_args={"session_id": "x"})) == "s"
    assert program(request("r", [1], 1)) is None
    assert program(request("r", [1], 1, session="Zürich 7/ü{}")) == "Zürich 7/ü{}"
    assert program(request("r", [1], 1, session="x" * LONGEST_NAME)) == "x" * LONGEST_NAME
    assert program(request("r", [1], 1, session="inferred-1")) == "inferred-1", "nothing is inferred here"


@pytest.mark.parametrize(
    "name", ["", "x" * (LONGEST_NAME + 1), "a\nb", "\0r1", "\x1b[31m", 7, 1.5, True, ["s"], {"a": 1}, b"s"]
)
def test_malformed_names_name_nothing(name: Any) -> None:
    assert identity().program(request("r", [1], 1, session=name)) is None
    assert identity().program(request("r", [1], 1, extra_args={"session_id": name})) is None
    assert identity().program(request("r", [1], 1, session=name, extra_args={"session_id": "good"})) == "good"


def test_hints() -> None:
    who = identity()
    for value, expected in (
        ("bash", "bash"),
        ("x" * 200, "x" * 64),
        ("", None),
        (5, None),
        (None, None),
        ("person", "person()"),
    ):
        assert who.tool_before(request("r", [1], 1, extra_args={"tool": value})) == expected
    assert who.tool_before(request("r", [1], 1)) is None
    yes: list[Any] = [True, 1, "1", "true"]
    no: list[Any] = [False, 0, "0", "false", "no", None, [], {}, 2]
    for flag in yes:
        assert who.last_turn(request("r", [1], 1, extra_args={"last_turn": flag}))
    for flag in no:
        assert not who.last_turn(request("r", [1], 1, extra_args={"last_turn": flag}))
    assert not who.last_turn(request("r", [1], 1))


def test_what_the_output_calls() -> None:
    who = identity(tokens=tokenizer())
    assert who.tool_after(answered('let me see <tool_call>{"name": "search", "arguments": {}}')) == "search"
    assert who.tool_after(answered("```bash\ncd x && pytest -q\n```")) == "pytest"
    assert who.tool_after(answered("it is done")) is None
    assert identity().tool_after(answered("it is done")) == UNKNOWN, "without a tokenizer only the client knows"


def test_a_stop_string_at_the_end_is_told_from_an_abort() -> None:
    who = identity(tokens=tokenizer())
    assert who.stopped_by_string(answered("well STOP", stop=["STOP"]))
    assert who.stopped_by_string(answered("well STOP an", stop="STOP")), "async scheduling runs a little ahead"
    assert not who.stopped_by_string(answered("well STO", stop=["STOP"]))
    assert not who.stopped_by_string(answered("well STOP", stop=["HALT"]))
    assert not who.stopped_by_string(answered("well STOP"))
    assert not who.stopped_by_string(answered("STOP" + "." * 100, stop=["STOP"])), "long ago: the client read on"
    assert who.stopped_by_string(answered("a\n\n", stop=["HALT", "\n\n"]))
    assert not identity().stopped_by_string(answered("well STOP", stop=["STOP"]))


def test_inference_by_prefix() -> None:
    who = identity(infer=True)
    first = request("one", [10] * 9, 9)
    first.append_output_token_ids([11] * 8 + [EOS])
    assert who.program(request("one", [10] * 9, 9)) is None
    name = who.finished(first, None)
    assert name == "inferred-1"
    following = request("two", [*first.all_token_ids, 12, 13], 9)
    assert who.program(following) == name
    assert who.program(request("two", [*first.all_token_ids, 12], 9, session="mine")) == "mine"
    assert who.program(request("x", [10] * 8 + [99] * 9, 9)) is None, "one system prompt makes no program"
    following.append_output_token_ids([14] * 8 + [EOS])
    assert who.finished(following, name) == name
    assert who.program(request("three", [*following.all_token_ids, 15], 9)) == name
    who.forget(name)
    assert who.program(request("four", [*following.all_token_ids, 15], 9)) is None


def test_named_programs_are_found_by_prefix_too() -> None:
    who = identity(infer=True)
    first = request("one", [10] * 9, 9, session="mine")
    first.append_output_token_ids([11] * 8 + [EOS])
    assert who.finished(first, "mine") == "mine"
    assert who.program(request("two", [*first.all_token_ids, 12], 9)) == "mine"


def test_a_client_cannot_take_an_inferred_name() -> None:
    assert PrefixIndex(BLOCK).name().startswith(INFERRED)
    assert identity(infer=True).program(request("r", [1], 1, session=f"{INFERRED}1")) is None


def test_without_inference_nothing_is_remembered() -> None:
    who = identity()
    made = answered("x" * 40)
    assert who.finished(made, None) is None and who.finished(made, "s") == "s"
    assert who.program(request("two", [*made.all_token_ids, 1], 9)) is None
    who.forget("s")
