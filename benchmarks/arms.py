"""Arms of a benchmark, each in a fresh interpreter; what a stopped run had finished is not run again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

STORE = Path("outputs/benchmarks")
ROOT = Path(__file__).parents[1]


def run_arms(
    name: str, arms: Mapping[str, dict[str, Any]], note: Callable[[str], None], *, timeout_s: float = 1200.0
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run ``python -m benchmarks.NAME --arm SETTINGS`` per arm; give its name and the JSON object on its last line.

    Results are kept under ``outputs/benchmarks/NAME`` until all arms are done, by the arm's settings and the code.
    """
    folder = STORE / name
    folder.mkdir(parents=True, exist_ok=True)
    for arm, settings in arms.items():
        text = json.dumps(settings, sort_keys=True)
        path = folder / f"{arm}-{hashlib.sha256((text + code()).encode()).hexdigest()[:12]}.json"
        if path.exists():
            note(f"{arm}: read back from {path}")
        else:
            note(f"{arm} …")
            path.write_text(run_arm(name, text, timeout_s))
        yield arm, json.loads(path.read_text())
    shutil.rmtree(folder)


def run_arm(name: str, settings: str, timeout_s: float) -> str:
    """The last line that one arm printed; its errors go to the terminal."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--arm", settings]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=timeout_s, check=True)
    return done.stdout.strip().splitlines()[-1]


def commit() -> str:
    """The commit of the code, or nothing where there is no git."""
    return _git("rev-parse", "HEAD").decode().strip()


def code() -> str:
    """What a stored result was made by: the commit, short, and where the tree has changes a hash of them."""
    changes = uncommitted()
    return commit()[:12] + (f"-{hashlib.sha256(changes).hexdigest()[:12]}" if changes else "")


def uncommitted() -> bytes:
    """The changes against the commit, untracked sources in full; texts and kept figures do not count."""
    found = _git("diff", "HEAD", "--", ":(exclude)*.md", ":(exclude)benchmarks/results")
    for name in sorted(_git("ls-files", "-z", "--others", "--exclude-standard", "--", "*.py", "*.yaml").split(b"\0")):
        if name:
            found += b"\0" + name + b"\0" + (ROOT / os.fsdecode(name)).read_bytes()
    return found


def _git(*arguments: str) -> bytes:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return b""
