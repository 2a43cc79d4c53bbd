from __future__ import annotations

import asyncio
import re
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.chat import Chat
from rollout.config import LongChainConfig
from rollout.environment import Row
from rollout.episode import Episode, Status, Turn
from rollout.errors import UserError
from rollout.tasks import Demonstration
from rollout.tasks.long_chain import STARTS, WORDINGS, LongChain, chain, count_at, count_width, own_tokens, worked
from training.models import train_tokenizer


@pytest.fixture(scope="module")
def task() -> LongChain:
    return LongChain()


def asked(text: str) -> tuple[str, int]:
    found: dict[str, str] = {}
    for wording in WORDINGS:
        pattern = re.escape(wording).replace(r"\{start\}", r"(?P<start>\d\d)").replace(r"\{count\}", r"(?P<count>\d\d)")
        found |= getattr(re.fullmatch(pattern, text), "groupdict", dict)()
    return found["start"], int(found["count"])


def slips(demonstration: Demonstration) -> tuple[int, int]:
    """(wrong digits, sums) of a demonstration, by reading it."""
    start, count = asked(demonstration.messages[0]["content"])
    digits: list[int] = []
    wrong = 0
    lines = demonstration.messages[-1]["reasoning_content"].split("\n")
    for left, line in zip(range(count, -1, -1), lines, strict=True):
        shown, digit = line.split(":")
        assert shown == f"{left:02}"
        wrong += len(digits) >= 2 and int(digit) != (digits[-1] + digits[-2]) % 10
        digits.append(int(digit))
    assert f"{digits[0]}{digits[1]}" == start
    assert demonstration.messages[-1]["content"] == str(digits[-1])
    return wrong, count - 1


