"""Which program a prompt goes on: against a search over all finished token lists."""

from __future__ import annotations

import hashlib
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.scheduling import prefixes
from rollout.scheduling.prefixes import PrefixIndex

SIZE = 4
TOKENS = st.lists(st.integers(0, 1), max_size=14)


def hashes(tokens: list[int]) -> list[bytes]:
    """One chained hash for each full block, as vLLM has them."""
    blocks, parent = [], b""
    for end in range(SIZE, len(tokens) + 1, SIZE):
        parent = hashlib.sha256(parent + repr(tokens[end - SIZE : end]).encode()).digest()
        blocks.append(parent)
    return blocks


def finish(index: PrefixIndex, program: str, prompt: list[int], output: list[int]) -> None:
    index.finished(program, len(prompt), prompt + output, hashes(prompt + output))


def find(index: PrefixIndex, tokens: list[int]) -> str | None:
    return index.find(tokens, hashes(tokens))


def searched(turns: list[tuple[str, list[int], list[int]]], tokens: list[int]) -> str | None:
    """The oracle: all marked prefixes of at least a block, the longest that ``tokens`` strictly extends."""
    owners: dict[tuple[int, ...], set[str]] = {}
    for program, prompt, output in turns:
        for marked in (prompt, prompt + output[:-1]):
            if len(marked) >= SIZE:
                owners.setdefault(tuple(marked), set()).add(program)
    fitting = [marked for marked in owners if len(marked) < len(tokens) and tuple(tokens[: len(marked)]) == marked]
    programs = owners[max(fitting, key=len)] if fitting else set()
    return programs.pop() if len(programs) == 1 else None


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), TOKENS, TOKENS), max_size=8), TOKENS, TOKENS)
def test_as_a_search_over_everything(
    turns: list[tuple[str, list[int], list[int]]], fresh: list[int], more: list[int]
) -> None:
    index = PrefixIndex(SIZE)
    for turn in turns:
        finish(index, *turn)
    for tokens in [
        fresh,
        *(prompt + output[: len(output) - cut] + more for _, prompt, output in turns for cut in (0, 1)),
    ]:
        assert find(index, tokens) == searched(turns, tokens)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), TOKENS, TOKENS, st.sampled_from([None, *"abcd"])), max_size=30))
def test_bounded_and_forgotten_without_a_trace(
    turns: list[tuple[str, list[int], list[int], str | None]],
) -> None:
    index = PrefixIndex(SIZE, limit=5)
    for program, prompt, output, gone in turns:
        finish(index, program, prompt, output)
        assert len(index) <= 5
        if gone is not None:
            index.forget(gone)
            assert all(find(index, p + o + [0, 1, 0]) != gone for _, p, o, _ in turns)
    while index._marks:
        index._drop(next(iter(index._marks)))
    assert not index._tails and not index._of


def test_a_conversation_and_one_whose_thinking_is_stripped() -> None:
    index = PrefixIndex(SIZE)
    prompt, thought, answer = [1] * 6, [7] * 5, [2] * 5
    finish(index, "chat", prompt, thought + answer)
    assert find(index, prompt + thought + answer + [9]) == "chat"
    assert find(index, prompt + answer + [9]) == "chat"
    assert find(index, prompt) is None  # the same question again: a sibling


def test_a_shared_system_prompt_makes_no_program() -> None:
    index = PrefixIndex(SIZE)
    system = list(range(10, 10 + 2 * SIZE))
    finish(index, "ann", [*system, 1], [5, 5])  # one token of her own, behind the last full block
    assert find(index, [*system, 2, 3, 4, 5, 6]) is None
    assert find(index, [*system, 1, 5, 5, 9]) == "ann"


def test_siblings_of_one_prompt_are_told_apart_by_their_answers() -> None:
    index = PrefixIndex(SIZE)
    prompt = [1] * 8
    finish(index, "a", prompt, [2] * 6)
    finish(index, "b", prompt, [3] * 6)
    assert find(index, [*prompt, 4, 4]) is None
    assert find(index, [*prompt, *[2] * 6, 4]) == "a"
    index.forget("a")
    assert find(index, [*prompt, 4, 4]) is None  # still b's as much as a's
    assert find(index, [*prompt, *[2] * 6, 4]) is None
    assert find(index, [*prompt, *[3] * 6, 4]) == "b"


def test_an_aborted_prompt_sent_again_is_another_program() -> None:
    index = PrefixIndex(SIZE)
    finish(index, "a", [1] * 9, [])
    assert find(index, [1] * 9) is None
    assert find(index, [1] * 10) == "a"


def test_the_mark_used_last_is_kept() -> None:
    index = PrefixIndex(SIZE, limit=2)
    finish(index, "a", [1] * 8, [])
    finish(index, "b", [2] * 8, [])
    assert find(index, [1] * 9) == "a"
    finish(index, "c", [3] * 8, [])
    assert find(index, [1] * 9) == "a"
    assert find(index, [2] * 9) is None


def test_the_search_is_bounded() -> None:
    index = PrefixIndex(SIZE)
    draw = random.Random(0)
    tokens = [draw.randrange(100) for _ in range(SIZE * (prefixes.REACH + 2))]
    finish(index, "a", tokens[: SIZE * 2], [])
    assert find(index, tokens[: SIZE * (prefixes.REACH + 1)]) == "a"
    assert find(index, tokens) is None


def test_names_differ() -> None:
    index = PrefixIndex(SIZE)
    assert [index.name(), index.name()] == ["inferred-1", "inferred-2"]
