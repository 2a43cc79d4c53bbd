"""``python -m serving`` as a person runs it: a process, what it prints, and what it leaves behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]


class Serving:
    """A running command and all that it printed so far."""

    def __init__(self, *overrides: str) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "serving", *overrides],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout or ()), daemon=True)
        self.reader.start()

    @property
    def printed(self) -> str:
        return "".join(self.lines)

    def finished(self, timeout: float = 60) -> str:
        """All that it printed, once it has ended."""
        self.process.wait(timeout)
        self.reader.join(timeout)
        return self.printed

    def wait_for(self, pattern: str, timeout: float) -> re.Match[str]:
        """Wait until the output matches."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and self.process.poll() is None:
            if found := re.search(pattern, self.printed):
                return found
            time.sleep(0.1)
        raise AssertionError(f"no {pattern!r} within {timeout} s: {self.printed}")

    def child(self, timeout: float = 30) -> psutil.Process:
        """vLLM's server, as soon as it has been started."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if children := psutil.Process(self.process.pid).children():
                return children[0]
            time.sleep(0.05)
        raise AssertionError(f"no child process within {timeout} s: {self.printed}")


def alive(processes: list[psutil.Process], timeout: float = 10) -> list[psutil.Process]:
    """Those that still run after ``timeout`` seconds."""
    _, left = psutil.wait_procs(processes, timeout)
    return left