def test_lengths_follow_the_pinned_law_in_tokens_of_the_real_tokenizer_and_template(task: LongChain) -> None:
    chat = Chat(train_tokenizer(task.corpus(), 512))
    lengths = []
    for row in task.rows("train"):
        start, count = asked(row.messages[0]["content"])
        answer = {"role": "assistant", "content": str(row.answer)}
        answer["reasoning_content"] = worked(chain(start, count), 2)
        ids, own = chat.demonstration([*row.messages, answer], [])
        lengths.append(sum(own))
        assert sum(own) == row.extras["own_tokens"] and len(ids) - sum(own) < 24
    lengths.sort()
    assert abs(lengths[len(lengths) // 2] - 64) <= 4
    assert abs(lengths[int(0.99 * len(lengths))] - 512) <= 16
    assert lengths[-1] <= 512
    # and between: a lognormal with these two quantiles has these others
    for quantile, tokens in {0.1: 20.4, 0.25: 35.0, 0.75: 117.0, 0.9: 201.2, 0.95: 278.4}.items():
        assert abs(lengths[int(quantile * len(lengths))] - tokens) <= 0.05 * tokens + 2.5


def test_rows_are_finite_stable_distinct_and_disjoint(task: LongChain) -> None:
    train, test = task.rows("train"), task.rows("test")
    assert (len(train), len(test)) == (1024, 2048)
    assert len({row.id for row in train + test}) == 3072
    assert [row.id for row in LongChain().rows("train")] == [row.id for row in train]
    other = LongChain(seed=1)
    assert [row.id for row in other.rows("train")] != [row.id for row in train]
    assert [row.id for row in other.rows("test")] == [row.id for row in test]
    counts = [[row.extras["count"] for row in t.rows("train")] for t in (task, other)]
    assert counts[0] != counts[1] and sorted(counts[0]) == sorted(counts[1])


def test_demonstrations_never_show_a_question_of_the_test_split(task: LongChain) -> None:
    shown = {demo.messages[0]["content"] for demo in task.demonstrations(4000)}
    assert len(shown) > 2500
    assert not shown & {row.messages[0]["content"] for row in task.rows("test")}


def test_difficulties_are_by_length(task: LongChain) -> None:
    bounds = {"short": (14, 64), "middle": (69, 124), "long": (129, 504)}
    for row in task.rows("train") + task.rows("test"):
        low, high = bounds[row.difficulty]
        assert low <= row.extras["own_tokens"] <= high
    assert Counter(row.difficulty for row in task.rows("test")) == {"short": 1059, "middle": 532, "long": 457}


def test_answers_are_the_last_digits_of_their_chains(task: LongChain) -> None:
    for row in task.rows("train")[:300]:
        start, count = asked(row.messages[0]["content"])
        a, b = map(int, start)
        for _ in range(count - 1):
            a, b = b, (a + b) % 10
        assert row.answer == b


@given(st.sampled_from(STARTS), st.integers(1, 300), st.integers(1, 3))
def test_a_worked_chain_counts_down_and_shows_each_digit(start: str, count: int, width: int) -> None:
    digits = chain(start, count)
    lines = worked(digits, width).split("\n")
    assert [line.split(":") for line in lines] == [[f"{count - i:0{width}}", str(d)] for i, d in enumerate(digits)]
    assert f"{digits[0]}{digits[1]}" == start
    assert all((x + y) % 10 == z for x, y, z in zip(digits, digits[1:], digits[2:], strict=False))


def test_chains_of_the_starts_in_use_come_back_after_12_steps_at_the_earliest() -> None:
    def period(start: str) -> int:
        digits = chain(start, 71)
        return next(i for i in range(1, 70) if digits[i : i + 2] == digits[:2])

    assert Counter(map(period, STARTS)) == {60: 60, 20: 20, 12: 12}
    assert all(period(f"{i:02}") < 12 for i in range(100) if f"{i:02}" not in STARTS)


def test_demonstrations_slip_at_the_given_rate_and_answer_the_wrong_chain(task: LongChain) -> None:
    demos = list(task.demonstrations(2000, seed=3))
    assert demos[:100] == list(task.demonstrations(100, seed=3))
    assert demos[:100] != list(task.demonstrations(100, seed=4))
    wrong, sums = map(sum, zip(*map(slips, demos), strict=True))
    assert sums > 30_000 and abs(wrong / sums - 0.08) < 0.005
    assert {(demo.style, demo.weight) for demo in demos} == {("think", 1.0)}
    assert all(slips(demo)[0] == 0 for demo in LongChain(slip=0.0).demonstrations(200))
    assert all(wrong == sums for wrong, sums in map(slips, LongChain(slip=1.0).demonstrations(200)))


@given(st.integers(16, 100), st.floats(1.5, 12), st.lists(st.floats(0.001, 0.999), min_size=2, max_size=8))
def test_the_law_scales(median: int, tail: float, quantiles: list[float]) -> None:
    longest = round(median * tail)
    width = count_width(longest)
    lengths = [own_tokens(count_at(q, median, longest), width) for q in sorted(quantiles)]
    assert all(low <= high for low, high in pairwise(lengths)) and lengths[-1] <= longest
    assert abs(own_tokens(count_at(0.5, median, longest), width) - median) <= (width + 3) / 2 + 0.5
    assert own_tokens(count_at(0.99, median, longest), width) >= longest * 31 / 32 - width - 3
    assert count_at(0.999, median, longest) < 10**width


@pytest.mark.parametrize("law", [{}, {"median_tokens": 16, "longest_tokens": 64}, {"longest_tokens": 2000}])
def test_more_rows_than_questions_are_refused_with_a_number_that_is_not(law: dict[str, Any]) -> None:
    for key, other in (("size", "test_size"), ("test_size", "size")):
        with pytest.raises(UserError, match=rf"^task\.{key}: .* give at most (\d+)$") as refused:
            LongChain(**law, **{key: 20_000, other: 1})
        most = int(str(refused.value).rpartition(" ")[2])
        rows = LongChain(**{key: most, other: 1}, **law).rows("train" if key == "size" else "test")
        assert len({row.id for row in rows}) == most > 20


@pytest.mark.parametrize(
    "settings, key",
    [
        ({"size": 0}, "size"),
        ({"test_size": 0}, "test_size"),
        ({"slip": 1.5}, "slip"),
        ({"slip": -0.1}, "slip"),
        ({"median_tokens": 13}, "median_tokens"),
        ({"median_tokens": 64, "longest_tokens": 64}, "longest_tokens"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=rf"^task\.{key}: "):
        LongChainConfig(**settings)


def test_only_the_exact_last_digit_of_a_finished_episode_succeeds(task: LongChain) -> None:
    async def scored(content: str, status: Status) -> tuple[dict[str, float], bool]:
        environment = task.environment()
        await environment.reset(Row("id", [{"role": "user", "content": "?"}], 7))
        result = await environment.score(Episode("id", "id", turns=[Turn("01:2\n00:7", content)], status=status))
        await environment.close()
        return result

    assert asyncio.run(scored("7", Status.FINISHED)) == ({"task": 1.0}, True)
    for content, status in [("2", Status.FINISHED), ("", Status.FINISHED), ("7", Status.TRUNCATED)]:
        assert asyncio.run(scored(content, status)) == ({"task": 0.0}, False)
