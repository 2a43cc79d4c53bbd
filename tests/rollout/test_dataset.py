from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from rollout.episode import Episode, Turn
from rollout.errors import UserError
from rollout.tasks.dataset import DatasetTask
from rollout.tools.calculator import calculator

ROWS = [{"prompt": f"Question {i}?", "answer": str(i), "level": i % 2} for i in range(10)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def task_of(folder: Path, train: list[dict[str, Any]], test: list[dict[str, Any]], **settings: Any) -> DatasetTask:
    files = {}
    for split, rows in (("train", train), ("test", test)):
        files[split] = str(folder / f"{split}.jsonl")
        Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DatasetTask(path="json", data_files=files, **settings)


def test_columns_become_rows(tmp_path: Path) -> None:
    task = task_of(tmp_path, ROWS[:6], ROWS[6:], difficulty_column="level", verifier="exact", size=4)
    train, test = task.rows("train"), task.rows("test")
    assert (len(train), len(test)) == (4, 4)
    assert test[0].messages == [{"role": "user", "content": "Question 6?"}]
    assert (test[0].answer, test[0].difficulty) == ("6", "0")
    assert [row.id for row in train] == [row.id for row in task_of(tmp_path, ROWS[:6], ROWS[6:], size=4).rows("train")]


def test_labels_of_thinking_come_from_a_column(tmp_path: Path) -> None:
    turns = [[True], [None], [True, False]]
    rows = [row | {"hard": each} for row, each in zip(ROWS, turns, strict=False)]
    task = task_of(tmp_path, rows, rows, thought_column="hard")
    assert [row.extras["needs_thought"] for row in task.rows("test")] == turns
    plain = task_of(tmp_path, [ROWS[0] | {"hard": True}], [ROWS[1] | {"hard": False}], thought_column="hard")
    assert plain.rows("test")[0].extras == {"needs_thought": False}


def test_prompts_may_be_messages_and_tools_are_found_by_name(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    rows = [{"chat": messages, "gold": 2}]
    task = task_of(
        tmp_path,
        rows,
        rows,
        prompt_column="chat",
        answer_column="gold",
        tools=["rollout.tools.calculator.calculator"],
    )
    assert task.rows("test")[0].messages == messages
    assert task.environment().tools() == [calculator]


def test_splits_share_no_row(tmp_path: Path) -> None:
    task = task_of(tmp_path, [*ROWS, ROWS[0]], ROWS[:3])
    assert len(task.rows("train")) == 7


@pytest.mark.parametrize(
    ("verifier", "answer", "success"),
    [
        ("math", r"$\frac{1}{2}$", True),
        ("math", "0.6", False),
        ("exact", "0.5", True),
        ("operator.contains", "is 0.5", True),
    ],
)
def test_verifiers(tmp_path: Path, verifier: str, answer: str, success: bool) -> None:
    task = task_of(tmp_path, ROWS, [{"prompt": "Half?", "answer": "0.5"}], verifier=verifier)

    async def score() -> bool:
        environment = task.environment()
        await environment.reset(task.rows("test")[0])
        return (await environment.score(Episode("p", "g", turns=[Turn("", answer)])))[1]

    assert asyncio.run(score()) is success


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompt_column": "problem"}, r"task\.prompt_column: no column 'problem'.*it has prompt, answer, level"),
        ({"answer_column": "gold"}, r"task\.answer_column: no column 'gold'"),
        ({"difficulty_column": "hard"}, r"task\.difficulty_column: no column 'hard'"),
        ({"thought_column": "level"}, r"task\.thought_column: row 0: 0 is not true, false or null"),
        ({"prompt_column": "level"}, r"task\.prompt_column: row 0: 'level' is neither text nor"),
        ({"train_split": "learn"}, r"cannot load split 'learn' of json.*Unknown split"),
        ({"tools": ["calculator"]}, r"task\.tools: 'calculator' is not known"),
        ({"tools": ["rollout.tools.calculator.evaluate"]}, r"is no Tool"),
        ({"verifier": "nowhere.at_all"}, r"task\.verifier: cannot import nowhere\.at_all"),
        ({"verifier": "best"}, r"task\.verifier: 'best' is not known"),
    ],
)
def test_wrong_settings_are_one_line(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        task_of(tmp_path, ROWS[:5], ROWS[5:], **settings).rows("train")
    assert "\n" not in str(error.value)


def test_a_missing_file_and_broken_lines_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task\.path: cannot load split 'test'"):
        DatasetTask(path="json", data_files={"test": str(tmp_path / "none.jsonl")}).rows("test")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="a data file is empty"):
        DatasetTask(path="json", data_files={"test": str(tmp_path / "empty.jsonl")}).rows("test")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": \n')
    with pytest.raises(UserError, match=r"task\.path: cannot load split 'test'") as error:
        DatasetTask(path="json", data_files={"test": str(broken)}).rows("test")
    assert "\n" not in str(error.value)
