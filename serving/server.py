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
        """Ask for an orderly end, wait ``timeout`` seconds, then kill the whole session. Safe to call twice."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def last_words(self) -> str:
        """The last line of the log that names an error, else its last line."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        named = [line for line in lines if re.search(r"(\w*Error|\w*Exception|error):", line)]
        line = (named or lines or ["no output"])[-1]
        return re.sub(r"^(\(\w+ pid=\d+\) )?(ERROR \S+ \S+ \[[^]]*\] )?", "", line)


def _die_with_parent() -> None:
    """In the child: end when the parent is killed outright and can stop nothing any more."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
