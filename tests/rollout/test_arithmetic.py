from __future__ import annotations

import asyncio
import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.environment import Row
from rollout.episode import Episode, Status, Turn
from rollout.tasks.arithmetic import DIRECT_WEIGHT, Arithmetic, compute, is_right, steps
from rollout.tools.calculator import evaluate

Fact = tuple[int, str, int]


def fact(row: Row) -> Fact:
    a, op, b = row.extras["a"], row.extras["op"], row.extras["b"]
    return (a, op, b) if op == "-" else (min(a, b), op, max(a, b))


@pytest.fixture(scope="module")
def task() -> Arithmetic:
    return Arithmetic()


def test_rows_are_finite_stable_and_distinct(task: Arithmetic) -> None:
    train, test = task.rows("train"), task.rows("test")
    assert (len(train), len(test)) == (4096, 2000)
    again = Arithmetic()
    assert [row.id for row in again.rows("train")] == [row.id for row in train]
    assert len({row.id for row in train + test}) == 6096
    other = Arithmetic(seed=1)
    assert [row.id for row in other.rows("train")] != [row.id for row in train]
    assert [row.id for row in other.rows("test")] == [row.id for row in test]


def test_difficulties_follow_the_mix(task: Arithmetic) -> None:
    assert Counter(row.difficulty for row in task.rows("train")) == {"1": 819, "2": 1639, "3": 1638}
    for row in task.rows("train") + task.rows("test"):
        assert {len(str(row.extras["a"])), len(str(row.extras["b"]))} == {int(row.difficulty)}
        assert row.answer == eval(f"{row.extras['a']}{row.extras['op']}{row.extras['b']}")


def test_one_digit_facts_are_trained_exhaustively_and_only_wordings_held_out(task: Arithmetic) -> None:
    every = set(itertools.product(range(10), "+-*", range(10)))
    for split in ("train", "test"):
        rows = [row for row in task.rows(split) if row.difficulty == "1"]  # type: ignore[arg-type]
        assert {(row.extras["a"], row.extras["op"], row.extras["b"]) for row in rows} == every
    shown = {demo.messages[0]["content"] for demo in task.demonstrations(20_000) if demo.difficulty == "1"}
    assert len(shown) == 900


def test_longer_facts_of_the_test_split_are_never_trained_or_shown() -> None:
    task = Arithmetic(size=20_000)
    held = {fact(row) for row in task.rows("test") if row.difficulty != "1"}
    trained = {fact(row) for row in task.rows("train") if row.difficulty != "1"}
    assert not held & trained
    texts = {row.messages[0]["content"] for row in task.rows("test")}
    assert not texts & {demo.messages[0]["content"] for demo in task.demonstrations(5000)}


def test_one_difficulty_runs_out_without_repeating() -> None:
    task = Arithmetic(mix={"1": 1.0}, operators="+")
    assert (len(task.rows("train")), len(task.rows("test"))) == (300, 100)
    two = Arithmetic(mix={"2": 1.0}, operators="*", size=10**6)
    assert len({row.id for row in two.rows("train")}) == len(two.rows("train")) > 25_000


def test_demonstrations_are_right_deterministic_and_of_three_styles(task: Arithmetic) -> None:
    demos = list(task.demonstrations(4000, seed=3))
    assert demos[:100] == list(task.demonstrations(100, seed=3))
    assert demos[:100] != list(task.demonstrations(100, seed=4))
    count = Counter(demo.difficulty for demo in demos)
    assert abs(count["1"] / len(demos) - 0.7) < 0.03
    styles = Counter(demo.style for demo in demos if demo.difficulty == "1")
    for style, share in {"direct": 0.5, "think": 0.1, "tool": 0.4}.items():
        assert abs(styles[style] / count["1"] - share) < 0.04
    for demo in demos:
        assert demo.weight == (DIRECT_WEIGHT if demo.style == "direct" else 1.0)
        answer = demo.messages[-1]["content"]
        for message in demo.messages:
            for call in message.get("tool_calls", []):
                assert evaluate(call["function"]["arguments"]["expression"]) == int(answer)
        assert ("reasoning_content" in demo.messages[-1]) == (demo.style == "think")


def test_without_the_tool_nothing_shows_it() -> None:
    task = Arithmetic(use_tool=False, mix={"1": 0.5, "3": 0.5}, operators="+-")
    demos = list(task.demonstrations(500))
    assert not task.tools() and {demo.style for demo in demos} == {"direct", "think"}
    assert {demo.difficulty for demo in demos} == {"1", "3"}
    assert not any("*" in demo.messages[0]["content"] or "times" in demo.messages[0]["content"] for demo in demos)


@given(st.integers(0, 999), st.sampled_from("+-*"), st.integers(0, 999))
def test_worked_steps_are_true_and_give_the_answer(a: int, op: str, b: int) -> None:
    lines = steps(a, op, b).split("\n")
    if op == "*":
        assert all(evaluate(left) == evaluate(right) for left, right in (line.split("=") for line in lines))
        assert lines[-1].endswith(f"={a * b}")
        return
    columns = []
    for line in lines:
        left, right = line.split("=")
        carry, digit = int(right[0]), int(right[1])
        assert evaluate(left) == (10 * carry + digit if op == "+" else digit - 10 * carry)
        columns.append(digit)
    total = sum(digit * 10**i for i, digit in enumerate(columns)) + (carry * 10 ** len(columns) if op == "+" else 0)
    assert total == abs(compute(a, op, b))


@pytest.mark.parametrize("answer", ["1234", " 1,234 ", "1234.", "1,234.\n", "01234"])
def test_right_answers(answer: str) -> None:
    assert is_right(answer, 1234)


@pytest.mark.parametrize(
    "answer", ["", "-1234", "1234.0", "12,34", "1234 eggs", "x=1234", "1234..", "1 234", "١٢٣٤", "+1234", "9" * 5000]
)
def test_wrong_answers(answer: str) -> None:
    assert not is_right(answer, 1234)


def test_only_a_finished_episode_succeeds(task: Arithmetic) -> None:
    async def scored(content: str, status: Status) -> tuple[dict[str, float], bool]:
        row = Row("id", [{"role": "user", "content": "What is 5 - 7?"}], -2)
        environment = task.environment()
        assert await environment.reset(row) == row.messages
        episode = Episode("id", "id", turns=[Turn("", content)], status=status)
        result = await environment.score(episode)
        await environment.close()
        return result

    assert asyncio.run(scored("-2", Status.FINISHED)) == ({"task": 1.0}, True)
    assert asyncio.run(scored("2", Status.FINISHED)) == ({"task": 0.0}, False)
    assert asyncio.run(scored("-2", Status.TRUNCATED)) == ({"task": 0.0}, False)
