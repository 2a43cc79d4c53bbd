"""Questions of graded difficulty: one to three digits, + - *, four wordings, all of them drawn from finite sets.

One-digit facts can be memorised and are trained exhaustively: only some of their wordings are held out. Of two- and
three-digit facts a tenth is held out whole. The split is the same for every seed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from random import Random
from typing import Any
from zlib import crc32

from rollout.chat import tool_call
from rollout.environment import Message, Row
from rollout.reasoning import told
from rollout.tasks import Demonstration, Split, ToolEnvironment, row_id
from rollout.tools import Tool
from rollout.tools.calculator import calculator

WORDINGS = ("What is {a} {op} {b}?", "Compute {a} {op} {b}.", "{a} {op} {b} = ?", "How much is {a} {word} {b}?")
WORDS = {"+": "plus", "-": "minus", "*": "times"}
LOWEST = {"1": 0, "2": 10, "3": 100}  # operands of difficulty d have d digits
INTEGER = re.compile(r"(-?)([0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)\.?")

# The warm start that lets two minutes suffice: most samples are one-digit, longer facts rarely use tool or thought.
SHARES = {"1": 0.7, "2": 0.15, "3": 0.15}
STYLES = {
    "1": {"direct": 0.5, "think": 0.1, "tool": 0.4},
    "2": {"direct": 0.6, "think": 0.2, "tool": 0.2},
    "3": {"direct": 0.7, "think": 0.1, "tool": 0.2},
}
DIRECT_WEIGHT = 3.0


def compute(a: int, op: str, b: int) -> int:
    return a + b if op == "+" else a - b if op == "-" else a * b


def is_right(answer: str, gold: int) -> bool:
    """Exactly the integer, with or without thousands separators and a final full stop."""
    match = INTEGER.fullmatch(answer.strip())
    if match is None or len(match[2]) > 20:
        return False
    return int(match[1] + match[2].replace(",", "")) == gold


def held_out(a: int, op: str, b: int, wording: int) -> bool:
    """Whether the test split has this question: by fact, whatever the order of + and *; one-digit ones by text."""
    if max(a, b) < 10:  # one wording of each fact
        return crc32(f"{a}{op}{b}".encode()) % len(WORDINGS) == wording
    low, high = (a, b) if op == "-" else (min(a, b), max(a, b))
    return crc32(f"{low}{op}{high}".encode()) % 10 == 0


def steps(a: int, op: str, b: int) -> str:
    """Worked steps, short enough to learn.

    Columns from the right for + and -: ``left+right+carry=`` then two digits, carry (or borrow) and column result.
    A product is the sum of the left operand times each digit of the right one.
    """
    if op == "*":
        factors = [int(digit) * 10**i for i, digit in enumerate(reversed(str(b)))]
        lines = [f"{a}*{factor}={a * factor}" for factor in factors]
        if len(factors) > 1:
            lines.append("+".join(str(a * factor) for factor in factors) + f"={a * b}")
        return "\n".join(lines)
    high, low = (a, b) if op == "+" else (max(a, b), min(a, b))
    width, carry, lines = max(len(str(high)), len(str(low))), 0, []
    for i in range(width):
        x, y = high // 10**i % 10, low // 10**i % 10
        column = compute(x, op, y) + (carry if op == "+" else -carry)
        lines.append(f"{x}{op}{y}{op}{carry}={abs(column // 10)}{column % 10}")
        carry = abs(column // 10)
    return "\n".join(lines)


class Arithmetic:
    """``mix`` gives each difficulty's share of the rows. One-digit texts run out, then the others fill the set.

    ``demonstration_mix`` gives each difficulty's share of the demonstrations, of those in ``mix`` (None: the study's).
    Of demonstrations without a tool, ``thinking`` is the share that thinks (None: the study's), ``told`` that of a
    system prompt which asks for what they show.
    """

    def __init__(
        self,
        *,
        name: str = "arithmetic",
        size: int = 4096,
        test_size: int = 2000,
        seed: int = 0,
        operators: str = "+-*",
        mix: dict[str, float] | None = None,
        use_tool: bool = True,
        demonstration_mix: dict[str, float] | None = None,
        thinking: float | None = None,
        told: float = 0.0,
    ) -> None:
        self.name = name
        self._sizes = {"train": size, "test": test_size}
        self._seed = seed
        self._operators = operators
        mix = {"1": 0.2, "2": 0.4, "3": 0.4} if mix is None else mix
        self._mix = {difficulty: share for difficulty, share in sorted(mix.items()) if share > 0}
        self._tools = [calculator] if use_tool else []
        self._demonstration_mix = SHARES if demonstration_mix is None else demonstration_mix
        self._thinking, self._told = thinking, told
        self._rows: dict[str, list[Row]] = {}

    def tools(self) -> list[Tool]:
        return self._tools

    def environment(self) -> ToolEnvironment:
        return ToolEnvironment(self._tools, is_right)

    def rows(self, split: Split) -> list[Row]:
        """The split's questions in shuffled order. The test set does not depend on the seed."""
        if split not in self._rows:
            rng = Random(f"{split} {self._seed if split == 'train' else ''}")
            rows: list[Row] = []
            shares, left = dict(self._mix), self._sizes[split]
            for difficulty in sorted(shares):
                wanted = round(left * shares[difficulty] / sum(shares.values()))
                found = self._draw(difficulty, split, wanted, rng)
                left -= len(found)
                del shares[difficulty]
                rows += found
            rng.shuffle(rows)
            self._rows[split] = rows
        return self._rows[split]

    def _draw(self, difficulty: str, split: Split, n: int, rng: Random) -> list[Row]:
        """``n`` distinct questions, or all there are; one-digit ones take every fact before a second wording of it."""
        operands = 10 ** int(difficulty) - LOWEST[difficulty]
        facts = operands**2 * len(self._operators)
        if difficulty == "1":
            order = [i + facts * w for w in range(len(WORDINGS)) for i in rng.sample(range(facts), facts)]
            # the wording turns with the fact, so that every wording is met in the first round
            order = [i % facts + facts * ((i // facts + i % facts) % len(WORDINGS)) for i in order]
        else:
            texts = facts * len(WORDINGS)
            share = 0.1 if split == "test" else 0.9
            order = rng.sample(range(texts), min(texts, int(1.2 * n / share) + 1000))
        questions = (self._question(difficulty, index) for index in order)
        found = [question for question in questions if held_out(*question) == (split == "test")]
        return [self._row(difficulty, *question) for question in found[:n]]

    def _question(self, difficulty: str, index: int) -> tuple[int, str, int, int]:
        """(a, operator, b, wording) of a place in the finite set of texts."""
        low = LOWEST[difficulty]
        operands = 10 ** int(difficulty) - low
        index, a = divmod(index, operands)
        index, b = divmod(index, operands)
        wording, op = divmod(index, len(self._operators))
        return low + a, self._operators[op], low + b, wording

    def _row(self, difficulty: str, a: int, op: str, b: int, wording: int) -> Row:
        text = WORDINGS[wording].format(a=a, op=op, b=b, word=WORDS[op])
        extras = {"a": a, "op": op, "b": b, "memorised": difficulty == "1"}
        if not self._tools:  # a calculator takes the place of thinking
            extras["needs_thought"] = difficulty != "1"
        return Row(row_id(text), [{"role": "user", "content": text}], compute(a, op, b), difficulty, extras)

    def demonstrations(self, n: int, seed: int = 0) -> Iterator[Demonstration]:
        """Direct, thinking and tool demonstrations of training questions, in the shares of the small-scale study."""
        rng = Random(f"demonstrations {seed}")
        difficulties = list(self._mix)
        shares = [self._demonstration_mix.get(difficulty, 0.0) for difficulty in difficulties]
        for _ in range(n):
            difficulty = rng.choices(difficulties, shares)[0]
            styles = {s: p for s, p in STYLES[difficulty].items() if self._tools or s != "tool"}
            if self._thinking is not None:
                free = styles["direct"] + styles["think"]
                styles |= {"direct": free * (1 - self._thinking), "think": free * self._thinking}
            style = rng.choices(list(styles), list(styles.values()))[0]
            yield self._demonstration(difficulty, style, rng)

    def _demonstration(self, difficulty: str, style: str, rng: Random) -> Demonstration:
        low, high = LOWEST[difficulty], 10 ** int(difficulty) - 1
        while True:
            question = (rng.randint(low, high), rng.choice(self._operators), rng.randint(low, high))
            wording = rng.randrange(len(WORDINGS))
            if not held_out(*question, wording):
                break
        a, op, b = question
        row = self._row(difficulty, a, op, b, wording)
        if self._told and style != "tool" and rng.random() < self._told:
            row = told(row, "always" if style == "think" else "never")
        answer: Message = {"role": "assistant", "content": str(row.answer)}
        messages = list(row.messages)
        if style == "think":
            answer["reasoning_content"] = steps(a, op, b)
        elif style == "tool":
            call: dict[str, Any] = {"expression": f"{a}{op}{b}"}
            messages.append({"role": "assistant", "content": "", "tool_calls": [tool_call("calculator", call)]})
            messages.append({"role": "tool", "content": str(row.answer)})
        weight = DIRECT_WEIGHT if style == "direct" else 1.0
        return Demonstration([*messages, answer], self._tools, style, difficulty, weight)

    def corpus(self) -> Iterator[str]:
        """Wordings, worked steps and tool calls as the chat template writes them."""
        for demonstration in self.demonstrations(2000):
            for message in demonstration.messages:
                yield message["content"]
                yield message.get("reasoning_content", "")
                for call in message.get("tool_calls", []):
                    expression = call["function"]["arguments"]["expression"]
                    yield f'{{"name": "calculator", "arguments": {{"expression": "{expression}"}}}}'
