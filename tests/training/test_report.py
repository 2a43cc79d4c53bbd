"""A run as one page: what stands in it, that texts stay texts, and what it does without a whole run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rollout.buffer import Group
from rollout.episode import Episode, Sequence, ToolCall, ToolResult, Turn
from rollout.errors import UserError
from training.episode_record import MOST_TOKENS
from training.estimates import Estimate
from training.journal import Journal
from training.packing import TrainSequence, pack
from training.report import page, record
from training.run_directory import RunDirectory
from training.timing import PARTS

ATTACK = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"><!-- & \u2028"
VOID = {"meta", "input", "br", "img", "link"}
PIECES = ["<think>", "</think>", "first", "second", ATTACK]


def decode(ids: list[int]) -> str:
    return "".join(PIECES[i] if i < len(PIECES) else f"w{i} " for i in ids)


def episode(step: int, sample: int) -> tuple[Episode, Estimate]:
    sequence = Sequence.open([7, 8, 9])
    own = [0, 1, 2 + sample % 2, 4]
    sequence.append_own(own, [-0.25, -0.5, -1.0, -2.0], [step] * 4)
    call = ToolCall("calculator", {"expression": ATTACK})
    turns = [Turn("", ATTACK, [call], [ToolResult(call, ATTACK, True, 0.25)])]
    made = Episode(
        f"prompt{step}{sample}", f"g{sample}", 0, "hard", [sequence], turns, {"task": 1.0, "bonus": 0.5}, True
    )
    return made, Estimate([np.array([1.0, 0.5, -0.5, 0.0])])


def figures(accuracy: float) -> dict[str, Any]:
    ends = {"accuracy": accuracy, "accuracy_low": accuracy - 0.05, "accuracy_high": accuracy + 0.05}
    return {**ends, "tokens": 31.5, "tool_calls": 1.25, "thinking": 0.5, "questions": 40}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Three steps, written by the journal and the run directory as a run writes them."""
    directory = RunDirectory(tmp_path / "run")
    with directory.open({"name": "A&B <run>", "steps": 3}, resume=False, overwrite=False):
        pass
    journal = Journal(directory.path, decode)
    for step, accuracy in ((0, 0.125), (3, 0.875)):
        parts = {name: figures(accuracy + shift) for name, shift in (("easy", 0.05), ("hard", -0.05))}
        result = {**figures(accuracy), "by_difficulty": parts}
        directory.evaluated(step, {"sampled": result, "greedy": figures(accuracy + 0.1)})
    for step in (1, 2, 3):
        pairs = [episode(step, sample) for sample in range(2)]
        groups = [Group(e.group_id, 1, step, 0, [e]) for e, _ in pairs]
        journal.write_episodes(step, groups, [[estimate] for _, estimate in pairs], 8)
        batch = pack([TrainSequence.of(pairs[0][0].sequences[0], 0, np.ones(4), np.ones(4))], max_tokens=64, pad_id=0)
        journal.score(batch, [b.own(b.behaviour_logprobs) + 0.01 for b in batch])
        seconds = {f"time/{part}": 0.5 for part in PARTS}
        row = {"loss": 0.1 * step, "reward": step / 3, "policy/mismatch": 1e-7 * step, "grad_norm": float("nan")}
        journal.write_metrics(step, {**row, **seconds, "time/step": 5.0})
    summary = {"accuracy_after": 0.8731, "seconds_total": 1234.5, "seconds_by_stage": {"training": 777.25}}
    (directory.path / "summary.json").write_text(json.dumps(summary))
    return directory.path


