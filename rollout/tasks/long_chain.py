"""Chains of digits whose solutions have heavy-tailed lengths by a pinned law: what windows and critics are measured on.

A question gives three digits and a number of steps; each next digit is the last plus the third last, mod 10. The
solution stands in the think block, one line a step with the steps that are left, and the answer is its last digit.
Everything that a step needs stands a few tokens back, so a tiny model learns steps of any chain at once, and what
decides a question is its length. 992 of the 1,000 starts return to themselves only after 31 or 217 steps, so copying
from an earlier line, or stopping early, is right no more often than a guess. Affine maps mod 10 fail there: the
longest period is 10 and most are at most 4.

Own tokens (all that the policy writes, its stop token included) are lognormal, ``median_tokens`` at the median and
``longest_tokens`` at the 99th percentile, which is also the maximum; a set takes the quantiles of that law evenly.
A token is one of ``training.models.train_tokenizer``, where digits, line ends and tags stand alone.

Demonstrations slip: each step shows a wrong digit with probability ``slip``, then goes on correctly from it to the
answer of the wrong chain. A policy warm-started on them slips as often per step when it is sampled at temperature 1,
so that it gets n steps right about (1 - slip)^n of the time, and by a lucky cancellation a tenth of the rest. RL can
remove the slips. Credit is local, one digit of hundreds, which is what a critic is for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from itertools import count
from random import Random
from statistics import NormalDist
from zlib import crc32

from rollout.environment import Message, Row
from rollout.errors import UserError
from rollout.tasks import Demonstration, Split, ToolEnvironment, row_id
from rollout.tasks.arithmetic import is_right
from rollout.tools import Tool

QUESTION = "Next digit: last plus third last, without tens. Start {start}, {steps:0{width}} steps."
# Starts of 0 and 5 alone repeat within 7 steps.
STARTS = tuple(start for start in (f"{i:03}" for i in range(1000)) if not set(start) <= {"0", "5"})
P99 = NormalDist().inv_cdf(0.99)


def chain(start: str, steps: int, *, slip: float = 0.0, rng: Random | None = None) -> list[int]:
    """The start's last digit and the ``steps`` digits after it; with ``rng`` each of those slips with ``slip``."""
    digits = [int(digit) for digit in start]
    for _ in range(steps):
        digit = (digits[-1] + digits[-3]) % 10
        if rng is not None and rng.random() < slip:
            digit = (digit + rng.randint(1, 9)) % 10
        digits.append(digit)
    return digits[2:]


def worked(digits: list[int], width: int) -> str:
    """A line for each digit of a chain, ``steps left:digit``, down to 0 with ``width`` digits of countdown."""
    return "\n".join(f"{len(digits) - 1 - i:0{width}}:{digit}" for i, digit in enumerate(digits))


def own_tokens(steps: int, width: int) -> int:
    """Tokens of a whole solution: its lines with their line ends, two tags, line end, answer, stop token."""
    return (steps + 1) * (width + 3) + 4


def countdown_width(longest_tokens: int) -> int:
    """The fewest digits of countdown that come within 1/32 of the longest solution: each costs a token a line."""
    return next(width for width in count(1) if own_tokens(10**width - 1, width) > longest_tokens * 31 / 32)


def steps_at(quantile: float, median_tokens: int, longest_tokens: int) -> int:
    """The number of steps, at least 1, whose solution is closest to the law's length at ``quantile`` in (0, 1)."""
    width = countdown_width(longest_tokens)
    tokens = median_tokens * (longest_tokens / median_tokens) ** (NormalDist().inv_cdf(quantile) / P99)
    most = min(10**width - 1, (longest_tokens - 4) // (width + 3) - 1)
    return min(max(round((min(tokens, longest_tokens) - 4) / (width + 3)) - 1, 1), most)


def held_out(start: str, steps: int) -> bool:
    """Whether the test split has this question: a tenth of the starts of each number of steps."""
    return crc32(f"{start} {steps}".encode()) % 10 == 0


class LongChain:
    """``size`` and ``test_size`` rows at even quantiles of the law; difficulties are short (up to the median), middle
    and long (above half the longest)."""

    def __init__(
        self,
        *,
        name: str = "long_chain",
        size: int = 4096,
        test_size: int = 1000,
        seed: int = 0,
        slip: float = 0.05,
        median_tokens: int = 64,
        longest_tokens: int = 512,
    ) -> None:
        self.name = name
        self._slip = slip
        self._law = (median_tokens, longest_tokens)
        self._width = countdown_width(longest_tokens)
        self._rows = {
            "train": self._draw("train", size, "task.size", Random(f"train {seed}")),
            "test": self._draw("test", test_size, "task.test_size", Random("test")),
        }

    def tools(self) -> list[Tool]:
        return []

    def environment(self) -> ToolEnvironment:
        return ToolEnvironment([], is_right)

    def rows(self, split: Split) -> list[Row]:
        """The split's questions in shuffled order. The test set does not depend on the seed."""
        return self._rows[split]

    def _draw(self, split: Split, size: int, key: str, rng: Random) -> list[Row]:
        """Distinct questions at the quantiles (i + 1/2) / ``size``."""
        lengths = Counter(steps_at((i + 0.5) / size, *self._law) for i in range(size))
        rows: list[Row] = []
        for steps, wanted in lengths.items():  # shortest first
            starts = [start for start in STARTS if held_out(start, steps) == (split == "test")]
            if wanted > len(starts):
                most = math.floor(size * len(starts) / wanted)
                raise UserError(
                    f"{key}: {size} rows need {wanted} questions of {steps} steps, and there are {len(starts)}; "
                    f"give at most {most}"
                )
            rows += [self._row(start, steps) for start in rng.sample(starts, wanted)]
        rng.shuffle(rows)
        return rows

    def _row(self, start: str, steps: int) -> Row:
        text = QUESTION.format(start=start, steps=steps, width=self._width)
        tokens = own_tokens(steps, self._width)
        median, longest = self._law
        difficulty = "short" if tokens <= median else "middle" if tokens <= longest / 2 else "long"
        message: Message = {"role": "user", "content": text}
        extras = {"start": start, "steps": steps, "own_tokens": tokens}
        return Row(row_id(text), [message], chain(start, steps)[-1], difficulty, extras)

    def demonstrations(self, n: int, seed: int = 0) -> Iterator[Demonstration]:
        """Solutions with slips, of training questions at random quantiles of the law."""
        rng = Random(f"demonstrations {seed}")
        for _ in range(n):
            steps = rng.choice(self._rows["train"]).extras["steps"]
            start = rng.choice(STARTS)
            while held_out(start, steps):
                start = rng.choice(STARTS)
            digits, row = chain(start, steps, slip=self._slip, rng=rng), self._row(start, steps)
            answer: Message = {"role": "assistant", "content": str(digits[-1])}
            answer["reasoning_content"] = worked(digits, self._width)
            yield Demonstration([*row.messages, answer], style="think", difficulty=row.difficulty)

    def corpus(self) -> Iterator[str]:
        """Questions and solutions as the chat template writes them."""
        for demonstration in self.demonstrations(500):
            question, answer = demonstration.messages
            yield question["content"]
            yield answer["reasoning_content"]
