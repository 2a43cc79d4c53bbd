"""vLLM's server as a child process: started, waited for, watched, and never left behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from rollout.errors import EngineDied, UserError, WaitTimeout

PR_SET_PDEATHSIG = 1  # Linux, prctl(2)
MAX_CHARS = 300  # of an error taken from the log
LOG_PREFIX = re.compile(r"^(\(\w+ pid=\d+\) )?([A-Z]+ [\d-]+ [\d:]+ \[[^]]*\] )?")
ERROR_LINE = re.compile(r"([\w.]*(Error|Exception)|[\w.]+: error): ")
ELSEWHERE = re.compile(r"[Ss]ee (root cause|stack trace)")  # an error that only points to another


def free_port(host: str, port: int) -> int:
    """``port``, or any free one for 0. Raises UserError if it cannot be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"port: {host}:{port} cannot be used ({error.strerror or error}); give another port=..., or port=0"
            ) from None
        return int(probe.getsockname()[1])


def base_url(host: str, port: int) -> str:
    """Where a client on this machine reaches the server."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Server:
    """One server process in a session of its own, so that a Ctrl-C in the terminal reaches only its parent."""

    def __init__(self, command: list[str], environment: dict[str, str], url: str, log: Path) -> None:
        self.url = url
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                command,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )

    def wait_ready(self, timeout: float, waiting: Callable[[float], None]) -> None:
        """Return once /health answers, else raise EngineDied or WaitTimeout; calls ``waiting(seconds)`` meanwhile."""
        start = time.monotonic()
        while not self._healthy():
            seconds = time.monotonic() - start
            if self.process.poll() is not None:
                raise EngineDied(f"the server did not start: {self.last_words()} (log: {self.log})")
            if seconds > timeout:
                raise WaitTimeout(
                    f"waited {timeout:g} s for {self.url}/health; raise start_timeout_s, or see {self.log}"
                )
            waiting(seconds)
            time.sleep(0.25)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def wait(self) -> None:
        """Until the process ends by itself, which it never should: always raises EngineDied."""
        code = self.process.wait()
        raise EngineDied(f"the server ended with code {code}: {self.last_words()} (log: {self.log})")

    def stop(self, timeout: float) -> None:
        """Ask for an orderly end, wait ``timeout`` seconds, then kill the session; a second Ctrl-C kills at once."""
        try:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGINT)
                self.process.wait(timeout)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            pass  # what is left is killed below
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def last_words(self) -> str:
        """The last error in the log, rather one that does not point to another; else the last line."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        lines = [LOG_PREFIX.sub("", line).strip() for line in text.splitlines() if line.strip()]
        errors = [i for i, line in enumerate(lines) if ERROR_LINE.match(line)]
        named = [i for i in errors if not ELSEWHERE.search(lines[i])] or errors
        if not named:
            return lines[-1] if lines else "it printed nothing"
        line = lines[named[-1]]
        if " validation error" in line:  # pydantic says what is wrong on the line after
            line = lines[min(named[-1] + 1, len(lines) - 1)]
        return line if len(line) <= MAX_CHARS else f"{line[:MAX_CHARS]}…"


def _die_with_parent() -> None:
    """In the child: end when the parent is killed outright and can stop nothing any more."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
