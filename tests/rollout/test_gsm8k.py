from __future__ import annotations

import json
from pathlib import Path

import pytest

from rollout.errors import UserError
from rollout.tasks.gsm8k import Gsm8k, demonstration

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "gsm8k"
real = pytest.mark.skipif(not DATA.is_dir(), reason="the real GSM8K files are not here")

TWO_STEPS = {
    "question": "Two steps?",
    "answer": "She eats 16-3 = <<16-3=13>>13 eggs.\nThat costs 13*$2 = $<<13*2=26>>26.\n#### 26",
}
NO_STEP = {"question": "No step?", "answer": "It is a thousand.\n#### 1,000"}


def task_of(folder: Path, *lines: str) -> Gsm8k:
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return Gsm8k(path=str(folder))


def test_each_step_becomes_a_call(tmp_path: Path) -> None:
    first, second = task_of(tmp_path, json.dumps(TWO_STEPS), json.dumps(NO_STEP)).rows("train")
    assert (first.answer, first.difficulty, second.difficulty) == ("26", "2", "0")
    shown = demonstration(first)
    assert [message["role"] for message in shown.messages] == ["user", *["assistant", "tool"] * 2, "assistant"]
    calls = [message["tool_calls"][0]["function"] for message in shown.messages if "tool_calls" in message]
    assert [call["arguments"]["expression"] for call in calls] == ["16-3", "13*2"]
    assert [message["content"] for message in shown.messages if message["role"] == "tool"] == ["13", "26"]
    assert shown.messages[1]["reasoning_content"] == "She eats 16-3 ="
    assert shown.messages[3]["reasoning_content"] == "13 eggs.\nThat costs 13*$2 = $"
    assert shown.messages[5] == {"role": "assistant", "content": "26", "reasoning_content": "26."}
    assert (demonstration(second).style, demonstration(second).messages[-1]["content"]) == ("think", "1,000")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"question": "a", "answer": "#### 1"', "line 2: not a JSON object"),
        ('{"question": "a"}', "line 2: not a JSON object.*'answer'"),
        ("[1]", "line 2: not a JSON object"),
        ('{"question": "a", "answer": 3}', "line 2: not a JSON object"),
        ('{"question": "a", "answer": "3"}', "line 2: no answer after ####"),
        ("", "line 2: not a JSON object"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    task = task_of(tmp_path, json.dumps(TWO_STEPS), line, json.dumps(NO_STEP))
    with pytest.raises(UserError, match=words) as error:
        task.rows("train")
    assert "train.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_an_untrue_step_is_named(tmp_path: Path) -> None:
    wrong = {"question": "q", "answer": "<<1+1=3>>3\n#### 3"}
    with pytest.raises(UserError, match=r"line 1: <<1\+1=3>> is not true"):
        list(task_of(tmp_path, json.dumps(wrong)).demonstrations(1))
    junk = {"question": "q", "answer": "<<one=1>>1\n#### 1"}
    with pytest.raises(UserError, match="line 1: <<one=1>>: cannot read"):
        list(task_of(tmp_path, json.dumps(junk)).demonstrations(1))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.jsonl: No such file.*task\.path"):
        Gsm8k(path=str(tmp_path)).rows("train")


@real
def test_the_real_files() -> None:
    task = Gsm8k(path=str(DATA), size=300)
    train, test = task.rows("train"), task.rows("test")
    assert (len(train), len(test)) == (300, 1319)
    assert not {row.id for row in train} & {row.id for row in test}
    demos = list(task.demonstrations(700))
    assert len(demos) == 700 and len({demo.messages[0]["content"] for demo in demos[:300]}) == 300


@real
def test_the_replay_benchmark(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import gsm8k_replay

    monkeypatch.setattr("sys.argv", ["gsm8k_replay", "--path", str(DATA), "--quick"])
    with pytest.raises(SystemExit) as ended:
        gsm8k_replay.main()
    assert ended.value.code == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]
    assert figures["answers_right"] == figures["demonstrations_intact"] == figures["questions"] == 100
    assert figures["steps_agree"] == figures["steps"] and figures["exceptions"] == 0
