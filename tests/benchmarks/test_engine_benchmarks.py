"""The benchmarks of engines run and report; their figures are not judged here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def quick(name: str, folder: Path) -> dict[str, float]:
    """The figures of a ``--quick`` run, in a folder of its own."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.strip().splitlines()[-1])
    assert (last["benchmark"], last["bars"]) == (name, [])
    return last["figures"]


def test_sync_parity(tmp_path: Path) -> None:
    figures = quick("sync_parity", tmp_path)
    assert figures["largest_difference"] <= 1e-4
    assert figures["smallest_move"] >= 0.1


@pytest.mark.slow
def test_rollout_throughput(tmp_path: Path) -> None:
    assert quick("rollout_throughput", tmp_path)["ratio"] > 0


def test_arms_that_were_done_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import arms

    ran: list[str] = []

    def run_arm(name: str, settings: str, timeout_s: float) -> str:
        if ran and settings == '{"b": 2}' and "stop" not in ran:
            ran.append("stop")
            raise KeyboardInterrupt
        ran.append(settings)
        return settings

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(arms, "run_arm", run_arm)
    settings = {"one": {"a": 1}, "two": {"b": 2}}
    with pytest.raises(KeyboardInterrupt):
        dict(arms.run_arms("example", settings, lambda text: None))
    assert dict(arms.run_arms("example", settings, lambda text: None)) == settings
    assert ran == ['{"a": 1}', "stop", '{"b": 2}']
    assert not list((tmp_path / "outputs").rglob("*.json"))
