"""math-verify behind processes that can be killed: ``10^{10^{10}}`` in an answer would stop this interpreter for ever,
because a big power holds the interpreter's lock and heeds no signal."""

from __future__ import annotations

import json
import os
import queue
import select
import subprocess
import sys
from pathlib import Path

from rollout.errors import UserError, WaitTimeout

WORKER = Path(__file__).with_name("math_worker.py")
START_TIMEOUT = 120.0  # seconds
VERDICT_TIMEOUT = 20.0  # math-verify itself gives up after 5 seconds for each of three stages, where a signal can
PLACES: queue.LifoQueue[MathProcess | None] = queue.LifoQueue()  # idle processes; None: not started yet
for _ in range(min(4, os.cpu_count() or 1)):
    PLACES.put(None)


class MathProcess:
    """One process. It ends when this interpreter does, at the latest when it has used its processor time."""

    def __init__(self) -> None:
        command = [sys.executable, "-P", str(WORKER)]  # -P: its folder holds names that must not shadow packages
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True)
        self._line("math-verify's process has not started", START_TIMEOUT)

    def equal(self, answer: str, gold: str, timeout: float) -> bool:
        """math-verify's verdict. WaitTimeout after ``timeout`` seconds: the process is then gone."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
        self.process.stdin.flush()
        verdict = json.loads(self._line(f"math-verify has no verdict on {answer[:60]!r}", timeout))
        if verdict is None:
            raise UserError(f"task.verifier: math-verify cannot read the gold answer {gold[:60]!r}; use exact")
        return bool(verdict)

    def _line(self, what: str, timeout: float) -> bytes:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], timeout)
        line = self.process.stdout.readline() if ready else b""
        if not line:
            self.process.kill()
            code = self.process.wait()
            raise WaitTimeout(f"{what} after {timeout:g} s" if not ready else f"{what}: it ended with code {code}")
        return line


def equal(answer: str, gold: str, timeout: float = VERDICT_TIMEOUT) -> bool:
    """Whether math-verify holds the two texts for equal; blocks, at most ``timeout`` seconds once its turn has come."""
    process = PLACES.get()
    try:
        if process is None or process.process.poll() is not None:
            process = MathProcess()
        return process.equal(answer, gold, timeout)
    except WaitTimeout:
        process = None
        raise
    finally:
        PLACES.put(process)
