"""Chains of digits with a pinned, heavy-tailed law of solution lengths: what windows and critics are measured on.

A question gives two digits and a number to count down from; each next digit is the sum of the last two, mod 10. The
solution stands in the think block, one line a digit, ``count:digit`` down to 0, and the answer is the last digit. A
step needs the two lines before it and no more, so a tiny model learns it at once for chains of every length. The
wording is one of seven. The chains of the starts in use have periods of 12, 20 and 60, so that to stop early or to copy
an old line is a guess. (Affine maps mod 10 would not do: most have periods of at most 4.)

Own tokens (all that the policy writes, its stop token included) are lognormal, ``median_tokens`` at the median and
``longest_tokens`` at the 99th percentile, which is also the maximum; a set takes the quantiles of that law evenly.
A token is one of ``training.models.train_tokenizer``, where digits, line ends and tags stand alone.

Demonstrations slip: each sum shows a wrong digit with probability ``slip``, then the chain goes on correctly from it,
and the answer is that of the wrong chain. A policy warm-started on them slips as often when it is sampled at
temperature 1, so that it gets k sums right about (1 - slip)^k of the time, and by lucky cancellation a tenth of the
rest. RL can remove the slips. Credit is local, one digit among hundreds, which is what a critic is for. Greedy decoding
does not slip: accuracy here is that of samples.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from random import Random
from statistics import NormalDist
from zlib import crc32

from rollout.environment import Message, Row
from rollout.errors import UserError
from rollout.tasks import Demonstration, Split, ToolEnvironment, row_id
from rollout.tasks.arithmetic import is_right
from rollout.tools import Tool

WORDINGS = (
    "Each digit is the sum of the two before it, without tens. Start with {start} and count down from {count}.",
    "Start with {start}, count down from {count}: each digit is the sum of the two before it, without tens.",
    "Count down from {count}. The digits start with {start}; add the last two, without tens.",
    "Add the last two digits, without tens, from {start} on. Count down from {count}.",
    "Start: {start}. Count down from {count} and add the last two digits, without tens.",
    "Each digit after {start} is the last two added, without tens. Count from {count} down.",
    "From {count} down to 0: begin with {start} and add the last two digits, without tens.",
)
SHORT_PERIODS = {"00", "05", "50", "55", "26", "68", "84", "42"}  # back at the start within 4 steps
STARTS = tuple(start for start in (f"{i:02}" for i in range(100)) if start not in SHORT_PERIODS)
P99 = NormalDist().inv_cdf(0.99)


def chain(start: str, count: int, *, slip: float = 0.0, rng: Random | None = None) -> list[int]:
    """``count`` + 1 digits, of which the start is two; with ``rng`` each of the others slips with ``slip``."""
    digits = [int(digit) for digit in start]
    for _ in range(count - 1):
        digit = (digits[-1] + digits[-2]) % 10
        if rng is not None and rng.random() < slip:
            digit = (digit + rng.randint(1, 9)) % 10
        digits.append(digit)
    return digits


def worked(digits: list[int], width: int) -> str:
    """A line for each digit of a chain, ``count:digit``, down to count 0, which is written with ``width`` digits."""
    return "\n".join(f"{len(digits) - 1 - i:0{width}}:{digit}" for i, digit in enumerate(digits))


def own_tokens(count: int, width: int) -> int:
    """Tokens of a whole solution: its lines with their line ends, two tags, line end, answer, stop token."""
    return (count + 1) * (width + 3) + 4


def count_width(longest_tokens: int) -> int:
    """The fewest digits for counts that come within 1/32 of the longest solution: each costs a token a line."""
    return next(w for w in itertools.count(1) if own_tokens(10**w - 1, w) > longest_tokens * 31 / 32)


def count_at(quantile: float, median_tokens: int, longest_tokens: int) -> int:
    """The count, at least 1, whose solution is closest to the law's length at ``quantile`` in (0, 1)."""
    width = count_width(longest_tokens)
    tokens = median_tokens * (longest_tokens / median_tokens) ** (NormalDist().inv_cdf(quantile) / P99)
    most = min(10**width - 1, (longest_tokens - 4) // (width + 3) - 1)
    return min(max(round((min(tokens, longest_tokens) - 4) / (width + 3)) - 1, 1), most)


def held_out(start: str, count: int) -> bool:
    """Whether the test split has this question: a quarter of the starts, others for each count."""
    return crc32(f"{start} {count}".encode()) % 4 == 0


class LongChain:
    """``size`` and ``test_size`` rows at even quantiles of the law; difficulties are short (up to the median), middle
    and long (above a quarter of the longest)."""

    def __init__(
        self,
        *,
        name: str = "long_chain",
        size: int = 1024,
        test_size: int = 2048,
        seed: int = 0,
        slip: float = 0.08,
        median_tokens: int = 64,
        longest_tokens: int = 512,
    ) -> None:
        self.name = name
        self._slip = slip
        self._law = (median_tokens, longest_tokens)
        self._width = count_width(longest_tokens)
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
        counts = Counter(count_at((i + 0.5) / size, *self._law) for i in range(size))
        asked = {
            count: [(s, w) for s in STARTS if held_out(s, count) == (split == "test") for w in WORDINGS]
            for count in counts
        }
        if any(len(asked[count]) < wanted for count, wanted in counts.items()):
            # Of m even quantiles, an interval that holds k of n others holds at most m (k + 1) / n + 1.
            most = min((len(asked[count]) - 1) * size // (wanted + 1) for count, wanted in counts.items())
            raise UserError(f"{key}: the law asks for more questions of one length than there are; give at most {most}")
        rows = [self._row(start, count, w) for count in counts for start, w in rng.sample(asked[count], counts[count])]
        rng.shuffle(rows)
        return rows

    def _row(self, start: str, count: int, wording: str) -> Row:
        text = wording.format(start=start, count=f"{count:0{self._width}}")
        tokens = own_tokens(count, self._width)
        median, longest = self._law
        difficulty = "short" if tokens <= median else "middle" if tokens <= longest / 4 else "long"
        message: Message = {"role": "user", "content": text}
        extras = {"start": start, "count": count, "own_tokens": tokens}
        return Row(row_id(text), [message], chain(start, count)[-1], difficulty, extras)

    def demonstrations(self, n: int, seed: int = 0) -> Iterator[Demonstration]:
        """Solutions with slips, of training questions at random quantiles of the law."""
        rng = Random(f"demonstrations {seed}")
        for _ in range(n):
            count = rng.choice(self._rows["train"]).extras["count"]
            start = rng.choice(STARTS)
            while held_out(start, count):
                start = rng.choice(STARTS)
            digits = chain(start, count, slip=self._slip, rng=rng)
            row = self._row(start, count, rng.choice(WORDINGS))
            answer: Message = {"role": "assistant", "content": str(digits[-1])}
            answer["reasoning_content"] = worked(digits, self._width)
            yield Demonstration([*row.messages, answer], style="think", difficulty=row.difficulty)

    def corpus(self) -> Iterator[str]:
        """Questions and solutions as the chat template writes them."""
        for demonstration in self.demonstrations(500):
            question, answer = demonstration.messages
            yield question["content"]
            yield answer["reasoning_content"]