class Checked(HTMLParser):
    """Refuses what is not well-formed; keeps the data and the text of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.scripts: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open and len(self.ids) == len(set(self.ids))
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif not self.open or self.open[-1] != "style":
            self.text += data


def made(run_dir: Path) -> Checked:
    return Checked(page.write(run_dir).read_text())


def test_the_page_is_whole_and_holds_every_number_of_the_summary(run_dir: Path) -> None:
    found = made(run_dir)
    for number in ("0.8731", "1234.5", "777.25", "seconds_by_stage.training"):
        assert number in found.text
    assert "3 steps, finished" in found.text
    assert "0.125 → 0.875" in found.text and "0.075 → 0.825" in re.sub(r"\s+", " ", found.text), "and by difficulty"
    assert found.data["metrics"]["reward"] == [0.333333, 0.666667, 1.0] and "grad_norm" not in found.data["metrics"]
    assert found.data["parts"] == list(PARTS) and all(name.replace("_", " ") in found.text for name in PARTS)
    assert [e["step"] for e in found.data["episodes"]] == [1, 1, 2, 2, 3, 3]
    titles = {chart["title"] for group in found.data["charts"].values() for chart in group}
    assert {"Loss", "Engine against trainer"} <= titles and "Entropy" not in titles, "what has no metric has no chart"


def test_the_page_needs_no_network_and_runs_its_own_script_alone(run_dir: Path) -> None:
    found = made(run_dir)
    assert not any({"src", "srcset", "action"} & attributes.keys() for _, attributes in found.tags)
    assert all((attributes.get("href") or "#").startswith("#") for _, attributes in found.tags)
    policy = next(a["content"] for tag, a in found.tags if tag == "meta" and "http-equiv" in a)
    assert policy is not None and "default-src 'none'" in policy and "unsafe" not in policy


def test_what_a_model_or_a_tool_wrote_is_data_and_never_markup(run_dir: Path) -> None:
    found = made(run_dir)
    assert len(found.scripts) == 2 and "img" not in {tag for tag, _ in found.tags}
    (turn,) = found.data["episodes"][0]["turns"]
    assert turn["content"] == ATTACK == turn["calls"][0]["result"] == turn["tokens"]["text"][3]
    assert "A&B <run>" in found.text, "the run's name too"


def test_tokens_have_their_advantage_and_the_difference_of_log_probs(run_dir: Path) -> None:
    first, second = made(run_dir).data["episodes"][:2]
    tokens = first["turns"][0]["tokens"]
    assert tokens["advantage"] == [1.0, 0.5, -0.5, 0.0] and tokens["engine"] == [-0.25, -0.5, -1.0, -2.0]
    assert tokens["difference"] == pytest.approx([0.01] * 4)
    assert "difference" not in second["turns"][0]["tokens"], "it was not in the batch"


def test_a_run_in_progress_is_shown_as_far_as_it_is(run_dir: Path) -> None:
    (run_dir / "summary.json").unlink()
    for name in ("metrics.jsonl", "episodes.jsonl"):
        lines = (run_dir / name).read_text().splitlines(keepends=True)
        (run_dir / name).write_text("".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])
    found = made(run_dir)
    assert "step 2 of 3, still running or stopped" in found.text and "there is no summary.json yet" in found.text
    assert found.data["metrics"]["step"] == [1, 2] and len(found.data["episodes"]) == 5
    for name in ("episodes.jsonl", "stages.json", "config.yaml"):
        (run_dir / name).unlink()
    assert "logged no episodes" in made(run_dir).text


def test_a_long_run_is_thinned_and_says_so(run_dir: Path) -> None:
    line = (run_dir / "episodes.jsonl").read_text().splitlines()[0]
    long = json.loads(line)
    long["turns"][0]["content"] = "x" * 100_000
    (run_dir / "episodes.jsonl").write_text(
        "".join(json.dumps({**long, "step": step}) + "\n" for step in range(1, 101))
    )
    row = {"loss": 1.0, "time/step": 1.0}
    rows = [{"step": step, **row, "reward": float(step % 2)} for step in range(1, 5001)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = made(run_dir)
    shown = [e["step"] for e in found.data["episodes"]]
    assert shown[0] == 1 and shown[-1] == 100 and 50 < len(shown) < 65
    assert f"{len(shown)} of 100 logged steps" in found.text
    assert len(found.data["metrics"]["step"]) == 1000 and found.data["metrics"]["step"][-1] == 5000
    assert found.data["metrics"]["reward"][0] == pytest.approx(0.6)
    assert (run_dir / "report.html").stat().st_size < 8_000_000


def test_what_is_no_run_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no directory; give the run_dir of a training run"):
        record.read(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"metrics.jsonl has no step yet"):
        record.read(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl line 2 is not JSON .*; restore the file"):
        record.read(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"reward": 1}\n')
    with pytest.raises(UserError, match=r"line 1 is no row of a run: it has no step"):
        record.read(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    for name in ("config.yaml", "stages.json", "summary.json"):
        (tmp_path / name).write_text("{")
        with pytest.raises(UserError, match=rf"{name} is no(t JSON| YAML) .*; restore the file or remove it"):
            record.read(tmp_path)
        (tmp_path / name).unlink()
    assert not (tmp_path / "report.html").exists()


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "training.report", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120)


def test_the_command_writes_the_page_or_one_line(run_dir: Path, tmp_path: Path) -> None:
    done = command(run_dir, "--out", tmp_path / "page.html")
    assert done.returncode == 0 and done.stdout == f"{tmp_path / 'page.html'}\n", done.stderr
    assert not (run_dir / "report.html").exists()
    missing = tmp_path / "no" / "page.html"
    for arguments, error in (
        ((tmp_path / "nowhere",), f"{tmp_path / 'nowhere'} is no directory; give the run_dir of a training run"),
        ((run_dir, "--out", missing), f"cannot write {missing}: No such file or directory; free its place, or give"),
    ):
        done = command(*arguments)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith(f"error: {error}") and done.stderr.count("\n") == 1


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def opened(path: Path) -> Iterator[tuple[Any, list[str]]]:
    """The page in a real browser, and what its console says."""
    api = pytest.importorskip("playwright.sync_api", reason="Playwright's Python package is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium is installed")
    said: list[str] = []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            opened = browser.new_page()
            opened.on("console", lambda message: said.append(message.text))
            opened.on("pageerror", lambda error: said.append(str(error)))
            opened.on("request", lambda request: said.append(request.url) if "file:" not in request.url else None)
            opened.goto(path.as_uri())
            yield opened, said
        finally:
            browser.close()


def test_in_a_browser_another_episode_can_be_picked_and_tokens_read(run_dir: Path) -> None:
    with opened(page.write(run_dir)) as (shown, said):
        assert shown.locator("#learning-charts svg").count() == len(made(run_dir).data["charts"]["learning"])
        assert shown.locator("#time-chart rect").count() == 3 * len(PARTS)
        article = shown.locator("#episode")
        assert "prompt30" in article.inner_text() and "first" in article.inner_text()
        shown.locator("#choices button").nth(1).click()
        assert "prompt31" in article.inner_text() and "second" in article.inner_text()
        shown.locator("#before").click()
        assert "prompt21" in article.inner_text() and shown.locator("#step").input_value() == "2"
        shown.locator("#choices button").nth(0).click()
        assert ATTACK[:60] in article.inner_text(), "shown as text"
        shown.locator(".token").nth(1).hover()
        tip = shown.locator("#tip").inner_text()
        assert "advantage: 0.5" in tip and "engine: −0.5" in tip and "trainer − engine: 0.01" in tip
        colours = ".tokens .token:nth-child(3)"
        before = shown.locator(colours).evaluate("e => e.style.background")
        shown.get_by_role("button", name="log-prob, trainer − engine").click()
        after = shown.locator(colours).evaluate("e => e.style.background")
        assert before.startswith("rgba(217") and after.startswith("rgba(47"), "negative advantage, positive difference"
        shown.locator("#metric").select_option("policy/mismatch")
        assert "policy/mismatch" in shown.locator("#metric-chart").inner_text()
        assert shown.title() == "A&B <run>: report" and said == []


def test_in_a_browser_a_run_with_little_in_it_is_shown_too(tmp_path: Path) -> None:
    journal = Journal(tmp_path, decode)
    sequence = Sequence.open([5])
    sequence.append_own([2] * (MOST_TOKENS + 9), [-1.0] * (MOST_TOKENS + 9), [0] * (MOST_TOKENS + 9))
    long = Episode("p", "g", sequences=[sequence])
    journal.write_episodes(1, [Group("g", 1, 0, 0, [long])], [[Estimate([np.zeros(MOST_TOKENS + 9)])]], 1)
    journal.score([], torch.empty(0, 0).unbind())
    journal.write_metrics(1, {"loss": 0.0})
    with opened(page.write(tmp_path)) as (shown, said):
        assert "9 tokens were not recorded" in shown.locator("#episode").inner_text()
        assert shown.locator("#learning-charts svg").count() == 1 and said == []
