"""Every gold answer of GSM8K scores 1, every calculator step agrees, every demonstration survives the chat format."""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path

from benchmarks.report import Report
from rollout.chat import Chat, assistant_message
from rollout.environment import Row
from rollout.episode import Episode, Turn
from rollout.tasks import Demonstration
from rollout.tasks.gsm8k import STEP, Gsm8k, demonstration
from rollout.tools import call
from rollout.tools.calculator import calculator, evaluate
from training.models import build_tiny, load_tokenizer

ROWS, STEPS = 8792, 27998
VOCAB = 1024


def turns_of(chat: Chat, ids: list[int], own: list[bool]) -> list[Turn]:
    """The turns that the policy would have written, parsed from the tokens alone."""
    runs = groupby(zip(ids, own, strict=True), key=lambda pair: pair[1])
    return [chat.parse([token for token, _ in run]) for written, run in runs if written]


def survives(chat: Chat, shown: Demonstration, ids: list[int], turns: list[Turn]) -> bool:
    """The tokens decode to the rendered conversation, and each turn parses to the message it came from."""
    rendered = str(chat.tokenizer.apply_chat_template(shown.messages, tokenize=False)).removesuffix("\n")
    messages = [message for message in shown.messages if message["role"] == "assistant"]
    return (
        chat.tokenizer.decode(ids, skip_special_tokens=False) == rendered
        and [assistant_message(turn) for turn in turns] == messages
        and all(turn.well_formed for turn in turns)
    )


async def replay(row: Row, turns: list[Turn], task: Gsm8k) -> tuple[bool, int]:
    """Score the episode and the raw solution; run each step as the tool call it is and count those that agree."""
    solution = f"{row.extras['solution']}\n#### {row.answer}"
    scores = []
    for final in (turns, [Turn("", solution)]):
        environment = task.environment()
        await environment.reset(row)
        rewards, success = await environment.score(Episode(row.id, row.id, turns=final))
        scores.append(success and rewards == {"task": 1.0})
        await environment.close()
    values = [text.rpartition("=")[2] for text in STEP.findall(row.extras["solution"])]
    calls = [c for turn in turns for c in turn.calls]
    results = [await call(calculator, c.arguments or {}) for c in calls]
    agree = [evaluate(result) == evaluate(value) for result, value in zip(results, values, strict=True)]
    return all(scores), sum(agree)


def questions(task: Gsm8k, each: int | None) -> Iterator[tuple[str, Row]]:
    for split in ("train", "test"):
        yield from ((split, row) for row in islice(task.rows(split), each))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", default="../shared/data/gsm8k", help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--quick", action="store_true", help="the first 50 questions of each split, no bars")
    options = parser.parse_args()
    report = Report("gsm8k_replay")
    task = Gsm8k(path=options.path)
    with tempfile.TemporaryDirectory() as folder:
        build_tiny(Path(folder), islice(task.corpus(), 4000), vocab=VOCAB, hidden=32, layers=1, heads=1)
        chat = Chat(load_tokenizer(folder))
    counts = {
        split: dict.fromkeys(["questions", "no steps", "steps", "agree", "right", "intact"], 0)
        for split in ("train", "test")
    }
    failures: list[str] = []
    longest = 0
    with asyncio.Runner() as runner:
        for split, row in questions(task, 50 if options.quick else None):
            count = counts[split]
            steps = len(STEP.findall(row.extras["solution"]))
            count["questions"] += 1
            count["steps"] += steps
            count["no steps"] += steps == 0
            try:
                shown = demonstration(row)
                ids, own = chat.demonstration(shown.messages, shown.tools)
                turns = turns_of(chat, ids, own)
                count["intact"] += survives(chat, shown, ids, turns)
                right, agree = runner.run(replay(row, turns, task))
            except Exception as error:  # a figure of this benchmark: counted, shown, and barred at 0
                failures.append(f"{row.extras['where']}: {error!r}")
                continue
            count["right"] += right
            count["agree"] += agree
            longest = max(longest, len(ids))
    report.table("GSM8K replayed", ["split", *counts["train"]], [[s, *c.values()] for s, c in counts.items()])
    for failure in failures[:10]:
        report.console.print(failure)
    totals = {name: sum(count[name] for count in counts.values()) for name in counts["train"]}
    for figure, name in (
        ("questions", "questions"),
        ("steps", "steps"),
        ("answers_without_steps", "no steps"),
        ("answers_right", "right"),
        ("steps_agree", "agree"),
        ("demonstrations_intact", "intact"),
    ):
        report.figure(figure, totals[name])
    report.figure("exceptions", len(failures))
    report.figure("longest_demonstration_tokens", longest)
    for figure, bound in (
        ("answers_right", ROWS),
        ("steps_agree", STEPS),
        ("demonstrations_intact", ROWS),
        ("exceptions", 0),
    ):
        report.bar(figure, "==", bound)
    report.finish(options.quick)


if __name__ == "__main__":
    main()
